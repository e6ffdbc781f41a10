"""The store as the mesh protocol uses it: etcd.py speaks to a real one, MemoryKV is the embedded default."""

import asyncio
import bisect
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

PAGE = 5000  # entries per page: measured, see docs/clustermesh.md
MOST_OPERATIONS = 128  # of one transaction: etcd's default limit


class KVError(Exception):
    """Base of everything a store can answer besides what was asked for."""


class ConnectionLost(KVError):  # noqa: N818
    """The store is out of reach, or changed its identity; keep the last state and try again."""


class Compacted(KVError):  # noqa: N818
    """The revision asked for is gone: list again."""


class Denied(KVError):  # noqa: N818
    """The store refuses this user this key."""


class LeaseLost(KVError):  # noqa: N818
    """The lease is gone, and with it its keys: get a new one and write them again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value; `lease` is 0 when there is none."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int = 0
    version: int = 1
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One change. A deletion has `value` None."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix at one revision. `store` identifies the store; 0 if it has no identity."""

    entries: tuple[Entry, ...]
    revision: int
    store: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction. A key that does not exist has 0 everywhere.

    `prefix`: it must hold for every key under `key`; `Compare(p, "version", 0, prefix=True)`: there is none.
    """

    key: str
    field: Literal["version", "create_revision", "mod_revision"]
    number: int
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    """One write of a transaction; `value` None deletes the key."""

    key: str
    value: bytes | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Committed:
    """How a transaction ended, and the store's revision then: of the writes, if it was carried out."""

    done: bool
    revision: int


class KV(Protocol):
    """What the protocol needs of a store. Every method raises KVError only."""

    @property
    def version(self) -> str:
        """Of the server; empty if it has none or is not connected."""
        ...

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str, *, linear: bool = False) -> Listing:
        """linear: as the whole store agrees on it now, not as one member saw it a moment ago."""
        ...

    def pages(self, prefix: str) -> AsyncGenerator[Listing, None]:
        """The same piece by piece, all at one revision; at least one page."""
        ...

    def watch(self, prefix: str, revision: int) -> AsyncGenerator[Sequence[Event], None]:
        """Batches of events from `revision` on, until cancelled or lost; a batch is whole revisions."""
        ...

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write; returns the store's revision."""
        ...

    async def delete(self, key: str) -> bool: ...

    async def grant(self, ttl_s: int) -> int:
        """A new lease, which ends by itself unless `keep_alive` runs."""
        ...

    async def keep_alive(self, lease: int, ttl_s: int) -> None:
        """Renew a lease for ever; raises LeaseLost when it is gone."""
        ...

    async def revoke(self, lease: int) -> None: ...

    async def create(self, key: str, value: bytes, lease: int = 0) -> bool:
        """Put only if the key does not exist; False when it does."""
        ...

    async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
        """If all conditions hold, all writes in one revision; else nothing. At most MOST_OPERATIONS of each."""
        ...

    async def close(self) -> None: ...


