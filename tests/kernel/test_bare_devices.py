"""Devices without link header: the programs for them, and a real tunnel whose outside and inside are judged apart."""

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import random
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import attach, frames, loader
from bpf.attach import XdpMode
from bpf.frames import ACK, RST, SYN
from bpf.layout import PORTS_TCP, PORTS_UDP, SLOT_HOST, BufferFlag, CellFlag, CellVerdict
from bpf.model import Direction, Host, Policy
from bpf.run import SKB_INGRESS_IFINDEX, SKB_SIZE, TCX_NEXT, Rig
from bpf.syscall import prog_test_run

pytestmark = pytest.mark.kernel

ALLOW, DENY = CellVerdict.ALLOW << 28 | 16, CellVerdict.DENY << 28 | 17
REFUSE = DENY | CellFlag.REJECT << 24
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if os.geteuid():
        pytest.skip("loading BPF needs root")
    with Rig() as loaded:
        yield loaded


# The kernel's test run takes the protocol from bytes 12 and 13, where a bare packet has its source: these are right.
LEAST = 54  # bytes, else it refuses the packet: after the 14 that it takes for Ethernet it wants an IP header
PEERS4 = [f"8.0.{third}.{fourth}" for third in (0, 7) for fourth in (1, 9, 200)]
PEERS6 = [f"2001:db8:86dd::{number}" for number in (1, 5, 9)]


def some_frame(choice: random.Random, us: str, peers: list[str]) -> bytes:
    src, dst = choice.choice(peers), choice.choice([us, us, *peers])
    ports = choice.choice([22, 53, 80, 40_000]), choice.choice([22, 53, 80, 40_000])
    kind = choice.randrange(5)
    if kind < 2:
        frame = frames.tcp(src, dst, *ports, choice.choice([SYN, ACK, SYN | ACK, RST, 0]))
    elif kind == 2:
        frame = frames.udp(src, dst, *ports, bytes(choice.randrange(20)))
    elif kind == 3:
        frame = frames.icmp(src, dst, choice.choice([8, 0, 3, 128, 129, 135]), identifier=choice.randrange(3))
    else:
        l4 = frames.udp_datagram(*ports, bytes(56))
        frame = frames.ip(
            src, dst, 17, l4, identification=choice.randrange(4), fragment=choice.choice([1, 64])
        )
    broken = bytearray(frame.ljust(14 + LEAST, b"\0"))
    for _ in range(choice.choice([0, 0, 1])):
        at = choice.randrange(14, len(broken))
        if not 26 <= at < 28 and not 22 <= at < 30 and at != 14:
            broken[at] = choice.randrange(256)
    if choice.random() < 0.1:
        del broken[choice.randrange(14 + LEAST, len(broken) + 1) :]
    return bytes(broken)


def test_the_programs_for_bare_packets_and_the_model_agree(rig: Rig) -> None:
    choice = random.Random(7)  # noqa: S311
    own = {packed("8.0.0.9"): SLOT_HOST, packed("2001:db8:86dd::9"): SLOT_HOST}
    rows = {
        (direction, slot): ((22, 53, ALLOW), (PORTS_UDP + 53, PORTS_UDP + 80, ALLOW))
        for direction in Direction
        for slot in (0, 2)
    }
    for enforced in range(1, 4):
        policy = Policy(own, rows=rows, enforced=BufferFlag(enforced))
        host = Host(policy)
        rig.forget()
        rig.install(policy)
        for number in range(700):
            us, peers = choice.choice([("8.0.0.9", PEERS4), ("2001:db8:86dd::9", PEERS6)])
            frame = some_frame(choice, us, peers)
            for name, direction in (
                ("tcx_ingress_l3", Direction.INGRESS),
                ("tcx_egress_l3", Direction.EGRESS),
            ):
                forwarded = direction is Direction.EGRESS and number % 5 == 0
                passes = run_bare(rig, name, frame[14:], forwarded=forwarded)
                # the test run reads the first bytes as a MAC address: to a group (0x45) or to another machine (0x60)
                keeps_state = direction is Direction.EGRESS or frame[14] == 0x45
                wanted = host.judge(frame, direction, forwarded=forwarded, keeps_state=keeps_state)
                assert passes == wanted.passes, (name, frame.hex(), wanted)


