"""This host in a real etcd: what it writes, and that it comes back by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.publish import Host, Publisher, publishable
from clustermesh.settings import EtcdSettings

HOST = Host("alpha", 1, "a1", publishable(["10.0.0.1", "127.0.0.1", "fe80::1", "fd00::1"]), {"role": "infra"})
NODE = wire.node_key("alpha", "a1")


@asynccontextmanager
async def publishing(endpoint: str, host: Host = HOST) -> AsyncIterator[Publisher]:
    kv = EtcdKV(EtcdSettings((endpoint,)))
    publisher = Publisher(kv, backoff=Backoff(0.05, 0.2), recheck_s=0.5)
    publisher.publish(host)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(publisher.run())
        try:
            yield publisher
        finally:
            task.cancel()
    await kv.close()


async def has(kv: EtcdKV, key: str) -> wire.Node | None:
    async with asyncio.timeout(6):
        while (found := await kv.get(key)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return None if found is None else wire.decode_node(key.rpartition("/")[2], found.value)


async def eventually(condition) -> None:
    async with asyncio.timeout(6):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_host_is_written_with_configuration_markers_and_heartbeat_all_leased(
    live, kv: EtcdKV
) -> None:
    async with publishing(live.endpoint) as publisher:
        await eventually(lambda: _ok(publisher))
        keys = {one.key: one for one in (await kv.list("cilium/")).entries}
    assert set(keys) == {
        "cilium/.heartbeat",
        "cilium/cluster-config/alpha",
        "cilium/state/ip/v1/default/10.0.0.1",
        "cilium/state/ip/v1/default/fd00::1",
        "cilium/state/nodes/v1/alpha/a1",
        *(f"cilium/synced/alpha/cilium/state/{one}/v1"
          for one in ("identities", "ip", "nodes", "services", "serviceexports")),
    }  # fmt: skip
    assert len({one.lease for one in keys.values()}) == 1
    assert keys["cilium/cluster-config/alpha"].value == (
        b'{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}'
    )
    entry = wire.decode_ip("fd00::1", keys["cilium/state/ip/v1/default/fd00::1"].value)
    assert (entry.identity, entry.host_ip) == (1, "10.0.0.1")


async def test_an_address_that_left_the_host_leaves_the_store(live, kv: EtcdKV) -> None:
    async with publishing(live.endpoint) as publisher:
        await has(kv, NODE)
        publisher.publish(replace(HOST, addresses=publishable(["10.0.0.1"])))
        await eventually(lambda: _absent(kv, wire.ip_key("fd00::1")))
        assert await kv.get(wire.ip_key("10.0.0.1"))


async def test_keys_come_back_after_a_lost_lease_and_after_somebody_deleted_them(live, kv: EtcdKV) -> None:
    async with publishing(live.endpoint):
        await has(kv, NODE)
        await kv.delete(NODE)
        await has(kv, NODE)
        found = await kv.get(NODE)
        assert found is not None
        await kv.revoke(found.lease)
        await has(kv, NODE)
        again = await kv.get(NODE)
        assert again is not None
        assert again.lease != found.lease


async def test_keys_come_back_when_the_store_restarts_empty(etcd, kv: EtcdKV) -> None:
    async with publishing(etcd.endpoint):
        await has(kv, NODE)
        etcd.stop()
        etcd.wipe()
        etcd.start()
        await asyncio.sleep(0.2)
        fresh = EtcdKV(EtcdSettings((etcd.endpoint,)))
        await has(fresh, NODE)
        await fresh.close()


async def test_another_clusters_id_in_the_configuration_stops_us(live, kv: EtcdKV) -> None:
    await kv.put(wire.config_key("alpha"), wire.encode_config(wire.ClusterConfig(7)))
    async with publishing(live.endpoint) as publisher:
        await eventually(lambda: _says(publisher, "cilium/cluster-config/alpha says id 7"))
        assert await kv.get(NODE) is None


async def test_an_address_of_somebody_else_is_not_overwritten(live, kv: EtcdKV) -> None:
    theirs = wire.ip_entry("10.0.0.1", 131073, "192.168.5.1")
    await kv.put(wire.ip_key("10.0.0.1"), wire.encode_ip(theirs))
    async with publishing(live.endpoint) as publisher:
        await eventually(lambda: _says(publisher, "held by others"))
        found = await kv.get(wire.ip_key("10.0.0.1"))
        assert found is not None
        assert found.value == wire.encode_ip(theirs)
        assert await kv.get(wire.ip_key("fd00::1"))


async def _ok(publisher: Publisher) -> bool:
    return publisher.ok


async def _says(publisher: Publisher, text: str) -> bool:
    return text in publisher.text


async def _absent(kv: EtcdKV, key: str) -> bool:
    return await kv.get(key) is None
