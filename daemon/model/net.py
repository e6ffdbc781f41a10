"""Addresses, prefixes, protocols and directions as small integers and tuples."""

import ipaddress
from enum import IntEnum
from typing import NamedTuple


class Direction(IntEnum):
    """Seen from the subject of the policy."""

    INGRESS = 0
    EGRESS = 1

    def __str__(self) -> str:
        return self.name.lower()


class Proto(IntEnum):
    """IP protocol numbers that the policy language can name with ports or types."""

    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    SCTP = 132


def proto_name(number: int) -> str:
    """`TCP` for 6, `ICMPv6` for 58, the bare number where there is no name."""
    if number == Proto.ICMPV6:
        return "ICMPv6"
    try:
        return Proto(number).name
    except ValueError:
        return str(number)


class Prefix(NamedTuple):
    """An address range; `address` is the network address as an integer, host order. Sorts by family, then address."""

    family: int  # 4 or 6
    address: int
    length: int

    @property
    def width(self) -> int:
        return 32 if self.family == 4 else 128

    @property
    def is_host(self) -> bool:
        return self.length == self.width

    @property
    def packed(self) -> bytes:
        """The network address in wire order: 4 or 16 bytes."""
        return self.address.to_bytes(self.width // 8, "big")

    def contains(self, other: "Prefix") -> bool:
        """Whether every address of `other` lies in this prefix."""
        if self.family != other.family or self.length > other.length:
            return False
        shift = self.width - self.length
        return self.address >> shift == other.address >> shift

    def __str__(self) -> str:
        text = str(ip_text(self.family, self.address))
        return text if self.is_host else f"{text}/{self.length}"

    @property
    def cidr(self) -> str:
        """Always with the length: `10.0.0.1/32`."""
        return f"{ip_text(self.family, self.address)}/{self.length}"


def ip_text(family: int, address: int) -> str:
    """Canonical text of an address."""
    return str(ipaddress.IPv4Address(address) if family == 4 else ipaddress.IPv6Address(address))


def parse_prefix(text: str) -> Prefix:
    """Read `10.0.0.0/8`, `10.0.0.1` or the IPv6 forms; host bits are masked off.

    Raises ValueError with a message that names the text.
    """
    network = ipaddress.ip_network(text, strict=False)
    return Prefix(network.version, int(network.network_address), network.prefixlen)


def packed_prefix(packed: bytes) -> Prefix:
    """The host prefix of an address in wire order."""
    return Prefix(4 if len(packed) == 4 else 6, int.from_bytes(packed, "big"), len(packed) * 8)


_ADDRESS = (1 << 128) - 1


def compact(prefix: Prefix) -> int:
    """The prefix as one integer, a third of its memory: an IPv4 host is its address, all others are longer numbers."""
    if prefix.family == 4:
        return prefix.address if prefix.length == 32 else prefix.address | 32 - prefix.length << 128
    return prefix.address | 192 - prefix.length << 128


def expand(key: int) -> Prefix:
    """The prefix of a `compact` number."""
    code = key >> 128
    return Prefix(4, key & _ADDRESS, 32 - code) if code <= 32 else Prefix(6, key & _ADDRESS, 192 - code)


WORLD4 = Prefix(4, 0, 0)
WORLD6 = Prefix(6, 0, 0)
