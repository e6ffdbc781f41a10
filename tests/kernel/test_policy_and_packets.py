"""Random documents, compiled and stored as the daemon does it, against random packets: the kernel's verdict must be the
one of an order-free reading of the documents (tests/unit/policy/test_meaning.py) with the packet model around it."""

import importlib.util
import ipaddress
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bpf import attach, frames
from bpf.frames import ACK, FIN, RST, SYN
from bpf.layout import (
    PORTS_ICMP4,
    PORTS_ICMP6,
    PORTS_PROTOCOL,
    PORTS_SCTP,
    PORTS_TCP,
    PORTS_UDP,
    SLOT_HOST,
    BufferFlag,
    CellVerdict,
    Hook,
)
from bpf.model import Direction, Host, Policy
from bpf.run import RIG_SIZES, Rig
from bpf.syscall import obj_pin
from daemon.datapath.image import Image
from daemon.datapath.maps import KernelMaps
from daemon.datapath.ops import Grace, Op
from daemon.model.identity import Identity
from daemon.model.net import Prefix, compact, parse_prefix
from daemon.policy.tables import PORTLESS

pytestmark = pytest.mark.kernel

US4, US6 = "192.0.2.1", "2001:db8:a::1"
PROTOCOLS = {1: "ICMP", 47: "GRE", 58: "ICMPv6"}
PORTS = [0, 22, 23, 24, 53, 80, 443, 10250, 10260, 65535]
ALLOW, DENY = CellVerdict.ALLOW << 28 | 16, CellVerdict.DENY << 28 | 17
PAIRS = int(os.environ.get("MESHWALL_PAIRS", "20000"))  # a release runs a million
PACKETS = 100  # of one policy
FIRST_PEER = 16


