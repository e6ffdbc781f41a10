"""Removes identities that nobody refers to any more, and locks that nobody holds: one member of a cluster does.

A key goes when two looks in a row, 15 minutes apart, found it unused and unchanged. The deletion itself is one
transaction that holds only if there is still no reference, so that it never races with a node that takes the
number up again. Masters with a lease are somebody's export, who removes them himself.
"""

import asyncio
import logging
import random
from collections.abc import Container, Iterable, Mapping
from contextlib import aclosing

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.kv import KV, Compare, Entry, Put
from clustermesh.leases import Leases, LockLost, Locks

log = logging.getLogger(__name__)

ROUND_S = 900.0
MOST_PER_MINUTE = 2500


def unused(masters: Iterable[Entry], used: Container[str]) -> dict[str, Entry]:
    """By key, the masters that no reference needs. used: label sets that nodes refer to."""
    return {
        one.key: one for one in masters if not one.lease and one.value.decode(errors="replace") not in used
    }


def due(now: Mapping[str, Entry], before: Mapping[str, int]) -> list[Entry]:
    """What was found in the round before, at the same revision. before: key -> mod revision."""
    return [one for key, one in sorted(now.items()) if before.get(key) == one.mod_revision]


class Collector:
    """One candidate of a cluster. Run `run` as a task; KVErrors go up."""

    def __init__(
        self,
        kv: KV,
        leases: Leases,
        *,
        cluster: str,
        first: int,
        last: int,
        node: str,
        round_s: float = ROUND_S,
        most_per_minute: int = MOST_PER_MINUTE,
    ) -> None:
        self.leading = False
        self.collected = 0
        self._kv = kv
        self._leases = leases
        self._locks = Locks(kv)
        self._cluster = cluster
        self._first, self._last = first, last
        self._node = node
        self._round_s = round_s
        self._pause_s = 60 / most_per_minute
        self._before: dict[str, int] = {}  # what the last round found: key -> mod revision

    async def run(self) -> None:
        """For ever: be the cluster's collector, or be ready to become it."""
        await self._locks.clean()
        while True:
            await asyncio.sleep(self._round_s * random.uniform(0.9, 1.1))  # noqa: S311 - jitter
            await self.round()

    async def round(self) -> None:
        """One look, if this node is the cluster's collector or can become it."""
        lead = await self._lead()
        self.leading = lead is not None
        if lead is None:
            self._before.clear()
            return
        masters = unused(await self._masters(), await self._used())
        locks = {
            one.key: one for one in (await self._kv.list(wire.IDENTITY_LOCKS)).entries if self._ours(one)
        }
        gone = set()
        for entry in due(masters, self._before):
            if await self._delete_master(entry, lead):
                gone.add(entry.key)
                await asyncio.sleep(self._pause_s)
        for entry in due(locks, self._before):
            await self._kv.commit((lead, _as_seen(entry)), (Put(entry.key, None),))
            await asyncio.sleep(self._pause_s)
        found = {**masters, **locks}
        self._before = {key: one.mod_revision for key, one in found.items() if key not in gone}
        if gone:
            self.collected += len(gone)
            log.info("%s: %d identities that nobody used are removed", self._cluster, len(gone))

    async def _lead(self) -> Compare | None:
        """The condition that we are the collector; None if somebody else is."""
        key = wire.collector_key(self._cluster)
        found = await self._kv.get(key)
        name = self._node.encode()
        if found is not None and found.value != name:
            self._leases.drop(key)
            return None
        lease = await self._leases.of(key)
        if found is not None and found.lease == lease:
            return _as_seen(found)
        compare = _as_seen(found) if found else Compare(key, "version", 0)
        done = await self._kv.commit((compare,), (Put(key, name, lease),))
        return Compare(key, "mod_revision", done.revision) if done.done else None

    async def _masters(self) -> list[Entry]:
        found = []
        async with aclosing(self._kv.pages(wire.IDENTITY_MASTERS)) as pages:
            async for page in pages:
                found += [one for one in page.entries if self._in_range(one.key)]
        return found

    async def _used(self) -> set[str]:
        """The label sets that nodes refer to."""
        found = set()
        async with aclosing(self._kv.pages(wire.IDENTITY_REFERENCES)) as pages:
            async for page in pages:
                for one in page.entries:
                    found.add(one.key.removeprefix(wire.IDENTITY_REFERENCES).rpartition("/")[0])
        return found

    async def _delete_master(self, entry: Entry, lead: Compare) -> bool:
        labels = entry.value.decode(errors="replace")
        number = entry.key.rpartition("/")[2]
        nobody = Compare(wire.identity_value_prefix(labels), "version", 0, prefix=True)
        try:
            async with self._locks.hold(wire.identity_lock(f"id/{number}")) as lock:
                compares = (lead, lock, _as_seen(entry), nobody)
                return (await self._kv.commit(compares, (Put(entry.key, None),))).done
        except LockLost:
            return False

    def _ours(self, lock: Entry) -> bool:
        path = lock.key.removeprefix(wire.IDENTITY_LOCKS).rpartition("/")[0]
        if path.startswith("id/"):
            return self._in_range(path)
        return f"k8s:{wire.CLUSTER_LABEL}={self._cluster};" in path

    def _in_range(self, key: str) -> bool:
        try:
            number = wire.decode_identity_number(key.rpartition("/")[2])
        except Malformed:
            return False
        return self._first <= number <= self._last


def _as_seen(entry: Entry) -> Compare:
    return Compare(entry.key, "mod_revision", entry.mod_revision)
