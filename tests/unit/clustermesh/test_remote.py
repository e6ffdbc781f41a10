"""One store, many clusters: whose an entry is, when it counts, and what a listing that misses it means."""

from clustermesh import wire
from clustermesh.kv import Entry, Event
from clustermesh.remote import (
    SHARED_STORE,
    Change,
    ClusterChanged,
    IdentityDeleted,
    IdentityUpserted,
    IpDeleted,
    IpUpserted,
    Mesh,
    NodeUpserted,
    Part,
    ServiceDeleted,
    ServiceUpserted,
    State,
)
from clustermesh.services import Port, Service, encode_service
from clustermesh.trust import Quotas, Trust

WEB, OTHER = 131073, 196609  # of west (2) and north (3)
PART = {part.prefix: part for part in SHARED_STORE}


class Store:
    """A mesh and a shorthand for telling it things."""

    def __init__(self, trust: Trust | None = None) -> None:
        self.mesh = Mesh(trust or Trust("east", 1))

    def put(self, key: str, value: bytes | None) -> list[Change]:
        return self.changes(self.mesh.applied(part_of(key), [Event(key, value, 5)], 100.0))

    def listing(self, prefix: str, entries: dict[str, bytes], *, doubtful: bool = False) -> list[Change]:
        found = [Entry(key, value, 5) for key, value in entries.items()]
        return self.changes(self.mesh.listed(PART[prefix], found, 100.0, doubtful=doubtful))

    def changes(self, batches: object) -> list[Change]:
        flat = [change for batch in batches for change in batch]  # type: ignore[attr-defined]
        return [one for one in flat if not isinstance(one, ClusterChanged)]

    def cluster(
        self, name: str, number: int, *, canaries: bool = False, cached: bool = False
    ) -> list[Change]:
        config = wire.ClusterConfig(number, canaries, cached)
        return self.put(wire.config_key(name), wire.encode_config(config))

    def ip(self, text: str, identity: int, host_ip: str = "192.168.5.1") -> list[Change]:
        return self.put(*ip(text, identity, host_ip))


def part_of(key: str) -> Part:
    return next(part for part in SHARED_STORE if key.startswith(part.prefix))


def ip(text: str, identity: int, host_ip: str = "192.168.5.1") -> tuple[str, bytes]:
    entry = wire.ip_entry(text, identity, host_ip)
    return wire.ip_key(entry.prefix), wire.encode_ip(entry)


def identity(number: int, cluster: str) -> tuple[str, bytes]:
    return wire.identity_key(number), wire.encode_identity(["k8s:a=b"], cluster)


def node(name: str, cluster: str, number: int, *addresses: str) -> tuple[str, bytes]:
    found = tuple(wire.NodeAddress("InternalIP", one) for one in addresses)
    return wire.node_key(cluster, name), wire.encode_node(wire.Node(name, cluster, found, cluster_id=number))


def test_entries_wait_for_their_clusters_configuration() -> None:
    store = Store()
    assert store.put(*identity(WEB, "west")) == []
    assert store.ip("10.1.0.5", WEB) == []
    assert store.mesh.waiting == 2
    found = store.cluster("west", 2)
    assert [type(one) for one in found] == [IdentityUpserted, IpUpserted]
    assert store.mesh.waiting == 0


def test_entries_wait_for_the_marker_of_their_kind() -> None:
    store = Store()
    store.cluster("west", 2, canaries=True)
    assert store.put(*identity(WEB, "west")) == []
    assert store.ip("10.1.0.5", WEB) == []
    assert [type(one) for one in store.put(wire.canary_key("west", wire.IDENTITIES), b"")] == [
        IdentityUpserted
    ]
    assert store.mesh.remotes["west"].state is State.SYNCING
    assert [type(one) for one in store.put(wire.canary_key("west", wire.IPS), b"")] == [IpUpserted]
    store.put(wire.canary_key("west", wire.NODES), b"")
    assert store.mesh.remotes["west"].state is State.SYNCED