def _meaning() -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / "policy" / "test_meaning.py"
    spec = importlib.util.spec_from_file_location("meaning", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


meaning = _meaning()
Doc = dict[str, Any]


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def asked(index: int) -> tuple[str, int]:
    """Protocol and port of a column, as the oracle takes them."""
    for base, name in ((PORTS_TCP, "TCP"), (PORTS_UDP, "UDP"), (PORTS_SCTP, "SCTP")):
        if base <= index < base + 0x10000:
            return name, index - base
    if index < PORTS_ICMP6:
        return "ICMP", index - PORTS_ICMP4
    if index < PORTS_PROTOCOL:
        return "ICMPv6", index - PORTS_ICMP6
    return PROTOCOLS.get(index - PORTS_PROTOCOL, "other"), PORTLESS


@dataclass(frozen=True)
class Documents(Policy):
    """What the documents say, asked one packet at a time. peers: address -> who the oracle takes it for."""

    case: Doc = field(default_factory=dict)
    peers: Mapping[bytes, Doc] = field(default_factory=dict)
    _seen: list[bytes] = field(default_factory=list)

    def slot(self, address: bytes) -> int:
        if address in (packed(US4), packed(US6)):
            return SLOT_HOST
        if address not in self._seen:
            self._seen.append(address)
        return FIRST_PEER + self._seen.index(address)

    def cell(self, direction: Direction, slot: int, index: int) -> int:
        if slot == SLOT_HOST:
            peer = meaning.IDENTITIES[1]
        else:
            address = self._seen[slot - FIRST_PEER]
            outside = {"address": str(ipaddress.ip_address(address)), "known": True}
            peer = self.peers.get(address, outside)
        word = meaning.oracle(self.case, direction.name.lower(), peer, *asked(index))
        return ALLOW if word == "allow" else DENY


def enforced(case: Doc) -> BufferFlag:
    """The directions that any document closes for the host."""
    if case["mode"] != "default":
        return BufferFlag(3 if case["mode"] == "always" else 0)
    found = BufferFlag(0)
    for document in case["policies"]:
        for spec in [*([document["spec"]] if "spec" in document else []), *document.get("specs", [])]:
            if meaning.subject_selected(spec, "", case["subject"]):
                for way, flag in (
                    ("ingress", BufferFlag.ENFORCE_INGRESS),
                    ("egress", BufferFlag.ENFORCE_EGRESS),
                ):
                    if spec.get(way) or spec.get(f"{way}Deny"):
                        found |= flag
    return found


def host_case(maker: Any) -> Doc:
    while True:
        case: Doc = maker.case()
        if meaning.is_host(case):
            return case


class Stored:
    """The maps of a rig, written as the daemon writes them."""

    def __init__(self, rig: Rig, pins: Path) -> None:
        directory = attach.home(pins) / "maps"
        directory.mkdir(parents=True)
        for name, one in rig.maps.items():
            obj_pin(one.fd, directory / name)
        self._maps = KernelMaps(pins, RIG_SIZES)
        self.image = Image(RIG_SIZES)
        self.owners: dict[Prefix, Identity | None] = {}

    def apply(self, ops: list[Op]) -> None:
        """Nothing runs beside us: nobody waits for packets that began with the old policy."""
        self._maps.apply([op for op in ops if not isinstance(op, Grace)])

    def own(self, owners: Mapping[Prefix, Identity | None]) -> None:
        """These addresses belong to these identities from now on; None: to one that nobody knows."""
        self.owners.update(owners)
        self.apply(self.image.claim({compact(one): who for one, who in owners.items()}, []))

    def peers(self) -> dict[bytes, Doc]:
        """As the oracle wants to know them."""
        unknown = meaning.PEERS[-1]
        return {
            one.address.to_bytes(4 if one.family == 4 else 16, "big"):
            unknown if who is None else meaning.IDENTITIES[int(who)]
            for one, who in self.owners.items()
        }  # fmt: skip

    def close(self) -> None:
        self._maps.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if os.geteuid():
        pytest.skip("loading BPF needs root")
    with Rig() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def stored(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    pins = tmp_path_factory.mktemp("bpffs")
    subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
    try:
        made = Stored(rig, pins)
        made.own(first_owners())
        yield made
        made.close()
    finally:
        subprocess.run(["umount", "-l", pins], check=True)


def first_owners() -> dict[Prefix, Identity | None]:
    """Each identity has addresses apart from, and inside of, the prefixes that policies name."""
    owners: dict[Prefix, Identity | None] = {parse_prefix(US4): Identity(1), parse_prefix(US6): Identity(1)}
    numbers = [one for one in meaning.IDENTITIES if one not in (1, 9, 10)]
    for at, who in enumerate([*map(Identity, numbers), None]):
        for text in (f"172.16.0.{at + 1}", f"10.1.2.{at + 100}", f"2001:db8::1:{at + 1:x}"):
            owners[parse_prefix(text)] = who
    return owners


def some_packet(choice: random.Random, pairs: list[tuple[str, str]]) -> tuple[Direction, bytes]:
    direction = choice.choice(list(Direction))
    us, peer = choice.choice(pairs)
    src, dst = (peer, us) if direction is Direction.INGRESS else (us, peer)
    ports = choice.choice([*PORTS, 40_000]), choice.choice(PORTS)
    kind = choice.randrange(10)
    if kind < 5:
        return direction, frames.tcp(
            src, dst, *ports, choice.choice([SYN, SYN, ACK, SYN | ACK, FIN | ACK, RST])
        )
    if kind < 7:
        return direction, frames.udp(src, dst, *ports)
    if kind == 7:
        types = [8, 0, 13] if "." in us else [128, 129, 8]
        return direction, frames.icmp(src, dst, choice.choice(types), identifier=choice.randrange(3))
    if kind == 8:
        l4 = frames.udp_datagram(*ports, bytes(56)) + bytes(8)
        chosen = choice.choice([17, 132])
        offset = choice.choice([1, 64])
        return direction, frames.ip(src, dst, chosen, l4, identification=choice.randrange(3), fragment=offset)
    return direction, frames.ip(
        src, dst, choice.choice([47, 132, 50, 136]), frames.udp_datagram(*ports, bytes(8))
    )


def differences(rig: Rig, stored: Stored, maker: Any, verdicts: Counter[bool]) -> list[str]:
    choice: random.Random = maker.rnd
    case = host_case(maker)
    moved = choice.sample(sorted(one for one in stored.owners if one.address not in OWN), 3)
    stored.own({one: choice.choice([Identity(70_000), Identity(6), None]) for one in moved})
    tables = meaning.compiled(case)
    stored.apply(stored.image.switch(tables))
    rig.forget()
    host = Host(Documents(enforced=enforced(case), case=case, peers=stored.peers()))
    known = [str(ipaddress.ip_address(one)) for one in stored.peers()] + meaning.ADDRESSES
    pairs = [(US4 if "." in one else US6, one) for one in known if one not in (US4, US6)]
    pairs = choice.sample(pairs, 12)  # few, so that packets meet the connections of others
    wrong = []
    for _ in range(PACKETS):
        direction, frame = some_packet(choice, pairs)
        hooks = [Hook.XDP, Hook.TCX_INGRESS] if direction is Direction.INGRESS else [Hook.TCX_EGRESS]
        for hook in hooks:
            wanted = host.judge(frame, direction, keeps_state=hook is not Hook.XDP)
            verdicts[wanted.passes] += 1
            if rig.run(hook, frame).passes != wanted.passes:
                wrong.append(f"{case} {hook.name} {frame.hex()}: the documents say {wanted}")
    return wrong


OWN = {int.from_bytes(packed(one), "big") for one in (US4, US6)}


def test_random_packets_get_the_verdict_that_random_documents_say(rig: Rig, stored: Stored) -> None:
    maker = meaning.Maker(random.Random(20_261_123))  # noqa: S311
    verdicts: Counter[bool] = Counter()
    for _ in range(-(-PAIRS // PACKETS)):
        assert differences(rig, stored, maker, verdicts) == []
    assert min(verdicts[True], verdicts[False]) > PAIRS / 5, "void: nearly all packets had the same verdict"


@pytest.mark.parametrize(("annotations", "answers"), [({}, False), ({"meshwall.io/denied": "reject"}, True)])
def test_the_annotation_of_a_document_makes_the_program_answer(
    rig: Rig, stored: Stored, annotations: dict[str, str], answers: bool
) -> None:
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "p", "annotations": annotations},
        "spec": {"nodeSelector": {}, "ingress": [{"fromEntities": ["health"]}]},
    }
    case = {"policies": [document], "mode": "default", "local": False, "subject": ["reserved:host"]}
    stored.apply(stored.image.switch(meaning.compiled(case)))
    verdict = rig.run(Hook.TCX_INGRESS, frames.tcp("203.0.113.99", US4, 40_000, 22))
    assert not verdict.passes
    assert bool(verdict.answer) is answers
