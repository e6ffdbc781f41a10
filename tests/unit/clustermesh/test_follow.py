"""Following a store: what is kept, what is believed, when."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from clustermesh import wire
from clustermesh.follow import Backoff, Follower
from clustermesh.kv import ConnectionLost, Listing, MemoryKV
from clustermesh.pace import Pace
from clustermesh.remote import Change, IpDeleted, IpUpserted, Mesh
from clustermesh.trust import Trust

WEB = 131073


class Wiped(MemoryKV):
    """A store that can be replaced by another one, and break during any listing."""

    store = 1
    lists_left = 1000

    async def list(self, prefix: str) -> Listing:
        self.lists_left -= 1
        if self.lists_left < 0:
            raise ConnectionLost("broke during a listing")
        listing = await super().list(prefix)
        return Listing(listing.entries, listing.revision, self.store)


@dataclass
class Seen:
    """The addresses in force, and every change on the way."""

    addresses: dict[int, int] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def __call__(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.changes.append(change)
            if isinstance(change, IpUpserted):
                self.addresses[change.cidr[1]] = change.identity
            elif isinstance(change, IpDeleted):
                del self.addresses[change.cidr[1]]


@asynccontextmanager
async def following(kv: MemoryKV, seen: Seen, quarantine_s: float = 300) -> AsyncIterator[Follower]:
    follower = Follower(
        kv, Mesh(Trust("east", 1)), seen, backoff=Backoff(0.01, 0.02), quarantine_s=quarantine_s
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        await until(lambda: follower.connected)
        try:
            yield follower
        finally:
            task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.005)


async def west(kv: MemoryKV, count: int) -> None:
    await kv.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2)))
    for number in range(count):
        entry = wire.ip_entry(f"10.1.0.{number}", WEB)
        await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))


async def test_a_compacted_watch_lists_again_and_misses_no_deletion() -> None:
    kv, seen = MemoryKV(), Seen()
    await west(kv, 3)
    async with following(kv, seen):
        await kv.delete(wire.ip_key("10.1.0.1"))
        kv.compact()  # before the watcher had its turn
        await until(lambda: len(seen.addresses) == 2)


async def test_half_a_reconnect_does_not_make_a_wiped_store_trusted() -> None:
    kv, seen = Wiped(), Seen()
    await west(kv, 3)
    async with following(kv, seen) as follower:
        kv.cut()
        await until(lambda: not follower.connected)
        await kv_wipe(kv)
        kv.store, kv.lists_left = 2, 3
        kv.heal()
        await until(lambda: kv.lists_left < 0)
        kv.lists_left = 1000
        await until(lambda: follower.connected)
        assert len(seen.addresses) == 3


async def test_a_third_of_the_addresses_vanishing_at_once_is_held_until_it_has_lasted() -> None:
    kv, seen = MemoryKV(), Seen()
    await west(kv, 60)
    async with following(kv, seen, quarantine_s=0.5) as follower:
        kv.cut()
        await until(lambda: not follower.connected)
        kv.heal()
        for number in range(25):
            await kv.delete(wire.ip_key(f"10.1.0.{number}"))
        await until(lambda: follower.connected)
        assert len(seen.addresses) == 60
        await until(lambda: len(seen.addresses) == 35)


async def test_an_address_that_comes_back_during_quarantine_never_flaps() -> None:
    kv, seen = MemoryKV(), Seen()
    await west(kv, 60)
    async with following(kv, seen, quarantine_s=0.3) as follower:
        kv.cut()
        await until(lambda: not follower.connected)
        kv.heal()
        for number in range(60):
            await kv.delete(wire.ip_key(f"10.1.0.{number}"))
        await until(lambda: follower.connected)
        seen.changes.clear()
        await west(kv, 60)
        await asyncio.sleep(0.6)
        assert not [one for one in seen.changes if isinstance(one, IpUpserted | IpDeleted)]


async def kv_wipe(kv: MemoryKV) -> None:
    kv._entries.clear()
    kv._events.clear()
    kv._revision = 1


async def test_a_cluster_that_floods_does_not_delay_another_and_ends_up_right() -> None:
    kv, seen = MemoryKV(), Seen()
    await west(kv, 1)
    await kv.put(wire.config_key("north"), wire.encode_config(wire.ClusterConfig(3)))
    async with following(kv, seen) as follower:
        follower._pace = Pace(rate=200, window_s=0.5)
        for _ in range(3):
            for number in range(100):
                entry = wire.ip_entry(f"10.1.0.{number}", WEB)
                await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))
        entry = wire.ip_entry("10.3.0.1", 196609)
        await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))
        for number in range(50):
            await kv.delete(wire.ip_key(f"10.1.0.{number}"))
        await until(lambda: 0x0A030001 in seen.addresses)
        assert follower.slowed["west"] > 0
        assert follower.slowed["north"] == 0
        assert len(seen.addresses) > 51, "deletions that wait have not happened yet"
        await until(lambda: len(seen.addresses) == 51)


async def test_a_mass_deletion_in_one_batch_is_held_and_can_be_accepted() -> None:
    kv, seen = MemoryKV(), Seen()
    await west(kv, 60)
    async with following(kv, seen) as follower:
        lease = await kv.grant(1)
        for number in range(60):
            entry = wire.ip_entry(f"10.1.0.{number}", WEB)
            await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry), lease)
        await asyncio.sleep(0.02)
        kv.expire(lease)  # the writer of a mirror died: all its keys go at once
        await kv.delete(wire.config_key("west"))
        await until(lambda: follower._mesh.remotes["west"].held_since > 0)
        assert len(seen.addresses) == 60
        await follower.take(follower._mesh.release(["west"]))
        assert not seen.addresses
