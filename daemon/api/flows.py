"""/v1/flows: JSON lines in the form of Hubble's GetFlowsResponse, with what is ours under `meshwall`."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from aiohttp import web

from daemon.flows.decode import reason_name
from daemon.flows.filters import FilterError, parse_filters
from daemon.flows.lines import Json, line
from daemon.flows.observe import Request, oldest_ns
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import LostSource

_PARAMETERS = {"number", "first", "follow", "since", "until", "whitelist", "blacklist"}


def routes(pipeline: FlowPipeline, recorded: Path | None = None) -> list[web.RouteDef]:
    """The handlers, to be added to the application. `recorded`: where older flows are, if they are kept.

    GET /v1/flows?number=20&first=&follow=&since=&until=&whitelist=[..]&blacklist=[..]: a stream of JSON
    lines. Times are RFC 3339 or nanoseconds since 1970; whitelist and blacklist are JSON lists of
    FlowFilters. GET /v1/flows/status: the store and the loss counters. GET /v1/flows/groups?since=&until=&..:
    recorded flows, those alike in one line with their `count`.
    """

    async def flows(request: web.Request) -> web.StreamResponse:
        return await _stream(pipeline, recorded, request)

    async def status(_: web.Request) -> web.StreamResponse:
        return web.json_response(status_json(pipeline))

    async def groups(request: web.Request) -> web.StreamResponse:
        return await _groups(recorded, request)

    return [
        web.get("/v1/flows", flows),
        web.get("/v1/flows/status", status),
        web.get("/v1/flows/groups", groups),
    ]


async def _stream(pipeline: FlowPipeline, recorded: Path | None, request: web.Request) -> web.StreamResponse:
    query = dict(request.query)
    try:
        wanted = parse_request(query)
    except FilterError as error:
        return web.json_response({"error": str(error)}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    start_ns = pipeline.started_ns
    remembered = oldest_ns(pipeline.store) or time.time_ns()
    if recorded and wanted.since_ns is not None and wanted.since_ns < remembered:
        shown = await _older(recorded, wanted, query, remembered, response)
        if wanted.number and shown >= wanted.number and not wanted.follow:
            return response
        left = wanted.number - shown if wanted.number and not wanted.follow else wanted.number
        wanted = replace(wanted, since_ns=remembered, number=left)
    async for answer in pipeline.observe(wanted):
        if request.transport is None or request.transport.is_closing():
            break
        if answer:
            await response.write("".join([line(one, start_ns) for one in answer]).encode())
    return response


async def _groups(recorded: Path | None, request: web.Request) -> web.StreamResponse:
    if recorded is None:
        return web.json_response({"error": "flows are not recorded (setting record.enabled)"}, status=404)
    query = dict(request.query)
    try:
        wanted = parse_request(query)
    except FilterError as error:
        return web.json_response({"error": str(error)}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    until = time.time_ns() if wanted.until_ns is None else wanted.until_ns
    await _read(recorded, _question(query, wanted.since_ns or 0, until) | {"groups": True}, response)
    return response


async def _older(
    recorded: Path, wanted: Request, query: dict[str, str], remembered_ns: int, response: web.StreamResponse
) -> int:
    """Write what was recorded before the oldest flow in memory; returns how many flows that were."""
    until = remembered_ns - 1 if wanted.until_ns is None else min(wanted.until_ns, remembered_ns - 1)
    question = _question(query, wanted.since_ns or 0, until)
    return await _read(recorded, question | {"number": None if wanted.follow else wanted.number}, response)


def _question(query: dict[str, str], since_ns: int, until_ns: int) -> Json:
    return {
        "since_ns": since_ns,
        "until_ns": until_ns,
        "whitelist": _json(query, "whitelist"),
        "blacklist": _json(query, "blacklist"),
    }


async def _read(recorded: Path, question: Json, response: web.StreamResponse) -> int:
    """Hand the reader's lines on; returns how many there were."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "daemon.flows.recorded", str(recorded)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018 - both were asked for
    try:
        child.stdin.write(json.dumps(question).encode())
        child.stdin.write_eof()
        shown = 0
        while data := await child.stdout.read(1 << 16):
            shown += data.count(b"\n")
            await response.write(data)
        return shown
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def parse_request(query: dict[str, str]) -> Request:
    """The request of a query string; FilterError names the parameter that is wrong."""
    if unknown := query.keys() - _PARAMETERS:
        raise FilterError(f"unknown parameter {min(unknown)!r}, expected {', '.join(sorted(_PARAMETERS))}")
    number = query.get("number")
    if number is not None and not (number.isascii() and number.isdigit() and len(number) <= 20):
        raise FilterError(f"number: expected a whole number, got {number!r}")
    follow, first = _flag(query, "follow"), _flag(query, "first")
    if follow and first:
        raise FilterError("first: not together with follow")
    return Request(
        filters=parse_filters(_json(query, "whitelist"), _json(query, "blacklist")),
        number=int(number) if number is not None and int(number) else None,
        first=first,
        follow=follow,
        since_ns=_time_ns(query, "since"),
        until_ns=_time_ns(query, "until"),
    )


def _flag(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise FilterError(f"{name}: expected true or false, got {value!r}")
    return value == "true"


def _json(query: dict[str, str], name: str) -> object:
    try:
        return json.loads(query.get(name, "[]"))
    except (ValueError, RecursionError) as error:
        raise FilterError(f"{name}: not JSON: {error}") from None


def _time_ns(query: dict[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,19}", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise FilterError(
            f"{name}: expected RFC 3339 with an offset, or nanoseconds since 1970, got {text!r}"
        )
    return int(moment.timestamp() * 1e6) * 1_000


def status_json(pipeline: FlowPipeline) -> Json:
    """The store's fill in Hubble's ServerStatus names, and what never reached it."""
    store, counters = pipeline.store, pipeline.counters
    return {
        "num_flows": len(store),
        "max_flows": store.capacity,
        "seen_flows": store.end,
        "uptime_ns": time.time_ns() - pipeline.started_ns,
        "lost": {LostSource.PERF_EVENT_RING_BUFFER.name.lower(): counters.lost, "foreign": counters.foreign},
        "suppressed": _by_reason(counters.suppressed.items()),
    }


def _by_reason(counts: Iterable[tuple[int, int]]) -> dict[str, int]:
    return {reason_name(reason): count for reason, count in counts if count}
