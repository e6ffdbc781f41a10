"""What the data path costs, always beside something to compare with, in the same interleaved run.

`python tests/bench/datapath.py` prints two tables. First nanoseconds per packet by BPF_PROG_TEST_RUN, for
one hot packet and for random known sources, beside an empty program. Then whole nanoseconds per packet over
a veth pair between two namespaces, sent by the kernel itself (live frames), beside plain XDP_DROP, nftables
sets and no firewall, for 16 to 8,192 rules. Medians of the rounds; the ratios are what counts. Needs root;
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpf import frames, layout
from bpf.features import instruction, returns
from bpf.frames import ACK, SYN
from bpf.layout import CellVerdict, Hook, Map, MapKind
from bpf.model import BufferFlag, Direction, Policy
from bpf.run import PROGRAM_OF, SKB_SIZE, XDP_DROP, XDP_PASS, Rig
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
GENERATOR, RECEIVER = "mwbenchgen", "mwbenchrcv"
GEN_DEVICE, RCV_DEVICE = "mwg0", "mwr0"
SIOCETHTOOL, ETHTOOL_SGRO = 0x8946, 0x2C
SIZES = layout.sized(
    slots=1 << 15, cells=1 << 18, rules=1 << 15, ip4_blocks=256 + 8_192, hosts=1 << 21, prefixes6=1 << 10,
    conntrack=1 << 17,
)  # fmt: skip


def known_sources(rules: int, enforced: BufferFlag = BufferFlag.ENFORCE_INGRESS) -> Policy:
    """`rules` /24 networks below 10/8, each with a rule of its own for the kubelet's port."""
    prefixes = {(struct.pack(">I", 10 << 24 | number << 8), 24): 4 + number for number in range(rules)}
    rows = {
        (Direction.INGRESS, 4 + number): ((KUBELET, KUBELET, CellVerdict.ALLOW << 28 | 16 + number),)
        for number in range(rules)
    }
    own = {socket.inet_aton(US): layout.SLOT_HOST}
    return Policy(own, prefixes, rows, default={Direction.EGRESS: ALLOW}, enforced=enforced)


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


def interleaved(cases: Sequence[tuple[str, str, Callable[[], float]]], rounds: int) -> list[Row]:
    """Run every case once a round, so that a slow moment of the machine hits all of them."""
    rows = [Row(name, against, []) for name, against, _ in cases]
    for _ in range(rounds):
        for row, (_, _, measure) in zip(rows, cases, strict=True):
            row.samples.append(measure())
    return rows


def report(title: str, rows: Sequence[Row]) -> None:
    """Print a table with ratios."""
    by_name = {row.name: row for row in rows}
    print(f"\n{title}\n{'':44}{'ns':>8}{'ratio':>8}  against")
    for row in rows:
        ratio = f"{row.over(by_name[row.against]):8.2f}  {row.against}" if row.against else ""
        print(f"{row.name:44}{row.median:8.0f}{ratio}")


