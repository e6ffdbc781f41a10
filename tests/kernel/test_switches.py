"""Panic and audit: switched by commands, on a real machine, with the daemon and without."""

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from bpf import layout

pytestmark = pytest.mark.kernel

OPEN, CLOSED, FAILSAFE, OUTSIDE = 7000, 7001, 7022, 7100
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{toPorts: [{{ports: [{{port: "{OPEN}", protocol: ANY}}]}}]}}]
"""
SETTINGS = {
    "failsafe": [
        {"direction": "ingress", "protocol": "TCP", "port": FAILSAFE},
        {"direction": "ingress", "protocol": "UDP", "port": FAILSAFE},
    ]
}


@pytest.fixture(scope="module")
def listening(machine):
    """The machine with its ports, before there is a daemon."""
    with contextlib.ExitStack() as stack:
        for port in (OPEN, CLOSED, FAILSAFE):
            stack.enter_context(machine.listener(machine.us, machine.node, port))
        yield machine


def start(listening) -> None:
    listening.start(node_file=str(listening.home / "node.yaml"), **SETTINGS)


@pytest.fixture(scope="module")
def node(listening):
    (listening.home / "node.yaml").write_text("labels: {zone: a}\n")
    if listening.daemon is None:  # one test by itself
        start(listening)
    listening.enforce(POLICY)
    listening.until(lambda: open_ports(listening) == [OPEN, FAILSAFE])
    return listening


def open_ports(node) -> list[int]:
    return [port for port in (OPEN, CLOSED, FAILSAFE) if node.connects(port)]


def panic(node, *words: str) -> str:
    done = node.meshwall("panic", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def children_s() -> float:
    """Processor time of the commands so far: other work on the machine does not count."""
    used = os.times()
    return used.children_user + used.children_system


@contextlib.contextmanager
def outbound(node) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection that the machine opened: both ends."""
    with (
        node.listener(node.peer, node.other, OUTSIDE) as there,
        node.bound(node.us, node.node, 0, socket.SOCK_STREAM) as ours,
    ):
        ours.connect((node.other, OUTSIDE))
        theirs, _ = there.accept()
        with theirs:
            yield ours, theirs


def test_a_first_start_without_the_labels_of_the_host_passes_the_failsafe_list_alone(listening):
    """First: later ones have a policy."""
    start(listening)
    with outbound(listening) as (ours, theirs):
        listening.until(lambda: listening.generation() > 0, 60)  # nobody accepts: only so many may connect
        assert open_ports(listening) == [FAILSAFE]
        assert "only the failsafe list passes" in listening.status()["enforcement"]["text"]
        theirs.sendall(b"an answer")
        assert ours.recv(16) == b"an answer"
        (listening.home / "node.yaml").write_text("labels: {zone: a}\n")
        listening.until(lambda: listening.generation() > 1, 20)
        assert open_ports(listening) == [OPEN, CLOSED, FAILSAFE]


def test_panic_works_with_the_daemon_killed_and_survives_its_restart(node):
    with outbound(node) as (ours, theirs):
        node.stop(signal.SIGKILL)
        before = children_s()
        assert panic(node, "open").startswith("PANIC open: every packet passes, until `meshwall panic off`")
        print(f"`meshwall panic open` took {children_s() - before:.2f} s of a CPU")
        assert children_s() - before < 1
        assert open_ports(node) == [OPEN, CLOSED, FAILSAFE]
        before = children_s()
        assert json.loads(panic(node, "failsafe", "--json"))["panic"] == "failsafe"
        print(f"`meshwall panic failsafe` took {children_s() - before:.2f} s of a CPU")
        assert open_ports(node) == [FAILSAFE]
        theirs.sendall(b"an answer")
        assert ours.recv(16) == b"an answer"
        before = node.generation()
        node.start()
        node.until(lambda: node.generation() > before, 60)
        assert open_ports(node) == [FAILSAFE]
        node.until(lambda: node.status().get("enforcement", {}).get("panic") == "failsafe")
        told = node.status()
        assert told["enforcement"]["text"] == "PANIC failsafe: only the failsafe list passes"
        assert "panic" in [one["part"] for one in told["warnings"]]
        assert 'meshwall_panic{mode="failsafe"} 1' in node.get("/metrics")[1]
        assert "WARN  panic: PANIC failsafe" in node.meshwall("status").stdout
        assert panic(node, "off") == "no panic: policy decides\n"
        assert open_ports(node) == [OPEN, FAILSAFE]
        node.until(lambda: not node.status()["enforcement"]["panic"])
        assert "panic failsafe, was none" in node.log()
        assert "panic none, was failsafe" in node.log()


def test_a_panic_with_a_time_ends_by_itself_and_says_when(node):
    assert "only the failsafe list passes, for another" in panic(node, "failsafe", "--for", "6s")
    assert 0 < json.loads(panic(node, "status", "--json"))["left_s"] <= 6
    assert not node.connects(OPEN)
    node.until(lambda: node.connects(OPEN))
    assert open_ports(node) == [OPEN, FAILSAFE]
    assert panic(node, "status") == "no panic: policy decides\n"


