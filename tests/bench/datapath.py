"""What the data path costs, always beside something to compare with, in the same interleaved run.

`python tests/bench/datapath.py` prints tables of nanoseconds per packet. First by BPF_PROG_TEST_RUN, for one
hot packet and for random known sources among 10 to 1,000,000 peers, beside an empty program. Then whole
packets over veth between namespaces, sent by the kernel itself (live frames): denied ones beside plain
XDP_DROP, nftables sets and no firewall, for 16 to 8,192 rules, with and without events; allowed ones beside
plain XDP_PASS with the same sink behind both; forwarded ones beside empty programs. A figure is the median
of the rounds, a sample of a program alone the best of five parts; the ratios are what counts. Needs root;
attaches only to devices in namespaces that it makes and removes.
"""

import argparse
import array
import contextlib
import ctypes
import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bpf import frames, layout
from bpf.features import instruction, returns
from bpf.frames import ACK, SYN
from bpf.layout import CellVerdict, Hook, Map, MapKind
from bpf.loader import DEFAULT_EVENT_BUDGET
from bpf.model import BufferFlag, Direction, Policy
from bpf.run import (
    LOOPBACK,
    PROGRAM_OF,
    SKB_INGRESS_IFINDEX,
    SKB_SIZE,
    TCX_DROP,
    XDP_DROP,
    XDP_PASS,
    Rig,
)
from bpf.syscall import (
    TEST_RUN_LIVE_FRAMES,
    XDP_HAS_FRAGS,
    XDP_NATIVE,
    AttachType,
    PinnedMap,
    ProgType,
    link_create,
    prog_load,
    prog_test_run,
)

US, PEER, KUBELET = "192.0.2.1", "10.0.0.1", 10250
ALLOW = CellVerdict.ALLOW << 28 | 16
GENERATOR, RECEIVER, BEHIND = "mwbenchgen", "mwbenchrcv", "mwbenchfar"
GEN_DEVICE, RCV_DEVICE, OUT_DEVICE, FAR_DEVICE = "mwg0", "mwr0", "mwo0", "mwf0"
ROUTED = "172.16.0.9"  # behind the receiver, which forwards
SIOCETHTOOL, ETHTOOL_SGRO = 0x8946, 0x2C
SIZES = layout.sized(
    slots=1 << 17, cells=1 << 18, rules=1 << 15, ip4_blocks=256 + 8_192, hosts=1 << 16, prefixes6=1 << 10,
    conntrack=1 << 17,
)  # fmt: skip
KNOWN = 0x00FF1F00  # bits of 10.0.0.0 that vary over 8,192 networks, as the kernel stores an address
BEST_OF = 5  # parts of a sample
WARM = 5
ATTEMPTS = 5  # a sample is void when packets are lost, as on a machine with other work
IDENTITIES, CLASSES = 65_536, 1_000  # of a million peers


def known_sources(rules: int, enforced: BufferFlag = BufferFlag.ENFORCE_INGRESS) -> Policy:
    """`rules` /24 networks below 10/8, each with a rule of its own for the kubelet's port."""
    prefixes = {(struct.pack(">I", 10 << 24 | number << 8), 24): 4 + number for number in range(rules)}
    rows = {
        (Direction.INGRESS, 4 + number): ((KUBELET, KUBELET, CellVerdict.ALLOW << 28 | 16 + number),)
        for number in range(rules)
    }
    own = {socket.inet_aton(US): layout.SLOT_HOST}
    return Policy(own, prefixes, rows, default={Direction.EGRESS: ALLOW}, enforced=enforced)


def known_peers(peers: int) -> Policy:
    """Dense addresses from 10.0.0.0 on, 65,536 identities of 1,000 kinds: pods of a large mesh."""
    prefixes = {
        (struct.pack(">I", 10 << 24 | number), 32): 4 + number % IDENTITIES for number in range(peers)
    }
    rows = {
        (Direction.INGRESS, 4 + number): (
            (KUBELET, KUBELET, CellVerdict.ALLOW << 28 | 16 + number % CLASSES),
        )
        for number in range(min(peers, IDENTITIES))
    }
    own = {socket.inet_aton(US): layout.SLOT_HOST}
    return Policy(own, prefixes, rows, default={Direction.EGRESS: ALLOW}, enforced=BufferFlag.ENFORCE_INGRESS)


