"""Answers instead of silence: what is sent back byte for byte, to whom never, how many, and what sockets see."""

import contextlib
import ctypes
import errno
import ipaddress
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest

from bpf import frames
from bpf.frames import ACK, FIN, RST, SYN
from bpf.layout import HITS, SLOT_HOST, CellFlag, CellVerdict, Hook
from bpf.model import Direction, Policy
from bpf.run import Rig
from bpf.syscall import XDP_NATIVE, AttachType, link_create

pytestmark = pytest.mark.kernel

US, THEM, US6, THEM6 = "192.0.2.1", "198.51.100.7", "2001:db8:a::1", "2001:db8:b::7"
FAMILIES = [(US, THEM), (US6, THEM6)]
INGRESS = [(Hook.TCX_INGRESS, THEM, US), (Hook.TCX_INGRESS, THEM6, US6)]
EGRESS = [(Hook.TCX_EGRESS, US, THEM), (Hook.TCX_EGRESS, US6, THEM6)]
REFUSE = CellVerdict.DENY << 28 | CellFlag.REJECT << 24 | 17
REFUSE_BY_DEFAULT = CellFlag.REJECT << 24
REPORT = CellVerdict.DENY << 28 | (CellFlag.REJECT | CellFlag.AUDIT) << 24 | 17
SILENT, ALLOW = CellVerdict.DENY << 28 | 18, CellVerdict.ALLOW << 28 | 16
BUDGET, PER_SOURCE = 100, 16
_libc = ctypes.CDLL(None, use_errno=True)


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


OWN = {packed(US): SLOT_HOST, packed(US6): SLOT_HOST}
REFUSING = Policy(OWN, default={Direction.INGRESS: REFUSE, Direction.EGRESS: REFUSE})


@pytest.fixture(scope="module")
def loaded() -> Iterator[Rig]:
    if os.geteuid():
        pytest.skip("loading BPF needs root")
    with Rig() as rig:
        yield rig


@pytest.fixture
def rig(loaded: Rig) -> Rig:
    loaded.forget()
    loaded.install(REFUSING)
    return loaded


def word_sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data + bytes(len(data) & 1)[: len(data) & 1]))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def taken_apart(frame: bytes, layer3: int = 14) -> tuple[str, str, int, bytes]:
    """Source, destination, protocol and transport part of an answer whose checksums are right."""
    if frame[layer3] >> 4 == 4:
        head, rest = frame[layer3 : layer3 + 20], frame[layer3 + 20 :]
        assert word_sum(head) == 0xFFFF
        assert struct.unpack_from(">H", head, 2)[0] == len(frame) - layer3
        proto, ends = head[9], (head[12:16], head[16:20])
    else:
        head, rest = frame[layer3 : layer3 + 40], frame[layer3 + 40 :]
        assert struct.unpack_from(">H", head, 4)[0] == len(rest)
        proto, ends = head[6], (head[8:24], head[24:40])
    pseudo = b"" if proto == 1 else b"".join(ends) + struct.pack(">II", len(rest), proto)
    assert word_sum(pseudo + rest) == 0xFFFF
    src, dst = (str(ipaddress.ip_address(end)) for end in ends)
    return src, dst, proto, rest


def answer(rig: Rig, hook: Hook, frame: bytes) -> bytes:
    verdict = rig.run(hook, frame)
    assert not verdict.passes
    return verdict.answer


@pytest.mark.parametrize("way", INGRESS + EGRESS)
@pytest.mark.parametrize(
    ("flags", "payload", "expected"),
    [
        (SYN, b"", (0, 1_001, RST | ACK)),
        (SYN, b"early", (0, 1_006, RST | ACK)),
        (ACK, b"data", (5_000, 0, RST)),
        (FIN | ACK, b"", (5_000, 0, RST)),
    ],
)
def test_tcp_gets_a_reset_that_its_sender_believes(
    rig: Rig, way: tuple[Hook, str, str], flags: int, payload: bytes, expected: tuple[int, int, int]
) -> None:
    hook, src, dst = way
    segment = struct.pack(">HHIIBBHHH", 40_000, 22, 1_000, 5_000, 0x50, flags, 65_535, 0, 0) + payload
    frame = frames.ip(src, dst, frames.TCP, segment, mac=bytes(6))
    told = answer(rig, hook, frame)
    assert told[:12] == frame[6:12] + frame[:6]
    assert told[12:14] == frame[12:14]
    back = taken_apart(told)
    assert back[:3] == (dst, src, frames.TCP)
    sport, dport, seq, ack, offset, got, *_ = struct.unpack(">HHIIBBHHH", back[3])
    assert (sport, dport, offset, (seq, ack, got)) == (22, 40_000, 0x50, expected)


@pytest.mark.parametrize("way", INGRESS + EGRESS)
@pytest.mark.parametrize("size", [0, 1, 5, 100, 1_200])
def test_others_get_an_icmp_error_that_quotes_them(rig: Rig, way: tuple[Hook, str, str], size: int) -> None:
    hook, src, dst = way
    frame = frames.udp(src, dst, 40_000, 53, bytes(size))
    back = taken_apart(answer(rig, hook, frame))
    proto, kind = (1, (3, 13)) if "." in src else (58, (1, 1))
    assert back[:3] == (dst, src, proto)
    assert tuple(back[3][:2]) == kind
    quoted = back[3][8:]
    assert quoted == frame[14 : 14 + len(quoted)]
    assert len(quoted) >= min(len(frame) - 14 & ~3, 128)


@pytest.mark.parametrize(("us", "them"), FAMILIES)
def test_an_answer_keeps_the_tags_of_its_frame(rig: Rig, us: str, them: str) -> None:
    frame = frames.ip(them, us, frames.TCP, frames.tcp_segment(40_000, 22), vlans=(7, 9))
    told = answer(rig, Hook.TCX_INGRESS, frame)
    assert told[12:22] == frame[12:22]
    assert taken_apart(told, 22)[0] == us


@pytest.mark.parametrize(("us", "them"), FAMILIES)
def test_headers_with_options_are_quoted_up_to_their_ports(rig: Rig, us: str, them: str) -> None:
    if "." in us:
        plain = bytearray(frames.udp(them, us, 40_000, 53, bytes(9)))
        plain[14] = 0x4F
        plain[34:34] = bytes([1] * 40)
        plain[16:18] = struct.pack(">H", len(plain) - 14)
        frame = bytes(plain)
    else:
        frame = frames.ip(them, us, 60, bytes([17, 3, 1, 28, *bytes(28)]) + frames.udp_datagram(40_000, 53))
    quoted = taken_apart(answer(rig, Hook.TCX_INGRESS, frame))[3][8:]
    assert struct.pack(">HH", 40_000, 53) in quoted


def never_answered() -> dict[str, bytes]:
    mac = b"\x01\0\x5e\0\0\1"
    unreachable = frames.icmp_error(THEM, US, 3, 1, frames.udp(US, THEM, 1, 2))
    later = frames.ip(THEM, US, 17, bytes(64), identification=9, fragment=64)
    return {
        "a reset": frames.tcp(THEM, US, 40_000, 22, RST),
        "a reset that acknowledges": frames.tcp(THEM, US, 40_000, 22, RST | ACK),
        "an ICMP error": unreachable,
        "an ICMPv6 error": frames.icmp_error(THEM6, US6, 1, 1, frames.udp(US6, THEM6, 1, 2)),
        "an echo reply": frames.icmp(THEM, US, 0),
        "a later fragment": later,
        "a first fragment of TCP": frames.ip(THEM, US, 6, frames.tcp_segment(1, 22) + bytes(4), fragment=1),
        "multicast": frames.udp(THEM, "224.0.0.251", 5353, 5353),
        "IPv6 multicast": frames.udp(THEM6, "ff02::fb", 5353, 5353),
        "broadcast": frames.udp(THEM, "255.255.255.255", 1, 2),
        "an own address in a group's frame": frames.ip(THEM, US, 17, frames.udp_datagram(1, 2), mac=mac),
        "a frame for another machine": frames.ip(
            THEM, US, 17, frames.udp_datagram(1, 2), mac=b"\2\0\0\0\0\7"
        ),
        "no source": frames.udp("0.0.0.0", US, 68, 67),  # noqa: S104 - an address in a packet
        "a source that is a group": frames.udp("224.0.0.5", US, 1, 2),
        "a spoofed own address": frames.udp(US, US, 1, 2),
        "a cut header": frames.ip(THEM, US, 6, bytes(12)),
        "a source route": source_routed(),
        "impossible flags": frames.tcp(THEM, US, 40_000, 22, SYN | FIN),
    }


