"""Clusters in a store become rows, and stay rows when the store goes away."""

import asyncio

import pytest

from clustermesh import wire
from clustermesh.kv import MemoryKV
from clustermesh.services import Port, Service, ServiceExport, encode_service, encode_service_export
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import parse_prefix
from daemon.sources.mesh import MeshSource
from daemon.state.tables import HostRow, IpKey, NodeKey, ServiceKey, Tables

WEB = 131073
METRICS = 131074
LABELS = ("k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod")


async def put_cluster(kv: MemoryKV, name: str = "west", number: int = 2, *, canaries: bool = False) -> None:
    config = wire.ClusterConfig(number, synced_canaries=canaries, max_clusters=255)
    await kv.put(wire.config_key(name), wire.encode_config(config))


async def put_identity(
    kv: MemoryKV, number: int, cluster: str = "west", labels: tuple[str, ...] = LABELS
) -> None:
    await kv.put(wire.identity_key(number), wire.encode_identity(labels, cluster))


async def put_ip(
    kv: MemoryKV, prefix: str, identity: int, host_ip: str = "192.168.5.1", pod: str = ""
) -> None:
    entry = wire.ip_entry(prefix, identity, host_ip, pod=pod)
    await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))


async def put_node(kv: MemoryKV, name: str, address: str, cluster: str = "west", number: int = 2) -> None:
    node = wire.Node(
        name, cluster, (wire.NodeAddress("InternalIP", address),), cluster_id=number, source="local",
        labels={"kubernetes.io/hostname": name},
    )  # fmt: skip
    await kv.put(wire.node_key(cluster, name), wire.encode_node(node))


def make(tables: Tables, kv: MemoryKV, **settings: object) -> MeshSource:
    return MeshSource(tables, kv, cluster_name="east", cluster_id=1, **settings)  # type: ignore[arg-type]


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def kv() -> MemoryKV:
    return MemoryKV()