class Randomiser:
    """A program that gives the packet a random source below 10/8 and continues with another program.

    mask: bits of the address, as the kernel stores it (first octet lowest), that vary.
    """

    def __init__(self, target: int, mask: int, flags: int) -> None:
        self._table = PinnedMap.create(_PROGRAMS)
        self._table.update(0, struct.pack("=I", target))
        load_fd = instruction(0x18, 2, 1, immediate=self._table.fd) + instruction(0)
        code = (
            _with_random_source(mask)
            + instruction(0xBF, 1, 6)
            + load_fd
            + instruction(0xB7, 3)
            + instruction(0x85, immediate=12)  # bpf_tail_call
            + returns(0)
        )
        self.fd = prog_load(ProgType.XDP, "mw_random", code, flags=flags, attach_type=AttachType.XDP)

    def close(self) -> None:
        """Unload."""
        os.close(self.fd)
        self._table.close()


_PROGRAMS = Map("programs", MapKind.PROG_ARRAY, None, layout.Struct("program", (("fd", "I"),)), 1)


def _with_random_source(mask: int) -> bytes:
    """r6 = context; the IPv4 source at byte 26 becomes 10.x.y.z."""
    steps = [
        instruction(0xBF, 6, 1),
        instruction(0x85, immediate=7),  # bpf_get_prandom_u32
        instruction(0x54, 0, immediate=mask),
        instruction(0x44, 0, immediate=10),
        instruction(0x61, 7, 6, 0),  # data
        instruction(0x61, 8, 6, 4),  # data_end
        instruction(0xBF, 2, 7),
        instruction(0x07, 2, immediate=54),
        instruction(0x3D, 8, 2, 2),  # a shorter frame is dropped
        returns(XDP_DROP),
        instruction(0x63, 7, 0, 26),
    ]
    return b"".join(steps)


@dataclass
class Row:
    """One line of a table: name, median ns, and the name of what it is compared with."""

    name: str
    against: str
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def over(self, other: "Row") -> float:
        """Median of the ratios within each round: noise that hits a whole round cancels out."""
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.samples, other.samples, strict=True)
        )

    def beyond(self, other: "Row") -> float:
        """Median of the differences within each round."""
        return statistics.median(
            ours - theirs for ours, theirs in zip(self.samples, other.samples, strict=True)
        )


def interleaved(cases: Sequence[tuple[str, str, Callable[[], float]]], rounds: int) -> list[Row]:
    """Run every case once a round, so that a slow moment of the machine hits all of them."""
    rows = [Row(name, against, []) for name, against, _ in cases]
    for _ in range(rounds):
        for row, (_, _, measure) in zip(rows, cases, strict=True):
            row.samples.append(measure())
    return rows


def report(title: str, rows: Sequence[Row]) -> None:
    """Print a table with ratios and differences."""
    by_name = {row.name: row for row in rows}
    print(f"\n{title}\n{'':48}{'ns':>8}{'ratio':>8}{'more':>8}  against")
    for row in rows:
        beside = ""
        if row.against:
            other = by_name[row.against]
            beside = f"{row.over(other):8.2f}{row.beyond(other):8.0f}  {row.against}"
        print(f"{row.name:48}{row.median:8.0f}{beside}")


@contextlib.contextmanager
def empty_programs(rig: Rig) -> Iterator[tuple[int, int]]:
    """Programs that pass everything, at XDP and at TCX."""
    frags = XDP_HAS_FRAGS if rig.features.xdp_frags else 0
    fds = (
        prog_load(ProgType.XDP, "mw_empty", returns(XDP_PASS), flags=frags, attach_type=AttachType.XDP),
        prog_load(ProgType.SCHED_CLS, "mw_empty", returns(-1)),
    )
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