def program_cost(rig: Rig, rounds: int, repeat: int) -> list[Row]:
    """Nanoseconds of the program alone."""
    frags = XDP_HAS_FRAGS if rig.features.xdp_frags else 0
    empty_xdp = prog_load(
        ProgType.XDP, "mw_empty", returns(XDP_PASS), flags=frags, attach_type=AttachType.XDP
    )
    empty_tcx = prog_load(ProgType.SCHED_CLS, "mw_empty", returns(-1))
    context = bytes(SKB_SIZE)

    def timed(program: int, frame: bytes, kind: ProgType) -> Callable[[], float]:
        given = b"" if kind is ProgType.XDP else context
        return lambda: float(prog_test_run(program, frame, repeat=repeat, context=given).duration_ns)

    def ours(hook: Hook, frame: bytes) -> Callable[[], float]:
        return timed(
            rig.loaded.fds[PROGRAM_OF[hook]], frame, ProgType.XDP if hook is Hook.XDP else ProgType.SCHED_CLS
        )

    allowed, denied = frames.tcp(PEER, US, 40000, KUBELET), frames.tcp("203.0.113.9", US, 40000, KUBELET)
    going_on = frames.tcp(PEER, US, 40000, KUBELET, ACK)
    forwarded = frames.tcp("203.0.113.9", "172.16.0.9", 40000, 80)
    sent = frames.tcp(US, "203.0.113.9", 50000, 443)
    answer = frames.tcp("203.0.113.9", US, 443, 50000, SYN | ACK)
    rig.run(Hook.TCX_EGRESS, sent)
    # a program array takes programs of one kind only; frags support and attach type are part of the kind
    wrap_empty = Randomiser(empty_xdp, 0x1FFF00, frags)
    wrap_ours = Randomiser(rig.loaded.fds["xdp"], 0x1FFF00, frags)
    unknown = Randomiser(rig.loaded.fds["xdp"], -256, frags)
    x, i, e = "xdp empty", "tcx empty", "tcx empty"
    cases = [
        (x, "", timed(empty_xdp, denied, ProgType.XDP)),
        ("xdp denied, new connection", x, ours(Hook.XDP, denied)),
        ("xdp allowed, new connection", x, ours(Hook.XDP, allowed)),
        ("xdp allowed, established", x, ours(Hook.XDP, going_on)),
        ("xdp answer to our connection", x, ours(Hook.XDP, answer)),
        ("xdp forwarded", x, ours(Hook.XDP, forwarded)),
        ("xdp empty, random sources", "", timed(wrap_empty.fd, going_on, ProgType.XDP)),
        (
            "xdp, random sources of 8,192 networks",
            "xdp empty, random sources",
            timed(wrap_ours.fd, going_on, ProgType.XDP),
        ),
        (
            "xdp, random sources, mostly unknown",
            "xdp empty, random sources",
            timed(unknown.fd, allowed, ProgType.XDP),
        ),
        (i, "", timed(empty_tcx, denied, ProgType.SCHED_CLS)),
        ("tcx denied, new connection", i, ours(Hook.TCX_INGRESS, denied)),
        ("tcx allowed, new connection", i, ours(Hook.TCX_INGRESS, allowed)),
        ("tcx allowed, established", i, ours(Hook.TCX_INGRESS, going_on)),
        ("tcx answer to our connection", i, ours(Hook.TCX_INGRESS, answer)),
        ("tcx egress, established", e, ours(Hook.TCX_EGRESS, sent)),
    ]
    try:
        return interleaved(cases, rounds)
    finally:
        for one in (wrap_empty, wrap_ours, unknown):
            one.close()
        os.close(empty_xdp)
        os.close(empty_tcx)


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
    """A veth pair between two namespaces of our own."""
    made = []
    try:
        for name in (GENERATOR, RECEIVER):
            ip("netns", "add", name)
            made.append(name)
        ip(
            "-n",
            GENERATOR,
            "link",
            "add",
            GEN_DEVICE,
            "type",
            "veth",
            "peer",
            "name",
            RCV_DEVICE,
            "netns",
            RECEIVER,
        )
        ip("-n", RECEIVER, "addr", "add", f"{US}/24", "dev", RCV_DEVICE)
        ip("-n", GENERATOR, "link", "set", GEN_DEVICE, "up")
        ip("-n", RECEIVER, "link", "set", RCV_DEVICE, "up")
        with inside(RECEIVER):
            _gro_on(RCV_DEVICE)
            for setting in ("ipv4/conf/all/rp_filter", f"ipv4/conf/{RCV_DEVICE}/rp_filter"):
                with contextlib.suppress(OSError):
                    Path("/proc/sys/net", setting).write_text("0", encoding="ascii")
        time.sleep(0.3)  # the links' state settles
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


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


def sender(ifindex: int, mask: int, frame: bytes) -> int:
    """A program that gives each frame a random source and sends it out of a device."""
    code = (
        _with_random_source(mask)
        + _with_checksums(frame)
        + instruction(0xB7, 1, immediate=ifindex)
        + instruction(0xB7, 2)
        + instruction(0x85, immediate=23)  # bpf_redirect
        + instruction(0x95)
    )
    return prog_load(ProgType.XDP, "mw_sender", code)


