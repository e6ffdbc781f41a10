"""This host in a real etcd: what it writes, and that it comes back by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.publish import Address, Host, Member, Publisher, publishable
from clustermesh.settings import EtcdSettings

HOST = Host("alpha", 1, "a1", publishable(["10.0.0.1", "127.0.0.1", "fe80::1", "fd00::1"]), {"role": "infra"})
OTHER = Host("alpha", 1, "a2", publishable(["10.0.0.2"]), {"role": "infra"})
NODE = wire.node_key("alpha", "a1")


@asynccontextmanager
async def publishing(endpoint: str, host: Host = HOST) -> AsyncIterator[Publisher]:
    kv = EtcdKV(EtcdSettings((endpoint,)))
    publisher = Publisher(kv, Member("alpha", 1, host.name), backoff=Backoff(0.05, 0.2), recheck_s=0.5)
    publisher._kv._spread_s = 0.0
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
        number = publisher.allocator.number(HOST.identity_labels)
    labels = "k8s:io.cilium.k8s.policy.cluster=alpha;node:role=infra;"
    assert set(keys) == {
        "cilium/.heartbeat",
        "cilium/cluster-config/alpha",
        f"cilium/state/identities/v1/id/{number}",
        f"cilium/state/identities/v1/value/{labels}/a1",
        "cilium/state/ip/v1/default/10.0.0.1",
        "cilium/state/ip/v1/default/fd00::1",
        "cilium/state/nodes/v1/alpha/a1",
        *(f"cilium/synced/alpha/cilium/state/{one}/v1"
          for one in ("identities", "ip", "nodes", "services", "serviceexports")),
    }  # fmt: skip
    master = keys.pop(f"cilium/state/identities/v1/id/{number}")
    assert (master.value, master.lease) == (labels.encode(), 0)
    assert len({one.lease for one in keys.values()}) == 1
    assert keys["cilium/cluster-config/alpha"].value == (
        b'{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":true}}'
    )
    entry = wire.decode_ip("fd00::1", keys["cilium/state/ip/v1/default/fd00::1"].value)
    assert (entry.identity, entry.host_ip) == (number, "10.0.0.1")


async def test_two_hosts_of_a_cluster_share_the_identity_of_a_label_set(live, kv: EtcdKV) -> None:
    web = wire.encode_identity(["k8s:app=web"], "alpha").decode()
    async with publishing(live.endpoint) as one, publishing(live.endpoint, OTHER) as two:
        one.want("workloads", addresses=[Address("10.1.0.5", web, "prod", "web-0")])
        two.want("workloads", addresses=[Address("10.1.1.5", web, "prod", "web-1")])
        await eventually(lambda: _ok(one))
        await eventually(lambda: _ok(two))
        await eventually(lambda: _has_number(one, web))
        await eventually(lambda: _has_number(two, web))
        assert one.allocator.number(web) == two.allocator.number(web)
        entries = [await kv.get(wire.ip_key(ip)) for ip in ("10.1.0.5", "10.1.1.5")]
        found = [wire.decode_ip(one.key.rpartition("/")[2], one.value) for one in entries if one]
        assert [(one.host_ip, one.pod) for one in found] == [("10.0.0.1", "web-0"), ("10.0.0.2", "web-1")]
        assert len({one.identity for one in found}) == 1


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


async def _has_number(publisher: Publisher, labels: str) -> bool:
    return publisher.ok and publisher.allocator.number(labels) is not None and not publisher.waiting


async def _says(publisher: Publisher, text: str) -> bool:
    return text in publisher.text


async def _absent(kv: EtcdKV, key: str) -> bool:
    return await kv.get(key) is None
