"""What the data path must do with a frame, in plain Python: the oracle that the C is compared with.

Written from the rules, not from the C, and as plainly as possible: `parse` turns bytes into facts and
`Host.judge` turns facts, tables and state into a decision.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from bpf.layout import (
    CT_ORIGIN_IN,
    CT_ORIGIN_OUT,
    PORTS_ICMP4,
    PORTS_ICMP6,
    PORTS_PROTOCOL,
    PORTS_SCTP,
    PORTS_TCP,
    PORTS_UDP,
    RULE_FAILSAFE,
    SLOT_HOST,
    SLOT_WORLD4,
    SLOT_WORLD6,
    BufferFlag,
    CellFlag,
    CellVerdict,
    ConfigFlag,
    PacketClass,
    Panic,
    Reason,
    Sizes,
)

TCP, UDP, SCTP, ICMP4, ICMP6, IGMP = 6, 17, 132, 1, 58, 2
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
FIN, SYN, RST, ACK = 1, 2, 4, 16
MOST_EXTENSIONS = 8
DEEPEST_HEADER = 0x3FFF  # no header is looked for beyond this offset
FIRST_DROP = Reason.POLICY_DEFAULT


class Direction(IntEnum):
    """Seen from the host."""

    INGRESS = 0
    EGRESS = 1


@dataclass
class Packet:
    """The facts of a frame; what does not apply is None, 0 or empty."""

    length: int
    kind: PacketClass = PacketClass.NON_IP
    reason: Reason | None = None  # why it is malformed
    refuse: Reason | None = None  # why it is dropped though it parses
    ethertype: int = 0
    group: bool = False  # to a multicast or broadcast MAC address
    vlans: list[int] = field(default_factory=list)
    family: int = 0
    src: bytes = b""
    dst: bytes = b""
    proto: int = 0
    sport: int | None = None
    dport: int | None = None
    tcp_flags: int = 0
    icmp_type: int | None = None
    icmp_code: int | None = None
    echo_id: int | None = None
    hop_limit: int = 0
    l4_off: int = 0
    limit: int = 0  # where the packet ends in the frame
    frag_header: bool = False
    frag_id: int = 0
    frag_off: int = 0
    frag_more: bool = False
    frag_proto: int = 0
    link: bool = False  # keeps the link alive
    port_index: int = 0

    @property
    def is_fragment(self) -> bool:
        return bool(self.frag_off or self.frag_more)


class _Malformed(Exception):  # noqa: N818 - control flow inside parse
    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def _be(data: bytes) -> int:
    return int.from_bytes(data, "big")


def parse(frame: bytes) -> Packet:
    """Total: every frame gets a class; malformed ones a reason."""
    packet = Packet(len(frame))
    try:
        _parse_link(packet, frame)
    except _Malformed as wrong:
        packet.kind, packet.reason = PacketClass.MALFORMED, wrong.reason
    return packet


def _parse_link(packet: Packet, frame: bytes) -> None:
    if len(frame) < 14:
        raise _Malformed(Reason.SHORT_ETH)
    packet.group = bool(frame[0] & 1)
    off, packet.ethertype = 14, _be(frame[12:14])
    while packet.ethertype in (0x8100, 0x88A8):
        if len(packet.vlans) == 2:
            raise _Malformed(Reason.VLAN_DEPTH)
        if len(frame) < off + 4:
            raise _Malformed(Reason.SHORT_VLAN)
        packet.vlans.append(_be(frame[off : off + 2]) & 0xFFF)
        packet.ethertype = _be(frame[off + 2 : off + 4])
        off += 4
    if packet.ethertype == 0x0800:
        _parse_ip4(packet, frame, off)
    elif packet.ethertype == 0x86DD:
        _parse_ip6(packet, frame, off)
    elif packet.ethertype == 0x0806:
        packet.kind, packet.link = PacketClass.ARP, True
        if len(frame) < off + 28:
            raise _Malformed(Reason.SHORT_IP)


def _parse_ip4(packet: Packet, frame: bytes, off: int) -> None:
    head = frame[off : off + 20]
    if len(head) < 20:
        raise _Malformed(Reason.SHORT_IP)
    length, total, room = (head[0] & 15) * 4, _be(head[2:4]), len(frame) - off
    if head[0] >> 4 != 4:
        raise _Malformed(Reason.IP_VERSION)
    if length < 20 or length > room:
        raise _Malformed(Reason.BAD_IHL)
    if total < length or total > room:
        raise _Malformed(Reason.BAD_TOTLEN)
    packet.family, packet.proto, packet.src, packet.dst = 4, head[9], head[12:16], head[16:20]
    packet.l4_off, packet.limit = off + length, off + total
    if _names_a_route(frame[off + 20 : off + length]):
        packet.refuse = Reason.SOURCE_ROUTE
    packet.frag_off, packet.frag_more = (_be(head[6:8]) & 0x1FFF) * 8, bool(head[6] & 0x20)
    if packet.is_fragment:
        packet.frag_header, packet.frag_id = True, _be(head[4:6])
        packet.frag_proto = packet.proto
        _check_fragment(packet, total - length, length)
    if not packet.frag_off:
        _parse_l4(packet, frame[: packet.limit])


def _names_a_route(options: bytes) -> bool:
    at = 0
    while at < len(options) and options[at]:
        if options[at] in (131, 137):
            return True
        if options[at] == 1:
            at += 1
        elif at + 1 < len(options) and options[at + 1]:
            at += options[at + 1]
        else:
            return False
    return False


def _check_fragment(packet: Packet, size: int, header: int) -> None:
    """size: bytes that the fragment brings; header: bytes that reassembly puts in front."""
    if not size or (packet.frag_more and size % 8):
        raise _Malformed(Reason.TINY_FRAG)
    if packet.frag_off + size + header > 65535:
        raise _Malformed(Reason.FRAG_TOOBIG)
    if not packet.frag_off:
        packet.kind = PacketClass.FRAG_FIRST
        return
    judged = {TCP: 20, SCTP: 12}.get(packet.frag_proto, 0)
    if packet.frag_off < judged:
        raise _Malformed(Reason.FRAG_L4_OVERLAP)
    packet.kind = PacketClass.FRAG_NONFIRST


def _parse_ip6(packet: Packet, frame: bytes, off: int) -> None:
    head = frame[off : off + 40]
    if len(head) < 40:
        raise _Malformed(Reason.SHORT_IP)
    if head[0] >> 4 != 6:
        raise _Malformed(Reason.IP_VERSION)
    payload = _be(head[4:6])
    if not payload and head[6] == HOP_BY_HOP:
        raise _Malformed(Reason.JUMBOGRAM)
    if payload > len(frame) - off - 40:
        raise _Malformed(Reason.BAD_PLEN)
    packet.family, packet.src, packet.dst = 6, head[8:24], head[24:40]
    packet.hop_limit, packet.proto = head[7], head[6]
    packet.l4_off, packet.limit = off + 40, off + 40 + payload
    walked = 0
    while packet.proto in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION):
        if walked == MOST_EXTENSIONS or packet.l4_off > DEEPEST_HEADER:
            raise _Malformed(Reason.EXT_DEPTH)
        _parse_extension(packet, frame[: packet.limit], first=not walked)
        walked += 1
        if packet.frag_off:
            return
    _parse_l4(packet, frame[: packet.limit])


def _parse_extension(packet: Packet, data: bytes, *, first: bool) -> None:
    off = packet.l4_off
    if packet.proto == FRAGMENT:
        _parse_fragment_header(packet, data, off)
        return
    short = Reason.TINY_FRAG if packet.kind is PacketClass.FRAG_FIRST else Reason.SHORT_EXT
    if packet.proto == HOP_BY_HOP and not first:
        raise _Malformed(Reason.HBH_MISPLACED)
    if packet.proto == ROUTING:
        if len(data) < off + 4:
            raise _Malformed(short)
        if not data[off + 2] or data[off + 3]:
            raise _Malformed(Reason.ROUTING_HEADER)
    if len(data) < off + 2 or len(data) < off + (data[off + 1] + 1) * 8:
        raise _Malformed(short)
    packet.proto, packet.l4_off = data[off], off + (data[off + 1] + 1) * 8


def _parse_fragment_header(packet: Packet, data: bytes, off: int) -> None:
    if packet.frag_header:
        raise _Malformed(Reason.DUP_FRAG_HEADER)
    if len(data) < off + 8:
        raise _Malformed(Reason.SHORT_EXT)
    packet.frag_header = True
    packet.frag_id = _be(data[off + 4 : off + 8])
    packet.proto = packet.frag_proto = data[off]
    packet.l4_off = off + 8
    packet.frag_off, packet.frag_more = _be(data[off + 2 : off + 4]) & 0xFFF8, bool(data[off + 3] & 1)
    if packet.is_fragment:
        _check_fragment(packet, len(data) - packet.l4_off, 0)


def _parse_l4(packet: Packet, data: bytes) -> None:
    if packet.l4_off > DEEPEST_HEADER:
        raise _Malformed(Reason.EXT_DEPTH)
    l4 = data[packet.l4_off :]
    whole = packet.kind is not PacketClass.FRAG_FIRST
    least = {TCP: 20, UDP: 8, SCTP: 12, (ICMP4 if packet.family == 4 else ICMP6): 8}.get(packet.proto, 0)
    if len(l4) < least:
        raise _Malformed(Reason.SHORT_L4 if whole else Reason.TINY_FRAG)
    kind = PacketClass.OTHER_L4
    packet.port_index = PORTS_PROTOCOL + packet.proto
    if packet.proto in (TCP, UDP, SCTP):
        kind = {TCP: PacketClass.TCP, UDP: PacketClass.UDP, SCTP: PacketClass.SCTP}[packet.proto]
        packet.sport, packet.dport = _be(l4[0:2]), _be(l4[2:4])
        packet.port_index = {TCP: PORTS_TCP, UDP: PORTS_UDP, SCTP: PORTS_SCTP}[packet.proto] + packet.dport
    if packet.proto == TCP:
        _check_tcp(packet, l4, whole=whole)
    elif packet.proto == UDP:
        if _be(l4[4:6]) < 8 or (whole and _be(l4[4:6]) > len(l4)):
            raise _Malformed(Reason.BAD_UDPLEN)
    elif packet.proto == IGMP and packet.family == 4 and whole:
        kind, packet.link = PacketClass.IGMP, packet.dst[0] >> 4 == 14  # to a group
    elif least == 8:
        kind = _parse_icmp(packet, l4)
    if whole or kind in (PacketClass.NDP, PacketClass.MLD):  # those two never come in fragments
        packet.kind = kind


def _check_tcp(packet: Packet, l4: bytes, *, whole: bool) -> None:
    words, packet.tcp_flags = l4[12] >> 4, l4[13]
    if words < 5 or (whole and words * 4 > len(l4)):
        raise _Malformed(Reason.BAD_DOFF)
    flags = packet.tcp_flags & 0x3F
    impossible = not flags or (flags & SYN and flags & (FIN | RST)) or (flags & FIN and not flags & ACK)
    if impossible:
        packet.refuse = Reason.BAD_TCP_FLAGS


def _parse_icmp(packet: Packet, l4: bytes) -> PacketClass:
    kind = packet.icmp_type = l4[0]
    packet.icmp_code = l4[1]
    if kind in ((8, 0) if packet.family == 4 else (128, 129)):
        packet.echo_id = _be(l4[4:6])
    if packet.family == 4:
        packet.port_index = PORTS_ICMP4 + kind
        if kind == 5:
            packet.refuse = Reason.ICMP_REDIRECT
        return PacketClass.ICMP4
    packet.port_index = PORTS_ICMP6 + kind
    if 133 <= kind <= 137:
        least = {133: 8, 134: 16}.get(kind, 24)
        valid = packet.hop_limit == 255 and not l4[1] and len(l4) >= least and not packet.frag_header
        packet.link = valid and kind != 137
        if not packet.link:
            packet.refuse = Reason.ICMP_REDIRECT if kind == 137 else Reason.NDP_INVALID
        return PacketClass.NDP
    if kind in (130, 131, 132, 143):
        packet.link = packet.hop_limit == 1 and not packet.frag_header and (kind == 143 or len(l4) >= 24)
        if not packet.link:
            packet.refuse = Reason.NDP_INVALID
        return PacketClass.MLD
    return PacketClass.ICMP6


@dataclass(frozen=True)
class Quote:
    """The tuple of the packet that an ICMP error quotes."""

    family: int
    src: bytes
    dst: bytes
    proto: int
    sport: int  # echo: the identifier
    dport: int


def quoted(packet: Packet, frame: bytes) -> Quote | None:
    """None when the packet is no ICMP error, or its quote cannot identify a flow."""
    errors = {PacketClass.ICMP4: (3, 11, 12), PacketClass.ICMP6: (1, 2, 3, 4)}.get(packet.kind, ())
    if packet.icmp_type not in errors:
        return None
    inner = frame[packet.l4_off + 8 : packet.limit]
    if packet.family == 4:
        if len(inner) < 20 or inner[0] >> 4 != 4 or inner[0] & 15 < 5 or _be(inner[6:8]) & 0x1FFF:
            return None
        proto, src, dst, l4 = inner[9], inner[12:16], inner[16:20], inner[(inner[0] & 15) * 4 :]
    else:
        if len(inner) < 40 or inner[0] >> 4 != 6:
            return None
        proto, src, dst, l4 = inner[6], inner[8:24], inner[24:40], inner[40:]
    if proto in (TCP, UDP, SCTP) and len(l4) >= 4:
        return Quote(packet.family, src, dst, proto, _be(l4[0:2]), _be(l4[2:4]))
    echo = (8, 0) if packet.family == 4 else (128, 129)
    if proto == (ICMP4 if packet.family == 4 else ICMP6) and len(l4) >= 8 and l4[0] in echo:
        return Quote(packet.family, src, dst, proto, _be(l4[4:6]), 0)
    return None


Paint = tuple[int, int, int]  # first and last port index, cell


BOTH_DIRECTIONS = BufferFlag.ENFORCE_INGRESS | BufferFlag.ENFORCE_EGRESS
NO_FLAGS = ConfigFlag(0)


@dataclass(frozen=True)
class Policy:
    """Tables of one generation. A remote address has a slot; a slot has a row for each direction."""

    addresses: Mapping[bytes, int] = field(default_factory=dict)
    prefixes: Mapping[tuple[bytes, int], int] = field(
        default_factory=dict
    )  # (network, length); the longest wins
    rows: Mapping[tuple[Direction, int], tuple[Paint, ...]] = field(default_factory=dict)  # later paints win
    default: Mapping[Direction, int] = field(default_factory=dict)  # cell of what no row paints
    enforced: BufferFlag = BOTH_DIRECTIONS
    flags: ConfigFlag = NO_FLAGS
    panic: Panic = Panic.NONE

    @property
    def in_force(self) -> BufferFlag:
        """The directions that are judged."""
        if self.panic is Panic.NONE:
            return self.enforced & BOTH_DIRECTIONS
        return BufferFlag(0) if self.panic is Panic.OPEN else BOTH_DIRECTIONS

    @property
    def audits(self) -> bool:
        """Whether nothing is dropped."""
        return self.panic is Panic.NONE and BufferFlag.AUDIT in self.enforced

    def slot(self, address: bytes) -> int:
        """The slot of an address; the world's when nothing names it."""
        if address in self.addresses:
            return self.addresses[address]
        number = _be(address)
        bits = len(address) * 8
        covering = [
            (length, slot)
            for (network, length), slot in self.prefixes.items()
            if len(network) == len(address) and number >> (bits - length) == _be(network) >> (bits - length)
        ]
        return max(covering)[1] if covering else (SLOT_WORLD4 if bits == 32 else SLOT_WORLD6)

    def cell(self, direction: Direction, slot: int, index: int) -> int:
        """The packed cell that decides."""
        found = self.painted(direction, slot, index)
        if self.panic is Panic.FAILSAFE and found & 0xFFFFFF != RULE_FAILSAFE:
            return CellVerdict.DEFAULT_DENY << 28 | int(direction)
        return found

    def painted(self, direction: Direction, slot: int, index: int) -> int:
        """The packed cell as the tables have it."""
        found = self.default.get(direction, 0)
        for first, last, cell in self.rows.get((direction, slot), ()):
            if first <= index <= last:
                found = cell
        return found


