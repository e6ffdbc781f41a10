"""Services of this host from files: rows with the source `local`, and in a store what is global and shared.

A backend that its check finds unhealthy stays in the row, and leaves what is published: there absence means gone.
"""

import asyncio
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clustermesh import wire
from clustermesh.publish import Publisher
from clustermesh.services import Service, encode_service, encode_service_export
from daemon.sources.documents import DocumentFiles
from daemon.sources.servicefiles import Check, Entry, LocalExport, LocalService, completed, parse_services
from daemon.state.tables import LOCAL, ServiceKey, ServiceRow, StatusRow, Tables

log = logging.getLogger(__name__)

GROUP = "services"
MAX_CHECKS = 2000  # backends of all services that are asked
_MAX_LINE = 4096  # of an answer
_GOOD = range(200, 400)  # HTTP status

Name = tuple[str, str]  # namespace, name
Asked = tuple[str, Check]  # address, and how


@dataclass(frozen=True, slots=True)
class Health:
    """What checks found of a backend: healthy until the first answer, which counts at once.

    `streak`: answers in a row that speak against it. `reason` is empty while all is well.
    """

    healthy: bool = True
    streak: int = 0
    reason: str = "not checked yet"

    def after(self, reason: str, check: Check) -> "Health":
        """With one more answer; `reason` is empty if it was good."""
        first = self.reason == "not checked yet"
        if (not reason) == self.healthy:
            return Health(self.healthy, 0, reason)
        streak = self.streak + 1
        if first or streak >= (check.fall if self.healthy else check.rise):
            return Health(not self.healthy, 0, reason)
        return Health(self.healthy, streak, reason or self.reason)


async def probe(address: str, check: Check) -> str:
    """Why a backend is not well; empty if it is."""
    try:
        async with asyncio.timeout(check.timeout_s):
            reader, writer = await asyncio.open_connection(address, check.port, limit=_MAX_LINE)
            try:
                return await _answer(reader, writer, address, check) if check.path else ""
            finally:
                writer.close()
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, check: Check
) -> str:
    host = f"[{address}]" if ":" in address else address
    writer.write(f"GET {check.path} HTTP/1.0\r\nHost: {host}:{check.port}\r\n\r\n".encode())
    try:
        line = (await reader.readline()).decode(errors="replace").strip()
    except ValueError:
        return "the answer is not HTTP"
    words = line.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        return "the answer is not HTTP"
    return "" if int(words[1]) in _GOOD else f"HTTP status {words[1]}"


