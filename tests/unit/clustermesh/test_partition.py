"""Seeded outages: after each, what is in force is what is in the store, and nothing moved meanwhile."""

import asyncio
import os
import random
from collections.abc import Sequence

import pytest

from clustermesh import wire
from clustermesh.follow import Backoff, Follower
from clustermesh.kv import MemoryKV
from clustermesh.remote import Change, IdentityDeleted, IdentityUpserted, IpDeleted, IpUpserted, Mesh
from clustermesh.trust import Trust

SEEDS = int(os.environ.get("MESHWALL_SEEDS", "50"))
CLUSTERS = {"west": 2, "north": 3}


class World:
    """A store with two clusters, what should be in force, and what is."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - repeatable
        self.kv = MemoryKV()
        self.wanted: dict[tuple[str, int], int] = {}
        self.addresses: dict[tuple[str, int], int] = {}
        self.identities: set[int] = set()
        self.changes = 0
        self.flaps: list[Change] = []

    def emit(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change:
                case IpUpserted(cluster, cidr, identity):
                    if self.addresses.get((cluster, cidr[1])) == identity:
                        self.flaps.append(change)
                    self.addresses[cluster, cidr[1]] = identity
                case IpDeleted(cluster, cidr):
                    if (cluster, cidr[1]) in self.wanted:
                        self.flaps.append(change)
                    del self.addresses[cluster, cidr[1]]
                case IdentityUpserted():
                    self.identities.add(change.identity)
                case IdentityDeleted():
                    self.identities.discard(change.identity)
                case _:
                    continue
            self.changes += 1

    async def begin(self) -> None:
        for name, number in CLUSTERS.items():
            config = wire.ClusterConfig(number, synced_canaries=True)
            await self.kv.put(wire.config_key(name), wire.encode_config(config))
            for resource in (wire.IDENTITIES, wire.IPS, wire.NODES):
                await self.kv.put(wire.canary_key(name, resource), b"")
        for _ in range(60):
            await self.write()

    async def write(self) -> None:
        """One random address appears, moves to another identity, or leaves."""
        name = self.rng.choice(list(CLUSTERS))
        number = (10 << 24) + (CLUSTERS[name] << 16) + self.rng.randrange(64)
        key = wire.ip_key(wire.ip_text(4, number))
        if self.rng.random() < 0.3:
            self.wanted.pop((name, number), None)
            await self.kv.delete(key)
            return
        identity = (CLUSTERS[name] << 16) + self.rng.randrange(1, 9)
        self.wanted[name, number] = identity
        await self.kv.put(wire.identity_key(identity), wire.encode_identity(["k8s:a=b"], name))
        await self.kv.put(key, wire.encode_ip(wire.ip_entry(wire.ip_text(4, number), identity)))

    async def unseen(self, count: int) -> None:
        """Writes that the follower cannot see, because it is cut off."""
        self.kv.heal()
        for _ in range(count):
            await self.write()
        self.kv.cut()


async def settle(world: World, follower: Follower) -> None:
    async with asyncio.timeout(5):
        while not follower.connected or world.addresses != world.wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_every_outage_heals_without_a_missed_deletion_or_a_flap(seed: int) -> None:
    world = World(seed)
    await world.begin()
    mesh = Mesh(Trust("east", 1, clusters=CLUSTERS))
    follower = Follower(world.kv, mesh, world.emit, backoff=Backoff(0.001, 0.003), quarantine_s=0.05)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        await settle(world, follower)
        for _ in range(6):
            for _ in range(world.rng.randrange(10)):
                await world.write()
                if world.rng.random() < 0.5:
                    await asyncio.sleep(0)
            if world.rng.random() < 0.3:
                world.kv.compact()
            world.kv.cut()
            async with asyncio.timeout(5):
                while follower.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            before = world.changes
            await world.unseen(world.rng.randrange(20))
            if world.rng.random() < 0.5:
                world.kv.heal()
                world.kv.compact()
                world.kv.cut()
            await asyncio.sleep(0.004)
            assert world.changes == before, "something moved while the store was out of reach"
            world.kv.heal()
            await settle(world, follower)
        task.cancel()
    assert not world.flaps