def test_a_deleted_marker_or_configuration_means_nothing() -> None:
    store = Store()
    store.cluster("west", 2, canaries=True)
    store.put(wire.canary_key("west", wire.IPS), b"")
    store.ip("10.1.0.5", WEB)
    assert store.put(wire.canary_key("west", wire.IPS), None) == []
    assert store.put(wire.config_key("west"), None) == []
    assert len(store.ip("10.1.0.6", WEB)) == 1


def test_addresses_of_hosts_belong_to_the_cluster_of_their_node() -> None:
    store = Store()
    store.cluster("west", 2)
    assert store.ip("10.9.0.1", 1, "192.168.5.1") == []
    found = store.put(*node("w1", "west", 2, "192.168.5.1"))
    assert [type(one) for one in found] == [NodeUpserted, IpUpserted]
    assert found[1] == IpUpserted("west", (4, 0x0A090001, 32), 6, "", "", "192.168.5.1")


def test_an_address_that_another_cluster_takes_over_changes_hands() -> None:
    store = Store()
    store.cluster("west", 2)
    store.cluster("north", 3)
    store.ip("10.1.0.5", WEB)
    cidr = (4, 0x0A010005, 32)
    assert store.ip("10.1.0.5", OTHER) == [
        IpDeleted("west", cidr), IpUpserted("north", cidr, OTHER, "", "", "192.168.5.1")
    ]  # fmt: skip


def test_an_address_that_an_unknown_cluster_takes_over_is_nobodys() -> None:
    store = Store()
    store.cluster("west", 2)
    store.ip("10.1.0.5", WEB)
    assert store.ip("10.1.0.5", OTHER) == [IpDeleted("west", (4, 0x0A010005, 32))]


def test_an_address_without_an_identity_yet_is_not_there() -> None:
    store = Store()
    store.cluster("west", 2)
    store.ip("10.1.0.5", WEB)
    assert store.ip("10.1.0.5", 0) == [IpDeleted("west", (4, 0x0A010005, 32))]
    assert store.mesh.waiting == 0


def test_a_bad_value_leaves_the_previous_good_one() -> None:
    store = Store()
    store.cluster("west", 2)
    store.put(*identity(WEB, "west"))
    assert store.put(wire.identity_key(WEB), b"k8s:a=c;") == []
    remote = store.mesh.remotes["west"]
    assert remote.identities[WEB] == ("k8s:a=b", "k8s:io.cilium.k8s.policy.cluster=west")
    assert remote.refused["cluster_label"] == 1
    assert store.put(wire.identity_key(WEB), None) == [IdentityDeleted("west", WEB)]
    assert not remote.refusals


def test_two_keys_for_one_address_leave_one_by_one() -> None:
    store = Store()
    store.cluster("west", 2)
    store.ip("10.1.0.5", WEB)
    assert store.put(wire.ip_key("10.1.0.5/32"), b'{"IP":"10.1.0.5","Mask":"/////w==","ID":131074}') == []
    (after,) = store.put(wire.ip_key("10.1.0.5"), None)
    assert isinstance(after, IpUpserted)
    assert after.identity == 131074
    assert store.put(wire.ip_key("10.1.0.5/32"), None) == [IpDeleted("west", (4, 0x0A010005, 32))]


def test_a_cluster_that_changes_its_id_starts_from_nothing() -> None:
    store = Store()
    store.cluster("west", 2)
    store.put(*identity(WEB, "west"))
    store.ip("10.1.0.5", WEB)
    found = store.cluster("west", 4)
    assert {type(one) for one in found} == {IdentityDeleted, IpDeleted}
    assert store.mesh.relist


def test_an_id_that_somebody_holds_is_refused_and_the_holder_stays() -> None:
    store = Store()
    store.cluster("west", 2)
    store.cluster("north", 2)
    store.cluster("east2", 1)
    assert store.mesh.remotes["north"].state is State.REFUSED
    assert "west" in store.mesh.remotes["north"].fault
    assert store.mesh.remotes["east2"].state is State.REFUSED
    assert len(store.ip("10.1.0.5", WEB)) == 1


