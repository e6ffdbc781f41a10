"""Policies are exchanged under traffic: no packet may be judged by a part of each."""

import asyncio
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bpf import layout
from bpf.attach import XdpMode, attach
from daemon.datapath.image import Image
from daemon.datapath.links import cleanup, load
from daemon.datapath.maps import KernelMaps
from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import parse_labels
from daemon.model.net import compact, parse_prefix
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import Compiled, CompileSettings, Subject, compile_policy

pytestmark = pytest.mark.kernel

SIZES = layout.sized(
    slots=4096, cells=1 << 18, rules=4096, hosts=1024, conntrack=4096, ip4_blocks=1024, prefixes6=1024
)
NODE, ANN, BOB = "10.96.7.1", "10.96.7.2", "10.96.7.3"
ANNS, BOBS = 2000, 2001  # the port of each; never that of the other
SUBJECT = Subject(Identity(1), parse_labels(["reserved:host"]))
KNOWN = {Identity(one): reserved_labels(Identity(one)) for one in Reserved if one}
SENDER = """
import itertools, select, socket, sys, time
node, ann, bob, anns, bobs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
ends = []
for source, port in ((ann, anns), (bob, bobs), (ann, bobs), (bob, anns)):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind((source, port + 20000))
    one.connect((node, port))
    ends.append(one)
for rounds in itertools.count(1):
    for one in ends:
        try:
            one.send(b"x")
        except ConnectionRefusedError:
            one.send(b"x")
    time.sleep(0.0001)
    if not rounds % 64 and select.select([sys.stdin], [], [], 0)[0]:
        break
print(rounds)
"""


def rule(cidr: str, port: int) -> dict[str, object]:
    return {"fromCIDR": [cidr], "toPorts": [{"ports": [{"port": str(port), "protocol": "UDP"}]}]}


def policy(variant: int, rules: int) -> Compiled:
    """Both variants mean the same for Ann and Bob, with other rows, other columns and other prefixes around them."""
    ingress = [rule(f"{ANN}/32", ANNS), rule(f"{BOB}/32", BOBS)]
    ingress += [
        rule(f"172.{16 + (at >> 8)}.{at & 255}.0/24", 3000 + (7 * at + 13 * variant) % 64)
        for at in range(rules)
    ]
    if variant:
        ingress = [rule(f"172.30.{at}.0/24", 100 + at) for at in range(40)] + ingress
        ingress += [rule("10.96.7.0/29", 5000), rule("10.96.0.0/16", 1999)]
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "switched"},
        "spec": {"nodeSelector": {}, "ingress": ingress},
    }
    parsed = parse_documents(json.dumps(document), "switched.yaml")
    assert not parsed.problems
    return compile_policy(parsed.policies, {}, SUBJECT, KNOWN, CompileSettings())


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass
class Ground:
    """A node with our programs on a cable, and Ann and Bob at its other end."""

    pins: Path
    node: str = field(default_factory=lambda: f"mwsn{os.getpid()}")
    peer: str = field(default_factory=lambda: f"mwsp{os.getpid()}")

    def up(self) -> None:
        for name in (self.node, self.peer):
            ip("netns", "add", name)
        ip("-n", self.node, "link", "add", "mws0", "type", "veth", "peer", "name", "mws0", "netns", self.peer)
        for name, addresses in ((self.node, [NODE]), (self.peer, [ANN, BOB])):
            for one in addresses:
                ip("-n", name, "addr", "add", f"{one}/24", "dev", "mws0")
            ip("-n", name, "link", "set", "mws0", "up")
        asyncio.run(load(self.pins, SIZES))
        with self.inside():
            attach(self.pins, socket.if_nametoindex("mws0"), XdpMode.AUTO)

    def down(self) -> None:
        cleanup(self.pins)
        subprocess.run(["umount", self.pins], check=False, capture_output=True)
        for name in (self.node, self.peer):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def inside(self) -> "Inside":
        return Inside(self.node)

    def ends(self) -> list[socket.socket]:
        """What hears Ann, what hears Bob, and the two that must never hear anything."""
        found = []
        with self.inside():
            for source, port in ((ANN, ANNS), (BOB, BOBS), (ANN, BOBS), (BOB, ANNS)):
                one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
                one.bind((NODE, port))
                one.connect((source, port + 20000))
                one.settimeout(0.5)
                found.append(one)
        return found


class Inside:
    """This thread in a namespace; sockets made there stay there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        with Path(f"/run/netns/{self.name}").open() as there:
            libc_setns(there.fileno())

    def __exit__(self, *_: object) -> None:
        libc_setns(self.before)
        os.close(self.before)


def libc_setns(fd: int) -> None:
    assert ctypes.CDLL(None, use_errno=True).setns(fd, 0) == 0


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    made = Ground(tmp_path / "bpf")
    made.pins.mkdir()
    try:
        made.up()
        yield made
    finally:
        made.down()


def count(one: socket.socket, found: list[int]) -> None:
    """Until nothing comes for half a second."""
    with contextlib.suppress(TimeoutError):
        while one.recv(16):
            found[0] += 1


def switched_under_traffic(ground: Ground, switches: int, rules: int, within_s: float) -> int:
    """Exchange two policies so many times, or as often as the time allows; how many it were. Nothing may be torn."""
    maps, image = KernelMaps(ground.pins, SIZES), Image(SIZES)
    variants = [policy(0, rules), policy(1, rules)]
    maps.apply(image.claim({compact(parse_prefix(NODE)): SUBJECT.identity}, ()))
    maps.apply(image.switch(variants[0]))
    ends = ground.ends()
    command = ["nsenter", f"--net=/run/netns/{ground.peer}", sys.executable, "-c", SENDER]
    counts = [[0] for _ in ends]
    threads = [threading.Thread(target=count, args=pair) for pair in zip(ends[:2], counts, strict=False)]
    with subprocess.Popen(
        [*command, NODE, ANN, BOB, str(ANNS), str(BOBS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as sender:
        for one in ends[:2]:
            assert one.recv(16)  # the neighbours know each other
        for one in threads:
            one.start()
        done, deadline = 0, time.monotonic() + within_s
        while done < switches and time.monotonic() < deadline:
            maps.apply(image.switch(variants[(done + 1) % 2]))
            done += 1
        sent = int(sender.communicate(b"\n")[0])
    for one in threads:
        one.join()
    for end, found in zip(ends[2:], counts[2:], strict=True):
        end.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            count(end, found)
    maps.close()
    assert sent > 20 * done
    assert [found[0] for found in counts] == [sent - 1, sent - 1, 0, 0], f"{done} switches"
    return done


def test_no_packet_sees_a_part_of_each_policy(ground):
    assert switched_under_traffic(ground, 2000, rules=100, within_s=8) > 50


@pytest.mark.slow
def test_no_packet_sees_a_part_of_each_policy_in_two_thousand_switches_of_a_thousand_rules(ground):
    assert switched_under_traffic(ground, 2000, rules=1000, within_s=600) == 2000
