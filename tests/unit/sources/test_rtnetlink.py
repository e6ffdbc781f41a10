"""Messages of rtnetlink as the kernel writes them."""

import socket
import struct

from daemon.model.net import parse_prefix
from daemon.sources import rtnetlink


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(*attributes: bytes, flags: int = 1) -> bytes:
    return struct.pack("=BxHiII", 0, 1, 7, flags, 0) + b"".join(attributes)


def address(family: int, *attributes: bytes, flags: int = 0) -> bytes:
    return struct.pack("=BBBBI", family, 24, flags, 0, 7) + b"".join(attributes)


def test_a_device_has_its_name_kind_master_and_the_device_below():
    kind = attribute(18 | 0x8000, attribute(1, b"vlan\0"))
    found = rtnetlink.device(
        link(
            attribute(3, b"eth0.10\0"),
            attribute(1, bytes.fromhex("02005e100001")),
            attribute(4, struct.pack("=I", 9000)),
            attribute(5, struct.pack("=I", 2)),
            attribute(10, struct.pack("=I", 4)),
            kind,
        )
    )
    assert (found.name, found.index, found.up, found.mac, found.mtu) == (
        "eth0.10",
        7,
        True,
        "02:00:5e:10:00:01",
        9000,
    )
    assert (found.kind, found.master, found.lower) == ("vlan", 4, 2)


def test_the_device_below_in_another_namespace_is_none_of_ours():
    below = attribute(5, struct.pack("=I", 2))
    assert rtnetlink.device(link(below, attribute(37, struct.pack("=i", 0)))).lower == 0
    assert not rtnetlink.device(link(below, flags=0)).up


def test_the_local_address_counts_and_not_the_other_end():
    ours, theirs = attribute(2, bytes([10, 0, 0, 1])), attribute(1, bytes([10, 0, 0, 2]))
    assert rtnetlink.address(address(socket.AF_INET, theirs, ours)) == parse_prefix("10.0.0.1")


def test_an_address_that_is_not_known_to_be_unique_is_not_ours_yet():
    ours = attribute(1, socket.inet_pton(socket.AF_INET6, "fd00::1"))
    assert rtnetlink.address(address(socket.AF_INET6, ours)) == parse_prefix("fd00::1")
    assert rtnetlink.address(address(socket.AF_INET6, ours, flags=0x40)) is None
    assert rtnetlink.address(address(socket.AF_INET6, ours, attribute(8, struct.pack("=I", 0x48)))) is None


def test_a_dump_lists_what_this_machine_has():
    devices, addresses = rtnetlink.dump()
    assert {one.name for one in devices.values()} == {name for _, name in socket.if_nameindex()}
    assert parse_prefix("127.0.0.1") in addresses
