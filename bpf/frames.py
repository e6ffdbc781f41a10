"""Ethernet frames from their facts, for tests, benches and traces. Checksums are left zero."""

import ipaddress
import struct

TCP, UDP, SCTP, ICMP4, ICMP6 = 6, 17, 132, 1, 58
SYN, ACK, FIN, RST = 2, 16, 1, 4
TO_LOOPBACK = bytes(6)  # the kernel's test run takes such frames as addressed to this host
TO_ALL = b"\xff" * 6


def ethernet(
    payload: bytes, ethertype: int, *, mac: bytes = TO_LOOPBACK, vlans: tuple[int, ...] = ()
) -> bytes:
    """A frame; `vlans` are 802.1Q tags, outermost first."""
    tags = b"".join(struct.pack(">HH", 0x8100, vlan) for vlan in vlans)
    return mac + b"\x02\0\0\0\0\1" + tags + struct.pack(">H", ethertype) + payload


def ip(
    src: str,
    dst: str,
    proto: int,
    l4: bytes,
    *,
    identification: int = 0,
    fragment: int = 0,
    mac: bytes = TO_LOOPBACK,
    vlans: tuple[int, ...] = (),
) -> bytes:
    """A frame with an IPv4 or IPv6 packet, by the addresses' family.

    fragment: byte offset, plus 1 when more follow. IPv6 gets a fragment header when it is not 0.
    """
    source, target = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    if len(source) == 4:
        field = fragment // 8 | (fragment & 1) << 13
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(l4), identification, field, 64, proto, 0)
        return ethernet(head + source + target + l4, 0x0800, mac=mac, vlans=vlans)
    if fragment:
        l4 = struct.pack(">BBHI", proto, 0, fragment, identification) + l4
        proto = 44
    head = struct.pack(">IHBB", 6 << 28, len(l4), proto, 64)
    return ethernet(head + source + target + l4, 0x86DD, mac=mac, vlans=vlans)


def tcp_segment(sport: int, dport: int, flags: int = SYN, payload: bytes = b"") -> bytes:
    """A TCP header and what it carries."""
    return struct.pack(">HHIIBBHHH", sport, dport, 1, 0, 0x50, flags, 65535, 0, 0) + payload


def udp_datagram(sport: int, dport: int, payload: bytes = b"") -> bytes:
    """A UDP header and what it carries."""
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload


def tcp(src: str, dst: str, sport: int, dport: int, flags: int = SYN) -> bytes:
    """A TCP segment without data."""
    return ip(src, dst, TCP, tcp_segment(sport, dport, flags))


def udp(src: str, dst: str, sport: int, dport: int, payload: bytes = b"x") -> bytes:
    """A UDP datagram."""
    return ip(src, dst, UDP, udp_datagram(sport, dport, payload))


def icmp(src: str, dst: str, kind: int, code: int = 0, *, identifier: int = 0, payload: bytes = b"") -> bytes:
    """An ICMP or ICMPv6 message, by the addresses' family; `identifier` is that of an echo."""
    proto = ICMP4 if ":" not in src else ICMP6
    return ip(src, dst, proto, struct.pack(">BBHHH", kind, code, 0, identifier, 0) + payload)


def icmp_error(src: str, dst: str, kind: int, code: int, quoted_frame: bytes) -> bytes:
    """An ICMP error about a frame that was built here without tags."""
    return icmp(src, dst, kind, code, payload=quoted_frame[14:])