def source_routed() -> bytes:
    frame = bytearray(frames.tcp(THEM, US, 40_000, 22))
    frame[14] = 0x47
    frame[34:34] = bytes([131, 7, 4, 10, 0, 0, 1, 0])
    frame[16:18] = struct.pack(">H", len(frame) - 14)
    return bytes(frame)


@pytest.mark.parametrize("what", never_answered())
def test_never_answered(rig: Rig, what: str) -> None:
    verdict = rig.run(Hook.TCX_INGRESS, never_answered()[what])
    assert not verdict.passes
    assert not verdict.answer
    early = rig.run(Hook.XDP, never_answered()[what])
    assert not early.marked
    # XDP cannot know for whom a frame is, and leaves this one to TCX
    assert early.passes == (what == "a frame for another machine")


def test_only_the_cell_that_denies_says_whether_there_is_an_answer(rig: Rig) -> None:
    rows = {(Direction.INGRESS, 0): ((23, 23, SILENT), (24, 24, ALLOW), (25, 25, REPORT))}
    rig.install(Policy(OWN, rows=rows, default={Direction.INGRESS: REFUSE_BY_DEFAULT}))
    assert rig.run(Hook.TCX_INGRESS, frames.tcp(THEM, US, 1, 22)).answer
    assert not rig.run(Hook.TCX_INGRESS, frames.tcp(THEM, US, 1, 23)).answer
    for port in (24, 25):
        assert rig.run(Hook.TCX_INGRESS, frames.tcp(THEM, US, 1, port)).passes


def test_one_source_gets_its_share_and_all_together_no_more_than_the_budget(rig: Rig) -> None:
    def answers(sources: list[str]) -> int:
        time.sleep(1.1)  # the budget's window is over
        rig.forget()
        return sum(
            bool(rig.run(Hook.TCX_INGRESS, frames.tcp(source, US, 1, 22)).answer) for source in sources
        )

    with pinned_to_one_cpu():
        assert answers([THEM] * 200) == PER_SOURCE
        assert answers([f"203.0.113.{number}" for number in range(1, 251)]) == BUDGET


@contextlib.contextmanager
def pinned_to_one_cpu() -> Iterator[None]:
    """Budgets are per CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_xdp_leaves_to_tcx_what_may_be_answered_and_drops_the_rest(rig: Rig) -> None:
    time.sleep(1.1)
    with pinned_to_one_cpu():
        verdicts = [rig.run(Hook.XDP, frames.tcp(THEM, US, 1, 22)) for _ in range(BUDGET + 50)]
    assert sum(verdict.passes for verdict in verdicts) == BUDGET
    assert not any(verdict.marked for verdict in verdicts)
    assert not rig.run(Hook.XDP, frames.tcp(THEM, US, 1, 22, RST)).passes


def test_answers_are_counted_by_direction_and_so_is_silence(rig: Rig) -> None:
    def sent() -> list[int]:
        rows = [rig.maps["answered"].lookup_percpu(direction) for direction in Direction]
        return [sum(HITS.unpack(raw)["packets"] for raw in row) for row in rows]  # type: ignore[misc]

    time.sleep(1.1)
    before = sent()
    with pinned_to_one_cpu():
        for _ in range(BUDGET + 20):
            rig.run(Hook.TCX_EGRESS, frames.udp(US, THEM, 1, 2))
        rig.run(Hook.TCX_INGRESS, frames.udp(THEM, US, 1, 2))
    assert [now - then for now, then in zip(sent(), before, strict=True)] == [1, BUDGET]


# With real sockets

OUTGOING = 4  # packet type of what the socket's own host sends
HERE, THERE, DEVICE, FAR = "mwrejhere", "mwrejthere", "mwrj0", "mwrj1"
ENDS = [("10.77.0.1", "10.77.0.2", socket.AF_INET), ("fd77::1", "fd77::2", socket.AF_INET6)]


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


@pytest.fixture(scope="module")
def cable(loaded: Rig) -> Iterator[Rig]:
    """Two namespaces with a veth pair; our programs on the one end."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    links: list[int] = []
    try:
        for name in (HERE, THERE):
            ip("netns", "add", name)
        ip("-n", HERE, "link", "add", DEVICE, "type", "veth", "peer", "name", FAR, "netns", THERE)
        for name, device, end in ((HERE, DEVICE, 0), (THERE, FAR, 1)):
            for ends in ENDS:
                length, extra = ("24", []) if "." in ends[0] else ("64", ["nodad"])
                ip("-n", name, "addr", "add", f"{ends[end]}/{length}", "dev", device, *extra)
            ip("-n", name, "link", "set", device, "up")
        with inside(HERE):
            index = socket.if_nametoindex(DEVICE)
            fds = loaded.loaded.fds
            links.append(link_create(fds["tcx_ingress"], index, AttachType.TCX_INGRESS))
            links.append(link_create(fds["tcx_egress"], index, AttachType.TCX_EGRESS))
            links.append(link_create(fds["xdp"], index, AttachType.XDP, XDP_NATIVE))
        time.sleep(1.1)  # a new second of the budget
        yield loaded
    finally:
        for link in links:
            os.close(link)
        for name in (HERE, THERE):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def enforce(rig: Rig, direction: Direction) -> None:
    """Denied and answered in this direction; denied in silence in the other, which must not swallow answers."""
    own = {packed(ends[0]): SLOT_HOST for ends in ENDS}
    default = {one: REFUSE if one is direction else SILENT for one in Direction}
    rig.forget()
    rig.install(Policy(own, default=default))