class MemoryKV:
    """The embedded store: one process, nothing on disk, the semantics of etcd as far as `KV` promises them.

    `cut` and `heal` make it unreachable and reachable again, `compact` forgets old events, `expire` ends a
    lease as if its owner had died.
    """

    def __init__(self, history: int = 10_000) -> None:
        self._entries: dict[str, Entry] = {}
        self._revision = 1
        self._events: list[Event] = []  # ascending by revision
        self._compacted = 0  # watches from this revision or earlier are refused
        self._history = history
        self._leases: set[int] = set()
        self._cut: str | None = None
        self._changed = asyncio.Event()

    @property
    def version(self) -> str:
        return ""

    async def get(self, key: str) -> Entry | None:
        self._check()
        return self._entries.get(key)

    async def list(self, prefix: str, *, linear: bool = False) -> Listing:  # noqa: ARG002 - it always is
        self._check()
        found = sorted(key for key in self._entries if key.startswith(prefix))
        return Listing(tuple(self._entries[key] for key in found), self._revision)

    async def pages(self, prefix: str) -> AsyncGenerator[Listing, None]:
        listing = await self.list(prefix)
        for start in range(0, len(listing.entries) or 1, PAGE):
            yield Listing(listing.entries[start : start + PAGE], listing.revision, listing.store)

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[Sequence[Event], None]:
        position = revision
        while True:
            self._check()
            if position <= self._compacted:
                raise Compacted(f"revision {position} is gone, the oldest is {self._compacted + 1}")
            start = bisect.bisect_left(self._events, position, key=lambda event: event.revision)
            batch = [event for event in self._events[start:] if event.key.startswith(prefix)]
            position = max(position, self._revision + 1)
            wake = self._changed
            if batch:
                yield batch
            else:
                await wake.wait()

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return (await self.commit((), (Put(key, value, lease),))).revision

    async def delete(self, key: str) -> bool:
        self._check()
        known = key in self._entries
        await self.commit((), (Put(key, None),))
        return known

    async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
        self._check()
        if not all(map(self._holds, compares)):
            return Committed(False, self._revision)
        for one in puts:
            if one.lease and one.lease not in self._leases:
                raise LeaseLost(f"lease {one.lease:x} not found")
        revision = self._revision + 1
        events = []
        for one in puts:
            old = self._entries.pop(one.key, None)
            if one.value is not None:
                created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
                self._entries[one.key] = Entry(one.key, one.value, revision, created, version, one.lease)
            if old is not None or one.value is not None:
                events.append(Event(one.key, one.value, revision))
        if events:
            self._record(events)
        return Committed(True, self._revision)

    def _holds(self, one: Compare) -> bool:
        if one.prefix:
            return all(
                getattr(entry, one.field) == one.number
                for key, entry in self._entries.items()
                if key.startswith(one.key)
            )
        found = self._entries.get(one.key)
        number = 0 if found is None else getattr(found, one.field)
        return bool(number == one.number)

    async def create(self, key: str, value: bytes, lease: int = 0) -> bool:
        self._check()
        if key in self._entries:
            return False
        await self.put(key, value, lease)
        return True

    async def grant(self, ttl_s: int) -> int:  # noqa: ARG002 - nothing expires by itself here
        self._check()
        lease = max(self._leases, default=0) + 1
        self._leases.add(lease)
        return lease

    async def keep_alive(self, lease: int, ttl_s: int) -> None:  # noqa: ARG002
        while True:
            wake = self._changed
            self._check()
            if lease not in self._leases:
                raise LeaseLost(f"lease {lease:x} not found")
            await wake.wait()

    async def revoke(self, lease: int) -> None:
        self._check()
        self.expire(lease)

    async def close(self) -> None:
        """Nothing is held that would need closing."""

    def cut(self, reason: str = "the store is cut off") -> None:
        """Every call and every watch fails from now on."""
        self._cut = reason
        self._wake()

    def heal(self) -> None:
        self._cut = None

    def compact(self) -> None:
        """Forget all events so far."""
        self._events.clear()
        self._compacted = self._revision

    def expire(self, lease: int) -> None:
        """End a lease: its keys go away in one revision."""
        self._leases.discard(lease)
        gone = [key for key, entry in self._entries.items() if entry.lease == lease]
        for key in gone:
            del self._entries[key]
        if gone:
            self._record([Event(key, None, self._revision + 1) for key in gone])
        self._wake()

    def _record(self, events: Sequence[Event]) -> None:
        self._revision += 1
        self._events.extend(events)
        if len(self._events) > 2 * self._history:
            kept = self._events[-self._history :]
            self._compacted = kept[0].revision
            self._events = [event for event in kept if event.revision > self._compacted]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self) -> None:
        if self._cut is not None:
            raise ConnectionLost(self._cut)