Timed = Callable[[], float]


def best(measure: Timed) -> Timed:
    """The least of a few: what other work on the machine adds, often half, is not what is measured."""
    return lambda: min(measure() for _ in range(BEST_OF))


class Alone:
    """Measures programs by the kernel's test run."""

    def __init__(self, repeat: int) -> None:
        self._repeat = repeat // BEST_OF

    def xdp(self, program: int, frame: bytes, *, warm: int = 1) -> Timed:
        """At XDP; warm: so many times as long, that tables of megabytes come into the caches."""
        return best(lambda: float(prog_test_run(program, frame, repeat=warm * self._repeat).duration_ns))

    def tcx(self, program: int, frame: bytes, *, forwarded: bool = False) -> Timed:
        """At TCX; forwarded: as seen on the way out of a packet that came from another device."""
        context = bytearray(SKB_SIZE)
        if forwarded:
            struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, LOOPBACK)
        given = bytes(context)
        return best(
            lambda: float(prog_test_run(program, frame, repeat=self._repeat, context=given).duration_ns)
        )


def together(*parts: Timed) -> Timed:
    """The sum of several."""
    return lambda: sum(part() for part in parts)


def program_cost(rig: Rig, few: Rig, many: Rig, rounds: int, repeat: int) -> list[Row]:
    """Nanoseconds of the programs alone. rig: 8,192 networks; few, many: 10 and 1,000,000 peers."""
    alone = Alone(repeat)
    stranger = "203.0.113.9"
    allowed, denied = frames.tcp(PEER, US, 40000, KUBELET), frames.tcp(stranger, US, 40000, KUBELET)
    going_on = frames.tcp(PEER, US, 40000, KUBELET, ACK)
    forwarded = frames.tcp(stranger, ROUTED, 40000, 80, ACK)
    sent, answer = frames.tcp(US, stranger, 50000, 443), frames.tcp(stranger, US, 443, 50000, SYN | ACK)
    rig.run(Hook.TCX_EGRESS, sent)
    talk = frames.tcp(US, stranger, 50001, 443, ACK), frames.tcp(stranger, US, 443, 50001, ACK)
    rig.run(Hook.TCX_EGRESS, frames.tcp(US, stranger, 50001, 443))
    rig.run(Hook.TCX_INGRESS, talk[1])
    rig.run(Hook.TCX_EGRESS, talk[0])  # now it has gone both ways
    ours, ingress, egress = (rig.loaded.fds[PROGRAM_OF[hook]] for hook in Hook)
    with empty_programs(rig) as (empty_xdp, empty_tcx), contextlib.ExitStack() as wrappers:
        frags = XDP_HAS_FRAGS if rig.features.xdp_frags else 0

        def random_sources(program: int, mask: int, frame: bytes = going_on) -> Timed:
            # a program array takes programs of one kind only; frags support and attach type are part of the kind
            wrapper = wrappers.enter_context(contextlib.closing(Randomiser(program, mask, frags)))
            return alone.xdp(wrapper.fd, frame, warm=WARM)

        x, i, random, through = "xdp empty", "tcx empty", "xdp empty, random sources", "empty, in and out"
        cases = [
            (x, "", alone.xdp(empty_xdp, denied)),
            ("xdp denied, new connection", x, alone.xdp(ours, denied)),
            ("xdp allowed, new connection", x, alone.xdp(ours, allowed)),
            ("xdp allowed, established", x, alone.xdp(ours, going_on)),
            ("xdp first answer to our connection", x, alone.xdp(ours, answer)),
            ("xdp further answers", x, alone.xdp(ours, talk[1])),
            ("xdp forwarded", x, alone.xdp(ours, forwarded)),
            (random, "", random_sources(empty_xdp, KNOWN)),
            ("xdp, random sources of 8,192 networks", random, random_sources(ours, KNOWN)),
            ("xdp, random sources, mostly unknown, new", random, random_sources(ours, -256, allowed)),
            ("xdp, random sources, mostly unknown, going on", random, random_sources(ours, -256)),
            ("xdp, random sources of 10 peers", random, random_sources(few.loaded.fds["xdp"], 0x07000000)),
            # 20 bits, as the kernel stores them
            (
                "xdp, random sources of 1,000,000 peers",
                random,
                random_sources(many.loaded.fds["xdp"], -0xF100),
            ),
            (i, "", alone.tcx(empty_tcx, denied)),
            ("tcx denied, new connection", i, alone.tcx(ingress, denied)),
            ("tcx allowed, new connection", i, alone.tcx(ingress, allowed)),
            ("tcx allowed, established", i, alone.tcx(ingress, going_on)),
            ("tcx first answer to our connection", i, alone.tcx(ingress, answer)),
            ("tcx further answers", i, alone.tcx(ingress, talk[1])),
            ("tcx egress, established", i, alone.tcx(egress, talk[0])),
            (
                through,
                "",
                together(alone.tcx(empty_tcx, forwarded), alone.tcx(empty_tcx, forwarded, forwarded=True)),
            ),
            (
                "forwarded, tcx in and out",
                through,
                together(alone.tcx(ingress, forwarded), alone.tcx(egress, forwarded, forwarded=True)),
            ),
        ]
        return interleaved(cases, rounds)


