"""A real meshwalld between two namespaces: what its policies do to real packets, counted at sockets."""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bpf import layout
from bpf.syscall import PinnedMap

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "slots": 1024,
    "cells": 16_384,
    "hosts": 1024,
    "conntrack": 4096,
    "ip4_blocks": 1024,
    "prefixes6": 1024,
}
NODE = {4: "10.98.0.1", 6: "fd98::1"}
ADMIN = {4: "10.98.0.2", 6: "fd98::2"}  # has an identity from the beginning
LATE = {4: "10.98.0.3", 6: "fd98::3"}  # gets one during a test
OTHER = {4: "10.98.0.4", 6: "fd98::4"}
GUEST = {4: "10.98.0.9", 6: "fd98::9"}  # allowed by address, not by identity
KUBELET, CLOSED, OUTSIDE, REFUSED = 10250, 10251, 8443, 8444
FAMILIES = pytest.mark.parametrize("family", [4, 6])
SO_RCVBUFFORCE = 33
_libc = ctypes.CDLL(None, use_errno=True)

NOTHING = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: base}
spec:
  nodeSelector: {matchLabels: {no: such-label}}
  ingress: [{}]
"""
ADMINS = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: base}
spec:
  nodeSelector: {}
  ingress:
  - fromEndpoints: [{matchLabels: {app: admin}}]
    toPorts: [{ports: [{port: "10250", protocol: TCP}, {port: "10250", protocol: UDP}]}]
  - fromCIDR: [10.98.0.8/29, "fd98::8/125"]
    toPorts: [{ports: [{port: "10250", protocol: UDP}]}]
"""
# The same for everybody in the test, told apart differently: prefixes split and merge at each switch.
ADMINS_SPLIT = (
    ADMINS
    + """
  - fromCIDR: [10.98.0.128/25, "fd98::8000/113"]
    toPorts: [{ports: [{port: "1000", endPort: 2000, protocol: TCP}]}]
  ingressDeny:
  - fromCIDR: [10.98.0.4/30, "fd98::4/126", 10.98.0.8/30, "fd98::8/126"]
    toPorts: [{ports: [{port: "10251", protocol: UDP}]}]
"""
)
OUTWARD = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: base}
spec:
  nodeSelector: {}
  egress:
  - toCIDR: [10.98.0.0/24, "fd98::/64"]
    toPorts: [{ports: [{port: "8443", protocol: TCP}]}]
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a namespace; sockets made there stay there."""
    with (
        Path("/proc/thread-self/ns/net").open() as before,
        Path(f"/run/netns/{namespace}").open() as there,
    ):
        assert _libc.setns(there.fileno(), 0) == 0
        try:
            yield
        finally:
            _libc.setns(before.fileno(), 0)


def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    """Wait for it, so long at most."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@dataclass
class Cable:
    """The node under test and everybody else, with one veth between them, and the node's meshwalld."""

    home: Path
    node: str = f"mwen{os.getpid()}"
    peer: str = f"mwep{os.getpid()}"
    daemon: "subprocess.Popen[bytes] | None" = None
    listeners: list[socket.socket] = field(default_factory=list)
    policy: str = ""

    def up(self) -> None:
        for name in (self.node, self.peer):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        self.plug("mwe0", NODE, (ADMIN, LATE, OTHER, GUEST))
        for place, ports in ((self.node, (KUBELET, CLOSED)), (self.peer, (OUTSIDE, REFUSED))):
            with inside(place):
                self.listeners += [
                    socket.create_server(
                        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
                    )
                    for port in ports
                ]
        for name in ("policies", "run", "state", "bpf"):
            (self.home / name).mkdir(mode=0o755)
        self.identities({"app=admin": ADMIN})

    def plug(self, device: str, ours: dict[int, str], theirs: tuple[dict[int, str], ...]) -> None:
        """A new cable between the two: `device` is our end."""
        ip("-n", self.node, "link", "add", device, "type", "veth", "peer", "name", device, "netns", self.peer)
        for name, addresses in ((self.node, (ours,)), (self.peer, theirs)):
            for one in addresses:
                ip("-n", name, "addr", "add", f"{one[4]}/24", "dev", device)
                ip("-n", name, "-6", "addr", "add", f"{one[6]}/64", "dev", device, "nodad")
            ip("-n", name, "link", "set", device, "up")

    def down(self) -> None:
        self.stop(signal.SIGKILL)
        for one in self.listeners:
            one.close()
        subprocess.run(["umount", self.home / "bpf"], check=False, capture_output=True)
        for name in (self.node, self.peer):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self) -> None:
        settings = {
            "node_name": "n1", "policy_dir": str(self.home / "policies"), "pins": str(self.home / "bpf"),
            "run_dir": str(self.home / "run"), "state_dir": str(self.home / "state"), "devices": ["mwe*"],
            "identities_file": str(self.home / "identities.yaml"), "map_sizes": SIZES,
        }  # fmt: skip
        (self.home / "meshwall.yaml").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "daemon.main", "--config", str(self.home / "meshwall.yaml")]
        with (self.home / "log").open("a") as log:
            self.daemon = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.node}", *command], cwd=ROOT, stderr=log
            )

    def stop(self, how: signal.Signals) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(how)
            self.daemon.wait(10)
            self.daemon = None

    def generation(self) -> int:
        """What the kernel enforces; 0 before there is anything."""
        try:
            with PinnedMap.open(
                self.home / f"bpf/v{layout.LAYOUT_VERSION}/maps/config", layout.maps()["config"]
            ) as config:
                return int.from_bytes((config.lookup(0) or b"")[:4], sys.byteorder)
        except OSError:
            return 0

    def write(self, policy: str) -> None:
        """Replace the policy file."""
        new = self.home / "new.yaml"
        new.write_text(policy)
        new.chmod(0o644)
        new.rename(self.home / "policies" / "base.yaml")
        self.policy = policy

    def enforce(self, policy: str) -> None:
        """Replace the policy file and wait until the kernel enforces it."""
        if policy == self.policy:
            return
        before = self.generation()
        self.write(policy)
        until(lambda: self.generation() > before, 15)

    def identities(self, addresses: dict[str, dict[int, str]]) -> None:
        known = [
            {"id": 7001 + at, "labels": [f"k8s:{label}", "k8s:io.kubernetes.pod.namespace=ops"],
             "addresses": list(one.values())}
            for at, (label, one) in enumerate(addresses.items())
        ]  # fmt: skip
        new = self.home / "identities.new"
        new.write_text(json.dumps({"identities": known}))
        new.rename(self.home / "identities.yaml")

    def meshwall(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "daemon.cli.main", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)

    def problems(self) -> str:
        answer = self.meshwall("status", "-o", "json", "--socket", str(self.home / "run" / "meshwall.sock"))
        return json.dumps(json.loads(answer.stdout)["problems"])

    def open(self, place: str, address: str, kind: socket.SocketKind) -> socket.socket:
        """A socket in a namespace, bound to an address there."""
        with inside(place):
            one = socket.socket(family_of(address), kind)
        one.settimeout(0.25)
        one.bind((address, 0))
        return one

    def connects(self, source: str, port: int, node: str = "") -> bool:
        """Does the node accept a TCP connection from this address of the peer?"""
        return self._connects(self.peer, source, node or NODE[6 if ":" in source else 4], port)

    def reaches(self, target: str, port: int) -> bool:
        """Does a TCP connection of the node to this address of the peer come about?"""
        return self._connects(self.node, NODE[6 if ":" in target else 4], target, port)

    def _connects(self, place: str, source: str, target: str, port: int) -> bool:
        with self.open(place, source, socket.SOCK_STREAM) as one:
            try:
                one.connect((target, port))
            except OSError:
                return False
            return True

    def pings(self, place: str, source: str, target: str) -> bool:
        """Does an ICMP echo come back?"""
        v6 = ":" in source
        with inside(place):
            one = socket.socket(
                family_of(source), socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
            )
        with one:
            one.bind((source, 0))
            body = struct.pack(">HH", os.getpid() & 0xFFFF, 1) + b"meshwall"
            head = bytes((128 if v6 else 8, 0))
            total = sum(struct.unpack(f">{len(body) // 2 + 1}H", head + body))
            check = ~(total + (total >> 16)) & 0xFFFF
            one.sendto(head + struct.pack(">H", 0 if v6 else check) + body, (target, 0))
            deadline = time.monotonic() + 0.4
            while (left := deadline - time.monotonic()) > 0 and select.select([one], [], [], left)[0]:
                answer = one.recv(2048)[0 if v6 else 20 :]
                if answer[0] == (129 if v6 else 0) and answer[8:] == b"meshwall":
                    return True
        return False

    def accepted(self, port: int) -> socket.socket:
        """The newest connection that a listener holds."""
        listener = next(one for one in self.listeners if one.getsockname()[1] == port)
        listener.settimeout(1)
        newest, _ = listener.accept()
        while select.select([listener], [], [], 0)[0]:
            newest.close()
            newest, _ = listener.accept()
        return newest


