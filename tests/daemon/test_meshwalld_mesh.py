"""The real daemon and a real etcd: the mesh is enforced from disk when the etcd is not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from clustermesh import wire

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.mesh,
    pytest.mark.skipif(not shutil.which("etcd"), reason="no etcd here: install the package etcd-server"),
]
CLIENT = 131073
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: only-the-client}
spec:
  nodeSelector: {}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "8000", protocol: TCP}]}]
"""
ENDPOINT = "http://127.0.0.1:2379"


class Store:
    """An etcd in the machine's own namespace."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            "nsenter", f"--net=/run/netns/{self.machine.host}", "etcd", "--data-dir", str(self.machine.root / "etcd"),
            "--unsafe-no-fsync",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while self.ctl("endpoint", "health", check=False):
            assert time.monotonic() < deadline, "etcd does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def ctl(self, *arguments: str, check: bool = True) -> int:
        command = [
            "nsenter",
            f"--net=/run/netns/{self.machine.host}",
            "etcdctl",
            "--endpoints",
            ENDPOINT,
            *arguments,
        ]
        done = subprocess.run(
            command, check=check, capture_output=True, env=os.environ | {"ETCDCTL_API": "3"}
        )
        return done.returncode

    def put(self, key: str, value: bytes) -> None:
        self.ctl("put", key, "--", value.decode())


@pytest.fixture
def store(machine) -> Iterator[Store]:
    made = Store(machine)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def fill(store: Store) -> None:
    store.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2)))
    labels = ["k8s:app=client", "k8s:io.kubernetes.pod.namespace=prod"]
    store.put(wire.identity_key(CLIENT), wire.encode_identity(labels, "west"))
    store.put(wire.ip_key("10.99.0.2"), wire.encode_ip(wire.ip_entry("10.99.0.2", CLIENT)))


def test_after_a_boot_without_the_store_what_was_known_is_enforced_at_once_and_then_reconciled(
    machine, store: Store, within: Callable[[Callable[[], bool]], None]
) -> None:
    fill(store)
    machine.write("p.yaml", POLICY)
    settings = {"etcd": {"endpoints": [ENDPOINT]}, "cluster_name": "east", "cluster_id": 1, "publish": False}
    machine.start(**settings)
    within(lambda: machine.connects(8000))
    assert not machine.connects(8001)
    within((machine.root / "state/mesh/_shared").exists)
    time.sleep(0.3)
    machine.kill(signal.SIGKILL)
    store.stop()
    done = machine.meshwall("cleanup", "--pins", str(machine.root / "bpf"))  # pins do not survive a boot
    assert done.returncode == 0, done.stderr
    assert machine.connects(8001)

    machine.start(**settings)
    assert "not synced after" not in machine.log
    assert "as they were last known" in machine.log
    assert not machine.connects(8001)
    assert machine.connects(8000)
    found = json.loads(machine.meshwall("mesh", "status", "-o", "json").stdout)
    west = next(one for one in found["clusters"] if one["name"] == "west")
    assert (west["connected"], west["addresses"]) == (False, 1)

    store.start()
    store.put(wire.ip_key("10.99.0.77"), wire.encode_ip(wire.ip_entry("10.99.0.77", CLIENT)))
    store.ctl("del", wire.ip_key("10.99.0.2"))
    deadline = time.monotonic() + 10
    while machine.connects(8000):
        assert time.monotonic() < deadline, "not reconciled ten seconds after the store is back"
    assert machine.meshwall("ip", "list", "--cluster", "west").stdout.count("10.99.0.") == 1
    assert "nothing to accept" in machine.meshwall("mesh", "accept", "west").stdout
    refused = machine.meshwall("mesh", "accept", "nowhere")
    assert (refused.returncode, "no cluster 'nowhere'" in refused.stderr) == (2, True)


WORKLOAD = """
name: client-0
namespace: prod
labels: {app: client}
addresses: [10.99.0.2]
"""


@pytest.mark.parametrize("etcd", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_workload_of_a_file_has_its_rights_published_or_not_and_loses_them_with_the_file(
    machine, request: pytest.FixtureRequest, within: Callable[[Callable[[], bool]], None], etcd: bool
) -> None:
    settings: dict[str, object] = {"cluster_name": "east", "cluster_id": 1}
    if etcd:
        request.getfixturevalue("store")
        settings["etcd"] = {"endpoints": [ENDPOINT]}
    machine.write("p.yaml", POLICY)
    machine.start(**settings)
    assert not machine.connects(8000)
    file = machine.root / "workloads.d/client.yaml"
    file.write_text(WORKLOAD)
    within(lambda: machine.connects(8000))
    assert not machine.connects(8001)
    number = published(machine, "app=client")
    assert 65536 <= number <= 131071
    if etcd:
        status = json.loads(machine.meshwall("mesh", "status", "-o", "json").stdout)
        assert status["publish"]["ok"], status["publish"]
        node = published(machine, "io.cilium.k8s.policy.cluster=east,!app")
        assert node != number
    machine.kill(signal.SIGTERM)
    machine.start(**settings)
    assert machine.connects(8000)
    assert published(machine, "app=client") == number
    file.unlink()
    within(lambda: not machine.connects(8000))


SERVICE = """
name: web
namespace: prod
annotations: {service.cilium.io/global: "true"}
ports: [{name: http, port: 80, targetPort: 8000}]
backends: [10.99.0.1, 10.99.0.2]
check: {tcp: true, interval: 0.5, timeout: 0.5}
"""


@pytest.mark.usefixtures("store")
def test_a_service_of_a_file_is_published_without_the_backend_that_does_not_listen(
    machine, within: Callable[[Callable[[], bool]], None]
) -> None:
    machine.start(cluster_name="east", cluster_id=1, etcd={"endpoints": [ENDPOINT]})
    (machine.root / "services.d/web.yaml").write_text(SERVICE)

    def backends() -> dict[str, str]:
        done = machine.meshwall("service", "get", "prod/web", "-o", "json")
        found = json.loads(done.stdout)["backends"] if done.returncode == 0 else []
        return {one["address"]: one["reason"] for one in found}

    within(lambda: backends().get("10.99.0.2", "healthy") != "healthy")
    assert backends() == {"10.99.0.1": "healthy", "10.99.0.2": "unhealthy: Connection refused"}
    done = machine.meshwall("service", "list")
    assert "east 1/2" in done.stdout
    command = [
        "nsenter", f"--net=/run/netns/{machine.host}", "etcdctl", "get", wire.service_key("east", "prod", "web"),
        "--print-value-only",
    ]  # fmt: skip
    value = subprocess.run(
        command, check=True, capture_output=True, env={"ETCDCTL_API": "3", **os.environ}
    ).stdout
    assert list(json.loads(value)["backends"]) == ["10.99.0.1"]
    command = [*machine.command()[:2], sys.executable, "-m", "daemon.cli.main", "mesh", "check", "-v", "--config",
               str(machine.root / "meshwall.yaml")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "all synced markers are there" in done.stdout


def published(machine, selector: str) -> int:
    """The one identity with these labels that this node uses."""
    deadline = time.monotonic() + 5
    while True:
        done = machine.meshwall("identity", "list", "--nodes", "-l", selector, "-o", "json")
        found = json.loads(done.stdout)["identities"] if done.stdout else []
        if found or time.monotonic() > deadline:
            assert [one["nodes"] for one in found] == [["t1"]], done.stderr
            return int(found[0]["id"])
