"""Model and programs must agree about every frame: mutated golden ones and built ones, at all three hooks."""

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import frames
from bpf.frames import ACK, FIN, RST, SYN
from bpf.layout import (
    PORTS_ICMP4,
    PORTS_ICMP6,
    PORTS_PROTOCOL,
    PORTS_UDP,
    RULE_FAILSAFE,
    SLOT_HOST,
    BufferFlag,
    CellFlag,
    CellVerdict,
    ConfigFlag,
    EventKind,
    Hook,
    Panic,
)
from bpf.model import Decision, Direction, Host, Policy, parse
from bpf.run import Rig

pytestmark = pytest.mark.kernel

VECTORS = Path(
    os.environ.get("MESHWALL_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"),
    "packets",
    "packets.jsonl",
)
OWN_COPY = Path(__file__).parents[1] / "vectors" / "packets.jsonl"
ADDRESSES4 = [
    "192.0.2.1",
    "198.51.100.1",
    "192.0.2.2",
    "203.0.113.5",
    "10.1.2.3",
    "224.0.0.1",
    "255.255.255.255",
]
ADDRESSES6 = [
    "2001:db8:a::1",
    "2001:db8:b::2",
    "fe80::1:1",
    "fe80::1:2",
    "2001:db8:b:1::9",
    "ff02::1",
    "2001:db8:c::5",
]
PORTS = [0, 22, 53, 67, 68, 80, 443, 10250, 33333, 40000, 65535]
MUTANTS = int(os.environ.get("MESHWALL_MUTANTS", "100000"))
CHUNK = 1_000  # frames under one policy, with one history


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if os.geteuid():
        pytest.skip("loading BPF needs root")
    with Rig() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def golden() -> list[bytes]:
    path = VECTORS if VECTORS.exists() else OWN_COPY
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [bytes.fromhex(row["hex"]) for row in rows if row["len"] >= 14]


def packed(address: str) -> bytes:
    import ipaddress

    return ipaddress.ip_address(address).packed


def some_policy(choice: random.Random) -> Policy:
    cells = [CellVerdict.ALLOW << 28 | 16, CellVerdict.DENY << 28 | 17, CellVerdict.REDIRECT << 28 | 18, 0]
    cells.append(CellVerdict.ALLOW << 28 | RULE_FAILSAFE)
    cells.append(CellFlag.AUDIT << 24 | CellVerdict.DENY << 28 | 19)
    addresses = {packed(own): SLOT_HOST for own in ("192.0.2.1", "2001:db8:a::1", "fe80::1:1")}
    addresses |= {
        packed(peer): choice.randrange(4, 8) for peer in choice.sample(ADDRESSES4[1:5] + ADDRESSES6[3:], 4)
    }
    prefixes = {(packed("198.51.100.0"), 24): 4, (packed("10.0.0.0"), 8): 5, (packed("10.1.2.0"), 28): 6}
    six = {
        (packed("2001:db8:b::"), 48): 5,
        (packed("2001:db8:b:1::"), 64): 6,
        (packed("2001:db8:c::"), 64): 7,
    }
    prefixes |= {key: six[key] for key in choice.sample(sorted(six), choice.randrange(4))}
    bases = [0, PORTS_UDP, 2 * PORTS_UDP]

    def paint() -> tuple[int, int, int]:
        base = choice.choice([*bases, PORTS_ICMP4, PORTS_ICMP6, PORTS_PROTOCOL])
        if base in bases:
            first, last = sorted(choice.sample(PORTS, 2))
        else:
            first, last = sorted((choice.randrange(256), choice.randrange(256)))
        return base + first, base + last, choice.choice(cells)

    rows = {
        (direction, slot): tuple(paint() for _ in range(choice.randrange(6)))
        for direction in Direction
        for slot in (0, 2, 4, 5, 6, 7)
    }
    default = {direction: choice.choice(cells) for direction in Direction}
    enforced = choice.choice([BufferFlag(3), BufferFlag(3), BufferFlag(1), BufferFlag(2), BufferFlag(3 | 4)])
    flags = choice.choice([ConfigFlag(0)] * 4 + [ConfigFlag.DROP_NON_IP])
    panic = choice.choice([Panic.NONE] * 6 + [Panic.OPEN, Panic.FAILSAFE])
    return Policy(addresses, prefixes, rows, default, enforced, flags, panic)