def test_only_configured_clusters_with_their_ids_are_read() -> None:
    store = Store(Trust("east", 1, clusters={"west": 2}))
    store.cluster("west", 7)
    store.cluster("north", 3)
    assert store.mesh.remotes["west"].state is State.REFUSED
    assert store.mesh.remotes["north"].state is State.REFUSED
    store.cluster("west", 2)
    assert store.mesh.remotes["west"].state is State.SYNCED


def test_other_modes_are_refused_in_both_directions() -> None:
    for here, there in ((255, 511), (511, 255)):
        store = Store(Trust("east", 1, max_clusters=here))
        store.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2, max_clusters=there)))
        assert "max_clusters_mismatch" in store.mesh.remotes["west"].fault


def test_a_listing_deletes_what_it_misses_once_the_cluster_is_complete() -> None:
    store = Store()
    store.cluster("west", 2, canaries=True)
    store.put(wire.canary_key("west", wire.IPS), b"")
    addresses = dict(ip(f"10.1.0.{number}", WEB) for number in range(1, 11))
    prefix = f"{wire.IPS}/default/"
    assert len(store.listing(prefix, addresses)) == 10
    addresses.popitem()
    store.listing(wire.SYNCED, {})  # a reconnect to a store that has lost the marker
    assert store.listing(prefix, addresses) == []
    assert store.mesh.counts(store.mesh.remotes["west"])["held"] == 1
    assert [type(one) for one in store.put(wire.canary_key("west", wire.IPS), b"")] == [IpDeleted]


def test_a_doubtful_listing_holds_until_released() -> None:
    store = Store()
    store.cluster("west", 2)
    addresses = dict(ip(f"10.1.0.{number}", WEB) for number in range(1, 4))
    prefix = f"{wire.IPS}/default/"
    store.listing(prefix, addresses)
    assert store.listing(prefix, {}, doubtful=True) == []
    assert store.mesh.remotes["west"].held_since == 100.0
    assert len(store.changes(store.mesh.release(["west"]))) == 3


def test_the_copies_of_a_mirror_are_read_for_clusters_that_say_so() -> None:
    store = Store()
    store.cluster("west", 2, canaries=True, cached=True)
    entry = wire.ip_entry("10.1.0.5", WEB)
    store.put(f"{wire.CACHE_IPS}/west/10.1.0.5", wire.encode_ip(entry))
    store.put(f"{wire.CACHE_IDENTITIES}/west/id/{WEB}", wire.encode_identity(["k8s:a=b"], "west"))
    assert store.put(f"{wire.CACHE_IDENTITIES}/west/value/k8s:a=b;/10.0.0.1", b"131073") == []
    found = store.put(wire.canary_key("west", wire.CACHE_IPS), b"")
    found += store.put(wire.canary_key("west", wire.CACHE_IDENTITIES), b"")
    assert [type(one) for one in found] == [IpUpserted, IdentityUpserted]
    assert store.ip("10.1.0.6", WEB) == []  # the same cluster's state keys are not for us
    assert store.put(f"{wire.CACHE_IPS}/west/10.1.0.5", None) == [IpDeleted("west", (4, 0x0A010005, 32))]


def test_quotas_stop_a_cluster_and_nobody_else() -> None:
    from clustermesh.trust import Quotas

    store = Store(Trust("east", 1, quotas=Quotas(addresses=2)))
    store.cluster("west", 2)
    store.cluster("north", 3)
    for number in range(4):
        store.ip(f"10.1.0.{number + 1}", WEB)
    assert store.mesh.remotes["west"].addresses == 2
    assert store.mesh.remotes["west"].refused["quota"] == 2
    assert len(store.ip("10.3.0.1", OTHER)) == 1


