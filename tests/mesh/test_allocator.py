"""Identities from a real etcd: nodes that race in one process and in two, leases that end, what is collected."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from clustermesh import wire
from clustermesh.allocator import Allocator
from clustermesh.collect import Collector
from clustermesh.etcd import EtcdKV
from clustermesh.kv import KVError, LeaseLost
from clustermesh.leases import Leases
from clustermesh.settings import EtcdSettings

FIRST, LAST = wire.identity_range(1)
WEB = "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=alpha;"


@asynccontextmanager
async def allocating(endpoint: str, node: str) -> AsyncIterator[Allocator]:
    kv = EtcdKV(EtcdSettings((endpoint,)))
    leases = Leases(kv)
    allocator = Allocator(kv, leases, first=FIRST, last=LAST, node=node)

    async def run() -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(leases.keep())
                    await allocator.run()
            except* LeaseLost:
                leases.forget()
            except* KVError:
                pass
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run())
        try:
            yield allocator
        finally:
            task.cancel()
    await kv.close()


async def settled(*allocators: Allocator) -> None:
    async with asyncio.timeout(20):
        while not all(one.settled for one in allocators):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def masters(kv: EtcdKV) -> dict[int, str]:
    found = (await kv.list(wire.IDENTITY_MASTERS)).entries
    return {int(one.key.rpartition("/")[2]): one.value.decode() for one in found}


async def test_ten_nodes_that_race_get_one_number_for_each_label_set(live, kv: EtcdKV) -> None:
    sets = [f"k8s:app=a{number};" for number in range(10)]
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(allocating(live.endpoint, f"n{one}")) for one in range(10)]
        for node in nodes:
            node.want(sets)
        await settled(*nodes)
        assert len({tuple(sorted(node.numbers.items())) for node in nodes}) == 1
    assert sorted((await masters(kv)).values()) == sorted(sets)
    references = (await kv.list(wire.IDENTITY_REFERENCES)).entries
    assert len(references) == 100
    assert all(one.lease for one in references)
    assert not (await kv.list(wire.IDENTITY_LOCKS)).entries


async def test_masters_and_leases_that_are_lost_come_back_with_the_same_number(live, kv: EtcdKV) -> None:
    async with allocating(live.endpoint, "n1") as node:
        node.want([WEB])
        await settled(node)
        number = node.number(WEB)
        assert number is not None
        await kv.delete(wire.identity_key(number))
        async with asyncio.timeout(1.5):
            while not await kv.get(wire.identity_key(number)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await settled(node)
        reference = await kv.get(wire.identity_value_key(WEB, "n1"))
        assert reference is not None
        await kv.revoke(reference.lease)
        node._reassert_s = 0.05  # as if five minutes had passed
        node._wake.set()
        async with asyncio.timeout(10):
            while not await kv.get(reference.key):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await settled(node)
        assert node.numbers == {WEB: number}


async def test_an_identity_that_nobody_uses_is_collected_in_two_rounds(live, kv: EtcdKV) -> None:
    async with allocating(live.endpoint, "n1") as node:
        node.want([WEB])
        await settled(node)
        collector = Collector(
            kv, Leases(kv), cluster="alpha", first=FIRST, last=LAST, node="n1", most_per_minute=10**6
        )
        await collector.round()
        await collector.round()
        assert len(await masters(kv)) == 1
        node.want([])
        await settled(node)
        await collector.round()
        assert len(await masters(kv)) == 1
        await collector.round()
        assert await masters(kv) == {}


RACER = """
import asyncio, sys
sys.path.insert(0, sys.argv[4])
from clustermesh.allocator import Allocator
from clustermesh.etcd import EtcdKV, EtcdSettings
from clustermesh.leases import Leases

async def main():
    kv = EtcdKV(EtcdSettings((sys.argv[1],)))
    allocator = Allocator(kv, Leases(kv), first=65536, last=131071, node=sys.argv[2])
    sets = [f"k8s:app=a{number};k8s:io.cilium.k8s.policy.cluster=alpha;" for number in range(int(sys.argv[3]))]
    allocator.want(sets)
    task = asyncio.ensure_future(allocator.run())
    while not allocator.settled:
        await asyncio.sleep(0.05)
    print(";".join(f"{labels.split(';')[0]}={number}" for labels, number in sorted(allocator.numbers.items())))
    print(len(allocator.problems))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await kv.close()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_two_processes_that_race_on_ten_thousand_label_sets_agree(live, kv: EtcdKV) -> None:
    await race(live.endpoint, 10_000)
    assert len(set((await masters(kv)).values())) == len(await masters(kv)) == 10_000


async def test_two_processes_that_race_agree(live, kv: EtcdKV) -> None:
    await race(live.endpoint, 200)
    assert len(set((await masters(kv)).values())) == len(await masters(kv)) == 200


async def race(endpoint: str, count: int) -> None:
    root = Path(wire.__file__).parents[1]
    command = [sys.executable, "-c", RACER, endpoint]
    racers = [
        await asyncio.create_subprocess_exec(
            *command, name, str(count), str(root), stdout=subprocess.PIPE, env={**os.environ}
        )
        for name in ("n1", "n2")
    ]
    said = [(await one.communicate())[0] for one in racers]
    assert said[0] == said[1]
    assert said[0].count(b"k8s:app=") == count
