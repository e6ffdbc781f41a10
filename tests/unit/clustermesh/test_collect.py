"""What is removed from the store, when, and by whom."""

import asyncio

from clustermesh import wire
from clustermesh.allocator import Allocator
from clustermesh.collect import Collector
from clustermesh.kv import Compare, MemoryKV, Put
from clustermesh.leases import Leases

FIRST, LAST = wire.identity_range(1)
WEB = "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=alpha;"
MASTER = wire.identity_key(FIRST + 1)


def collector(store: MemoryKV, node: str = "n1", cluster: str = "alpha") -> Collector:
    return Collector(
        store, Leases(store), cluster=cluster, first=FIRST, last=LAST, node=node, most_per_minute=10**9
    )


async def test_an_unused_identity_goes_in_the_second_round() -> None:
    store = MemoryKV()
    await store.put(MASTER, WEB.encode())
    one = collector(store)
    await one.round()
    assert await store.get(MASTER)
    await one.round()
    assert await store.get(MASTER) is None
    assert one.collected == 1
    assert not (await store.list(wire.IDENTITY_LOCKS)).entries


async def test_what_changed_between_two_rounds_stays_for_another_one() -> None:
    store = MemoryKV()
    await store.put(MASTER, WEB.encode())
    one = collector(store)
    await one.round()
    await store.put(MASTER, WEB.encode())
    await one.round()
    assert await store.get(MASTER)
    await one.round()
    assert await store.get(MASTER) is None


async def test_what_is_used_leased_or_of_another_cluster_stays() -> None:
    store = MemoryKV()
    await store.put(MASTER, WEB.encode())
    await store.put(wire.identity_value_key(WEB, "n7"), str(FIRST + 1).encode())
    await store.put(wire.identity_key(FIRST + 2), b"k8s:exported=yes;", await store.grant(900))
    await store.put(wire.identity_key(LAST + 1), b"k8s:of=others;")
    await store.put(wire.identity_key(FIRST + 3), WEB.encode() + b"k8s:z=longer;")
    one = collector(store)
    for _ in range(3):
        await one.round()
    left = [entry.key for entry in (await store.list(wire.IDENTITY_MASTERS)).entries]
    assert left == sorted([MASTER, wire.identity_key(FIRST + 2), wire.identity_key(LAST + 1)])


async def test_a_reference_that_comes_at_the_last_moment_keeps_the_identity() -> None:
    class Late(MemoryKV):
        async def commit(self, compares, puts=()):  # type: ignore[no-untyped-def]
            if Put(MASTER, None) in puts:
                await super().commit((), (Put(wire.identity_value_key(WEB, "n7"), b"65537"),))
            return await super().commit(compares, puts)

    store = Late()
    await store.put(MASTER, WEB.encode())
    one = collector(store)
    for _ in range(3):
        await one.round()
    assert await store.get(MASTER)


async def test_one_member_collects_and_another_takes_over_when_it_is_gone() -> None:
    store = MemoryKV()
    one, two = collector(store, "n1"), collector(store, "n2")
    await one.round()
    await two.round()
    assert (one.leading, two.leading) == (True, False)
    leader = await store.get(wire.collector_key("alpha"))
    assert leader is not None
    assert leader.value == b"n1"
    store.expire(leader.lease)
    await two.round()
    await one.round()
    assert (one.leading, two.leading) == (False, True)


async def test_who_is_no_longer_the_collector_deletes_nothing() -> None:
    class Deposed(MemoryKV):
        async def commit(self, compares, puts=()):  # type: ignore[no-untyped-def]
            if Put(MASTER, None) in puts:
                await super().commit((), (Put(wire.collector_key("alpha"), b"n2"),))
            return await super().commit(compares, puts)

    store = Deposed()
    await store.put(MASTER, WEB.encode())
    one = collector(store)
    for _ in range(3):
        await one.round()
    assert await store.get(MASTER)


async def test_a_lock_that_nobody_gave_back_goes_in_the_second_round() -> None:
    store = MemoryKV()
    stale = [wire.identity_lock(WEB) + "/7b", wire.identity_lock(f"id/{FIRST + 1}") + "/7b"]
    others = [wire.identity_lock("k8s:io.cilium.k8s.policy.cluster=beta;") + "/7c",
              wire.identity_lock(f"id/{LAST + 1}") + "/7c"]  # fmt: skip
    for key in (*stale, *others):
        await store.put(key, b"")
    one = collector(store)
    await one.round()
    assert len((await store.list(wire.IDENTITY_LOCKS)).entries) == 4
    await one.round()
    assert sorted(entry.key for entry in (await store.list(wire.IDENTITY_LOCKS)).entries) == sorted(others)


async def test_collecting_and_allocating_at_once_never_leaves_a_reference_without_its_master() -> None:
    store = MemoryKV()
    leases = Leases(store)
    allocator = Allocator(store, leases, first=FIRST, last=FIRST + 9, node="n1", attempt_s=0)
    one = collector(store)
    dangling = []

    async def look() -> None:
        while True:
            used = {int(one.value) for one in (await store.list(wire.IDENTITY_REFERENCES)).entries}
            dangling.extend([number for number in used if not await store.get(wire.identity_key(number))])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(allocator.run()), group.create_task(look())]
        for turn in range(200):
            allocator.want([WEB] if turn % 3 else [])
            await one.round()
            await asyncio.sleep(0)
        allocator.want([WEB])
        async with asyncio.timeout(5):
            while not allocator.settled:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
    assert one.collected > 5
    assert not dangling


async def test_a_condition_on_a_prefix_holds_for_no_key_and_fails_for_one() -> None:
    store = MemoryKV()
    nobody = Compare("a/", "version", 0, prefix=True)
    assert (await store.commit((nobody,), (Put("a/1", b""),))).done
    assert not (await store.commit((nobody,), (Put("b", b""),))).done
