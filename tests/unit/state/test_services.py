"""Services of all clusters as one: the merge vectors through the table's rows, and what is told of each backend."""

import json
import os
from pathlib import Path

import pytest

from clustermesh.services import Port, Service, ServiceExport, decode_service, read_annotations
from daemon.state.services import all_merged, merged, winning
from daemon.state.tables import LOCAL, ServiceKey, ServiceRow

ROOT = Path(os.environ.get("MESHWALL_VECTORS", "../shared/vectors"))
MERGE = ROOT / "clustermesh" / "service_merge.jsonl"
HTTP = {"http": Port("TCP", 80)}


def service(cluster: str, number: int, *backends: str, shared: bool = True) -> Service:
    return Service(
        cluster, "prod", "web", backends=dict.fromkeys(backends, HTTP), shared=shared, cluster_id=number
    )


def local(*backends: str, affinity: str = "", is_global: bool = True, **unhealthy: str) -> ServiceRow:
    sick = {key.replace("_", ".")[1:]: why for key, why in unhealthy.items()}
    return ServiceRow(service("east", 1, *backends), is_global, affinity, sick)


def chosen(rows: dict[str, ServiceRow]) -> list[str]:
    return [one.address for one in merged("prod", "web", rows, "east").backends if one.chosen]


WEST = ServiceRow(service("west", 2, "10.1.0.5"))


@pytest.mark.skipif(not MERGE.exists(), reason="the golden data is not beside this checkout")
def test_the_merge_vectors_hold_for_rows() -> None:
    lines = [json.loads(line) for line in MERGE.read_text().splitlines()]
    told = 0
    for line in lines:
        made, rows = line["svc"], {}
        if made.get("no_local_svc") or line["expect"]["service_event"] is None:
            continue
        if any(one.get("terminating") for one in made.get("local_eps") or ()):
            continue  # files have no such backends
        wanted = read_annotations(made.get("annotations") or {})
        for event in line["remote"]:
            value = event["value"]
            source = f"mesh:{value['cluster']}"
            if f"{value['namespace']}/{value['name']}" != line["service"]:
                continue
            rows.pop(source, None)
            if event["op"] == "update":
                name = f"{value['namespace']}/{value['name']}"
                rows[source] = ServiceRow(decode_service(name, json.dumps(value).encode()))
        ours = [one["ip"] for one in made.get("local_eps") or () if one.get("ready")]
        rows.pop("mesh:east", None)
        rows[LOCAL] = ServiceRow(service("east", 1, *ours), wanted.is_global, wanted.affinity)
        expected = line["expect"]["backends"]
        preferred = {one["addr"] for one in expected if one["preferred"]}
        addresses = {one["addr"] for one in expected}
        assert set(chosen(rows)) == (preferred or addresses), line["name"]
        told += 1
    assert told > 5


def test_without_affinity_every_healthy_backend_is_chosen() -> None:
    assert chosen({LOCAL: local("10.0.0.5", "10.0.0.6"), "mesh:west": WEST}) == [
        "10.0.0.5", "10.0.0.6", "10.1.0.5",
    ]  # fmt: skip


def test_affinity_local_goes_elsewhere_only_when_nothing_here_is_healthy() -> None:
    assert chosen({LOCAL: local("10.0.0.5", affinity="local"), "mesh:west": WEST}) == ["10.0.0.5"]
    sick = local("10.0.0.5", affinity="local", _10_0_0_5="refused")
    assert chosen({LOCAL: sick, "mesh:west": WEST}) == ["10.1.0.5"]


def test_affinity_remote_stays_here_only_when_there_is_nobody_else() -> None:
    assert chosen({LOCAL: local("10.0.0.5", affinity="remote"), "mesh:west": WEST}) == ["10.1.0.5"]
    assert chosen({LOCAL: local("10.0.0.5", affinity="remote")}) == ["10.0.0.5"]


def test_what_is_not_shared_or_not_global_is_not_used_and_it_says_so() -> None:
    hidden = ServiceRow(service("west", 2, "10.1.0.5", shared=False), is_global=False)
    assert chosen({LOCAL: local("10.0.0.5"), "mesh:west": hidden}) == ["10.0.0.5"]
    found = merged("prod", "web", {LOCAL: local("10.0.0.5", is_global=False), "mesh:west": WEST}, "east")
    assert [(one.address, one.chosen, one.reason) for one in found.backends] == [
        ("10.0.0.5", True, "local only: not global"),
        ("10.1.0.5", False, "the local service is not global"),
    ]


def test_of_one_address_the_local_part_wins_then_the_lowest_cluster_id() -> None:
    rows = {
        LOCAL: local("10.0.0.5"),
        "mesh:north": ServiceRow(service("north", 3, "10.0.0.5", "10.9.0.9")),
        "mesh:west": ServiceRow(service("west", 2, "10.9.0.9")),
    }
    found = {one.address: one.cluster for one in merged("prod", "web", rows, "east").backends}
    assert found == {"10.0.0.5": "east", "10.9.0.9": "west"}


def test_a_service_of_another_host_of_our_cluster_is_a_local_one() -> None:
    ours = ServiceRow(service("east", 1, "10.0.0.7"))
    assert chosen({"mesh:east": ours, "mesh:west": WEST}) == ["10.0.0.7", "10.1.0.5"]


def test_a_service_that_only_others_have_is_listed_and_not_used() -> None:
    rows = {ServiceKey("prod", "web", "mesh:west"): WEST}
    [found] = all_merged(rows, "east")
    assert found.text == "not here: no service of this name in our cluster"
    assert [one.chosen for one in found.backends] == [False]


def test_the_oldest_export_counts() -> None:
    old = ServiceExport("west", "web", "prod", "2026-01-01T00:00:00Z", (), "ClusterSetIP", "None")
    new = ServiceExport("east", "web", "prod", "2026-02-01T00:00:00Z", (), "Headless", "None")
    west, ours = ServiceKey("prod", "web", "mesh:west"), ServiceKey("prod", "web", LOCAL)
    assert winning({ours: new, west: old}) == {("prod", "web"): west}