def allows(cell: int) -> bool:
    """Does this cell let a new connection through?"""
    return cell >> 28 in (CellVerdict.ALLOW, CellVerdict.REDIRECT)


Flow = tuple[bytes, bytes, int, int, int, int]  # local, remote, local port, remote port, protocol, origin
Datagram = tuple[bytes, bytes, int, int, int]  # source, destination, id, protocol, family


@dataclass(frozen=True)
class Decision:
    """What happens to a packet: `reason` below FIRST_DROP passes, unless audited."""

    reason: Reason
    passes: bool
    rule: int | None = None  # the rule that decided, if a rule did


@dataclass
class Host:
    """A policy with the state that packets leave behind. Nothing expires: tests are short."""

    policy: Policy
    flows: set[Flow] = field(default_factory=set)
    datagrams: set[Datagram] = field(default_factory=set)
    denied_datagrams: set[Datagram] = field(default_factory=set)
    fragment_share: int = Sizes().fragments // 16  # datagrams of one source at a time

    def judge(
        self, frame: bytes, direction: Direction, *, forwarded: bool = False, keeps_state: bool = True
    ) -> Decision:
        """Decide about one frame and remember what later ones need.

        forwarded: on egress, the packet came from another device. keeps_state: False for XDP, which leaves
        new inbound connections to the next hook, and for frames to another MAC address.
        """
        packet = parse(frame)
        policy = self.policy
        if not policy.in_force:
            return Decision(Reason.NOT_ENFORCED, passes=True)
        if direction is Direction.INGRESS:
            reason = self._ingress(packet, frame, keeps_state=keeps_state)
        else:
            reason = self._egress(packet, frame, forwarded=forwarded)
        rule = None
        if self._by_rule(packet, reason):
            rule = self._cell(packet, direction) & 0xFFFFFF
        return Decision(reason, self._passes(packet, reason, direction), rule)

    def _by_rule(self, packet: Packet, reason: Reason) -> bool:
        decided = reason in (Reason.FORWARDED, Reason.POLICY_DEFAULT, Reason.POLICY_DENY)
        return decided and not packet.frag_off

    def _passes(self, packet: Packet, reason: Reason, direction: Direction) -> bool:
        if reason < FIRST_DROP or self.policy.audits:
            return True
        return self._by_rule(packet, reason) and bool(self._cell(packet, direction) >> 24 & CellFlag.AUDIT)

    def _remote(self, packet: Packet, direction: Direction) -> int:
        return self.policy.slot(packet.src if direction is Direction.INGRESS else packet.dst)

    def _cell(self, packet: Packet, direction: Direction) -> int:
        return self.policy.cell(direction, self._remote(packet, direction), packet.port_index)

    def _ingress(self, packet: Packet, frame: bytes, *, keeps_state: bool) -> Reason:
        enforced = self.policy.in_force
        if not enforced & BufferFlag.ENFORCE_INGRESS:
            if packet.family and keeps_state:
                self._track(packet, Direction.INGRESS)
            return Reason.NOT_ENFORCED
        early = self._before_policy(packet)
        if early is not None:
            return early
        if packet.refuse is None:
            reason = self._by_policy(packet, frame, Direction.INGRESS)
        else:
            reason = packet.refuse if self._is_ours(packet) else Reason.NOT_HOST
        if reason is Reason.NOT_HOST:
            return reason
        reason = self._tie(packet, reason, Direction.INGRESS)
        if reason is Reason.FORWARDED and enforced & BufferFlag.ENFORCE_EGRESS and keeps_state:
            self._track(packet, Direction.INGRESS)
        return reason

    def _before_policy(self, packet: Packet) -> Reason | None:
        """What needs no policy; None for the rest."""
        if packet.reason is not None:
            return packet.reason
        if packet.kind is PacketClass.ARP:
            return Reason.LINK
        if packet.kind is PacketClass.NON_IP:
            return Reason.NON_IP_REFUSED if self.policy.flags & ConfigFlag.DROP_NON_IP else Reason.NON_IP
        impossible = impossible_address(packet)
        if impossible:
            return impossible
        if self.policy.slot(packet.src) == SLOT_HOST:
            return Reason.SPOOFED_LOCAL
        return Reason.LINK if packet.link else None

    def _egress(self, packet: Packet, frame: bytes, *, forwarded: bool) -> Reason:
        tracks = bool(self.policy.in_force & BufferFlag.ENFORCE_INGRESS)
        if forwarded:
            if tracks and packet.family and self.policy.slot(packet.src) == SLOT_HOST:
                self._track(packet, Direction.EGRESS)
            return Reason.NOT_HOST
        if packet.link:
            return Reason.LINK
        if not self.policy.in_force & BufferFlag.ENFORCE_EGRESS:
            reason = Reason.NOT_ENFORCED
        elif packet.reason is not None:
            return packet.reason
        elif packet.kind is PacketClass.NON_IP:
            return Reason.NON_IP
        else:
            reason = self._tie(packet, self._by_policy(packet, frame, Direction.EGRESS), Direction.EGRESS)
        if tracks and reason in (Reason.FORWARDED, Reason.NOT_ENFORCED):
            self._track(packet, Direction.EGRESS)
        return reason

    def _by_policy(self, packet: Packet, frame: bytes, direction: Direction) -> Reason:
        cell = self._cell(packet, direction)
        if allows(cell) and not packet.frag_off:
            return Reason.FORWARDED
        if direction is Direction.INGRESS and not self._is_ours(packet):
            return Reason.NOT_HOST
        if packet.frag_off:
            return self._by_first_fragment(packet)
        if self._is_reply(packet, direction):
            return Reason.REPLY
        if self._is_related(packet, frame, direction):
            return Reason.RELATED
        return Reason.POLICY_DENY if cell >> 28 == CellVerdict.DENY else Reason.POLICY_DEFAULT

    def _by_first_fragment(self, packet: Packet) -> Reason:
        datagram = self._datagram(packet)
        if datagram in self.denied_datagrams:
            return Reason.FRAG_DENIED
        return Reason.FORWARDED if datagram in self.datagrams else Reason.FRAG_NO_FIRST

    def _datagram(self, packet: Packet) -> Datagram:
        return (packet.src, packet.dst, packet.frag_id, packet.frag_proto, packet.family)

    def _tie(self, packet: Packet, reason: Reason, direction: Direction) -> Reason:
        """Remember a first fragment's verdict; a datagram with two first fragments is denied if either is."""
        if packet.kind is not PacketClass.FRAG_FIRST:
            return reason
        datagram = self._datagram(packet)
        if not self._passes(packet, reason, direction):
            self.denied_datagrams.add(datagram)
        elif datagram in self.denied_datagrams:
            return Reason.FRAG_DENIED
        elif direction is Direction.INGRESS and datagram not in self.datagrams and self._is_full(packet.src):
            return Reason.FRAG_TABLE_FULL
        else:
            self.datagrams.add(datagram)
        return reason

    def _is_full(self, source: bytes) -> bool:
        return sum(datagram[0] == source for datagram in self.datagrams) >= self.fragment_share

    def _is_ours(self, packet: Packet) -> bool:
        if packet.group or not packet.family or self.policy.flags & ConfigFlag.ALL_OURS:
            return True
        multicast = packet.dst[0] >= 224 if packet.family == 4 else packet.dst[0] == 255
        return multicast or self.policy.slot(packet.dst) == SLOT_HOST

    def _flow(self, packet: Packet, direction: Direction, origin: int) -> Flow:
        ports = (packet.dport or 0, packet.sport or 0)
        if packet.proto in (ICMP4, ICMP6):
            ports = (packet.echo_id or 0, 0)
        elif direction is Direction.EGRESS:
            ports = (ports[1], ports[0])
        ends = (packet.dst, packet.src) if direction is Direction.INGRESS else (packet.src, packet.dst)
        return (*ends, *ports, packet.proto, origin)

    def _is_reply(self, packet: Packet, direction: Direction) -> bool:
        if _opens_tcp(packet) or (_is_icmp(packet) and packet.icmp_type not in (0, 129)):
            return False
        if _is_icmp(packet) and packet.echo_id is None:
            return False
        origin = CT_ORIGIN_OUT if direction is Direction.INGRESS else CT_ORIGIN_IN
        return self._flow(packet, direction, origin) in self.flows

    def _track(self, packet: Packet, direction: Direction) -> None:
        """Make an entry for the first packet of a connection, if its answers will need one."""
        if packet.reason is not None or packet.frag_off or packet.link or not packet.family:
            return
        origin = CT_ORIGIN_IN if direction is Direction.INGRESS else CT_ORIGIN_OUT
        if packet.proto == TCP:
            opens = _opens_tcp(packet)
        elif _is_icmp(packet):
            opens = packet.icmp_type == (8 if packet.family == 4 else 128)
        else:
            bases = {UDP: PORTS_UDP, SCTP: PORTS_SCTP}
            back = bases.get(packet.proto, PORTS_PROTOCOL)
            back += (packet.sport or 0) if packet.proto in bases else packet.proto
            opens = not allows(
                self.policy.cell(Direction(1 - direction), self._remote(packet, direction), back)
            )
        answered = packet.proto != TCP and self._flow(packet, direction, 1 - origin) in self.flows
        ours = direction is Direction.EGRESS or self._is_ours(packet)
        if opens and ours and not answered:
            self.flows.add(self._flow(packet, direction, origin))

    def _is_related(self, packet: Packet, frame: bytes, direction: Direction) -> bool:
        quote = quoted(packet, frame)
        if quote is None:
            return False
        too_big = _says_too_big(packet)
        if direction is Direction.EGRESS:
            if too_big or quote.dst != packet.src:
                return too_big
            return self._knows_received(quote) or self._answer_passes(quote, direction, too_big=False)
        if quote.src != packet.dst:
            return False
        return self._knows_sent(quote) or self._answer_passes(quote, direction, too_big=too_big)

    def _knows(self, local: bytes, remote: bytes, ports: tuple[int, int], proto: int) -> bool:
        return any(
            (local, remote, *ports, proto, origin) in self.flows for origin in (CT_ORIGIN_OUT, CT_ORIGIN_IN)
        )

    def _knows_sent(self, quote: Quote) -> bool:
        return self._knows(quote.src, quote.dst, (quote.sport, quote.dport), quote.proto)

    def _knows_received(self, quote: Quote) -> bool:
        ports = (quote.sport, 0) if quote.proto in (ICMP4, ICMP6) else (quote.dport, quote.sport)
        return self._knows(quote.dst, quote.src, ports, quote.proto)

    def _answer_passes(self, quote: Quote, direction: Direction, *, too_big: bool) -> bool:
        """Would policy alone pass the answer that an ICMP error stands for? Such connections have no entry.

        TCP keeps entries for what this host opens; there this counts for "too big" only.
        """
        base = {UDP: PORTS_UDP, SCTP: PORTS_SCTP} | ({TCP: PORTS_TCP} if too_big else {})
        if quote.proto not in base:
            return False
        remote = quote.dst if direction is Direction.INGRESS else quote.src
        return allows(self.policy.cell(direction, self.policy.slot(remote), base[quote.proto] + quote.sport))