@dataclass
class Counted:
    """Datagrams sent from one address of the peer to one port of the node, and those that arrived."""

    sent: int = 0
    received: int = 0


@contextlib.contextmanager
def traffic(cable: Cable, flows: dict[tuple[str, int], Counted], every_s: float = 0.0005) -> Iterator[None]:
    """Send on every flow, over and over, and count both ends at the sockets."""
    ends, ours, stop = [], [], threading.Event()
    for source, port in flows:
        with inside(cable.node):
            end = socket.socket(family_of(source), socket.SOCK_DGRAM)
        end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        end.bind((NODE[6 if ":" in source else 4], port))
        end.connect((source, 30000 + port))
        ends.append(end)
        with inside(cable.peer):
            mine = socket.socket(family_of(source), socket.SOCK_DGRAM)
        mine.bind((source, 30000 + port))
        ours.append(mine)

    def send() -> None:
        while not stop.is_set():
            for mine, ((source, port), count) in zip(ours, flows.items(), strict=True):
                mine.sendto(b"x", (NODE[6 if ":" in source else 4], port))
                count.sent += 1
            time.sleep(every_s)

    def receive(end: socket.socket, count: Counted) -> None:
        with contextlib.suppress(BlockingIOError):
            while end.recv(16, socket.MSG_DONTWAIT):
                count.received += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()
        time.sleep(0.1)
        for end, count in zip(ends, flows.values(), strict=True):
            receive(end, count)
        for one in (*ends, *ours):
            one.close()


