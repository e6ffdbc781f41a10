"""Seeded partitions between readers and real etcds: a proxy that cuts, hangs, delays and leads to another, empty store.

Each scenario is a cluster of its own in the cached layout, so that fifty of them run side by side over two etcds;
compactions hit them all. MESHWALL_SEEDS sets how many; a thousand run with the slow tests.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.kv import Compacted
from clustermesh.settings import EtcdSettings, split_endpoint
from daemon.sources.mesh import MeshSource
from daemon.state.tables import IpKey, Tables

SEEDS = int(os.environ.get("MESHWALL_SEEDS", "50"))
HEAL_S = 10.0
QUARANTINE_S = 2.0
TRANSFER = 65536
MODES = ("cut", "hang", "slow", "flap", "wiped")


class Proxy:
    """Between a reader and etcd. `mode`: open, cut (connections die, none is taken), hang (nothing moves), slow."""

    def __init__(self, port: int) -> None:
        self.mode = "open"
        self.port = 0
        self.target = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.mode == "cut":
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(TRANSFER):
            while self.mode == "hang":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            if self.mode == "slow":
                await asyncio.sleep(0.05)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def set(self, mode: str) -> None:
        self.mode = mode
        if mode == "cut":
            for task in self._tasks:
                task.cancel()

    async def stop(self) -> None:
        self.set("cut")
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


class Watched(Tables):
    """Tables that remember when a row went away that nobody had touched."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: set[str] = set()
        self.touched: set[str] = set()  # written since all was well
        self.flaps: list[str] = []
        delete = self.ips.delete

        def watched(key: IpKey) -> bool:
            if str(key.prefix) in self.wanted - self.touched:
                self.flaps.append(str(key.prefix))
            return delete(key)

        self.ips.delete = watched  # type: ignore[method-assign]

    @property
    def addresses(self) -> set[str]:
        return {str(key.prefix) for key in self.ips}


class Scenario:
    """One cluster, its writer, a reader behind a proxy, and what the reader should know."""

    def __init__(self, seed: int, stores: list[EtcdKV], ports: list[int], proxy: Proxy) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - repeatable
        self.name, self.id = f"seed-{seed}", seed % 255 + 1
        self.stores, self.ports = stores, ports
        self.now = 0  # which store the cluster is in
        self.proxy = proxy
        self.tables = Watched()
        settings = EtcdSettings((f"http://127.0.0.1:{proxy.port}",))
        self.reader = EtcdKV(settings)
        self.source = MeshSource(
            self.tables, self.reader, cluster_name="here", cluster_id=0, only=self.name, name=self.name
        )
        self.source.follower._backoff = Backoff(0.1, 0.5)
        self.source.follower._quarantine_s = QUARANTINE_S

    @property
    def kv(self) -> EtcdKV:
        return self.stores[self.now]

    def key(self, text: str) -> str:
        return f"{wire.CACHE_IPS}/{self.name}/{text}"

    async def begin(self) -> None:
        config = wire.ClusterConfig(self.id, synced_canaries=True, cached=True)
        await self.kv.put(wire.config_key(self.name), wire.encode_config(config))
        for text in self.tables.wanted:
            await self.put(text)
        for resource in (wire.CACHE_IDENTITIES, wire.CACHE_IPS, wire.CACHE_NODES):
            await self.kv.put(wire.canary_key(self.name, resource), b"")

    async def put(self, text: str) -> None:
        await self.kv.put(
            self.key(text), wire.encode_ip(wire.ip_entry(text, (self.id << 16) + 1, "10.2.0.1"))
        )

    async def write(self) -> None:
        text = f"10.2.0.{self.rng.randrange(1, 60)}"
        self.tables.touched.add(text)
        if self.rng.random() < 0.4:
            self.tables.wanted.discard(text)
            await self.kv.delete(self.key(text))
        else:
            self.tables.wanted.add(text)
            await self.put(text)

    async def move(self) -> None:
        """The store was lost: another one, in which the cluster writes everything again, perhaps late."""
        self.now = 1 - self.now
        for prefix in (f"{wire.CACHE_IPS}/{self.name}/", f"{wire.SYNCED}{self.name}/"):
            for entry in (await self.kv.list(prefix)).entries:
                await self.kv.delete(entry.key)
        self.proxy.target = self.ports[self.now]

    async def converged(self, within_s: float = HEAL_S) -> None:
        async with asyncio.timeout(within_s):
            while not (self.source.follower.connected and self.tables.addresses == self.tables.wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

        self.tables.touched.clear()

    async def lost(self) -> None:
        async with asyncio.timeout(8):
            while self.source.follower.connected:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def outage(self, mode: str) -> None:
        self.proxy.set({"flap": "cut", "wiped": "cut"}.get(mode, mode))
        if mode in {"cut", "flap", "wiped"}:
            await self.lost()
        before = self.tables.ips.revision
        if mode == "wiped":
            await self.move()
        for _ in range(self.rng.randrange(1, 12)):
            await self.write()
        if self.rng.random() < 0.3:
            with suppress(Compacted):  # another scenario was faster
                await self.kv.compact(await self.kv.put(f"other/{self.name}", b""))
        if mode == "flap":
            for _ in range(6):
                self.proxy.set("open")
                await asyncio.sleep(self.rng.random() / 20)
                self.proxy.set("cut")
        elif mode != "slow":
            pause_s = self.rng.choice((0.2, 0.2, 5.0))
            await asyncio.sleep(pause_s)
            assert pause_s < 5 or not self.source.follower.connected, "a hung member is left within 5 s"
            assert self.tables.ips.revision == before, f"{mode}: something moved while cut off"
        self.proxy.set("open")
        if mode == "wiped":
            await asyncio.sleep(self.rng.random())  # the cluster's writer comes later than its readers
            await self.begin()
        await self.converged(HEAL_S + (QUARANTINE_S if mode == "wiped" else 0))

    async def run(self) -> None:
        for _ in range(40):
            await self.write()
        await self.begin()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.source.run())
            await self.converged()
            for mode in self.rng.sample(MODES, 2):
                try:
                    await self.outage(mode)
                except (TimeoutError, AssertionError) as error:
                    status = self.tables.status.get(f"mesh:{self.name}")
                    differs = self.tables.addresses ^ self.tables.wanted
                    error.add_note(f"{self.name}: {mode}: {sorted(differs)}: {status}")
                    raise
            task.cancel()
        await self.reader.close()
        assert not self.tables.flaps, f"{self.name}: left and came back"


async def run_seeds(endpoints: list[str], seeds: range) -> None:
    ports = [split_endpoint(one)[2] for one in endpoints]
    stores = [EtcdKV(EtcdSettings((one,))) for one in endpoints]

    async def one(seed: int) -> None:
        async with proxied(ports[0]) as proxy:
            await Scenario(seed, stores, ports, proxy).run()

    async with asyncio.TaskGroup() as group:
        for seed in seeds:
            group.create_task(one(seed))
    for store in stores:
        await store.close()


async def test_partitions_heal_within_ten_seconds_and_nothing_moves_meanwhile(live, etcd) -> None:
    await run_seeds([live.endpoint, etcd.endpoint], range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 20))
async def test_many_more_partitions_heal(live, etcd, batch: int) -> None:
    await run_seeds([live.endpoint, etcd.endpoint], range(50 * batch, 50 * batch + 50))