def received() -> int:
    """Packets that came in at the receiving device, whatever became of them; read in its namespace."""
    with inside(RECEIVER):
        raw = subprocess.run(
            ["ip", "-s", "-j", "link", "show", RCV_DEVICE], capture_output=True, check=True
        ).stdout
    return int(json.loads(raw)[0]["stats64"]["rx"]["packets"])


@contextlib.contextmanager
def linked(program: int, kind: AttachType, flags: int = 0) -> Iterator[None]:
    """The program on the receiving device."""
    with inside(RECEIVER):
        link = link_create(program, socket.if_nametoindex(RCV_DEVICE), kind, flags)
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


Setting = Callable[[], contextlib.AbstractContextManager[None]]


def settings(rig: Rig, drop: int, rules: int) -> list[tuple[str, str, Setting]]:
    """What stands at the receiving device: name, what it is compared with, how to put it there."""
    fds = rig.loaded.fds
    return [
        ("plain XDP_DROP", "", lambda: linked(drop, AttachType.XDP, XDP_NATIVE)),
        ("meshwall XDP", "plain XDP_DROP", lambda: linked(fds["xdp"], AttachType.XDP, XDP_NATIVE)),
        ("meshwall TCX", "nftables set, ingress", lambda: linked(fds["tcx_ingress"], AttachType.TCX_INGRESS)),
        ("nftables set, ingress", "", lambda: nftables(rules, "ingress")),
        ("nftables set, input", "", lambda: nftables(rules, "input")),
        ("no firewall", "", contextlib.nullcontext),
    ]


def packet_cost(rules: Sequence[int], rounds: int, count: int, rig: Rig) -> dict[int, list[Row]]:
    """Nanoseconds per packet from sending to its drop, for each number of rules."""
    found: dict[int, list[Row]] = {}
    drop = prog_load(ProgType.XDP, "mw_drop", returns(XDP_DROP))
    with cable():
        with inside(GENERATOR):
            index = socket.if_nametoindex(GEN_DEVICE)
        with inside(RECEIVER):
            mac = mac_of(RCV_DEVICE)
        frame = frames.ip(PEER, US, 6, frames.tcp_segment(40000, 22), mac=mac)  # a port that no rule allows
        program = sender(index, 0x00FFFF00, frame)

        def send() -> float:
            before, started = received(), time.perf_counter()
            with inside(GENERATOR):
                prog_test_run(program, frame, repeat=count, flags=TEST_RUN_LIVE_FRAMES, batch_size=64)
            took = time.perf_counter() - started
            arrived = received() - before
            if arrived < count:
                raise RuntimeError(
                    f"only {arrived} of {count} packets arrived: the figures would mean nothing"
                )
            return took / count * 1e9

        def under(setting: Setting) -> Callable[[], float]:
            def measure() -> float:
                with setting():
                    return send()

            return measure

        for number in rules:
            rig.install(known_sources(number), event_budget=10)
            found[number] = interleaved(
                [(name, to, under(setting)) for name, to, setting in settings(rig, drop, number)], rounds
            )
        os.close(program)
    os.close(drop)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--repeat", type=int, default=1_000_000, help="runs of a program in one sample")
    parser.add_argument("--packets", type=int, default=100_000, help="packets sent in one sample")
    parser.add_argument("--rules", type=int, nargs="+", default=[16, 1_024, 8_192])
    parser.add_argument("--json", type=Path, help="also write the medians there")
    options = parser.parse_args(arguments)
    if os.geteuid():
        print("this bench loads BPF programs: it needs root", file=sys.stderr)
        return 1
    with Rig(SIZES) as rig:
        for name, info in rig.loaded.info.items():
            print(f"{name}: {info.instructions} instructions, {info.verified_instructions} verified")
        rig.install(known_sources(8_192), event_budget=10)
        programs = program_cost(rig, options.rounds, options.repeat)
        report("Program alone, 8,192 rules", programs)
        packets = packet_cost(options.rules, options.rounds, options.packets, rig)
    for number, rows in packets.items():
        report(f"Denied packets over veth, sending included, {number:,} rules", rows)
    if options.json:
        every = {"programs": programs, **{f"veth {number} rules": rows for number, rows in packets.items()}}
        medians = {title: {row.name: row.median for row in rows} for title, rows in every.items()}
        options.json.write_text(json.dumps(medians, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