def pods(name: str, *ranges: str) -> tuple[str, bytes]:
    node = wire.Node(
        name,
        "east",
        (wire.NodeAddress("InternalIP", "10.0.0.1"),),
        ipv4_cidr=wire.node_cidr(ranges[0]),
        cluster_id=1,
    )
    return wire.node_key("east", name), wire.encode_node(node)


def reasons(store: Store, cluster: str = "west") -> set[str]:
    return set(store.mesh.remotes[cluster].refused)


def test_nobody_speaks_for_nodes_and_pods_of_our_own_cluster() -> None:
    store = Store()
    store.cluster("east", 1)
    store.cluster("west", 2)
    store.put(*pods("e1", "10.9.1.0/24"))
    for text in ("10.0.0.1", "10.9.1.5", "10.9.0.0/16", "10.9.1.0/25"):
        assert store.ip(text, WEB) == [], text
    assert store.put(*node("w1", "west", 2, "10.0.0.1")) != []
    assert reasons(store) == {"our_address"}
    assert len(store.ip("10.9.2.5", WEB)) == 1
    store.put(wire.node_key("east", "e1"), None)
    assert len(store.ip("10.9.1.5", WEB)) == 1


def test_what_becomes_ours_later_is_taken_back() -> None:
    store = Store()
    store.cluster("west", 2)
    for text in ("10.1.0.5", "10.1.0.6", "10.2.0.0/16"):
        store.ip(text, WEB)
    ours = [wire.parse_cidr("10.1.0.5"), wire.parse_cidr("10.2.7.7")]
    gone = store.changes(store.mesh.protect("e1", ours))
    assert gone == [
        IpDeleted("west", wire.parse_cidr("10.1.0.5")),
        IpDeleted("west", wire.parse_cidr("10.2.0.0/16")),
    ]
    assert store.changes(store.mesh.protect("e1", ours, [wire.parse_cidr("10.1.0.0/24")])) == [
        IpDeleted("west", wire.parse_cidr("10.1.0.6"))
    ]
    assert store.mesh.remotes["west"].addresses == 0


def test_a_cluster_that_leaves_takes_nothing_of_others_along() -> None:
    store = Store()
    store.cluster("west", 2)
    store.cluster("north", 3)
    store.put(*identity(WEB, "west"))
    store.put(*node("w1", "west", 2, "192.168.5.1"))
    store.ip("10.1.0.5", WEB)
    store.ip("10.3.0.1", OTHER)
    gone = store.changes(store.mesh.leave("west"))
    assert sorted(type(one).__name__ for one in gone) == ["IdentityDeleted", "IpDeleted", "NodeDeleted"]
    assert {one.cluster for one in gone} == {"west"}
    assert list(store.mesh.remotes) == ["north"]
    store.cluster("south", 2)  # the id is free again
    assert store.mesh.remotes["south"].state is State.SYNCED


def test_clusters_with_a_store_of_their_own_are_not_read_from_the_shared_one() -> None:
    store = Store()
    store.mesh.elsewhere = {"west"}
    store.mesh._ids[2] = "west"
    store.cluster("west", 2)
    store.ip("10.1.0.5", WEB)
    store.put(*identity(WEB, "west"))
    store.put(*node("w1", "west", 2, "192.168.5.1"))
    store.put(wire.canary_key("west", wire.IPS), b"")
    assert not store.mesh.remotes
    assert store.mesh.waiting == 0


def test_old_etcds_are_warned_of() -> None:
    from clustermesh.trust import version_warning

    assert all(map(version_warning, ("3.4.23", "3.5.1", "3.5.32", "3.6.13", "3.3.27", "2.3.8")))
    assert not any(map(version_warning, ("3.4.44", "3.5.33", "3.6.14", "3.7.0", "4.0.0-rc1", "", "unknown")))