def built_frame(choice: random.Random) -> bytes:
    src, dst = (choice.choice(pool) for pool in [choice.choice([ADDRESSES4, ADDRESSES6])] for _ in range(2))
    sport, dport = choice.choice(PORTS), choice.choice(PORTS)
    kind = choice.randrange(9)
    if kind < 3:
        flags = choice.choice([SYN, SYN | ACK, ACK, FIN | ACK, RST, RST | ACK, choice.randrange(256)])
        return frames.tcp(src, dst, sport, dport, flags)
    if kind < 5:
        return frames.udp(src, dst, sport, dport)
    if kind == 5:
        types = [8, 0, 3, 5, 13, 128, 129, 1, 2, 135, 130]
        return frames.icmp(
            src, dst, choice.choice(types), choice.randrange(5), identifier=choice.randrange(4)
        )
    if kind == 6:
        quoted = frames.tcp(dst, choice.choice([src, *ADDRESSES4[:3]]) if "." in dst else src, dport, sport)
        return frames.icmp_error(src, dst, choice.choice([3, 11, 1, 2]), choice.choice([0, 1, 4]), quoted)
    if kind == 7 and ":" in src:
        return frame_with_extensions(choice, src, dst)
    l4 = frames.udp_datagram(sport, dport, bytes(56))
    offset = choice.choice([1, 64, 65, 8, 9, 0, 65456, 65472, 65480])
    proto = choice.choice([6, 17, 132])
    return frames.ip(src, dst, proto, l4, identification=choice.randrange(8), fragment=offset)


def frame_with_extensions(choice: random.Random, src: str, dst: str) -> bytes:
    kinds = [choice.choice([60, 60, 60, 43, 44, 0]) for _ in range(choice.choice([1, 2, 7, 8, 9]))]
    if choice.random() < 0.5:
        kinds = [60] * len(kinds)
    chain, following = frames.tcp_segment(choice.choice(PORTS), choice.choice(PORTS)), 6
    for kind in reversed(kinds):
        left = choice.choice([0, 0, 1]) if kind == 43 else 0
        chain, following = bytes([following, 0, 4 if kind == 43 else 0, left, 0, 0, 0, 0]) + chain, kind
    return frames.ip(src, dst, following, chain)


def some_frame(choice: random.Random, golden: list[bytes]) -> bytes:
    frame = bytearray(built_frame(choice) if choice.random() < 0.3 else choice.choice(golden))
    for _ in range(choice.choice([0, 1, 1, 1, 2, 3])):
        choice.choice([change_bytes, change_bytes, change_a_length, change_order, cut_or_grow])(choice, frame)
    if choice.random() < 0.3:
        frame[0:6] = bytes(6)
    return bytes(frame[:1514]).ljust(14, b"\0")


def change_bytes(choice: random.Random, frame: bytearray) -> None:
    """One to eight of them, in the headers."""
    for _ in range(choice.choice([1, 1, 2, 3, 4, 8])):
        frame[choice.randrange(12, min(len(frame), 100))] = choice.choice(
            [choice.randrange(256), 0, 255, 1, 64]
        )


