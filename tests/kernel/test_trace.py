"""`meshwall trace packet` on a real machine: what it says is what happens, and it leaves nothing behind."""

import json
import socket
import time
from typing import Any

import pytest

from bpf import frames, layout
from bpf.syscall import PinnedMap

pytestmark = pytest.mark.kernel

OPEN, CLOSED = 7000, 7001
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress:
  - fromCIDR: [10.96.0.2/32]
    toPorts: [{{ports: [{{port: "{OPEN}", protocol: TCP}}]}}]
  egress: [{{toEntities: [all]}}]
"""


@pytest.fixture(scope="module")
def node(machine):
    machine.enforce(POLICY)
    with machine.listener(machine.us, machine.node, OPEN), machine.listener(machine.us, machine.node, CLOSED):
        machine.until(lambda: machine.connects(OPEN) and not machine.connects(CLOSED))
        yield machine


def trace(node, *words: str) -> dict[str, Any]:
    done = node.meshwall("trace", "packet", "--pins", str(node.home / "bpf"), "-o", "json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def opening(node, port: int) -> tuple[str, ...]:
    return "--tcp", f"{node.other}:40000", f"{node.node}:{port}"


def test_a_trace_foretells_what_real_packets_meet_and_names_the_rule(node) -> None:
    for port in (OPEN, CLOSED):
        assert (trace(node, *opening(node, port))["verdict"] == "pass") == node.connects(port)
    found = trace(node, *opening(node, OPEN), "--device", node.device)
    assert found["device"] == {"name": node.device, "ingress": True, "egress": True, "xdp": "native"}
    (xdp, tcx) = found["hooks"]
    assert xdp["deferred"], "egress is enforced, so an entry is needed, and TCX makes it"
    assert (xdp["verdict"], tcx["verdict"], found["decided_by"]) == ("pass", "pass", "tcx-ingress")
    rule = tcx["rule"]
    assert (rule["policy"], rule["name"], rule["line"]) == ("base", "ingress[0]", 8)
    assert rule["file"].endswith(".yaml")
    assert tcx["identity"]["labels"] == ["reserved:world"]
    denied = trace(node, *opening(node, CLOSED))
    assert [(one["verdict"], one["reason"]) for one in denied["hooks"]] == [("drop", "POLICY_DEFAULT")] * 2
    assert denied["decided_by"] == "xdp"


def test_the_answer_of_an_open_connection_is_known_to_a_trace(node) -> None:
    with (
        node.listener(node.peer, node.other, 7100) as there,
        node.bound(node.us, node.node, 0, socket.SOCK_STREAM) as ours,
    ):
        ours.connect((node.other, 7100))
        port = ours.getsockname()[1]
        words = ("--tcp", f"{node.other}:7100", f"{node.node}:{port}", "--flags", "ACK")
        assert [one["reason"] for one in trace(node, *words)["hooks"]] == ["REPLY", "REPLY"]
        there.accept()[0].close()
    stray = ("--tcp", f"{node.other}:7101", f"{node.node}:{port}", "--flags", "ACK")
    assert trace(node, *stray)["verdict"] == "drop"
    out = trace(node, "--tcp", f"{node.node}:1", f"{node.other}:7100", "--direction", "out")
    assert [(one["hook"], one["verdict"]) for one in out["hooks"]] == [("tcx-egress", "pass")]


def test_what_cannot_be_traced_is_told(node, tmp_path) -> None:
    def said(*words: str) -> tuple[int, str]:
        done = node.meshwall("trace", "packet", *words)
        return done.returncode, done.stderr

    pins = ("--pins", str(node.home / "bpf"))
    assert said("--pins", str(tmp_path), *opening(node, OPEN)) == (
        2,
        f"meshwall trace: there is no data path of this version in {tmp_path}: start meshwalld first\n",
    )
    assert said(*pins, "001122") == (
        2,
        "meshwall trace: the frame has 3 bytes, and the kernel runs none under 14 (an Ethernet header)\n",
    )
    assert "no network device nosuch0" in said(*pins, *opening(node, OPEN), "--device", "nosuch0")[1]
    cut = trace(node, frames.tcp(node.other, node.node, 1, OPEN)[:30].hex())
    assert [one["reason"] for one in cut["hooks"]] == ["SHORT_IP", "SHORT_IP"]


def contents(node) -> dict[str, list[tuple[bytes, bytes]]]:
    found = {}
    for name, spec in layout.maps().items():
        if spec.kind is not layout.MapKind.RINGBUF and name not in ("trace", "scratch"):
            with PinnedMap.open_sized(node.pins / "maps" / name, spec) as table:
                found[name] = sorted(table.items())
    return found


def settled(node) -> dict[str, list[tuple[bytes, bytes]]]:
    """The maps when nothing is under way any more: a device that goes down still says good-bye."""
    before = contents(node)
    while True:
        time.sleep(0.5)
        now = contents(node)
        if now == before:
            return now
        before = now


def test_traces_work_without_the_daemon_and_change_no_map(node) -> None:
    node.stop()
    node.ip("-n", node.peer, "link", "set", node.device, "down")
    fragment = frames.ip(
        node.other, node.node, 17, frames.udp_datagram(1, 53, bytes(16)), identification=9, fragment=1
    )
    before = settled(node)
    for words in (
        opening(node, OPEN),
        opening(node, CLOSED),
        ("--udp", f"{node.node}:1", "10.96.0.9:53", "--direction", "out"),
        ("--tcp", f"{node.node}:1", "10.96.0.9:53", "--direction", "out", "--forwarded"),
        ("--icmp", node.other6, node.node6),
        (fragment.hex(),),
    ):
        found = trace(node, *words)
        assert not found["daemon"]
        assert found["verdict"] in ("pass", "drop")
    after = contents(node)
    assert {name for name in before if before[name] != after[name]} == set()
