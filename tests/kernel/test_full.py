"""Small tables that fill up: what is refused, what stays, and what is said about it."""

import json

import pytest

from bpf import layout
from daemon.datapath import watch

pytestmark = pytest.mark.kernel

OPEN, OUTSIDE = 7000, 7100
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress:
  - fromEndpoints: [{{matchLabels: {{app: web}}}}]
    toPorts: [{{ports: [{{port: "{OPEN}", protocol: TCP}}]}}]
"""
HOSTS, CONNECTIONS = 64, 256


def identities(machine, addresses: list[str]) -> None:
    labels = ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod"]
    new = machine.home / "identities.new"
    new.write_text(json.dumps({"identities": [{"id": 7001, "labels": labels, "addresses": addresses}]}))
    new.rename(machine.home / "identities.yaml")


@pytest.fixture(scope="module")
def node(machine):
    identities(machine, [machine.other])
    machine.start(map_sizes={**machine.sizes, "hosts": HOSTS, "half_open": CONNECTIONS})
    machine.enforce(POLICY)
    with machine.listener(machine.us, machine.node, OPEN):
        machine.until(lambda: machine.connects(OPEN))
        machine.until(lambda: machine.get("/readyz") == (200, "ok\n"))
        yield machine


def test_addresses_that_do_not_fit_are_told_and_those_that_did_stay(node):
    scattered = [f"2001:db8::{at + 1:x}" for at in range(HOSTS + 10)]
    identities(node, [node.other, *scattered])
    node.until(lambda: node.get("/readyz")[0] == 503)
    assert "addresses count as world" in node.get("/readyz")[1]
    assert node.connects(OPEN)
    told = node.status()
    assert (told["ok"], told["ready"]) == (False, False)
    assert sum(told["parts"]["addresses"]["details"]["missing"].values()) >= 10
    assert 'meshwall_addresses_missing{source="mesh:default"}' in node.get("/metrics")[1]
    node.until(lambda: not node.status()["parts"]["maps"]["ok"])
    assert "full: ip6_hosts" in node.status()["parts"]["maps"]["text"]
    assert 'cilium_bpf_map_pressure{map_name="ip6_hosts"} 1' in node.get("/metrics")[1]
    assert node.meshwall("status", "--brief").returncode == 1
    assert node.get("/healthz") == (200, "ok\n")
    # fewer vanish at once than would be held back as suspicious
    identities(node, [node.other, *scattered[: HOSTS - 5]])
    node.until(lambda: node.get("/readyz") == (200, "ok\n"))
    assert "addresses" not in node.status()["parts"]


def test_connections_are_counted_and_a_full_table_cuts_nothing_that_policy_allows(node):
    sizes = layout.sized(**{**node.sizes, "hosts": HOSTS, "half_open": CONNECTIONS})
    assert watch.count(node.home / "bpf", sizes)["ct4_new"] < watch.ALARM
    for _ in range(4):
        with node.bound(node.us, node.node, 0) as mine:
            for port in range(2_000, 2_000 + CONNECTIONS):
                mine.sendto(b"x", (node.other, port))
    found = watch.count(node.home / "bpf", sizes)
    assert found["ct4_new"] > 0.5
    assert all(0 <= share <= 1 for share in found.values())
    assert node.connects(OPEN)
