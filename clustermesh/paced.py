"""A store whose requests are counted, so that a thousand writers that come back at once do not drown it."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from clustermesh.kv import KV, Committed, Compare, Entry, Event, Listing, Put

RATE = 20.0  # requests a second
BURST = 20
SPREAD_S = 2.0  # after an outage each writer begins at a moment of its own within this


class Paced:
    """`KV` over another one. Unlimited until `limit` is called: a first start writes everything at once.

    Watches and keep-alives are not counted: they are streams.
    """

    def __init__(
        self,
        kv: KV,
        rate: float = RATE,
        burst: int = BURST,
        spread_s: float = SPREAD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limited = False
        self._kv = kv
        self._every_s = 1 / rate
        self._burst_s = (burst - 1) / rate
        self._spread_s = spread_s
        self._clock = clock
        self._next = 0.0  # when the next request is due at the steady rate

    @property
    def version(self) -> str:
        return self._kv.version

    def limit(self) -> None:
        """The first start is over."""
        self.limited = True

    def outage(self) -> None:
        """The store was out of reach: begin somewhere within the spread, and without a burst."""
        self.limited = True
        self._next = self._clock() + self._burst_s + random.uniform(0, self._spread_s)  # noqa: S311 - jitter

    async def _turn(self) -> None:
        if not self.limited:
            return
        now = self._clock()
        self._next = max(self._next, now) + self._every_s
        wait_s = self._next - self._every_s - self._burst_s - now
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def get(self, key: str) -> Entry | None:
        await self._turn()
        return await self._kv.get(key)

    async def list(self, prefix: str, *, linear: bool = False) -> Listing:
        await self._turn()
        return await self._kv.list(prefix, linear=linear)

    def pages(self, prefix: str) -> AsyncGenerator[Listing, None]:
        return self._kv.pages(prefix)

    def watch(self, prefix: str, revision: int) -> AsyncGenerator[Sequence[Event], None]:
        return self._kv.watch(prefix, revision)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        await self._turn()
        return await self._kv.put(key, value, lease)

    async def delete(self, key: str) -> bool:
        await self._turn()
        return await self._kv.delete(key)

    async def grant(self, ttl_s: int) -> int:
        await self._turn()
        return await self._kv.grant(ttl_s)

    async def keep_alive(self, lease: int, ttl_s: int) -> None:
        await self._kv.keep_alive(lease, ttl_s)

    async def revoke(self, lease: int) -> None:
        await self._turn()
        await self._kv.revoke(lease)

    async def create(self, key: str, value: bytes, lease: int = 0) -> bool:
        await self._turn()
        return await self._kv.create(key, value, lease)

    async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
        await self._turn()
        return await self._kv.commit(compares, puts)

    async def close(self) -> None:
        await self._kv.close()
