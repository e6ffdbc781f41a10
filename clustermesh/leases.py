"""What a writer holds in a store for as long as it lives: leases with its keys, and locks."""

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager

from clustermesh.kv import KV, Compare, Entry, KVError, LeaseLost, Put

LEASE_S = 900  # of what is published: it outlives a restart
KEYS_PER_LEASE = 1000  # a lease with more is slow to end: every key is a deletion of its own
LOCK_LEASE_S = 25
_LOCK_REUSE_S = 10.0  # a lock lease that is older is not used again, so that none needs keeping alive
_LOCK_WAIT_S = 10.0


class LockLost(KVError):  # noqa: N818
    """Somebody else has the lock, or our lease on it ended; what was to be done under it was not done."""


class Leases:
    """The leases of one writer, at most `most` keys on each. Run `keep` as a task."""

    def __init__(self, kv: KV, ttl_s: int = LEASE_S, most: int = KEYS_PER_LEASE) -> None:
        self._kv = kv
        self._ttl_s = ttl_s
        self._most = most
        self._keys: dict[str, int] = {}
        self._loads: dict[int, int] = {}  # lease -> number of keys
        self._granting = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def all(self) -> tuple[int, ...]:
        """Every lease that is in use."""
        return tuple(self._loads)

    async def of(self, key: str) -> int:
        """The lease of a key; a new key gets one with room."""
        async with self._granting:
            if key in self._keys:
                return self._keys[key]
            lease = next((one for one, load in self._loads.items() if load < self._most), 0)
            if not lease:
                lease = await self._kv.grant(self._ttl_s)
                self._loads[lease] = 0
                self._changed.set()
            self._keys[key] = lease
            self._loads[lease] += 1
            return lease

    def drop(self, key: str) -> None:
        """The key was deleted."""
        lease = self._keys.pop(key, 0)
        if lease:
            self._loads[lease] -= 1

    def forget(self) -> None:
        """Leases were lost: every key gets another one."""
        self._keys.clear()
        self._loads.clear()

    async def keep(self) -> None:
        """Keep all leases alive, for ever. Raises LeaseLost (in a group) when one is gone."""
        kept: set[int] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                for lease in self._loads.keys() - kept:
                    kept.add(lease)
                    group.create_task(self._kv.keep_alive(lease, self._ttl_s))
                await self._changed.wait()


class Locks:
    """Locks as etcd's own clients take them: `<path>/<lease in hex>`, held by the lowest create revision.

    They are hints: what is done under one must compare the lock key in the same transaction, which is what
    `hold` yields. Their leases are short and never renewed.
    """

    def __init__(self, kv: KV, clock: Callable[[], float] = time.monotonic) -> None:
        self._kv = kv
        self._clock = clock
        self._lease = 0
        self._granted_at = 0.0
        self._granting = asyncio.Lock()
        self._paths: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._left: set[str] = set()  # keys of ours that could not be deleted

    @asynccontextmanager
    async def hold(self, path: str) -> AsyncGenerator[Compare, None]:
        """Wait for the lock. Raises LockLost after 10 s, KVError when the store fails."""
        mine = self._paths.setdefault(path, asyncio.Lock())
        async with mine:
            lease = await self._current()
            key = f"{path}/{lease:x}"
            try:
                revision = await self._take(key, path, lease)
                yield Compare(key, "create_revision", revision)
            finally:
                await self._give_back(key)

    async def clean(self) -> None:
        """Delete what could not be deleted before; else others wait until its lease has ended."""
        for key in tuple(self._left):
            await self._kv.delete(key)
            self._left.discard(key)

    async def _current(self) -> int:
        async with self._granting:
            if not self._lease or self._clock() - self._granted_at > _LOCK_REUSE_S:
                self._lease = await self._kv.grant(LOCK_LEASE_S)
                self._granted_at = self._clock()
            return self._lease

    async def _take(self, key: str, path: str, lease: int) -> int:
        try:
            await self._kv.commit((Compare(key, "create_revision", 0),), (Put(key, b"", lease),))
        except LeaseLost as error:
            self._lease = 0
            raise LockLost(f"{path}: {error}") from error
        try:
            async with asyncio.timeout(_LOCK_WAIT_S):
                while True:
                    listing = await self._kv.list(f"{path}/", linear=True)
                    waiting = sorted(listing.entries, key=lambda one: one.create_revision)
                    place = next((at for at, one in enumerate(waiting) if one.key == key), None)
                    if place is None:
                        raise LockLost(f"{key} is gone: its lease has ended")
                    if place == 0:
                        return waiting[0].create_revision
                    await self._gone(waiting[place - 1], listing.revision)
        except TimeoutError:
            raise LockLost(f"{path}: held by somebody else for {_LOCK_WAIT_S:g} s") from None

    async def _gone(self, before: Entry, revision: int) -> None:
        async with aclosing(self._kv.watch(before.key, revision + 1)) as batches:
            async for events in batches:
                if any(one.key == before.key and one.value is None for one in events):
                    return

    async def _give_back(self, key: str) -> None:
        self._left.add(key)
        try:
            await self._kv.delete(key)
        except BaseException:  # also cancelled: the key may still be there, and must not be taken again
            self._lease = 0
            raise
        self._left.discard(key)