def counted() -> dict[tuple[str, int], Counted]:
    """Two allowed flows and two denied ones, in both families."""
    return {
        (source[family], port): Counted()
        for family in (4, 6)
        for source, port in ((ADMIN, KUBELET), (GUEST, KUBELET), (ADMIN, CLOSED), (OTHER, KUBELET))
    }


def verdicts_hold(flows: dict[tuple[str, int], Counted], at_least: int) -> None:
    """Every packet of the allowed flows arrived, none of the others did; and there were enough to tell."""
    for (source, port), count in flows.items():
        allowed = port == KUBELET and source in (*ADMIN.values(), *GUEST.values())
        assert count.sent >= at_least, (source, port, count)
        assert count.received == (count.sent if allowed else 0), (source, port, count)


@pytest.fixture(scope="module")
def cable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cable]:
    made = Cable(tmp_path_factory.mktemp("enforcement"))
    try:
        made.up()
        made.write(NOTHING)
        made.start()
        until(lambda: made.generation() > 0, 30)
        yield made
    finally:
        print((made.home / "log").read_text() if (made.home / "log").exists() else "no log")
        made.down()


@FAMILIES
def test_connections_that_exist_when_enforcement_begins_are_not_cut(cable, family):
    cable.enforce(NOTHING)
    with cable.open(cable.node, NODE[family], socket.SOCK_STREAM) as ours:
        ours.connect((OTHER[family], REFUSED))
        with cable.accepted(REFUSED) as theirs:
            cable.enforce(ADMINS)
            assert not cable.connects(OTHER[family], CLOSED)
            theirs.sendall(b"still here")  # the peer speaks first: nothing of ours can have opened the way
            assert ours.recv(16) == b"still here"


@FAMILIES
def test_only_the_admin_reaches_the_kubelet(cable, family):
    cable.enforce(ADMINS)
    assert cable.connects(ADMIN[family], KUBELET)
    assert not cable.connects(ADMIN[family], CLOSED)
    assert not cable.connects(OTHER[family], KUBELET)


@FAMILIES
def test_the_node_reaches_others_and_gets_their_answers_though_nobody_may_come_in(cable, family):
    cable.enforce(ADMINS)
    assert cable.reaches(OTHER[family], REFUSED)
    assert cable.pings(cable.node, NODE[family], OTHER[family])
    assert not cable.pings(cable.peer, OTHER[family], NODE[family])


@FAMILIES
def test_answers_to_a_datagram_pass_and_other_datagrams_do_not(cable, family):
    cable.enforce(ADMINS)
    with (
        cable.open(cable.node, NODE[family], socket.SOCK_DGRAM) as ours,
        cable.open(cable.peer, OTHER[family], socket.SOCK_DGRAM) as theirs,
        cable.open(cable.peer, OTHER[family], socket.SOCK_DGRAM) as stranger,
    ):
        stranger.sendto(b"unasked", ours.getsockname())
        ours.sendto(b"question", theirs.getsockname())
        question, place = theirs.recvfrom(16)
        theirs.sendto(b"answer", place)
        assert (question, ours.recv(16)) == (b"question", b"answer")
        stranger.sendto(b"unasked", place)
        with pytest.raises(TimeoutError):
            ours.recv(16)