def _says_too_big(packet: Packet) -> bool:
    if packet.kind is PacketClass.ICMP4:
        return (packet.icmp_type, packet.icmp_code) == (3, 4)
    return packet.kind is PacketClass.ICMP6 and packet.icmp_type == 2


def _opens_tcp(packet: Packet) -> bool:
    return packet.proto == TCP and packet.tcp_flags & (SYN | ACK) == SYN


def _is_icmp(packet: Packet) -> bool:
    own = ICMP4 if packet.family == 4 else ICMP6
    return packet.proto == own and packet.kind in (
        PacketClass.ICMP4,
        PacketClass.ICMP6,
        PacketClass.FRAG_FIRST,
    )


def impossible_address(packet: Packet) -> Reason | None:
    """Addresses that no packet from the wire can have."""
    src, dst = packet.src, packet.dst
    if packet.family == 4:
        if dst[0] == 127:
            return Reason.BAD_DST
        if src == bytes(4):
            asks_for_an_address = (
                packet.kind is PacketClass.UDP
                and dst == b"\xff" * 4
                and (packet.sport, packet.dport) == (68, 67)
            )
            return None if asks_for_an_address or packet.kind is PacketClass.IGMP else Reason.BAD_SRC
        return Reason.BAD_SRC if src[0] in (0, 127) or src[0] >> 4 == 14 or src == b"\xff" * 4 else None
    if dst == bytes(15) + b"\1" and not _bad_source6(packet):
        return Reason.BAD_DST
    return Reason.BAD_SRC if _bad_source6(packet) else None


def _bad_source6(packet: Packet) -> bool:
    src = packet.src
    if src == bytes(16):
        return packet.kind not in (PacketClass.NDP, PacketClass.MLD)
    return src[0] == 255 or src[:12] == bytes(10) + b"\xff\xff" or src == bytes(15) + b"\1"
