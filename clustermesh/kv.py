"""The store as the mesh protocol uses it. `etcd.py` speaks to a real one; `MemoryKV` is the embedded default."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class KVError(Exception):
    """Base of everything a store can answer besides what was asked for."""


class ConnectionLost(KVError):
    """The store is out of reach, or changed its identity; keep the last state and try again."""


class Compacted(KVError):
    """The revision asked for is gone: list again."""


class Denied(KVError):
    """The store refuses this user this key."""


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
    """All entries under a prefix at one revision."""

    entries: tuple[Entry, ...]
    revision: int


class KV(Protocol):
    """What the protocol needs of a store. Every method raises KVError only."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> Listing: ...

    def watch(self, prefix: str, revision: int) -> AsyncIterator[Sequence[Event]]:
        """Batches of events from `revision` on, until cancelled or lost; a batch is one store revision or more."""
        ...

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write; returns the store's revision."""
        ...

    async def delete(self, key: str) -> bool: ...

    async def grant(self, ttl_s: int) -> int:
        """A new lease; the client keeps it alive until `revoke` or `close`."""
        ...

    async def revoke(self, lease: int) -> None: ...

    async def create(self, key: str, value: bytes, lease: int = 0) -> bool:
        """Put only if the key does not exist; False when it does."""
        ...

    async def close(self) -> None: ...
