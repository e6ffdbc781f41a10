"""Seeded partitions between a reader and a real etcd: a proxy that cuts, hangs and delays, and compactions meanwhile.

MESHWALL_SEEDS sets how many; the default set runs two, `-m slow` fifty.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.settings import EtcdSettings
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables

SEEDS = int(os.environ.get("MESHWALL_SEEDS", "50"))
HEAL_S = 10


class Proxy:
    """Between the reader and etcd. `mode`: open, cut (connections die, none is taken), hang (nothing moves), slow."""

    def __init__(self, port: int) -> None:
        self.mode = "open"
        self.port = 0
        self._target = port
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
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
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


async def one_write(kv: EtcdKV, rng: random.Random, wanted: set[str]) -> None:
    text = f"10.2.0.{rng.randrange(1, 60)}"
    if rng.random() < 0.4:
        wanted.discard(text)
        await kv.delete(wire.ip_key(text))
    else:
        wanted.add(text)
        await kv.put(wire.ip_key(text), wire.encode_ip(wire.ip_entry(text, 131073, "10.2.0.1")))


async def run_seed(port: int, kv: EtcdKV, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    tables, wanted = Tables(), set[str]()
    await kv.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2, synced_canaries=True)))
    for resource in (wire.IDENTITIES, wire.IPS, wire.NODES):
        await kv.put(wire.canary_key("west", resource), b"")
    for _ in range(40):
        await one_write(kv, rng, wanted)

    def same() -> bool:
        return {str(key.prefix) for key in tables.ips} == wanted

    async with proxied(port) as proxy:
        reader = EtcdKV(EtcdSettings((f"http://127.0.0.1:{proxy.port}",)))
        source = MeshSource(tables, reader, cluster_name="east", cluster_id=1)
        source.follower._backoff = Backoff(0.1, 0.5)
        source.follower._quarantine_s = 1.0
        async with asyncio.TaskGroup() as group:
            task = group.create_task(source.run())
            await until(lambda: source.follower.connected and same(), HEAL_S)
            for mode in rng.sample(["cut", "hang", "slow", "flap"], 2):
                proxy.set("cut" if mode == "flap" else mode)
                if mode in {"cut", "flap"}:
                    await until(lambda: not source.follower.connected, 6)
                before = tables.ips.revision
                for _ in range(rng.randrange(1, 12)):
                    await one_write(kv, rng, wanted)
                if rng.random() < 0.5:
                    await kv.compact(await kv.put("other", b""))
                if mode == "flap":
                    for _ in range(6):
                        proxy.set("open")
                        await asyncio.sleep(rng.random() / 20)
                        proxy.set("cut")
                elif mode != "slow":
                    await asyncio.sleep(
                        rng.choice((0.2, 0.2, 4.5))
                    )  # the last is longer than the watchdog waits
                    assert tables.ips.revision == before, f"{mode}: something moved while cut off"
                proxy.set("open")
                await until(lambda: source.follower.connected and same(), HEAL_S)
            task.cancel()
        await reader.close()


async def until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not converged in time"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(2))
async def test_a_partition_heals_within_ten_seconds(live, kv: EtcdKV, seed: int) -> None:
    await run_seed(live.port, kv, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, SEEDS))
async def test_every_partition_heals_within_ten_seconds(live, kv: EtcdKV, seed: int) -> None:
    await run_seed(live.port, kv, seed)