class ServiceFiles:
    """Keeps rows, checks and store equal to a directory of services. `run` is the task.

    publisher: who waits for our word; None if nothing is published. announce: services are, too.
    """

    def __init__(
        self,
        tables: Tables,
        publisher: Publisher | None,
        directory: Path,
        state_dir: Path,
        *,
        cluster: str,
        cluster_id: int = 0,
        announce: bool = True,
        owner_check: bool = True,
    ) -> None:
        self._tables = tables
        self._publisher = publisher
        self._announce = announce
        self._services: dict[Name, LocalService] = {}
        self._exports: dict[Name, LocalExport] = {}
        self._problems: tuple[str, ...] = ()
        self._health: dict[Asked, Health] = {}
        self._checks: dict[Asked, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._files = DocumentFiles(
            tables,
            directory,
            state_dir / "last-good-services",
            name="service files",
            parse=lambda text, file: parse_services(text, file, cluster, cluster_id),
            changed=self._take,
            owner_check=owner_check,
        )

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._files.run())
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._ask(group)
                self._tell()

    def _take(self, files: Mapping[str, Sequence[Entry]]) -> None:
        entries = [one for name in sorted(files) for one in files[name]]
        self._services, self._exports, self._problems = unique(entries)
        self._wake.set()

    # -- health

    def _ask(self, group: asyncio.TaskGroup) -> None:
        """A task for each backend that is to be asked, and for no other."""
        wanted = [
            (address, one.check)
            for _, one in sorted(self._services.items())
            if one.check is not None
            for address in one.service.backends or ()
        ]
        asked = set(wanted[:MAX_CHECKS])
        if len(wanted) > MAX_CHECKS:
            self._problems += (f"{len(wanted)} backends are to be checked, only {MAX_CHECKS} are",)
        for gone in self._checks.keys() - asked:
            self._checks.pop(gone).cancel()
            self._health.pop(gone, None)
        for one in asked - self._checks.keys():
            self._checks[one] = group.create_task(self._watch(one))

    async def _watch(self, one: Asked) -> None:
        """Ask one backend for ever."""
        address, check = one
        while True:
            before = self._health.get(one, Health())
            now = before.after(await probe(address, check), check)
            self._health[one] = now
            if now.healthy != before.healthy:
                log.info(
                    "backend %s port %d is %s", address, check.port, "healthy" if now.healthy else now.reason
                )
            if (now.healthy, now.reason) != (before.healthy, before.reason):
                self._wake.set()
            await asyncio.sleep(check.interval_s * random.uniform(0.9, 1.1))  # noqa: S311 - jitter

    def _unhealthy(self, one: LocalService) -> dict[str, str]:
        if one.check is None:
            return {}
        found = {
            address: self._health.get((address, one.check), Health())
            for address in one.service.backends or ()
        }
        return {address: health.reason for address, health in found.items() if not health.healthy}

    # -- what others see

    def _tell(self) -> None:
        rows: dict[ServiceKey, ServiceRow] = {}
        keys: dict[str, bytes] = {}
        for (namespace, name), one in self._services.items():
            unhealthy = self._unhealthy(one)
            wanted = one.wanted
            service = replace(one.service, include_external=wanted.is_global, shared=wanted.shared)
            row = ServiceRow(service, wanted.is_global, wanted.affinity, unhealthy, one.file, one.line)
            rows[ServiceKey(namespace, name, LOCAL)] = row
            if wanted.is_global and wanted.shared:
                told = published(service, unhealthy)
                keys[wire.service_key(service.cluster, namespace, name)] = encode_service(told)
        exports = {
            ServiceKey(*name, LOCAL): completed(one.export, self._services)
            for name, one in self._exports.items()
        }
        tables = self._tables
        ours = {key for key in tables.services if key.source == LOCAL}
        tables.services.replace(rows, within=ours)
        tables.exports.replace(exports, within={key for key in tables.exports if key.source == LOCAL})
        for key, export in exports.items():
            keys[wire.service_export_key(export.cluster, key.namespace, key.name)] = encode_service_export(
                export
            )
        if self._publisher is not None:
            self._publisher.want(GROUP, keys if self._announce else {})
        self._status(rows, len(exports), len(keys))

    def _status(self, rows: Mapping[ServiceKey, ServiceRow], exports: int, keys: int) -> None:
        sick = {
            f"{key.namespace}/{key.name} {address}": why
            for key, row in rows.items()
            for address, why in row.unhealthy.items()
        }
        text = f"{len(rows)} services, {exports} exports"
        if self._publisher is not None and self._announce:
            text += f", {keys} of them published"
        if sick:
            text += f"; {len(sick)} backends unhealthy: {next(iter(sick))}: {next(iter(sick.values()))}"
        if self._problems:
            text += f"; {self._problems[0]}"
        details = {
            "services": len(rows),
            "exports": exports,
            "unhealthy": sick,
            "problems": list(self._problems),
        }
        row = StatusRow(not self._problems, text, details=details, warn=bool(sick))
        self._tables.status.put("services", row)


def unique(
    entries: Sequence[Entry],
) -> tuple[dict[Name, LocalService], dict[Name, LocalExport], tuple[str, ...]]:
    """Services and exports by name, and what is wrong between files: who comes first has a name."""
    services: dict[Name, LocalService] = {}
    exports: dict[Name, LocalExport] = {}
    problems = []
    for one in entries:
        if isinstance(one, LocalService):
            name = one.service.namespace, one.service.name
            first: Entry = services.setdefault(name, one)
        else:
            name = one.export.namespace, one.export.name
            first = exports.setdefault(name, one)
        if first is not one:
            where = f"{one.file} line {one.line}"
            problems.append(f"{where}: {'/'.join(name)} is in {first.file} line {first.line} already")
    return services, exports, tuple(problems)


def published(service: Service, unhealthy: Mapping[str, str]) -> Service:
    """A service as others shall see it: with its healthy backends."""
    healthy = {
        address: ports for address, ports in (service.backends or {}).items() if address not in unhealthy
    }
    return replace(service, backends=healthy)
