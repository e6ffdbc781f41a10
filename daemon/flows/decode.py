"""Event bytes of the ring buffer -> tuples. Nothing is looked up here; daemon/flows/enrich.py does that."""

import struct
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from bpf.layout import EVENT, EventKind, Reason
from daemon.model.flow import DropReason, FlowType, FlowVerdict
from daemon.model.verdict import Verdict


class Event(NamedTuple):
    """One struct event, field for field (a test holds the order to bpf/layout.py)."""

    time_ns: int  # CLOCK_MONOTONIC
    saddr: bytes  # IPv4: the first four bytes
    daddr: bytes
    sport_be: bytes
    dport_be: bytes
    kind: int
    reason: int
    direction: int
    hook: int
    family: int
    proto: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    verdict: int
    ethertype_be: bytes
    identity: int
    rule: int
    ifindex: int
    length: int
    generation: int
    packet_class: int  # PacketClass
    pad: bytes


class Brief(NamedTuple):
    """The fields that counters need; few events differ in them, so a batch folds to few of these."""

    kind: int
    reason: int
    direction: int
    family: int
    proto: int
    identity: int
    rule: int
    generation: int


_EVENT = struct.Struct(EVENT.format)
_BRIEF = struct.Struct(
    "="
    + "".join(
        code if name in Brief._fields else f"{struct.calcsize('=' + code)}x" for name, code in EVENT.fields
    )
)
SIZE = _EVENT.size


def events(raw: bytes | bytearray | memoryview) -> Iterator[Event]:
    """The events of a run of whole structs."""
    return map(Event._make, _EVENT.iter_unpack(raw))


def briefs(raw: bytes | bytearray | memoryview) -> Iterator[tuple[int, ...]]:
    """The same run as Brief's fields, as plain tuples: they are counted, not read."""
    return _BRIEF.iter_unpack(raw)


def address_text(family: int, address: bytes) -> str:
    """Canonical text of an event's address; empty for frames that are not IP."""
    if family == 4:
        return str(IPv4Address(address[:4]))
    return str(IPv6Address(address)) if family == 6 else ""


def reason_name(number: int) -> str:
    """`policy-default` for 16; `reason-63` for a number that this version has no name for."""
    return REASON_NAMES.get(number) or f"reason-{number}"


REASON_NAMES = {int(reason): reason.name.lower().replace("_", "-") for reason in Reason}

_MALFORMED = DropReason.INVALID_PACKET_DROPPED
_EXTENSION = DropReason.INVALID_IPV6_EXTENSION_HEADER
_TRANSPORT = DropReason.CT_TRUNCATED_OR_INVALID_HEADER

# Hubble has fewer reasons than we: the closest is taken, and the summary of the flow names ours.
HUBBLE_REASON = {
    Reason.POLICY_DEFAULT: DropReason.POLICY_DENIED,
    Reason.POLICY_DENY: DropReason.POLICY_DENY,
    Reason.NON_IP_REFUSED: DropReason.UNSUPPORTED_L3_PROTOCOL,
    Reason.SHORT_ETH: _MALFORMED,
    Reason.SHORT_VLAN: _MALFORMED,
    Reason.VLAN_DEPTH: DropReason.VLAN_FILTERED,
    Reason.SHORT_IP: _MALFORMED,
    Reason.IP_VERSION: _MALFORMED,
    Reason.BAD_IHL: _MALFORMED,
    Reason.BAD_TOTLEN: _MALFORMED,
    Reason.BAD_PLEN: _MALFORMED,
    Reason.JUMBOGRAM: _EXTENSION,
    Reason.SHORT_EXT: _EXTENSION,
    Reason.EXT_DEPTH: _EXTENSION,
    Reason.HBH_MISPLACED: _EXTENSION,
    Reason.ROUTING_HEADER: _EXTENSION,
    Reason.SOURCE_ROUTE: _MALFORMED,
    Reason.BAD_SRC: DropReason.INVALID_SOURCE_IP,
    Reason.BAD_DST: _MALFORMED,
    Reason.SPOOFED_LOCAL: DropReason.INVALID_SOURCE_IP,
    Reason.SHORT_L4: _TRANSPORT,
    Reason.BAD_DOFF: _TRANSPORT,
    Reason.BAD_TCP_FLAGS: _MALFORMED,
    Reason.BAD_UDPLEN: _TRANSPORT,
    Reason.TINY_FRAG: _MALFORMED,
    Reason.FRAG_TOOBIG: _MALFORMED,
    Reason.FRAG_L4_OVERLAP: _MALFORMED,
    Reason.FRAG_NO_FIRST: DropReason.FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND,
    Reason.FRAG_DENIED: DropReason.POLICY_DENIED,
    Reason.FRAG_TABLE_FULL: DropReason.CT_MAP_INSERTION_FAILED,
    Reason.DUP_FRAG_HEADER: _EXTENSION,
    Reason.ICMP_REDIRECT: _MALFORMED,
    Reason.NDP_INVALID: DropReason.FORBIDDEN_ICMPV6_MESSAGE,
}
_BY_NUMBER = {int(reason): drop for reason, drop in HUBBLE_REASON.items()}


def drop_reason(number: int) -> DropReason:
    """Hubble's reason for one of ours: an invalid packet if it is unknown and drops,no drop if it passes."""
    return _BY_NUMBER.get(
        number, _MALFORMED if number >= Reason.POLICY_DEFAULT else DropReason.DROP_REASON_UNKNOWN
    )


class Meaning(NamedTuple):
    """What kind, reason and verdict of an event say together."""

    type: FlowType
    verdict: FlowVerdict
    reason: str
    drop: DropReason  # of what is dropped or audited
    judged: bool  # a cell of the policy decided; otherwise the event's rule says nothing


_JUDGED = frozenset({Reason.FORWARDED, Reason.POLICY_DEFAULT, Reason.POLICY_DENY})


@lru_cache(maxsize=1024)
def meaning(kind: int, reason: int, verdict: int) -> Meaning:
    """The meaning of an event; there are few different ones."""
    allowed = kind == EventKind.ALLOW
    if kind == EventKind.AUDIT:
        outcome = FlowVerdict.AUDIT
    elif not allowed:
        outcome = FlowVerdict.DROPPED
    else:
        outcome = FlowVerdict.REDIRECTED if verdict == Verdict.REDIRECT else FlowVerdict.FORWARDED
    return Meaning(
        FlowType.POLICY_VERDICT if allowed or kind == EventKind.AUDIT else FlowType.DROP,
        outcome,
        reason_name(reason),
        DropReason.DROP_REASON_UNKNOWN if allowed else drop_reason(reason),
        reason in _JUDGED,
    )
