"""`meshwall observe` against a running API, without a kernel."""

import argparse
import asyncio
import json
import os
import subprocess
import sys

import pytest
from aiohttp import web

from bpf.layout import EVENT, EventKind, Reason
from daemon.api.flows import routes
from daemon.cli import flows
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import Lost, LostSource
from daemon.state.tables import Tables

DROP = EVENT.pack(
    kind=EventKind.DROP,
    reason=Reason.POLICY_DENY,
    family=4,
    saddr=b"\xcb\0\x71\x09",
    proto=17,
    identity=2,
    rule=16,
)


@pytest.fixture
def pipeline(tmp_path):
    found = FlowPipeline(Tables(), tmp_path)
    found.append(DROP * 3)
    return found


@pytest.fixture
async def path(pipeline, tmp_path):
    app = web.Application()
    app.add_routes(routes(pipeline))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    yield tmp_path / "s"
    await runner.cleanup()


@pytest.fixture
def observe(path):
    """Run the command with some words; its exit status."""

    async def run(*words):
        parser = argparse.ArgumentParser(prog="meshwall")
        flows.register(parser.add_subparsers())
        args = parser.parse_args(["observe", *words])
        args.socket = path
        return await asyncio.to_thread(flows.run, args)

    return run


async def test_the_lines_of_a_query(observe, capsys):
    assert await observe("--last", "2", "--ip", "203.0.113.0/24") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("(world) <> 0.0.0.0 (host) Policy denied by denylist DROPPED (UDP) rule=16")


async def test_jsonpb_is_hubbles_form_and_nothing_else(observe, capsys):
    assert await observe("-o", "jsonpb") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(row) for row in rows] == [["flow", "time"]] * 3


async def test_every_layout_ends_well(observe, capsys):
    for layout in ("compact", "dict", "json", "table", "tab"):
        assert await observe("-o", layout) == 0
        assert capsys.readouterr().out


async def test_losses_do_not_mix_with_the_flows(observe, pipeline, capsys):
    pipeline.store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, 5))
    assert await observe() == 0
    told = capsys.readouterr()
    assert "lost" not in told.out
    assert "5 flows lost: the kernel's event buffer was full" in told.err


async def test_what_the_daemon_refuses_is_told_with_its_reason(observe, capsys):
    assert await observe("--protocol", "vrrp") == 2
    assert "unknown protocol 'vrrp'" in capsys.readouterr().err
    assert await observe("--first", "3", "--last", "2") == 2


async def test_a_follower_learns_that_the_daemon_has_ended(observe, pipeline, capsys):
    asyncio.get_running_loop().call_later(0.3, pipeline.store.close)
    assert await observe("-f", "--last", "1") == 1
    assert "the daemon has ended" in capsys.readouterr().err


async def test_a_reader_that_goes_away_is_no_error(path):
    command = (
        "import argparse; from daemon.cli import flows; "
        "p = argparse.ArgumentParser(); p.add_argument('--socket'); "
        "flows.register(p.add_subparsers()); a = p.parse_args(); raise SystemExit(a.run(a))"
    )
    words = [sys.executable, "-c", command, "--socket", str(path), "observe", "--all"]
    read, write = os.pipe()
    os.close(read)
    done = await asyncio.to_thread(
        subprocess.run, words, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
