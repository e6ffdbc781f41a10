"""Node ports and masqueraded traffic: a pod behind the machine, translated by nftables as kube-proxy does."""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft: `./dev setup` installs it"),
]

NODE_PORT, CLOSED_NODE_PORT, POD_PORT, OUTSIDE, EARLIER = 30080, 30081, 8080, 9000, 9001
POD, GATEWAY = "10.95.0.2", "10.95.0.1"
RULES = f"""
table ip mwnat {{
  chain pre {{
    type nat hook prerouting priority -100
    tcp dport {{ {NODE_PORT}, {CLOSED_NODE_PORT} }} dnat to {POD}:{POD_PORT}
  }}
  chain post {{
    type nat hook postrouting priority 100
    oifname "mwd0" ip saddr {POD} masquerade
  }}
}}
"""
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{toPorts: [{{ports: [{{port: "{NODE_PORT}", protocol: TCP}}]}}]}}]
  egress: [{{toPorts: [{{ports: [{{port: "1", protocol: TCP}}]}}]}}]
"""


@pytest.fixture(scope="module")
def node(machine) -> Iterator[object]:
    pod = f"{machine.us}p"
    machine.ip("netns", "add", pod)
    try:
        machine.ip(
            "-n", machine.us, "link", "add", "mwpod", "type", "veth", "peer", "name", "eth0", "netns", pod
        )
        for name, device, address in ((machine.us, "mwpod", GATEWAY), (pod, "eth0", POD)):
            machine.ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            machine.ip("-n", name, "link", "set", device, "up")
        machine.ip("-n", pod, "route", "add", "default", "via", GATEWAY)
        inside = ["nsenter", f"--net=/run/netns/{machine.us}"]
        subprocess.run([*inside, "nft", "-f", "-"], input=RULES, text=True, check=True)
        subprocess.run([*inside, "sysctl", "-qw", "net.ipv4.ip_forward=1"], check=True)
        machine.pod = pod
        with connected_before(machine) as machine.before:
            yield from enforcing(machine)
    finally:
        machine.ip("netns", "delete", pod)


@contextlib.contextmanager
def connected_before(machine):
    """A connection from the pod to outside, older than the filter: both ends."""
    with (
        machine.bound(machine.peer, machine.other, EARLIER, socket.SOCK_STREAM) as end,
        machine.bound(machine.pod, POD, 0, socket.SOCK_STREAM) as mine,
    ):
        end.listen(1)
        mine.connect((machine.other, EARLIER))
        there, _ = end.accept()
        with there:
            there.settimeout(2)
            yield mine, there


def enforcing(machine) -> Iterator[object]:
    machine.enforce(POLICY)
    machine.until(lambda: not machine.connects(CLOSED_NODE_PORT))
    with machine.listener(machine.pod, POD, POD_PORT):
        yield machine


def test_a_masqueraded_connection_that_is_older_than_the_filter_goes_on(node):
    mine, there = node.before
    there.sendall(b"answer")
    assert mine.recv(16) == b"answer"
    mine.sendall(b"question")
    assert there.recv(16) == b"question"


def asks_outside(node, kind: socket.SocketKind) -> bool:
    """Does the pod get an answer from outside, by way of this machine's address?"""
    with node.bound(node.peer, node.other, OUTSIDE, kind) as end, node.bound(node.pod, POD, 0, kind) as mine:
        if kind == socket.SOCK_DGRAM:
            mine.sendto(b"q", (node.other, OUTSIDE))
            _, client = end.recvfrom(16)
            end.sendto(b"a", client)
        else:
            end.listen(1)
            mine.connect((node.other, OUTSIDE))
            there, client = end.accept()
            there.sendall(b"a")
            there.close()
        assert client[0] == node.node  # translated
        return mine.recv(16) == b"a"


def reaches_outside(node, kind: socket.SocketKind) -> bool:
    """Does something that the machine itself sends arrive?"""
    with (
        node.bound(node.peer, node.other, OUTSIDE, kind) as end,
        node.bound(node.us, node.node, 0, kind) as mine,
    ):
        if kind == socket.SOCK_STREAM:
            end.listen(1)
        try:
            mine.connect((node.other, OUTSIDE))
            mine.send(b"q")
            end.accept() if kind == socket.SOCK_STREAM else end.recv(1)
        except (TimeoutError, ConnectionError):
            return False
        return True


def test_a_node_port_is_judged_as_it_is_seen_outside(node):
    assert node.connects(NODE_PORT)
    assert not node.connects(CLOSED_NODE_PORT)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_masqueraded_traffic_of_a_pod_and_its_answers_pass_though_the_machine_itself_may_do_neither(
    node, kind
):
    assert asks_outside(node, kind)
    assert not reaches_outside(node, kind)


@pytest.mark.slow
def test_an_exempt_node_port_is_left_to_the_policy_behind_it(node):
    node.stop()
    before = node.generation()
    node.start(node_ports={"mode": "exempt"})
    node.until(lambda: node.generation() > before, 30)
    assert node.connects(CLOSED_NODE_PORT)
    assert node.connects(NODE_PORT)
    assert not node.connects(POD_PORT)
    told = node.get("/metrics")[1]
    assert 'meshwall_rule_packets_total{policy="",rule="exempt-node-port"}' in told
