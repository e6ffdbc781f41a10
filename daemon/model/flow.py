"""Flow: one event of the data path as a person sees it. Verdict and drop reason numbers are Hubble's."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from daemon.model.identity import Identity
from daemon.model.net import Direction, Proto, proto_name
from daemon.model.rule import MatchType, RuleOrigin


class FlowVerdict(IntEnum):
    """flow.Verdict of the Hubble API, as far as a host firewall gives them."""

    FORWARDED = 1
    DROPPED = 2
    AUDIT = 4
    REDIRECTED = 5


class FlowType(IntEnum):
    """event_type.type of the Hubble API."""

    DROP = 1
    POLICY_VERDICT = 5


class DropReason(IntEnum):
    """flow.DropReason of the Hubble API: the members our own reasons map to."""

    DROP_REASON_UNKNOWN = 0  # also: no drop
    INVALID_SOURCE_IP = 132
    POLICY_DENIED = 133
    INVALID_PACKET_DROPPED = 134
    CT_TRUNCATED_OR_INVALID_HEADER = 135
    UNSUPPORTED_L3_PROTOCOL = 139
    CT_MAP_INSERTION_FAILED = 155
    INVALID_IPV6_EXTENSION_HEADER = 156
    FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND = 175
    FORBIDDEN_ICMPV6_MESSAGE = 176
    POLICY_DENY = 181
    VLAN_FILTERED = 182


DROP_TEXT = {
    DropReason.DROP_REASON_UNKNOWN: "",
    DropReason.INVALID_SOURCE_IP: "Invalid source ip",
    DropReason.POLICY_DENIED: "Policy denied",
    DropReason.INVALID_PACKET_DROPPED: "Invalid packet",
    DropReason.CT_TRUNCATED_OR_INVALID_HEADER: "CT: Truncated or invalid header",
    DropReason.UNSUPPORTED_L3_PROTOCOL: "Unsupported L3 protocol",
    DropReason.CT_MAP_INSERTION_FAILED: "CT: Map insertion failed",
    DropReason.INVALID_IPV6_EXTENSION_HEADER: "Invalid IPv6 extension header",
    DropReason.FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND: "First logical datagram fragment not found",
    DropReason.FORBIDDEN_ICMPV6_MESSAGE: "Forbidden ICMPv6 message",
    DropReason.POLICY_DENY: "Policy denied by denylist",
    DropReason.VLAN_FILTERED: "VLAN traffic disallowed by VLAN filter",
}


class LostSource(IntEnum):
    """flow.LostEventSource of the Hubble API: where events were lost."""

    PERF_EVENT_RING_BUFFER = 1  # the kernel's ring buffer was full
    OBSERVER_EVENTS_QUEUE = 2  # records of ours that could not be read
    HUBBLE_RING_BUFFER = 3  # a follower was overtaken by newer flows


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that nobody will see, and why. `suppressed` were left out on purpose by the kernel's budget."""

    source: LostSource
    count: int
    suppressed: int = 0


class Endpoint(NamedTuple):
    """One side of a flow. `address` is empty for frames that are not IP; `port` is 0 where there is none."""

    address: str
    port: int
    identity: Identity
    labels: tuple[str, ...] = ()  # canonical text
    namespace: str = ""
    pod: str = ""
    node: str = ""  # the host that has this address
    cluster: str = ""
    local: bool = False  # this host


class Flow(NamedTuple):
    """One event. `origin` is None for the fixed rules and for rules that are no longer known.

    A tuple, because a frozen dataclass of this width takes three times as long to build.
    """

    number: int  # position in the store, from 0 at start; a stable name of the event
    time_ns: int  # wall clock, since 1970
    type: FlowType
    verdict: FlowVerdict
    reason: str  # our own cause, `policy-default`, `bad-ihl`, ...; the one that would have dropped if audited
    drop: DropReason  # of what is dropped or audited
    direction: Direction
    hook: str
    interface: str
    ifindex: int
    family: int  # 4, 6, or 0 for frames that are not IP
    proto: int
    ethertype: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    fragment: bool  # a later fragment: without ports, flags and types of its own
    length: int  # bytes of the frame
    generation: int
    rule: int | None  # number in the kernel; None when the packet was refused before policy was asked
    origin: RuleOrigin | None
    restricting: tuple[str, ...]  # default denies: the policies that put the direction under policy
    source: Endpoint
    destination: Endpoint
    node: str
    cluster: str

    @property
    def remote(self) -> Endpoint:
        """The side that is not this host."""
        return self.source if self.direction is Direction.INGRESS else self.destination

    @property
    def rule_name(self) -> str:
        """See `rule_name`; empty when no rule decided."""
        return "" if self.rule is None else rule_name(self.rule, self.origin)


