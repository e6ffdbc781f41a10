"""Port classes: two ports of a protocol and direction that the same port lists hold are one column."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from daemon.model.net import Proto
from daemon.model.rule import NamedPort, PortMatch, PortRange
from daemon.policy.tables import Columns

NamedPorts = Mapping[str, tuple[tuple[int, int], ...]]  # name -> (protocol, port)

_WITH_PORTS = (Proto.TCP, Proto.UDP, Proto.SCTP, Proto.ICMP, Proto.ICMPV6)
_TYPES_END, _PORTS_END = 0x100, 0x10000


class _PortList(NamedTuple):
    """A rule's ports, ascending and disjoint, and the protocols that one entry names as a whole."""

    ranges: tuple[PortRange, ...]
    whole: frozenset[int]


def resolved(ports: Iterable[PortMatch], named: NamedPorts) -> list[PortRange]:
    """Ports with names resolved; an unknown name gives nothing."""
    found = []
    for one in ports:
        if isinstance(one, NamedPort):
            known = named.get(one.name, ())
            found += [PortRange(proto, port, port) for proto, port in known if proto in one.protocols]
        else:
            found.append(one)
    return found


class ColumnBuilder:
    """Collects port lists, then numbers the columns.

    Columns depend on the lists only, never on who may use them.
    """

    def __init__(self, named: NamedPorts) -> None:
        self._named = named
        self._written: dict[Sequence[PortMatch], int] = {}
        self._lists: dict[_PortList | None, int] = {None: 0}
        self._numbers: dict[int, int] = {0: 0}  # mask of port lists -> column
        self._columns: list[list[int]] = []

    def add(self, ports: tuple[PortMatch, ...] | None) -> int:
        """The number of a port list; None is every port of every protocol."""
        if ports is None:
            return 0
        number = self._written.get(ports)
        if number is None:
            found = resolved(ports, self._named)
            # Ranges that only together make up a protocol say nothing about packets without ports.
            whole = frozenset(one.proto for one in found if one.whole)
            one_list = _PortList(_merged(found), whole)
            number = self._written[ports] = self._lists.setdefault(one_list, len(self._lists))
        return number

    def build(self) -> Columns:
        """Sweep each protocol's ranges once."""
        edges: dict[int, dict[int, int]] = {proto: {} for proto in _WITH_PORTS}
        whole: dict[int, int] = {}
        for one_list, number in self._lists.items():
            bit = 1 << number
            if one_list is None:
                continue
            for proto in one_list.whole:
                whole[proto] = whole.get(proto, 0) | bit
            for one in one_list.ranges:
                if one.proto in edges:
                    at = edges[one.proto]
                    at[one.first] = at.get(one.first, 0) ^ bit
                    at[one.last + 1] = at.get(one.last + 1, 0) ^ bit
        cuts: dict[Proto, tuple[int, ...]] = {}
        columns: dict[Proto, tuple[int, ...]] = {}
        for proto in _WITH_PORTS:
            end = _TYPES_END if proto in (Proto.ICMP, Proto.ICMPV6) else _PORTS_END
            cuts[proto], columns[proto] = self._sweep(edges[proto], end)
        protocols = {proto: self._column(mask) for proto, mask in sorted(whole.items())}
        self._columns = [[] for _ in self._lists]
        for mask, column in self._numbers.items():
            self._columns[0].append(column)
            left = mask
            while left:
                bit = left & -left
                self._columns[bit.bit_length() - 1].append(column)
                left ^= bit
        return Columns(cuts, columns, protocols, len(self._numbers))

    def _sweep(self, edges: Mapping[int, int], end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        mask, cuts, columns = 0, [0], [0]
        for edge in sorted(edges):
            if edge >= end:
                break
            mask ^= edges[edge]
            column = self._column(mask)
            if edge == 0:
                columns[0] = column
            elif column != columns[-1]:
                cuts.append(edge)
                columns.append(column)
        return tuple(cuts), tuple(columns)

    def _column(self, mask: int) -> int:
        return self._numbers.setdefault(mask, len(self._numbers))

    def of(self, number: int) -> Sequence[int]:
        """The columns of a port list, after `build`."""
        return self._columns[number]


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Ascending and disjoint, adjacent ones joined."""
    found: list[PortRange] = []
    for one in sorted(ranges):
        if found and found[-1].proto == one.proto and one.first <= found[-1].last + 1:
            found[-1] = PortRange(one.proto, found[-1].first, max(found[-1].last, one.last))
        else:
            found.append(one)
    return tuple(found)
