"""PolicyChanges: a record in the audit log whenever the policies mean something else. And /v1/changes, to read it."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from aiohttp import web

from daemon.api.app import ApiError, stream_rows, user_name
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.compile import HOST, CompileSettings, Subject
from daemon.policy.diff import Change, PolicySet, differences
from daemon.runtime.auditlog import AuditLog
from daemon.state.tables import PolicyKey, StatusRow, Tables

SETTLE_S = 0.5  # files that are changed together are one change
MOST_LINES = 100  # of meaning in a record
MOST_RULES = 2_000  # of both sets together; above, meaning is not worked out

Settings = Callable[[], CompileSettings]


def routes(log: AuditLog) -> list[web.RouteDef]:
    """The handler."""

    async def changes(request: web.Request) -> web.StreamResponse:
        since = _since(request.query.get("since", ""))
        rows = await asyncio.to_thread(lambda: list(log.read(since)))
        return await stream_rows(request, {}, "changes", rows)

    return [web.get("/v1/changes", changes)]


def _since(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        raise ApiError(400, f"since: expected RFC 3339, got {text!r}") from None


class PolicyChanges:
    """Watches the tables. `run` is the task."""

    def __init__(self, tables: Tables, settings: Settings, log: AuditLog) -> None:
        self._tables = tables
        self._settings = settings
        self._log = log

    async def run(self) -> None:
        """Until cancelled. The first set after the start is compared with nothing: it is recorded as it is."""
        wake = asyncio.Event()
        readers = (self._tables.policies.reader(wake), self._tables.cidr_groups.reader(wake))
        before: PolicySet | None = None
        while True:
            await wake.wait()
            await asyncio.sleep(SETTLE_S)
            wake.clear()
            for reader in readers:
                reader.take()
            host = self._tables.host.get("host")
            if not self._tables.policies.synced or host is None:
                continue
            now = PolicySet(tuple(self._tables.policies.rows.values()), dict(self._tables.cidr_groups.rows))
            subject = Subject(HOST, host.labels)
            await asyncio.to_thread(self._record, before, now, subject)
            before = now
            self._tell()

    def _record(self, before: PolicySet | None, now: PolicySet, subject: Subject) -> None:
        if before is None:
            names = sorted(one.title for one in now.policies)
            self._log.write("policy.start", "meshwalld", policies=names)
            return
        edits = edited(before.policies, now.policies)
        if not any(edits.values()) and before.groups == now.groups:
            return
        meaning, complete = meaning_of(before, now, subject, self._settings())
        self._log.write(
            "policy.change",
            _owners([*before.policies, *now.policies], {name for names in edits.values() for name in names}),
            **edits,
            groups=sorted(_different(before.groups, now.groups)),
            meaning=meaning,
            complete=complete,
        )

    def _tell(self) -> None:
        failed = self._log.failed
        row = StatusRow(
            not failed, failed or "kept", "free space in state_dir" if failed else "", time.time()
        )
        before = self._tables.status.get("audit log")
        if before is None or (before.ok, before.text) != (row.ok, row.text):
            self._tables.status.put("audit log", row)


def edited(before: Sequence[Policy], now: Sequence[Policy]) -> dict[str, list[str]]:
    """Titles of policies that came, went, and read otherwise or elsewhere now."""
    old, new = _by_key(before), _by_key(now)
    return {
        "added": sorted(new[key].title for key in new.keys() - old.keys()),
        "removed": sorted(old[key].title for key in old.keys() - new.keys()),
        "changed": sorted(new[key].title for key in new.keys() & old.keys() if old[key] != new[key]),
    }


def _by_key(policies: Iterable[Policy]) -> dict[PolicyKey, Policy]:
    return {PolicyKey(one.kind, one.namespace, one.name): one for one in policies}


def _different(before: Mapping[str, CidrGroup], now: Mapping[str, CidrGroup]) -> set[str]:
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def meaning_of(
    before: PolicySet, now: PolicySet, subject: Subject, settings: CompileSettings
) -> tuple[list[str], bool]:
    """What changes for this host, a line each, and whether that is all of it."""
    rules = sum(len(spec.rules) for one in (*before.policies, *now.policies) for spec in one.specs)
    if rules > MOST_RULES:
        return [], False
    found = differences(before, now, subject, settings)
    lines = [_line(one) for one in found.changes[:MOST_LINES]]
    return lines, found.complete and len(found.changes) <= MOST_LINES


def _line(one: Change) -> str:
    way = "from" if one.direction == 0 else "to"
    return f"{one.direction} {way} {one.peer}: {', '.join(one.ports)}: {one.before} -> {one.after}"


def _owners(policies: Sequence[Policy], titles: Iterable[str]) -> str:
    """Whose files they are: that is all that is known of who wrote them."""
    wanted = set(titles)
    names = set()
    for policy in policies:
        if policy.title in wanted:
            with suppress(OSError):
                names.add(user_name(Path(policy.file).stat().st_uid))
    return f"owner of the files: {', '.join(sorted(names))}" if names else "unknown"
