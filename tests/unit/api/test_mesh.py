"""What /v1/mesh says of clusters, and whom its listings leave out."""

import pytest

from daemon.api.mesh import conflicts_by_source, nodes_json
from daemon.api.resources import Filter, identity_rows, ip_prefixes, ip_rows
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import parse_prefix
from daemon.policy.selectortext import parse_selector
from daemon.state.tables import IdentityRow, IpKey, IpRow, NodeKey, NodeRow, Tables


@pytest.fixture
def tables() -> Tables:
    made = Tables()
    for number, source, labels in (
        (131073, "mesh:west", ["k8s:app=web", "k8s:tier=front"]),
        (196609, "mesh:north", ["k8s:app=web"]),
        (70000, "file", ["k8s:app=db"]),
    ):
        made.identities.put(Identity(number), IdentityRow(parse_labels(labels), source))
    for prefix, source, number in (
        ("10.1.0.1", "mesh:west", 131073), ("10.1.0.1", "mesh:north", 196609), ("10.1.0.2", "mesh:west", 131073),
        ("10.1.0.2", "file", 70000), ("10.2.0.0/16", "mesh:north", 196609),
    ):  # fmt: skip
        made.ips.put(IpKey(parse_prefix(prefix), source), IpRow(Identity(number)))
    for cluster, name, label in (("west", "w1", "zone=a"), ("north", "n1", "zone=b")):
        made.nodes.put(
            NodeKey(cluster, name),
            NodeRow((), parse_labels([f"k8s:{label}"]), Identity(0), f"mesh:{cluster}"),
        )
    return made


async def test_clusters_that_disagree_are_counted_and_what_others_say_is_not(tables: Tables) -> None:
    assert dict(await conflicts_by_source(tables)) == {"mesh:west": 1, "mesh:north": 1}


def test_identities_are_listed_by_source_and_selector(tables: Tables) -> None:
    def listed(source: str, selector: str = "") -> list[int]:
        return [one["id"] for one in identity_rows(tables, "", Filter(source, parse_selector(selector)))]

    assert listed("mesh:west") == [131073]
    assert listed("mesh") == [131073, 196609]
    assert listed("file") == [70000]
    assert listed("", "app=web,!tier") == [196609]
    assert listed("reserved", "reserved:host") == [1]


def test_addresses_are_listed_by_source_and_prefix(tables: Tables) -> None:
    def listed(source: str, prefix: str = "") -> list[str]:
        within = parse_prefix(prefix) if prefix else None
        found = ip_prefixes(tables, within, None)
        return [one["cidr"] for one in ip_rows(tables, found, None, Filter(source))]

    assert listed("mesh:north") == ["10.1.0.1/32", "10.2.0.0/16"]
    assert listed("mesh:north", "10.2.3.4") == ["10.2.0.0/16"]
    assert listed("file") == ["10.1.0.2/32"]


def test_nodes_are_listed_by_cluster_and_selector(tables: Tables) -> None:
    assert [one["name"] for one in nodes_json(tables, "west")["nodes"]] == ["w1"]
    assert [one["name"] for one in nodes_json(tables, "", parse_selector("zone in (b,c)"))["nodes"]] == ["n1"]