def test_a_failsafe_panic_closes_what_no_policy_closed_and_keeps_open_connections(node):
    node.enforce(POLICY.replace("nodeSelector: {}", "nodeSelector: {matchLabels: {no: such}}"))
    assert open_ports(node) == [OPEN, CLOSED, FAILSAFE]
    with outbound(node) as (ours, theirs):
        panic(node, "failsafe")
        assert open_ports(node) == [FAILSAFE]
        theirs.sendall(b"an answer")
        assert ours.recv(16) == b"an answer"
        panic(node, "off")
    assert open_ports(node) == [OPEN, CLOSED, FAILSAFE]
    node.enforce(POLICY)


def test_panic_refuses_what_would_lock_everybody_out_or_makes_no_sense(node, tmp_path):
    for words, told in (
        (("off", "--for", "1m"), "--for says how long"),
        (("open", "--pins", str(tmp_path)), "there is no data path of this version"),
    ):
        done = node.meshwall("panic", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert told in done.stderr
    assert node.meshwall("panic").returncode == 2
    assert "every packet passes" in node.meshwall("panic").stdout


def test_without_a_policy_generation_a_failsafe_panic_is_refused(node):
    config = node.pins / "maps" / "config"
    with layout_map(config) as opened:
        before = opened.lookup(0)
        try:
            opened.update(0, layout.CONFIG.pack(**layout.CONFIG.unpack(before) | {"generation": 0}))
            done = node.meshwall("panic", "failsafe")
        finally:
            opened.update(0, before)
    assert done.returncode == 2
    assert "no policy has ever been loaded here" in done.stderr
    assert open_ports(node) == [OPEN, FAILSAFE]


def layout_map(path):
    from bpf.syscall import PinnedMap

    return PinnedMap.open(path, layout.maps()["config"])


# Audit


def audit(node, *words: str) -> str:
    done = node.meshwall("audit", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_audit_of_the_host_is_a_switch_of_the_generation(node):
    generation = node.generation()
    assert "the whole host  on" in audit(node, "on")
    assert node.generation() > generation
    assert open_ports(node) == [OPEN, CLOSED, FAILSAFE]
    assert node.status()["enforcement"]["audit"]
    assert "AUDIT: audit: everything passes" in node.meshwall("status").stdout
    audit(node, "off")
    assert open_ports(node) == [OPEN, FAILSAFE]
    assert "the whole host  off" in audit(node, "status")
    audit(node, "reset")
    assert "settings" in audit(node, "status")


@pytest.mark.slow
def test_audit_outlives_the_daemon(node):
    audit(node, "on")
    node.stop(signal.SIGKILL)
    assert node.connects(CLOSED)
    node.start()
    node.until(lambda: node.status().get("enforcement", {}).get("ok", False), 30)
    assert node.status()["enforcement"]["audit"]
    assert node.connects(CLOSED)
    audit(node, "reset")
    assert open_ports(node) == [OPEN, FAILSAFE]


def test_audit_of_one_policy_lets_its_own_denials_pass_and_an_unknown_name_is_refused(node):
    audit(node, "on", "--policy", "base")
    assert open_ports(node) == [OPEN, CLOSED, FAILSAFE]
    assert node.status()["policies"]["by_state"] == {"audit": 1}
    audit(node, "off", "--policy", "base")
    assert open_ports(node) == [OPEN, FAILSAFE]
    done = node.meshwall("audit", "on", "--policy", "nosuch")
    assert done.returncode == 2
    assert "no policy 'nosuch'" in done.stderr


def test_switching_audit_under_traffic_drops_no_allowed_packet_and_passes_denied_ones_only_while_it_is_on(
    node,
):
    """Each datagram has a number; the numbers of denied ones that arrived form one run for each audit."""
    with (
        node.bound(node.us, node.node, OPEN) as allowed,
        node.bound(node.us, node.node, CLOSED) as denied,
        node.bound(node.peer, node.other, 0) as mine,
    ):
        for one in (allowed, denied):
            one.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        stop, sent = threading.Event(), 0

        def send() -> None:
            nonlocal sent
            while not stop.is_set():
                for port in (OPEN, CLOSED):
                    mine.sendto(struct.pack("=I", sent), (node.node, port))
                sent += 1
                time.sleep(0.0005)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(3):
            audit(node, "on")
            audit(node, "off")
        stop.set()
        sender.join()
        numbers = {
            one: [struct.unpack("=I", raw)[0] for raw in node.received(one)] for one in (allowed, denied)
        }
    assert numbers[allowed] == list(range(sent))
    assert 0 < len(numbers[denied]) < sent
    gaps = [
        after
        for before, after in zip(numbers[denied], numbers[denied][1:], strict=False)
        if after != before + 1
    ]
    assert len(gaps) == 2