# Packets over a veth pair

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a named network namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if _libc.setns(there, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
        yield
    finally:
        _libc.setns(before, 0)
        os.close(there)
        os.close(before)


def ip(*words: str) -> None:
    """The ip command; its error is the bench's."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def cable() -> Iterator[None]:
    """Namespaces of our own in a row, each with a veth pair to the next; the one in the middle forwards."""
    names = (GENERATOR, RECEIVER, BEHIND)
    try:
        for name in names:
            ip("netns", "add", name)
        for here, device, there, peer in (
            (GENERATOR, GEN_DEVICE, RECEIVER, RCV_DEVICE),
            (RECEIVER, OUT_DEVICE, BEHIND, FAR_DEVICE),
        ):
            ip("-n", here, "link", "add", device, "type", "veth", "peer", "name", peer, "netns", there)
            ip("-n", here, "link", "set", device, "up")
            ip("-n", there, "link", "set", peer, "up")
        ip("-n", RECEIVER, "addr", "add", f"{US}/24", "dev", RCV_DEVICE)
        ip("-n", RECEIVER, "addr", "add", "172.16.0.1/24", "dev", OUT_DEVICE)
        with inside(BEHIND):
            far = mac_of(FAR_DEVICE)
        ip(
            "-n",
            RECEIVER,
            "neigh",
            "add",
            ROUTED,
            "lladdr",
            far.hex(":"),
            "dev",
            OUT_DEVICE,
            "nud",
            "permanent",
        )
        with inside(RECEIVER):
            _gro_on(RCV_DEVICE)
            for setting, value in (
                ("ipv4/conf/all/rp_filter", "0"),
                (f"ipv4/conf/{RCV_DEVICE}/rp_filter", "0"),
                ("ipv4/ip_forward", "1"),
            ):
                Path("/proc/sys/net", setting).write_text(value, encoding="ascii")
        ip("-n", RECEIVER, "route", "add", "10.0.0.0/8", "dev", RCV_DEVICE)
        time.sleep(0.3)  # the links' state settles
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _gro_on(device: str) -> None:
    """veth takes frames that XDP redirects only with GRO on, or with a program of its own."""
    value = array.array("I", [ETHTOOL_SGRO, 1])
    request = struct.pack("16sQ16x", device.encode(), value.buffer_info()[0])
    with socket.socket() as handle:
        fcntl.ioctl(handle, SIOCETHTOOL, request)


def mac_of(device: str) -> bytes:
    """Its hardware address; in the current namespace."""
    with socket.socket() as handle:
        reply = fcntl.ioctl(handle, 0x8927, struct.pack("16s24x", device.encode()))
    return reply[18:24]


def _word_sum(data: bytes) -> int:
    """The sum of a checksum, in the order in which this machine loads words."""
    return sum(struct.unpack(f"={len(data) // 2}H", data))


def _checksum(base: int, offset: int) -> bytes:
    """Store at `offset` the checksum of what contains the source address; r5 is the sum of its halves."""
    fold = (
        instruction(0xBF, 2, 1) + instruction(0x57, 2, immediate=0xFFFF) + instruction(0x77, 1, immediate=16)
    )
    fold += instruction(0x0F, 1, 2)
    start = instruction(0xBF, 1, 5) + instruction(0x07, 1, immediate=base)
    return start + fold + fold + instruction(0xA7, 1, immediate=0xFFFF) + instruction(0x6B, 7, 1, offset)


def _with_checksums(frame: bytes) -> bytes:
    """After _with_random_source: right IPv4 and TCP checksums, else the stack drops it for nothing."""
    header = _word_sum(frame[14:26]) + _word_sum(frame[30:34])
    pseudo = (
        _word_sum(frame[30:34]) + _word_sum(struct.pack(">HH", 6, len(frame) - 34)) + _word_sum(frame[34:])
    )
    halves = instruction(0x61, 5, 7, 26) + instruction(0xBF, 1, 5) + instruction(0x57, 5, immediate=0xFFFF)
    halves += instruction(0x77, 1, immediate=16) + instruction(0x0F, 5, 1)
    return halves + _checksum(header, 24) + _checksum(pseudo, 50)


def _as_before(frame: bytes) -> bytes:
    """After _with_random_source: undo what a router did, for pages come back and are sent again."""
    low, high = struct.unpack("=iH", frame[:6])
    return (
        instruction(0x62, 7, offset=0, immediate=low)
        + instruction(0x6A, 7, offset=4, immediate=high)
        + instruction(0x72, 7, offset=22, immediate=frame[22])
    )


def sender(ifindex: int, mask: int, frame: bytes) -> int:
    """A program that gives each frame a random source and sends it out of a device."""
    code = (
        _with_random_source(mask)
        + _as_before(frame)
        + _with_checksums(frame)
        + instruction(0xB7, 1, immediate=ifindex)
        + instruction(0xB7, 2)
        + instruction(0x85, immediate=23)  # bpf_redirect
        + instruction(0x95)
    )
    return prog_load(ProgType.XDP, "mw_sender", code)


def received() -> int:
    """Packets that came in at the receiving device, whatever became of them."""
    with inside(RECEIVER):
        raw = subprocess.run(
            ["ip", "-s", "-j", "link", "show", RCV_DEVICE], capture_output=True, check=True
        ).stdout
    return int(json.loads(raw)[0]["stats64"]["rx"]["packets"])


def forwarded() -> int:
    """Packets that the receiver has forwarded."""
    with inside(RECEIVER):
        names, values = Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines()[:2]
    return int(dict(zip(names.split(), values.split(), strict=True))["ForwDatagrams"])


@contextlib.contextmanager
def linked(
    program: int, kind: AttachType, device: str = RCV_DEVICE, namespace: str = RECEIVER
) -> Iterator[None]:
    """The program on a device."""
    flags = XDP_NATIVE if kind is AttachType.XDP else 0
    with inside(namespace):
        link = link_create(program, socket.if_nametoindex(device), kind, flags)
    try:
        yield
    finally:
        os.close(link)


@contextlib.contextmanager
def nftables(rules: int, hook: str) -> Iterator[None]:
    """The same policy as a set of networks at nftables' ingress hook, or at its input hook."""
    networks = ", ".join(f"10.{number >> 8}.{number & 255}.0/24" for number in range(rules))
    if hook == "ingress":
        table, chain = "netdev mwb", f"type filter hook ingress device {RCV_DEVICE} priority 0; policy drop;"
    else:
        table, chain = "ip mwb", "type filter hook input priority 0; policy drop;"
    text = f"""table {table} {{
        set known {{ type ipv4_addr; flags interval; elements = {{ {networks} }} }}
        chain c {{ {chain}
            ip saddr @known tcp dport {KUBELET} accept
        }}
    }}"""
    with inside(RECEIVER):
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
    try:
        yield
    finally:
        with inside(RECEIVER):
            subprocess.run(["nft", "delete", "table", *table.split()], check=True)


Setting = Callable[[], contextlib.AbstractContextManager[object]]
Case = tuple[str, str, Setting]


@dataclass(frozen=True)
class Programs:
    """What may stand at a device besides ours."""

    xdp_drop: int
    xdp_pass: int
    tcx_drop: int
    tcx_pass: int


@contextlib.contextmanager
def plain_programs() -> Iterator[Programs]:
    """Programs of two instructions."""
    fds = [
        prog_load(ProgType.XDP, "mw_drop", returns(XDP_DROP)),
        prog_load(ProgType.XDP, "mw_pass", returns(XDP_PASS)),
        prog_load(ProgType.SCHED_CLS, "mw_drop", returns(TCX_DROP)),
        prog_load(ProgType.SCHED_CLS, "mw_pass", returns(-1)),
    ]
    try:
        yield Programs(*fds)
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def several(*settings: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """All of them, attached in this order."""
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield


@contextlib.contextmanager
def events_off(rig: Rig) -> Iterator[None]:
    """No event in any second."""
    at = layout.CONFIG.offsets()["event_budget"]
    with rig.maps["config"].mmap(writable=True) as memory:
        (before,) = struct.unpack_from("=I", memory, at)
        struct.pack_into("=I", memory, at, 0)
        try:
            yield
        finally:
            struct.pack_into("=I", memory, at, before)


def when_denied(rig: Rig, plain: Programs, rules: int) -> list[Case]:
    """What stands at the receiving device: name, what it is compared with, how to put it there."""
    xdp, ingress = rig.loaded.fds["xdp"], rig.loaded.fds["tcx_ingress"]
    return [
        ("plain XDP_DROP", "", lambda: linked(plain.xdp_drop, AttachType.XDP)),
        ("meshwall XDP", "plain XDP_DROP", lambda: linked(xdp, AttachType.XDP)),
        (
            "meshwall XDP, no events",
            "plain XDP_DROP",
            lambda: several(linked(xdp, AttachType.XDP), events_off(rig)),
        ),
        (
            "plain drop at TCX",
            "nftables set, ingress",
            lambda: linked(plain.tcx_drop, AttachType.TCX_INGRESS),
        ),
        ("meshwall TCX", "nftables set, ingress", lambda: linked(ingress, AttachType.TCX_INGRESS)),
        ("nftables set, ingress", "", lambda: nftables(rules, "ingress")),
        ("nftables set, input", "", lambda: nftables(rules, "input")),
        ("no firewall", "", contextlib.nullcontext),
    ]


def when_allowed(rig: Rig, plain: Programs) -> list[Case]:
    """The same, with a sink behind that drops everything."""
    xdp, ingress = rig.loaded.fds["xdp"], rig.loaded.fds["tcx_ingress"]

    def sunk(
        *settings: contextlib.AbstractContextManager[object],
    ) -> contextlib.AbstractContextManager[object]:
        return several(*settings, linked(plain.tcx_drop, AttachType.TCX_INGRESS))

    return [
        ("plain XDP_PASS, sink", "", lambda: sunk(linked(plain.xdp_pass, AttachType.XDP))),
        ("meshwall XDP, sink", "plain XDP_PASS, sink", lambda: sunk(linked(xdp, AttachType.XDP))),
        (
            "meshwall XDP and TCX, sink",
            "plain XDP_PASS, sink",
            lambda: sunk(linked(xdp, AttachType.XDP), linked(ingress, AttachType.TCX_INGRESS)),
        ),
        ("sink alone", "", sunk),
        ("meshwall TCX, sink", "sink alone", lambda: sunk(linked(ingress, AttachType.TCX_INGRESS))),
    ]


def when_forwarded(rig: Rig, plain: Programs) -> list[Case]:
    """At both devices of the host that forwards; a sink drops what is about to leave."""
    fds = rig.loaded.fds

    def at_both(xdp: int | None, ingress: int, egress: int) -> contextlib.AbstractContextManager[object]:
        settings = [
            linked(ingress, AttachType.TCX_INGRESS),
            linked(egress, AttachType.TCX_EGRESS),
            linked(ingress, AttachType.TCX_INGRESS, OUT_DEVICE),
            linked(egress, AttachType.TCX_EGRESS, OUT_DEVICE),
        ]
        if xdp is not None:
            settings.append(linked(xdp, AttachType.XDP))
        return several(*settings, sink())

    def sink() -> contextlib.AbstractContextManager[None]:
        return linked(plain.tcx_drop, AttachType.TCX_EGRESS, OUT_DEVICE)

    return [
        ("no programs", "", sink),
        ("empty TCX", "no programs", lambda: at_both(None, plain.tcx_pass, plain.tcx_pass)),
        ("meshwall TCX", "empty TCX", lambda: at_both(None, fds["tcx_ingress"], fds["tcx_egress"])),
        ("empty XDP and TCX", "no programs", lambda: at_both(plain.xdp_pass, plain.tcx_pass, plain.tcx_pass)),
        (
            "meshwall XDP and TCX",
            "empty XDP and TCX",
            lambda: at_both(fds["xdp"], fds["tcx_ingress"], fds["tcx_egress"]),
        ),
    ]


class Sender:
    """Sends from the generating namespace and waits until all has arrived."""

    def __init__(self, count: int) -> None:
        self._count = count
        with inside(GENERATOR):
            self._index = socket.if_nametoindex(GEN_DEVICE)
        with inside(RECEIVER):
            self._mac = mac_of(RCV_DEVICE)

    @contextlib.contextmanager
    def sending(
        self, target: str, port: int, arrived: Callable[[], int], mask: int = 0x00FFFF00
    ) -> Iterator[Timed]:
        """ns per packet to this address and port; arrived: counts, and must see every one."""
        frame = frames.ip(PEER, target, 6, frames.tcp_segment(40000, port), mac=self._mac)
        program = sender(self._index, mask, frame)
        try:
            yield lambda: self._send(program, frame, arrived)
        finally:
            os.close(program)

    def _send(self, program: int, frame: bytes, arrived: Callable[[], int]) -> float:
        counted = 0
        for _ in range(ATTEMPTS):
            before, started = arrived(), time.perf_counter()
            with inside(GENERATOR):
                prog_test_run(program, frame, repeat=self._count, flags=TEST_RUN_LIVE_FRAMES, batch_size=64)
            took = time.perf_counter() - started
            counted = arrived() - before
            if counted >= self._count:
                return took / self._count * 1e9
        raise RuntimeError(f"only {counted} of {self._count} packets arrived: the figures would mean nothing")


def under(cases: Sequence[Case], send: Timed) -> list[tuple[str, str, Timed]]:
    """What interleaved() takes: each case sends under its setting."""

    def measure(setting: Setting) -> Timed:
        def once() -> float:
            with setting():
                return send()

        return once

    return [(name, against, measure(setting)) for name, against, setting in cases]


def packet_cost(rules: Sequence[int], rounds: int, count: int, rig: Rig) -> dict[str, list[Row]]:
    """Nanoseconds per packet from sending to its end, by title of the table."""
    found: dict[str, list[Row]] = {}
    with cable(), plain_programs() as plain:
        sent = Sender(count)
        for number in rules:
            rig.install(known_sources(number), event_budget=DEFAULT_EVENT_BUDGET)
            with sent.sending(US, 22, received) as send:  # a port that no rule allows
                found[f"Denied over veth, {number:,} rules"] = interleaved(
                    under(when_denied(rig, plain, number), send), rounds
                )
        rig.install(known_sources(8_192), event_budget=DEFAULT_EVENT_BUDGET)
        with sent.sending(US, KUBELET, received, KNOWN) as send:
            found["Allowed over veth"] = interleaved(under(when_allowed(rig, plain), send), rounds)
        with sent.sending(ROUTED, 80, forwarded) as send:
            found["Forwarded over veth"] = interleaved(under(when_forwarded(rig, plain), send), rounds)
    return found


class Figure(NamedTuple):
    """What was measured of something that has a limit."""

    what: str
    value: float
    limit: float


def figures(tables: Mapping[str, Sequence[Row]]) -> Iterator[Figure]:
    """The figures that a release has to reach."""
    named = {title: {row.name: row for row in rows} for title, rows in tables.items()}
    for title, rows in named.items():
        if title.startswith("Denied"):
            ours, plain, sets = (
                rows[name] for name in ("meshwall XDP", "plain XDP_DROP", "nftables set, ingress")
            )
            yield Figure(f"{title}: XDP against plain XDP_DROP", ours.over(plain), 1.25)
            yield Figure(f"{title}: events against none", ours.over(rows["meshwall XDP, no events"]), 1.15)
            yield Figure(f"{title}: TCX against nftables sets", rows["meshwall TCX"].over(sets), 0.65)
            yield Figure(
                "  (the same of a program that only drops)", rows["plain drop at TCX"].over(sets), 0.65
            )
        if title.startswith("Allowed"):
            accepted = rows["meshwall XDP, sink"].over(rows["plain XDP_PASS, sink"])
            yield Figure("Allowed over veth: XDP against plain XDP_PASS", accepted, 1.3)
    rows = named["Program alone"]
    empty = rows["xdp empty, random sources"]
    many = rows["xdp, random sources of 1,000,000 peers"]
    yield Figure("1,000,000 known peers against an empty program", many.over(empty), 4)
    forwarded = rows["forwarded, tcx in and out"].beyond(rows["empty, in and out"])
    yield Figure("ns for a forwarded packet, in and out", forwarded, 60)


def print_loading(rig: Rig) -> None:
    """What the verifier did."""
    for name, info in rig.loaded.info.items():
        print(f"{name}: {info.instructions} instructions, {info.verified_instructions} verified")
    print(f"compiled in {rig.loaded.compile_s:.2f} s, verified and loaded in {rig.loaded.load_s:.2f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--repeat", type=int, default=1_000_000, help="runs of a program in one sample")
    parser.add_argument("--packets", type=int, default=100_000, help="packets sent in one sample")
    parser.add_argument(
        "--rules", type=int, nargs="*", default=[16, 1_024, 8_192], help="of nothing: programs alone"
    )
    parser.add_argument("--json", type=Path, help="also write the medians there")
    options = parser.parse_args(arguments)
    if os.geteuid():
        print("this bench loads BPF programs: it needs root", file=sys.stderr)
        return 1
    tables: dict[str, list[Row]] = {}
    with Rig(SIZES) as rig:
        print_loading(rig)
        with Rig(SIZES) as few, Rig(SIZES) as many:
            rig.install(known_sources(8_192), event_budget=10)
            few.install(known_peers(10), event_budget=10)
            many.install(known_peers(1 << 20), event_budget=10)
            tables["Program alone"] = program_cost(rig, few, many, options.rounds, options.repeat)
        report("Program alone", tables["Program alone"])
        sent = packet_cost(options.rules, options.rounds, options.packets, rig) if options.rules else {}
        for title, rows in sent.items():
            tables[title] = rows
            report(f"{title}, sending included", rows)
    print("\nFigures and their limits")
    for what, value, limit in figures(tables):
        print(f"{what:68}{value:8.2f}  {'at most' if value <= limit else 'ABOVE'} {limit}")
    if options.json:
        medians = {title: {row.name: row.median for row in rows} for title, rows in tables.items()}
        options.json.write_text(json.dumps(medians, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