def change_a_length(choice: random.Random, frame: bytearray) -> None:
    """A field that says how long something is, or where it belongs, becomes a little or very wrong."""
    packet = parse(bytes(frame))
    layer3 = 14 + 4 * len(packet.vlans)
    fields = {
        4: [(layer3 + 2, 2), (layer3, 1), (layer3 + 6, 2)],
        6: [(layer3 + 4, 2), (layer3 + 41, 1), (layer3 + 42, 2)],
    }.get(packet.family, [])
    fields += (
        [(packet.l4_off + 4, 2), (packet.l4_off + 12, 1), (packet.l4_off + 1, 1)] if packet.l4_off else []
    )
    fields = [(at, size) for at, size in fields if at + size <= len(frame)]
    if not fields:
        return
    at, size = choice.choice(fields)
    most = (1 << 8 * size) - 1
    before = int.from_bytes(frame[at : at + size], "big")
    after = choice.choice([before + choice.randrange(-9, 10), 0, most, choice.randrange(most + 1)])
    frame[at : at + size] = (after & most).to_bytes(size, "big")


def change_order(choice: random.Random, frame: bytearray) -> None:
    """Two pieces of eight bytes change places: extension headers, fragment headers, options."""
    pieces = (len(frame) - 14) // 8
    if pieces < 2:
        return
    one, other = (14 + 8 * choice.randrange(min(pieces, 14)) + choice.choice([0, 4]) for _ in range(2))
    if max(one, other) + 8 <= len(frame) and abs(one - other) >= 8:
        frame[one : one + 8], frame[other : other + 8] = frame[other : other + 8], frame[one : one + 8]


def cut_or_grow(choice: random.Random, frame: bytearray) -> None:
    what = choice.random()
    if what < 0.5:
        del frame[choice.randrange(14, len(frame) + 1) :]
    elif what < 0.7:
        frame += choice.randbytes(choice.randrange(64))
    else:
        at = choice.randrange(14, min(len(frame), 80) + 1)
        frame[at:at] = choice.randbytes(choice.choice([4, 8]))


def differences(rig: Rig, golden: list[bytes], seed: int, count: int) -> list[str]:
    choice = random.Random(seed)  # noqa: S311
    policy = some_policy(choice)
    host = Host(policy)
    rig.forget()
    rig.install(policy)
    rig.events()
    wrong = []
    for number in range(count):
        frame = some_frame(choice, golden)
        # the test run's device has the all-zero address: others are frames for another host
        ours = bool(frame[0] & 1) or frame[:6] == bytes(6)
        steps = [
            (Hook.XDP, Direction.INGRESS, False, False),
            (Hook.TCX_INGRESS, Direction.INGRESS, False, ours),
            (Hook.TCX_EGRESS, Direction.EGRESS, choice.random() < 0.2, True),
        ]
        for hook, direction, forwarded, keeps_state in steps:
            try:
                passes = rig.run(hook, frame, forwarded=forwarded).passes
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                continue  # the kernel's test run refuses frames with a cut IP header at TCX
            wanted = host.judge(frame, direction, forwarded=forwarded, keeps_state=keeps_state)
            told = [(event["kind"], event["reason"]) for event in rig.events()]
            if passes != wanted.passes or told != expected_events(wanted):
                wrong.append(
                    f"seed {seed} frame {number} {hook.name} {frame.hex()}: {passes} {told}, model {wanted}"
                )
    return wrong


def expected_events(decision: Decision) -> list[tuple[int, int]]:
    if decision.reason < 16:
        return []
    return [(EventKind.AUDIT if decision.passes else EventKind.DROP, decision.reason)]


def test_programs_and_model_agree_about_mutated_frames(rig: Rig, golden: list[bytes]) -> None:
    for seed in range(-(-MUTANTS // CHUNK)):
        assert differences(rig, golden, seed, CHUNK) == []


@pytest.mark.slow
def test_programs_and_model_agree_about_a_million_frames_at_each_hook(rig: Rig, golden: list[bytes]) -> None:
    for seed in range(10_000, 11_100):  # TCX test runs refuse some frames: more than a million are needed
        assert differences(rig, golden, seed, CHUNK) == []
