"""What this host tells the store: itself, whenever its addresses or labels change, and what other sources add.

Which keys it wrote is kept in a file, so that the next run removes what is no longer wanted, and label sets keep
their numbers. Writes `status["mesh publish"]`.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clustermesh.allocator import users
from clustermesh.kv import KV, KVError
from clustermesh.publish import Host, Member, Publisher, publishable
from daemon.model.net import ip_text
from daemon.sources.safefiles import UnsafeError, opened_directory, read_file, write_file
from daemon.state.tables import HostRow, StatusRow, Tables

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
SHOWN = 20  # keys that the status names
HOST = "host"


class MeshPublisher:
    """The writer of one store. `publisher` is where other sources say what they want written.

    expect: groups that say so; nothing is written before all have.
    """

    def __init__(
        self,
        tables: Tables,
        kv: KV,
        member: Member,
        *,
        state_dir: Path,
        boot_id: str = "",
        expect: Sequence[str] = (),
    ) -> None:
        self._tables = tables
        self._kv = kv
        self._path = state_dir / "published.json"
        self._boot_id = boot_id
        self._announce = member.announce
        self._unsaved = ""
        self._followers: list[Callable[[], None]] = []
        self.publisher = Publisher(
            kv,
            member,
            remembered=_load(self._path),
            remember=self._save,
            expect=[*expect, *((HOST,) if member.announce else ())],
            on_change=self._changed,
        )

    async def users(self) -> dict[int, list[str]]:
        """Which nodes refer to each identity, as the store has it now. Raises OSError."""
        try:
            return await users(self._kv)
        except KVError as error:
            raise OSError(str(error)) from error

    def on_numbers(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever a label set may have got another number."""
        self._followers.append(callback)

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.publisher.run())
            await self._follow_host()

    async def _follow_host(self) -> None:
        wake = asyncio.Event()
        reader = self._tables.host.reader(wake)
        while True:
            await wake.wait()
            wake.clear()
            reader.take()
            host = self._tables.host.get("host")
            if host is not None and self._announce:
                self.publisher.publish(self._host(host))

    def _host(self, row: HostRow) -> Host:
        labels = {label.key: label.value for label in row.labels if label.source == "k8s"}
        addresses = publishable([ip_text(one.family, one.address) for one in row.addresses])
        return Host(row.cluster, row.cluster_id, row.name, addresses, labels, self._boot_id)

    async def _save(self, keys: Mapping[str, str]) -> None:
        """A full or read-only disk stops nothing; it is said once."""
        try:
            await asyncio.to_thread(lambda: write_file(self._path.parent, self._path.name, json.dumps(keys)))
            self._unsaved = ""
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._unsaved:
                log.warning("%s is not written: %s", self._path, reason)
            self._unsaved = reason

    def _changed(self) -> None:
        for callback in self._followers:
            callback()
        if self._announce:
            self._status()

    def _status(self) -> None:
        publisher = self.publisher
        hint = ""
        if publisher.conflicts:
            hint = "two hosts or clusters use one address: find out who has it, and renumber the other"
        elif not publisher.ok and publisher.error:
            hint = "written as soon as the store takes it; see: meshwall mesh status"
        details: dict[str, object] = {
            "keys": len(publisher.written),
            "sample": sorted(publisher.written)[:SHOWN],
            "conflicts": dict(publisher.conflicts),
            "waiting": publisher.waiting,
            "identities": len(publisher.allocator.numbers),
            "without_number": dict(list(publisher.allocator.problems.items())[:SHOWN]),
            "last_error": publisher.error,
            "leases": [f"{one:x}" for one in publisher.leases.all],
            "collector": publisher.collector.leading,
            "collected": publisher.collector.collected,
        }
        self._tables.status.put(
            "mesh publish", StatusRow(publisher.ok, publisher.text, hint, details=details)
        )


def _load(path: Path) -> dict[str, str]:
    """What an earlier run wrote; nothing when that cannot be read, for its leases end by themselves."""
    try:
        with opened_directory(path.parent, owner_check=True) as handle:
            found = json.loads(read_file(handle, path.name, most_bytes=MAX_BYTES, owner_check=True)[1])
    except FileNotFoundError:
        return {}
    except (OSError, UnsafeError, ValueError) as error:
        log.warning("%s: what an earlier run published is not known: %s", path, error)
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)}
