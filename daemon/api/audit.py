"""/v1/audit: what is in audit, and switching it."""

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from daemon.api.app import ApiError, Json
from daemon.state.audit import audited
from daemon.state.tables import WHOLE_HOST, Tables

IN_FORCE_WITHIN_S = 5.0
_STATES = {"on": True, "off": False, "reset": None}


def routes(tables: Tables, switch: Callable[[str, bool | None], None]) -> list[web.RouteDef]:
    """The handlers; `switch` keeps and tells what is wanted."""

    async def listed(_: web.Request) -> web.StreamResponse:
        return web.json_response(audit_json(tables))

    async def change(request: web.Request) -> web.StreamResponse:
        state, policy = request.query.get("state", ""), request.query.get("policy", WHOLE_HOST)
        if state not in _STATES:
            raise ApiError(400, f"state: {state!r}, expected on, off or reset")
        if state == "on" and policy and policy not in {one.title for one in tables.policies.rows.values()}:
            raise ApiError(404, f"no policy {policy!r}; `meshwall policy list` has the names")
        try:
            switch(policy, _STATES[state])
        except OSError as error:
            raise ApiError(500, f"not changed, it could not be kept over a restart: {error}") from None
        return web.json_response(audit_json(tables) | {"in_force": await _in_force(tables)})

    return [web.get("/v1/audit", listed), web.post("/v1/audit", change)]


def audit_json(tables: Tables) -> Json:
    """`host` and each policy that the settings or a command name; `by` says which of the two."""
    rows = {
        name: {"audit": row.on, "since": row.since, "by": "command" if row.by_command else "settings"}
        for name, row in sorted(tables.audit.rows.items())
    }
    return {"host": rows.pop(WHOLE_HOST, None), "policies": rows}


async def _in_force(tables: Tables) -> bool:
    """True once the kernel enforces a generation with these switches."""
    wanted = audited(tables)
    wake = asyncio.Event()
    reader = tables.status.reader(wake)
    deadline = time.monotonic() + IN_FORCE_WITHIN_S
    while (left := deadline - time.monotonic()) > 0:
        reader.take()
        row = tables.status.get("datapath")
        details = row.details if row else {}
        if (details.get("audit"), details.get("audit_policies")) == (wanted.host, sorted(wanted.policies)):
            return bool(row and row.ok)
        wake.clear()
        try:
            async with asyncio.timeout(left):
                await wake.wait()
        except TimeoutError:
            return False
    return False