@FAMILIES
def test_what_leaves_the_node_is_limited_to_what_policy_names(cable, family):
    cable.enforce(OUTWARD)
    assert cable.reaches(OTHER[family], OUTSIDE)
    assert not cable.reaches(OTHER[family], REFUSED)
    assert cable.connects(OTHER[family], CLOSED)  # comes in, and its answers go out


def test_an_identity_that_arrives_later_needs_no_new_policy(cable):
    cable.enforce(ADMINS)
    assert not cable.connects(LATE[4], KUBELET)
    generation = cable.generation()
    cable.identities({"app=admin": ADMIN | {5: LATE[4], 7: LATE[6]}})
    until(lambda: cable.connects(LATE[4], KUBELET))
    until(lambda: cable.connects(LATE[6], KUBELET))
    cable.identities({"app=admin": ADMIN})
    until(lambda: not cable.connects(LATE[4], KUBELET))
    assert cable.generation() == generation


def test_a_device_that_appears_later_is_filtered(cable):
    cable.enforce(ADMINS)
    cable.plug("mwe1", {4: "10.97.0.1", 6: "fd97::1"}, ({4: "10.97.0.2", 6: "fd97::2"},))
    until(lambda: not cable.connects("10.97.0.2", CLOSED, "10.97.0.1"))
    assert not cable.connects("fd97::2", CLOSED, "fd97::1")
    ip("-n", cable.node, "link", "delete", "mwe1")
    assert cable.connects(ADMIN[4], KUBELET)


def test_a_policy_that_does_not_fit_is_refused_whole_and_the_old_one_stays(cable):
    cable.enforce(ADMINS)
    many = "".join(
        f'  - {{fromCIDR: [10.{at}.0.0/16], toPorts: [{{ports: [{{port: "{at + 1}", protocol: TCP}}]}}]}}\n'
        for at in range(200)
    )
    generation = cable.generation()
    cable.write(ADMINS + many)
    until(lambda: "refused, the last good policy stays: cells: " in cable.problems())
    assert cable.generation() == generation
    assert cable.connects(ADMIN[4], KUBELET)
    assert not cable.connects(OTHER[4], KUBELET)
    cable.write(ADMINS)
    until(lambda: "refused" not in cable.problems())


def test_policy_switches_lose_no_allowed_packet_and_pass_no_denied_one(cable):
    cable.enforce(ADMINS)
    flows = counted()
    with traffic(cable, flows):
        for _ in range(15):
            cable.enforce(ADMINS_SPLIT)
            cable.enforce(ADMINS)
    verdicts_hold(flows, 1000)


def test_a_daemon_that_is_killed_and_started_again_changes_nothing_for_traffic(cable):
    cable.enforce(ADMINS)
    flows = counted()
    with traffic(cable, flows, 0.001):
        for how in (signal.SIGKILL, signal.SIGTERM):
            cable.stop(how)
            time.sleep(0.3)
            cable.start()
            cable.enforce(ADMINS_SPLIT if how is signal.SIGKILL else ADMINS)  # the new one is in charge
    verdicts_hold(flows, 1000)


@pytest.mark.slow
def test_a_daemon_killed_in_the_middle_of_switches_leaves_verdicts_that_hold(cable):
    cable.enforce(ADMINS)
    flows = counted()
    with traffic(cable, flows, 0.001):
        for pause_s in (0.004, 0.008, 0.012, 0.016, 0.02, 0.024, 0.028, 0.032):
            cable.write(ADMINS_SPLIT)
            time.sleep(pause_s)
            cable.stop(signal.SIGKILL)
            cable.start()
            time.sleep(0.1)
            cable.enforce(ADMINS)
    verdicts_hold(flows, 1000)


def test_cleanup_leaves_nothing_and_works_without_the_daemon(cable):
    """Last: it ends the enforcement that the others look at."""
    cable.enforce(ADMINS)
    cable.stop(signal.SIGTERM)
    assert not cable.connects(OTHER[4], CLOSED)
    done = cable.meshwall("cleanup", "--pins", str(cable.home / "bpf"))
    assert done.returncode == 0, done.stderr
    assert not list((cable.home / "bpf").iterdir())
    assert not os.path.ismount(cable.home / "bpf")
    assert cable.connects(OTHER[4], CLOSED)
    assert cable.reaches(OTHER[6], REFUSED)