async def test_what_is_in_the_store_at_start_becomes_rows(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    await put_cluster(kv)
    await put_identity(kv, WEB)
    await put_ip(kv, "10.1.0.5", WEB, pod="web-0")
    await put_node(kv, "w1", "192.168.5.1")
    async with running(make(tables, kv)):
        await until(lambda: tables.identities.synced)
    row = tables.identities[Identity(WEB)]
    assert row.source == "mesh:west"
    assert row.labels == parse_labels([*LABELS, "k8s:io.cilium.k8s.policy.cluster=west"])
    ip = tables.ips[IpKey(parse_prefix("10.1.0.5"), "mesh:west")]
    assert (ip.identity, ip.name, ip.node) == (WEB, "web-0", "192.168.5.1")
    node = tables.nodes[NodeKey("west", "w1")]
    assert node.addresses == (("InternalIP", parse_prefix("192.168.5.1")),)
    assert parse_labels(["k8s:kubernetes.io/hostname=w1"]) == node.labels
    assert tables.status["mesh:west"].ok


async def test_later_changes_follow(tables: Tables, kv: MemoryKV, running, until):
    await put_cluster(kv)
    async with running(make(tables, kv)):
        await until(lambda: tables.identities.synced)
        await put_identity(kv, WEB)
        await put_ip(kv, "10.1.0.5", WEB)
        await until(lambda: IpKey(parse_prefix("10.1.0.5"), "mesh:west") in tables.ips)
        await kv.delete(wire.ip_key("10.1.0.5"))
        await until(lambda: not tables.ips)
        await kv.delete(wire.identity_key(WEB))
        await until(lambda: not tables.identities)


async def test_a_lost_store_changes_no_row_and_says_since_when(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    await put_cluster(kv)
    await put_identity(kv, WEB)
    await put_ip(kv, "10.1.0.5", WEB)
    async with running(make(tables, kv, clock=lambda: 1000.0)):
        await until(lambda: tables.ips.synced)
        revision = tables.ips.revision, tables.identities.revision
        kv.cut("cable pulled")
        await until(lambda: bool(tables.ips.stale_since))
        assert tables.ips.stale_since == {"mesh:west": 1000.0}
        assert not tables.status["mesh:west"].ok
        assert "cable pulled" in tables.status["mesh"].text
        assert (tables.ips.revision, tables.identities.revision) == revision
        kv.heal()
        await put_ip(kv, "10.1.0.6", WEB)
        await kv.delete(wire.ip_key("10.1.0.5"))
        await until(lambda: IpKey(parse_prefix("10.1.0.6"), "mesh:west") in tables.ips)
        await until(lambda: IpKey(parse_prefix("10.1.0.5"), "mesh:west") not in tables.ips)
        await until(lambda: not tables.ips.stale_since)  # services are listed after addresses
        assert tables.status["mesh:west"].ok


async def test_identities_of_this_host_are_not_overwritten(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    from daemon.state.tables import IdentityRow

    mine = IdentityRow(parse_labels(["k8s:app=mine"]), "file")
    tables.identities.put(Identity(WEB), mine)
    await put_cluster(kv)
    await put_identity(kv, WEB)
    async with running(make(tables, kv)):
        await until(lambda: tables.identities.synced)
        await kv.delete(wire.identity_key(WEB))
        await put_identity(kv, METRICS)
        await until(lambda: Identity(METRICS) in tables.identities)
    assert tables.identities[Identity(WEB)] == mine


async def test_an_unreachable_store_does_not_hold_the_tables_back_for_ever(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    kv.cut()
    async with running(make(tables, kv, sync_wait_s=0.05)):
        await until(lambda: tables.ips.synced)
    assert not tables.status["mesh"].ok


async def test_refused_entries_are_counted_in_the_status(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    await put_cluster(kv)
    await put_ip(kv, "127.0.0.1", WEB)
    await put_identity(kv, METRICS, cluster="north")
    async with running(make(tables, kv)):
        await until(lambda: tables.ips.synced)
    details = tables.status["mesh:west"].details
    assert details["refused_by_reason"] == {"special_address": 1, "cluster_label": 1}
    assert not tables.ips
    assert not tables.identities


async def test_a_nodes_address_is_told_by_the_node_and_not_hidden_by_its_own_entry(
    tables: Tables, kv: MemoryKV, running, until
):
    await put_cluster(kv)
    await put_node(kv, "w1", "192.168.5.1")
    await put_ip(kv, "192.168.5.1", 1)
    async with running(make(tables, kv)):
        await until(lambda: tables.ips.synced)
        assert not tables.ips
        assert len(tables.nodes) == 1
        await put_ip(kv, "192.168.5.1", WEB)
        await until(lambda: IpKey(parse_prefix("192.168.5.1"), "mesh:west") in tables.ips)


async def test_a_node_cannot_take_this_hosts_address_or_a_special_one(
    tables: Tables, kv: MemoryKV, running, until
):
    mine = parse_prefix("10.0.0.9")
    tables.host.put("host", HostRow("e1", "east", 1, frozenset(), frozenset({mine})))
    await put_cluster(kv)
    await put_node(kv, "w1", "10.0.0.9")
    await put_node(kv, "w2", "127.0.0.1")
    async with running(make(tables, kv)):
        await until(lambda: tables.nodes.synced)
    assert [row.addresses for row in tables.nodes.rows.values()] == [(), ()]
    assert tables.status["mesh:west"].details["refused_by_reason"] == {"our_address": 1, "special_address": 1}


async def test_a_listing_that_is_still_coming_is_waited_for_and_one_that_is_not_is_not(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    await put_cluster(kv, canaries=True)  # and its markers never come
    source = make(tables, kv, sync_wait_s=0.2)
    async with running(source):
        for _ in range(4):
            await asyncio.sleep(0.1)
            source.follower.pages += 1
            assert not tables.ips.synced
        await until(lambda: tables.ips.synced)


async def test_services_and_exports_become_rows_and_go_with_their_keys(
    tables: Tables, kv: MemoryKV, running, until
) -> None:
    await put_cluster(kv)
    web = Service("west", "prod", "web", backends={"10.1.0.5": {"http": Port("TCP", 80)}}, cluster_id=2)
    key = wire.service_key("west", "prod", "web")
    await kv.put(key, encode_service(web))
    export = ServiceExport("west", "web", "prod", "2026-01-01T00:00:00Z", (), "ClusterSetIP", "None")
    await kv.put(wire.service_export_key("west", "prod", "web"), encode_service_export(export))
    row = ServiceKey("prod", "web", "mesh:west")
    async with running(make(tables, kv)):
        await until(lambda: row in tables.services and row in tables.exports)
        assert tables.services[row].service == web
        assert not tables.services[row].is_global
        assert tables.services.synced
        assert tables.status["mesh:west"].details["services"] == 1
        await kv.delete(key)
        await until(lambda: row not in tables.services)
        kv.cut()
        await until(lambda: "mesh:west" in tables.exports.stale_since)
        assert tables.exports[row] == export