def test_a_store_that_lost_everything_is_looked_at_in_small_pieces() -> None:
    store = Store()
    store.cluster("west", 2)
    prefix = f"{wire.IPS}/default/"
    store.listing(prefix, dict(ip(f"10.1.{number >> 8}.{number & 255}", WEB) for number in range(5000)))
    listing = store.mesh.begin(PART[prefix])
    pieces = list(listing.end(100.0))
    assert len(pieces) >= 20, "others get a turn every few hundred keys"
    assert not store.changes(pieces)
    assert store.mesh.counts(store.mesh.remotes["west"])["held"] == 5000


def service(name: str, cluster: str, number: int, *backends: str) -> tuple[str, bytes]:
    ports = {one: {"http": Port("TCP", 8080)} for one in backends}
    found = Service(cluster, "prod", name, backends=ports, shared=True, cluster_id=number)
    return wire.service_key(cluster, "prod", name), encode_service(found)


def test_a_service_waits_for_the_marker_of_services_and_of_nothing_else() -> None:
    store = Store()
    store.cluster("west", 2, canaries=True)
    for resource in (wire.NODES, wire.IDENTITIES, wire.IPS):
        store.put(wire.canary_key("west", resource), b"x")
    assert store.mesh.remotes["west"].state is State.SYNCED
    assert store.put(*service("web", "west", 2, "10.1.0.5")) == []
    [change] = store.put(wire.canary_key("west", wire.SERVICES), b"x")
    assert isinstance(change, ServiceUpserted)
    assert list(change.service.backends or ()) == ["10.1.0.5"]
    assert store.put(service("web", "west", 2)[0], None) == [ServiceDeleted("west", "prod/web")]


def test_a_mirrored_service_is_read_from_the_cache_only() -> None:
    store = Store()
    store.cluster("west", 2, cached=True)
    key, value = service("web", "west", 2, "10.1.0.5")
    assert store.put(key, value) == []
    [change] = store.put(key.replace(wire.SERVICES, wire.CACHE_SERVICES), value)
    assert isinstance(change, ServiceUpserted)


def test_a_service_that_points_to_us_or_is_anothers_is_refused_and_counted() -> None:
    trust = Trust("east", 1, own_addresses=frozenset({wire.parse_cidr("10.9.0.1")}))
    store = Store(trust)
    store.cluster("west", 2)
    for backend in ("10.9.0.1", "127.0.0.1", "169.254.1.1"):
        assert store.put(*service("web", "west", 2, backend)) == []
    assert store.put(service("web", "west", 2)[0], service("web", "north", 3, "10.1.0.5")[1]) == []
    assert store.put(*service("web", "west", 3, "10.1.0.5")) == []
    refused = store.mesh.remotes["west"].refused
    assert refused["our_address"] == 1
    assert refused["special_address"] == 2
    assert sum(refused.values()) == 5


def test_a_service_goes_when_its_backend_becomes_ours() -> None:
    store = Store()
    store.cluster("west", 2)
    store.put(*service("web", "west", 2, "10.9.0.1"))
    changes = store.changes(store.mesh.protect("e1", [wire.parse_cidr("10.9.0.1")]))
    assert changes == [ServiceDeleted("west", "prod/web")]


def test_more_services_than_the_quota_are_refused_and_counted() -> None:
    store = Store(Trust("east", 1, quotas=Quotas(services=2)))
    store.cluster("west", 2)
    for number in range(4):
        store.put(*service(f"web-{number}", "west", 2, "10.1.0.5"))
    remote = store.mesh.remotes["west"]
    assert (sorted(remote.services), remote.refused["quota"]) == (["prod/web-0", "prod/web-1"], 2)


def test_services_are_kept_on_disk_and_come_back() -> None:
    store = Store()
    store.cluster("west", 2)
    store.put(*service("web", "west", 2, "10.1.0.5"))
    again = Store()
    changes = again.changes(again.mesh.restore(list(store.mesh.dump())))
    assert [type(one) for one in changes] == [ServiceUpserted]