def run_bare(rig: Rig, name: str, packet: bytes, *, forwarded: bool) -> bool:
    context = bytearray(SKB_SIZE)
    if forwarded:
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, 1)
    return prog_test_run(rig.loaded.fds[name], packet, context=bytes(context)).value == TCX_NEXT


# A tunnel of datagrams between two namespaces: the simplest thing that has an outside and an inside

HERE, THERE, DEVICE, FAR, TUN = "mwbarehere", "mwbarethere", "mwbr0", "mwbr1", "mwtun0"
OUTER, INNER = ("10.78.0.1", "10.78.0.2"), ("10.79.0.1", "10.79.0.2")
INNER6 = ("fd79::1", "fd79::2")
CARRIER, OPEN, CLOSED = 4_754, 7_000, 7_001


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert _libc.setns(there, 0) == 0
        yield
    finally:
        _libc.setns(before, 0)
        os.close(there)
        os.close(before)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def tunnel_end(end: int, namespace: str) -> tuple[int, socket.socket]:
    """A tun device with its addresses, and the socket that carries its packets."""
    with inside(namespace):
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", TUN.encode(), IFF_TUN | IFF_NO_PI))
        carrier = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        carrier.bind((OUTER[end], CARRIER))
        carrier.connect((OUTER[1 - end], CARRIER))
    ip("-n", namespace, "addr", "add", f"{INNER[end]}/24", "dev", TUN)
    ip("-n", namespace, "addr", "add", f"{INNER6[end]}/64", "dev", TUN, "nodad")
    ip("-n", namespace, "link", "set", TUN, "up", "mtu", "1300")
    return tun, carrier


def relay(ends: list[tuple[int, socket.socket]], stop: threading.Event) -> None:
    """Carries packets between the tun devices and their sockets."""
    to = {tun: carrier.fileno() for tun, carrier in ends} | {carrier.fileno(): tun for tun, carrier in ends}
    while not stop.is_set():
        for ready in select.select(list(to), [], [], 0.05)[0]:
            with contextlib.suppress(OSError):  # refused or down for a moment
                os.write(to[ready], os.read(ready, 2_000))