def connect_error(sender: socket.socket, address: str) -> tuple[int, float]:
    """errno of a TCP connection, and the seconds it took."""
    sender.settimeout(3)
    started = time.monotonic()
    try:
        sender.connect((address, 22))
    except TimeoutError:
        return errno.ETIMEDOUT, time.monotonic() - started
    except OSError as error:
        return error.errno or 0, time.monotonic() - started
    return 0, time.monotonic() - started


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("ends", ENDS)
def test_connect_is_refused_at_once(
    cable: Rig, ends: tuple[str, str, socket.AddressFamily], direction: Direction
) -> None:
    enforce(cable, direction)
    here, there, family = ends
    namespace, target = (THERE, here) if direction is Direction.INGRESS else (HERE, there)
    with inside(namespace), socket.socket(family, socket.SOCK_STREAM) as sender:
        code, seconds = connect_error(sender, target)
    assert code == errno.ECONNREFUSED
    assert seconds < 0.5


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("ends", ENDS)
def test_a_datagram_gets_an_icmp_error(
    cable: Rig, ends: tuple[str, str, socket.AddressFamily], direction: Direction
) -> None:
    enforce(cable, direction)
    here, there, family = ends
    namespace, target = (THERE, here) if direction is Direction.INGRESS else (HERE, there)
    with inside(namespace), socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.connect((target, 53))
        sender.send(b"anybody there?")
        assert select.select([sender], [], [], 3)[0], "no error came back"
        assert sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.EHOSTUNREACH, errno.EACCES)


def test_a_flood_gets_no_more_answers_than_the_budget(cable: Rig) -> None:
    enforce(cable, Direction.INGRESS)
    here = ENDS[0][0]
    time.sleep(1.1)
    with inside(THERE):
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with listener, raw:
        listener.bind((FAR, 0x0800))
        started = time.monotonic()
        for number in range(5_000):
            raw.sendto(frames.tcp(f"10.77.1.{1 + number % 250}", here, 1, 22)[14:], (here, 0))
        time.sleep(0.2)
        windows = int(time.monotonic() - started) + 2
        answers = resets_in(listener)
    assert 0 < answers <= BUDGET * windows * (os.cpu_count() or 1)


def resets_in(listener: socket.socket) -> int:
    """Frames with a reset that came in and wait to be read."""
    found = 0
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, (_, _, kind, *_) = listener.recvfrom(2_000)
            found += kind != OUTGOING and frame[23] == frames.TCP and bool(frame[47] & RST)
    return found