# Rules without a policy, by the numbers of bpf/layout.py; a test holds them together.
FIXED_RULES = {
    0: "default-deny-ingress",
    1: "default-deny-egress",
    2: "default-allow",
    3: "failsafe",
    5: "exempt-node-port",
}


_FIXED_MATCH = {2: MatchType.ALL, 3: MatchType.L4_ONLY}


def matched_by(number: int | None, origin: RuleOrigin | None) -> MatchType:
    """By what the deciding rule matches; nothing for default denies and where policy was not asked."""
    if origin is not None:
        return MatchType(origin.match)
    return _FIXED_MATCH.get(number, MatchType.NONE) if number is not None else MatchType.NONE


def rule_name(number: int, origin: RuleOrigin | None) -> str:
    """Where a rule stands in its policy: `ingress[0]`, `specs[1].egressDeny[2]`; or its fixed name."""
    if origin is None:
        return FIXED_RULES.get(number, "")
    spec = f"specs[{origin.spec}]." if origin.spec else ""
    return f"{spec}{origin.direction}{'Deny' if origin.deny else ''}[{origin.index}]"


# In the order in which Hubble writes them.
TCP_FLAGS = (
    ("SYN", 0x02), ("ACK", 0x10), ("RST", 0x04), ("FIN", 0x01), ("PSH", 0x08), ("URG", 0x20), ("ECE", 0x40),
    ("CWR", 0x80),
)  # fmt: skip

_ICMP4 = {
    0: "EchoReply", 3: "DestinationUnreachable", 4: "SourceQuench", 5: "Redirect", 8: "EchoRequest",
    9: "RouterAdvertisement", 10: "RouterSolicitation", 11: "TimeExceeded", 12: "ParameterProblem",
    13: "TimestampRequest", 14: "TimestampReply",
}  # fmt: skip
_ICMP6 = {
    1: "DestinationUnreachable", 2: "PacketTooBig", 3: "TimeExceeded", 4: "ParameterProblem",
    128: "EchoRequest", 129: "EchoReply", 130: "MLDv1MulticastListenerQueryMessage",
    131: "MLDv1MulticastListenerReportMessage", 132: "MLDv1MulticastListenerDoneMessage",
    133: "RouterSolicitation", 134: "RouterAdvertisement", 135: "NeighborSolicitation",
    136: "NeighborAdvertisement", 137: "Redirect", 143: "MLDv2MulticastListenerReportMessageV2",
}  # fmt: skip


def tcp_flag_names(flags: int) -> tuple[str, ...]:
    """`("SYN", "ACK")` for 0x12."""
    return tuple(name for name, bit in TCP_FLAGS if flags & bit)


def icmp_name(proto: int, icmp_type: int) -> str:
    """`EchoRequest` for ICMPv4 type 8; the bare number where there is no name."""
    return (_ICMP4 if proto == Proto.ICMP else _ICMP6).get(icmp_type, str(icmp_type))


def summary(flow: Flow) -> str:
    """The last column of a line: what kind of packet, and our own cause where Hubble's reason is wider."""
    if not flow.family:
        text = f"ethertype 0x{flow.ethertype:04x}"
    elif flow.fragment:
        text = f"{proto_name(flow.proto)} fragment"
    elif flow.proto == Proto.TCP:
        text = f"TCP Flags: {', '.join(tcp_flag_names(flow.tcp_flags)) or 'none'}"
    elif flow.proto in (Proto.ICMP, Proto.ICMPV6):
        version = 4 if flow.proto == Proto.ICMP else 6
        code = f" code {flow.icmp_code}" if flow.icmp_code else ""
        text = f"ICMPv{version} {icmp_name(flow.proto, flow.icmp_type)}{code}"
    else:
        name = proto_name(flow.proto)
        text = f"protocol {name}" if name.isdigit() else name
    return text if flow.reason in _SAID_ELSEWHERE else f"{text}; {flow.reason}"


_SAID_ELSEWHERE = ("forwarded", "policy-default", "policy-deny")