@pytest.fixture(scope="module")
def tunnel(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The pins; nothing is attached yet."""
    pins = tmp_path_factory.mktemp("bpffs") / "pins"
    pins.mkdir()
    ends: list[tuple[int, socket.socket]] = []
    stop = threading.Event()
    try:
        for name in (HERE, THERE):
            ip("netns", "add", name)
        ip("-n", HERE, "link", "add", DEVICE, "type", "veth", "peer", "name", FAR, "netns", THERE)
        for end, (name, device) in enumerate(((HERE, DEVICE), (THERE, FAR))):
            ip("-n", name, "addr", "add", f"{OUTER[end]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        ends += [tunnel_end(end, name) for end, name in enumerate((HERE, THERE))]
        carrying = threading.Thread(target=relay, args=(ends, stop))
        carrying.start()
        subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
        loader.pin_programs(rig.loaded.fds, attach.home(pins) / "progs")
        yield pins
    finally:
        stop.set()
        if ends:
            carrying.join()
        for tun, carrier in ends:
            os.close(tun)
            carrier.close()
        subprocess.run(["umount", "-l", pins], check=False)
        for name in (HERE, THERE):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def filtered(pins: Path, device: str) -> Iterator[attach.Attachment]:
    with inside(HERE):
        index = socket.if_nametoindex(device)
        how = attach.attach(pins, index, XdpMode.AUTO)
        try:
            assert attach.status(pins, index) == attach.Attachment(index, True, True, how.xdp, how.by)
            yield how
        finally:
            attach.detach(pins, index)


def policy(**ports: int) -> Policy:
    """From the peer, outside and inside: cells by `u` or `t` and the port; the rest is denied with an answer."""
    own = {packed(one): SLOT_HOST for one in (OUTER[0], INNER[0], INNER6[0])}
    bases = {"u": PORTS_UDP, "t": PORTS_TCP}
    paints = tuple((bases[name[0]] + int(name[1:]),) * 2 + (cell,) for name, cell in ports.items())
    rows = {(Direction.INGRESS, slot): paints for slot in (0, 2)}
    return Policy(own, rows=rows, default={Direction.INGRESS: REFUSE, Direction.EGRESS: ALLOW})


def connect(address: str, port: int) -> int:
    """errno of a connection from there; nobody listens here, so passing is a refusal by the stack."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(THERE), socket.socket(family, socket.SOCK_STREAM) as sender:
        sender.settimeout(0.4)
        try:
            sender.connect((address, port))
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno or 0
    return 0


def listening(address: str) -> socket.socket:
    with inside(HERE):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        server.bind((address, OPEN))
        server.listen()
    return server


@pytest.mark.parametrize("inner", [INNER[0], INNER6[0]])
def test_a_tunnel_is_judged_inside_at_its_own_device(rig: Rig, tunnel: Path, inner: str) -> None:
    rig.forget()
    with listening(inner), filtered(tunnel, TUN) as how:
        assert how.xdp == "off"
        assert "no XDP on devices without link header" in how.note
        rig.install(policy(t7000=ALLOW))
        assert connect(inner, OPEN) == 0
        rig.install(policy(t7000=DENY))
        assert connect(inner, OPEN) == errno.ETIMEDOUT
        rig.install(policy())
        assert connect(inner, OPEN) == errno.ECONNREFUSED  # a reset came back through the tunnel


def test_a_tunnel_is_judged_outside_at_the_device_that_carries_it(rig: Rig, tunnel: Path) -> None:
    rig.forget()
    with listening(INNER[0]), filtered(tunnel, DEVICE) as how:
        assert how.xdp == "native"
        rig.install(policy(u4754=ALLOW))
        assert connect(INNER[0], OPEN) == 0  # nothing looks inside
        rig.install(policy(u4754=DENY, t7000=ALLOW))
        assert connect(INNER[0], OPEN) == errno.ETIMEDOUT
        with filtered(tunnel, TUN):
            rig.install(policy(u4754=ALLOW, t7000=ALLOW))
            assert connect(INNER[0], OPEN) == 0
            assert connect(INNER[0], CLOSED) == errno.ECONNREFUSED


def test_what_this_host_sends_into_a_tunnel_is_judged_too(rig: Rig, tunnel: Path) -> None:
    own = {packed(INNER[0]): SLOT_HOST}
    rig.forget()
    with filtered(tunnel, TUN), inside(HERE):
        rig.install(Policy(own, default={Direction.INGRESS: DENY, Direction.EGRESS: REFUSE}))
        with socket.socket() as sender:
            sender.settimeout(0.4)
            with pytest.raises(ConnectionRefusedError):  # the answer of the egress program
                sender.connect((INNER[1], OPEN))


def test_vxlan_devices_have_frames_and_take_the_programs_for_them(rig: Rig, tunnel: Path) -> None:
    ip("-n", HERE, "link", "add", "mwvx0", "type", "vxlan", "id", "5", "dstport", "4789",
       "local", OUTER[0], "remote", OUTER[1])  # fmt: skip
    ip("-n", THERE, "link", "add", "mwvx0", "type", "vxlan", "id", "5", "dstport", "4789",
       "local", OUTER[1], "remote", OUTER[0])  # fmt: skip
    try:
        for end, name in enumerate((HERE, THERE)):
            ip("-n", name, "addr", "add", f"10.80.0.{end + 1}/24", "dev", "mwvx0")
            ip("-n", name, "link", "set", "mwvx0", "up")
        rig.forget()
        with listening("10.80.0.1"), filtered(tunnel, "mwvx0"), filtered(tunnel, DEVICE):
            own = {packed(OUTER[0]): SLOT_HOST, packed("10.80.0.1"): SLOT_HOST}
            rows = {
                (Direction.INGRESS, 0): ((7_000, 7_000, ALLOW), (PORTS_UDP + 4_789, PORTS_UDP + 4_789, ALLOW))
            }
            rig.install(Policy(own, rows=rows, default={Direction.EGRESS: ALLOW}))
            assert connect("10.80.0.1", OPEN) == 0
            assert connect("10.80.0.1", CLOSED) == errno.ETIMEDOUT
    finally:
        for name in (HERE, THERE):
            subprocess.run(["ip", "-n", name, "link", "del", "mwvx0"], check=False)
