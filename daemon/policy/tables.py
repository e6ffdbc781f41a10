"""PolicyTables: what a policy set means for one subject, as a matrix of identity classes by port classes."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from daemon.model.identity import Identity
from daemon.model.net import Direction, Prefix, Proto
from daemon.model.rule import RuleOrigin

PORTLESS = -1  # the "port" of packets that carry none: later fragments, protocols without ports


class Rows(NamedTuple):
    """Row numbers of one peer class in the ingress and the egress matrix."""

    ingress: int
    egress: int


@dataclass(frozen=True, slots=True)
class Columns:
    """Port classes: `cuts[proto]` are ascending first ports, `columns[proto]` the column from each cut on.

    Protocols that are not named use `protocols[number]`, or column 0; the same holds for PORTLESS of a named
    one. Column 0 is what only rules without ports reach.
    """

    cuts: Mapping[Proto, tuple[int, ...]]
    columns: Mapping[Proto, tuple[int, ...]]
    protocols: Mapping[int, int]
    count: int

    def at(self, proto: int, port: int = PORTLESS) -> int:
        """The column of a packet: protocol number and destination port, or ICMP type."""
        for known, cuts in self.cuts.items():
            if known == proto and port != PORTLESS:
                return self.columns[known][bisect_right(cuts, port) - 1]
        return self.protocols.get(proto, 0)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One direction. `rows[row][column]` is a packed cell (model/verdict.py), its rule a key of `rules`."""

    enforced: bool
    default_deny: bool
    columns: Columns
    rows: tuple[tuple[int, ...], ...]

    def cell(self, row: int, proto: int, port: int = PORTLESS) -> int:
        """The packed cell that decides about a packet from (or to) a peer of this row."""
        return self.rows[row][self.columns.at(proto, port)]


@dataclass(frozen=True, slots=True)
class PolicyTables:
    """The compiled policy of one subject. Equal inputs give equal tables, so reconcilers may compare with ==.

    rules: rule index -> origin. Indexes below bpf.layout.FIRST_RULE are the fixed rules and have no origin;
    policy rules start at FIRST_RULE (`first_rule` repeats the number, so that this package need not know
    bpf). identities: rows of each identity that has labels. prefixes: every prefix that policy tells apart ->
    its group; 0.0.0.0/0 and ::/0 are always there. An address belongs to its longest prefix, unless a managed
    identity owns it. groups: rows of each prefix group. unknown: rows of a peer whose identity has no labels
    yet.
    """

    ingress: Matrix
    egress: Matrix
    rules: Mapping[int, RuleOrigin]
    identities: Mapping[Identity, Rows]
    prefixes: Mapping[Prefix, int]
    groups: tuple[Rows, ...]
    unknown: Rows

    def rows_of(self, identity: Identity) -> Rows:
        """The rows of an identity; `unknown` for one whose labels nobody has told yet."""
        return self.identities.get(identity, self.unknown)

    def rows_of_address(self, address: Prefix) -> Rows:
        """The rows of an address outside the mesh: its longest named prefix decides."""
        for length in range(address.length, -1, -1):
            shift = address.width - length
            group = self.prefixes.get(Prefix(address.family, address.address >> shift << shift, length))
            if group is not None:
                return self.groups[group]
        return self.unknown

    def matrix(self, direction: Direction) -> Matrix:
        """The matrix of one direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress
