"""GET /v1/status: everything that a person wants to see at a glance, with stable keys."""

import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aiohttp import web

from daemon.api.app import Json
from daemon.api.mesh import mesh_json
from daemon.api.resources import policies_json
from daemon.flows.counters import read_reasons
from daemon.flows.decode import reason_name
from daemon.runtime.loopwatch import Stalls
from daemon.state.audit import audited
from daemon.state.tables import WHOLE_HOST, StatusRow, Tables

NO_HINT = "`meshwall status --verbose` and `journalctl -u meshwalld` have the details"
ENFORCING = ("host", "datapath", "addresses", "maps")  # parts without which a host is not ready; and devices
DROPS_FROM = 16  # lower reasons pass


class StatusSource:
    """What the status needs besides the tables."""

    def __init__(
        self,
        *,
        tables: Tables,
        pins: Path,
        failsafe: list[str],
        stalls: Stalls,
        mode: str,
    ) -> None:
        self.tables = tables
        self.pins = pins
        self.failsafe = failsafe
        self.stalls = stalls
        self.mode = mode
        self.started = time.time()


def routes(source: StatusSource) -> list[web.RouteDef]:
    """The handlers."""

    async def status(_: web.Request) -> web.StreamResponse:
        return web.json_response(status_json(source))

    async def alive(_: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.StreamResponse:
        wrong = not_ready(source.tables)
        text = "\n".join(f"{name}: {row.text}" for name, row in wrong) or "ok"
        return web.Response(text=f"{text}\n", status=503 if wrong else 200)

    return [web.get("/v1/status", status), web.get("/healthz", alive), web.get("/readyz", ready)]


def not_ready(tables: Tables) -> list[tuple[str, StatusRow]]:
    """What keeps this host from enforcing its policy on every device and address."""
    found = [
        (name, row)
        for name, row in sorted(tables.status.rows.items())
        if not row.ok and (name in ENFORCING or name.startswith("device:"))
    ]
    if "datapath" not in tables.status:
        found.insert(0, ("datapath", StatusRow(False, "the data path is not ready yet")))
    return found


def status_json(source: StatusSource) -> Json:
    """All of it. `ok` is whether every part is, `problems` says what is not and how to cure it."""
    tables = source.tables
    host = tables.host.get("host")
    listed = policies_json(tables, audited(tables))
    problems = _problems(tables, listed["problems"])
    return {
        "ok": not problems,
        "ready": not not_ready(tables),
        "version": program_version(),
        "node": host.name if host else "",
        "cluster": {"name": host.cluster, "id": host.cluster_id} if host else None,
        "started": source.started,
        "uptime_s": round(time.time() - source.started, 1),
        "problems": problems,
        "warnings": _warnings(tables),
        "enforcement": _enforcement(source),
        "devices": _devices(tables),
        "policies": {
            "total": len(listed["policies"]),
            "by_state": dict(sorted(Counter(one["state"] for one in listed["policies"]).items())),
            "findings": len(listed["problems"]),
            "list": listed["policies"],
        },
        "identities": _by_source(Counter(row.source for row in tables.identities.rows.values())),
        "addresses": _by_source(tables.ips.counts),
        "nodes": len(tables.nodes),
        "mesh": mesh_json(tables),
        "drops": _drops(source.pins),
        "failsafe": source.failsafe,
        "event_loop": {
            "stalls": source.stalls.count,
            "worst_s": round(source.stalls.worst_s, 3),
            "total_s": round(source.stalls.total_s, 3),
        },
        "memory": memory(),
        "parts": {name: _row(row) for name, row in sorted(tables.status.rows.items())},
    }


def program_version() -> str:
    """Of the installed distribution."""
    try:
        return version("meshwall")
    except PackageNotFoundError:
        return "unknown"


def memory() -> Json:
    """Bytes of this process: `resident` in all, of which `kernel_tables` are maps of the data path.

    Those exist with or without us; they count as ours because we write them through memory.
    """
    resident = tables = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            inside = rest.endswith("anon_inode:bpf-map")
        elif word == "Rss:":
            size = int(rest.split()[0]) << 10
            resident += size
            tables += size if inside else 0
    return {"resident": resident, "kernel_tables": tables}


def _problems(tables: Tables, findings: list[Json]) -> list[Json]:
    """Parts that are not well, then findings in documents; each with a hint."""
    found: list[Json] = [
        {"part": name, "text": row.text, "hint": row.hint or NO_HINT, "since": row.since}
        for name, row in sorted(tables.status.rows.items(), key=lambda one: (one[0] != "datapath", one[0]))
        if not row.ok
    ]
    for one in findings:
        where = f"{one['file']}:{one['line']}" if one["line"] else one["file"]
        what = f"{one['field']}: {one['message']}" if one["field"] else one["message"]
        hint = "what it said before stays enforced; mend the file" if one["severity"] == "error" else ""
        found.append({"part": where, "text": what, "hint": hint, "since": 0})
    return found


def _warnings(tables: Tables) -> list[Json]:
    """What works and should be known all the same."""
    return [
        {"part": name, "text": row.text, "hint": row.hint, "since": row.since}
        for name, row in sorted(tables.status.rows.items())
        if row.ok and row.warn
    ]


def _enforcement(source: StatusSource) -> Json:
    row = source.tables.status.get("datapath")
    said = audited(source.tables)
    panic = source.tables.status.get("panic")
    text = panic.text if panic else row.text if row else "the data path is not ready yet"
    details = row.details if row else {}
    return {
        "mode": source.mode,
        "audit": said.host,
        "audit_since": source.tables.audit[WHOLE_HOST].since if said.host else 0.0,
        "audit_policies": sorted(said.policies),
        "ok": row.ok if row else False,
        "text": text,
        "panic": panic.details["panic"] if panic else None,
        "since": row.since if row else 0.0,
        "generation": details.get("generation"),
        "ingress": details.get("ingress"),
        "egress": details.get("egress"),
    }


def _devices(tables: Tables) -> list[Json]:
    """Filtered devices as the data path reports them."""
    found = []
    for name, row in sorted(tables.status.rows.items()):
        if name.startswith("device:"):
            found.append(
                {"name": name.removeprefix("device:"), "ok": row.ok, "text": row.text, **row.details}
            )
    return found


def _by_source(counts: Counter[str]) -> Json:
    return {"total": counts.total(), "by_source": dict(sorted(counts.items()))}


def _drops(pins: Path) -> list[Json]:
    return [
        {
            "direction": str(direction),
            "reason": reason_name(reason),
            "packets": hits.packets,
            "bytes": hits.bytes,
        }
        for (direction, reason), hits in sorted(read_reasons(pins).items())
        if reason >= DROPS_FROM
    ]


def _row(row: StatusRow) -> Json:
    return {
        "ok": row.ok,
        "text": row.text,
        "hint": row.hint,
        "since": row.since,
        "details": dict(row.details),
    }
