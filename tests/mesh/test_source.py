"""The daemon's rows against a real etcd that stops, forgets, restarts empty and is cut off."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.kv import KV
from clustermesh.settings import EtcdSettings
from daemon.model.identity import Identity
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables

WEB = 131073


async def put_cluster(kv: KV, *, canaries: bool = True) -> None:
    config = wire.ClusterConfig(2, synced_canaries=canaries, max_clusters=255)
    await kv.put(wire.config_key("west"), wire.encode_config(config))
    for resource in (wire.IDENTITIES, wire.IPS, wire.NODES):
        await kv.put(wire.canary_key("west", resource), b"2026-11-23T11:08:50Z")


async def put_identity(kv: KV, number: int) -> None:
    await kv.put(wire.identity_key(number), wire.encode_identity([f"k8s:app=a{number}"], "west"))


async def put_ip(kv: KV, number: int, identity: int = WEB) -> None:
    entry = wire.ip_entry(f"10.1.{number >> 8}.{number & 255}", identity, "192.168.5.1")
    await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))


def addresses(tables: Tables) -> set[str]:
    return {str(key.prefix) for key in tables.ips}


async def until(condition: Callable[[], bool], timeout_s: float = 8) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.01)


@asynccontextmanager
async def following(tables: Tables, *endpoints: str, **settings: object) -> AsyncIterator[MeshSource]:
    kv = EtcdKV(EtcdSettings(endpoints))
    source = MeshSource(tables, kv, cluster_name="east", cluster_id=1, **settings)  # type: ignore[arg-type]
    source.follower._backoff = Backoff(0.1, 0.5)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(source.run())
        try:
            yield source
        finally:
            task.cancel()
    await kv.close()


@pytest.fixture
def tables() -> Tables:
    return Tables()


async def test_the_store_becomes_rows_and_changes_follow_within_a_second(
    live, kv: EtcdKV, tables: Tables
) -> None:
    await put_cluster(kv)
    await put_identity(kv, WEB)
    for number in range(1, 51):
        await put_ip(kv, number)
    async with following(tables, live.endpoint):
        await until(lambda: tables.ips.synced)
        assert len(tables.ips) == 50
        assert tables.status["mesh:west"].ok
        await put_identity(kv, WEB + 1)
        await put_ip(kv, 60, WEB + 1)
        await until(lambda: "10.1.0.60" in addresses(tables), 1)
        assert Identity(WEB + 1) in tables.identities


async def test_a_stopped_etcd_changes_nothing_and_is_resynced_by_difference(
    etcd, kv: EtcdKV, tables: Tables
) -> None:
    await put_cluster(kv)
    await put_identity(kv, WEB)
    for number in range(1, 11):
        await put_ip(kv, number)
    async with following(tables, etcd.endpoint):
        await until(lambda: "mesh" in tables.status and tables.status["mesh"].ok)
        assert len(tables.ips) == 10
        revisions = tables.ips.revision, tables.identities.revision
        etcd.stop()
        await until(lambda: not tables.status["mesh"].ok)
        assert "mesh:west" in tables.ips.stale_since
        await asyncio.sleep(1)
        assert (tables.ips.revision, tables.identities.revision) == revisions
        etcd.start()
        await until(lambda: "mesh" in tables.status and tables.status["mesh"].ok)
        assert (tables.ips.revision, tables.identities.revision) == revisions
        assert not tables.ips.stale_since
        await put_ip(kv, 20)
        await until(lambda: "10.1.0.20" in addresses(tables), 1)


async def test_deletions_during_an_outage_and_a_compaction_are_not_missed(
    etcd, kv: EtcdKV, tables: Tables
) -> None:
    await put_cluster(kv)
    for number in range(1, 11):
        await put_ip(kv, number)
    async with following(tables, etcd.endpoint) as source:
        await until(lambda: source.follower.connected and len(tables.ips) == 10)
        etcd.hang()
        await until(lambda: not source.follower.connected)
        etcd.resume()
        await kv.delete(wire.ip_key("10.1.0.3"))
        await kv.compact(await kv.put("other", b""))
        await until(lambda: "10.1.0.3" not in addresses(tables))
        await until(lambda: source.follower.connected)
        assert len(tables.ips) == 9


async def test_a_store_that_comes_back_empty_takes_nothing_away(etcd, kv: EtcdKV, tables: Tables) -> None:
    await put_cluster(kv)
    await put_identity(kv, WEB)
    for number in range(1, 31):
        await put_ip(kv, number)
    async with following(tables, etcd.endpoint) as source:
        await until(lambda: source.follower.connected and len(tables.ips) == 30)
        etcd.stop()
        await until(lambda: not source.follower.connected)
        etcd.wipe()
        etcd.start()
        await until(lambda: source.follower.connected)
        assert len(tables.ips) == 30
        assert tables.status["mesh:west"].details["held"] == 31


async def test_a_second_endpoint_takes_over(live, kv: EtcdKV, tables: Tables) -> None:
    await put_cluster(kv)
    await put_ip(kv, 1)
    async with following(tables, "http://127.0.0.1:9", live.endpoint):
        await until(lambda: len(tables.ips) == 1)


async def test_an_empty_store_of_a_cluster_without_markers_is_held_and_then_believed(
    etcd, kv: EtcdKV, tables: Tables
) -> None:
    await put_cluster(kv, canaries=False)
    await put_ip(kv, 1)
    async with following(tables, etcd.endpoint) as source:
        source.follower._quarantine_s = 1.0
        await until(lambda: source.follower.connected and len(tables.ips) == 1)
        etcd.stop()
        await until(lambda: not source.follower.connected)
        etcd.wipe()
        etcd.start()
        await until(lambda: source.follower.connected)
        assert addresses(tables) == {"10.1.0.1"}
        assert "held" in tables.status["mesh:west"].text
        await until(lambda: not tables.ips)


async def test_being_stopped_while_the_store_goes_away_is_still_being_stopped(live, tables: Tables) -> None:
    kv = EtcdKV(EtcdSettings((live.endpoint,)))
    source = MeshSource(tables, kv, cluster_name="east", cluster_id=1)
    async with asyncio.timeout(3), asyncio.TaskGroup() as group:
        task = group.create_task(source.run())
        await until(lambda: source.follower.connected)
        task.cancel()
        await kv.close()
    assert task.cancelled()
