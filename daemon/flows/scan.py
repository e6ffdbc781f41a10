"""Filters over recorded events, a frame at a time: a cheap test of whole columns finds the few that are looked at.

The columns of a frame answer the fields that the event itself has (addresses, ports, identities, verdict, protocol).
Each field becomes one bit per event, in one long integer; what is left is asked with the exact filters, whose meaning
is in daemon/flows/filters.py alone. Where these columns say nothing (labels, names), every event is looked at.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from itertools import product
from sys import byteorder
from typing import Any

from bpf.layout import EVENT, EventKind
from daemon.flows.decode import SIZE, Event, events
from daemon.flows.filters import EVENT_FIELDS, EventTest
from daemon.model.net import Direction, Proto

AT = EVENT.offsets()
_BYTES = range(256)
_NO_EVENT = next(events(bytes(SIZE)))
# Fields whose answer depends on these bytes of the event only.
_SMALL: Mapping[str, tuple[str, ...]] = {
    "verdict": ("kind", "verdict"),
    "drop_reason_desc": ("kind", "reason"),
    "event_type": ("kind", "reason"),
    "traffic_direction": ("direction",),
    "protocol": ("family", "proto"),
    "ip_version": ("family",),
}
_FEW = {"kind": tuple(EventKind), "family": (0, 4, 6), "direction": (0, 1)}


class Columns:
    """The events of one frame, column by column."""

    def __init__(self, payload: bytes, count: int) -> None:
        self.count = count
        self._payload = payload
        self.all = int.from_bytes(b"\x01" * count, "little")

    def event(self, index: int) -> Event:
        """One event."""
        (found,) = events(self._payload[index :: self.count])
        return found

    def column(self, at: int) -> bytes:
        """The byte at that offset of every event."""
        return self._payload[at * self.count : (at + 1) * self.count]

    def among(self, at: int, values: Iterable[int]) -> int:
        """The events whose byte at that offset is one of the values."""
        table = bytearray(256)
        for value in values:
            table[value] = 1
        return int.from_bytes(self.column(at).translate(table), "little")

    def equal(self, at: int, value: bytes) -> int:
        """The events that have these bytes there."""
        found = self.all
        for offset, byte in enumerate(value, at):
            found &= self.among(offset, (byte,))
            if not found:
                break
        return found

    def indexes(self, found: int) -> Iterator[int]:
        """The positions of the events that are in."""
        marks = found.to_bytes(self.count, "little")
        at = marks.find(1)
        while at >= 0:
            yield at
            at = marks.find(1, at + 1)


Test = Callable[[Columns], int]


def prefilter(whitelist: Sequence[Mapping[str, Sequence[object]]]) -> Test:
    """What may match a list of FlowFilters that `parse_filters` has accepted; never less than what does."""
    entries = [_column_tests(entry) for entry in whitelist]
    if not entries or not all(entries):  # an entry of which the columns say nothing: anything may match
        return lambda columns: columns.all

    def test(columns: Columns) -> int:
        found = 0
        for entry in entries:
            left = columns.all
            for one in entry:
                left &= one(columns)
            found |= left
        return found

    return test


def _column_tests(entry: Mapping[str, Sequence[object]]) -> list[Test]:
    found = (_column_test(field, values) for field, values in entry.items())
    return [one for one in found if one is not None]


def _column_test(field: str, values: Sequence[object]) -> Test | None:
    listed = values if isinstance(values, list) else [values]
    if field in _SMALL:
        return _small(_SMALL[field], EVENT_FIELDS[field](listed))
    side, _, what = field.partition("_")
    if side not in ("source", "destination"):
        return None
    match what:
        case "ip":
            return _addresses(AT["saddr" if side == "source" else "daddr"], [str(one) for one in listed])
        case "port":
            return _ports(
                AT["sport_be" if side == "source" else "dport_be"], [int(str(one)) for one in listed]
            )
        case "identity":
            return _identities(side == "source", [int(str(one)) for one in listed])
        case _:
            return None


def _small(names: tuple[str, ...], test: EventTest) -> Test:
    """By asking the filter about every value of its bytes."""
    *outer, last = names
    allowed: dict[tuple[int, ...], list[int]] = {}
    for fixed in product(*(_FEW[name] for name in outer)):
        fields: dict[str, Any] = dict(zip(outer, fixed, strict=True))
        if found := [value for value in _BYTES if test(_NO_EVENT._replace(**fields | {last: value}))]:
            allowed[fixed] = found

    def columns_test(columns: Columns) -> int:
        found = 0
        for fixed, values in allowed.items():
            left = columns.among(AT[last], values)
            for name, value in zip(outer, fixed, strict=True):
                left &= columns.among(AT[name], (value,))
            found |= left
        return found

    return columns_test


def _ports(at: int, ports: Sequence[int]) -> Test:
    protocols = (Proto.TCP, Proto.UDP, Proto.SCTP)
    wanted = [port.to_bytes(2, "big") for port in ports]

    def test(columns: Columns) -> int:
        return _any(columns.equal(at, one) for one in wanted) & columns.among(AT["proto"], protocols)

    return test


def _identities(source: bool, numbers: Sequence[int]) -> Test:
    """The event has the identity of the remote side; the local one is this host, 1."""
    wanted = [number.to_bytes(4, byteorder) for number in numbers]
    remote_when = Direction.INGRESS if source else Direction.EGRESS

    def test(columns: Columns) -> int:
        remote = columns.among(AT["direction"], (remote_when,))
        found = _any(columns.equal(AT["identity"], one) for one in wanted) & remote
        return found | columns.all & ~remote if 1 in numbers else found

    return test


def _addresses(at: int, texts: Sequence[str]) -> Test:
    tests = [_network(at, text) for text in texts]
    return lambda columns: _any(test(columns) for test in tests)


def _network(at: int, text: str) -> Test:
    network = ip_network(text, strict=False) if "/" in text else ip_network(ip_address(text))
    whole, rest = divmod(network.prefixlen, 8)
    packed = network.network_address.packed
    shift = 8 - rest
    last = [value for value in _BYTES if value >> shift == packed[whole] >> shift] if rest else []

    def test(columns: Columns) -> int:
        found = columns.among(AT["family"], (network.version,)) & columns.equal(at, packed[:whole])
        return found & columns.among(at + whole, last) if rest else found

    return test


def _any(found: Iterable[int]) -> int:
    total = 0
    for one in found:
        total |= one
    return total
