"""The reachability table: for each class of peers, which ports have which verdict, and by which rule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.model.net import Direction, Proto
from daemon.model.verdict import CellFlag, Verdict, unpack_cell
from daemon.policy.compile import Compiled
from daemon.policy.explain import Peer, peer_signature, port_text
from daemon.policy.tables import PORTLESS, Columns

EVERYTHING = "everything"
OTHER_PROTOCOLS = "other protocols"
_ENDS = {Proto.TCP: 0x10000, Proto.UDP: 0x10000, Proto.SCTP: 0x10000, Proto.ICMP: 0x100, Proto.ICMPV6: 0x100}


class NamedPeer(NamedTuple):
    """A peer that stands for its class, and how to call the class."""

    title: str
    peer: Peer


class Segment(NamedTuple):
    """Neighbouring ports of one protocol; PORTLESS for packets of protocols without ports."""

    proto: int
    first: int
    last: int

    @property
    def text(self) -> str:
        """`22/TCP`, `1000-2000/UDP`, `all/TCP`, `other protocols`."""
        if self.first == PORTLESS:
            return OTHER_PROTOCOLS
        if self.first == 0 and self.last == _ENDS[Proto(self.proto)] - 1:
            return f"all/{port_text(self.proto, PORTLESS, PORTLESS)}"
        return port_text(self.proto, self.first, self.last)


class Cell(NamedTuple):
    """Ports with one verdict."""

    ports: str
    verdict: str
    rule: int


@dataclass(frozen=True, slots=True)
class Row:
    """Peers with equal cells. Cells with the default verdict are left out."""

    peers: tuple[str, ...]
    cells: tuple[Cell, ...]
    summary: str  # `allow 22/TCP, 443/TCP; otherwise deny`


@dataclass(frozen=True, slots=True)
class Reach:
    """One direction."""

    direction: Direction
    enforced: bool
    default_deny: bool
    rows: tuple[Row, ...]


def word(cell: int) -> str:
    """`allow`, `deny`, `redirect` or `audit`, with `+auth` where a handshake is asked for."""
    verdict, _, flags = unpack_cell(cell)
    if flags & CellFlag.AUDIT:
        return "audit"
    text = {Verdict.ALLOW: "allow", Verdict.REDIRECT: "redirect"}.get(verdict, "deny")
    return f"{text}+auth" if flags & CellFlag.AUTH and text != "deny" else text


def segments(columns: Iterable[Columns]) -> list[Segment]:
    """Stretches of ports that no column set separates."""
    found = []
    sets = list(columns)
    for proto, end in _ENDS.items():
        cuts = sorted({cut for one in sets for cut in one.cuts[proto]})
        found += [Segment(proto, first, last - 1) for first, last in zip(cuts, [*cuts[1:], end], strict=True)]
    return [*found, Segment(0, PORTLESS, PORTLESS)]


def joined(parts: Sequence[Segment]) -> tuple[str, ...]:
    """Texts of segments, neighbours joined; all of them are `everything`."""
    merged: list[Segment] = []
    for one in parts:
        before = merged[-1] if merged else None
        if before and before.proto == one.proto and before.last + 1 == one.first:
            merged[-1] = Segment(one.proto, before.first, one.last)
        else:
            merged.append(one)
    texts = tuple(one.text for one in merged)
    return (
        (EVERYTHING,)
        if len(texts) == len(_ENDS) + 1 and all("all/" in text or text == OTHER_PROTOCOLS for text in texts)
        else texts
    )


def row_of(compiled: Compiled, direction: Direction, peer: Peer) -> tuple[int, ...]:
    """The cells of a peer that the tables need not know."""
    localhost = compiled.compiler.localhost and int(peer.identity) == 1
    return compiled.compiler.directions[direction].row(peer_signature(compiled, peer), localhost=localhost)


def reachability(compiled: Compiled, peers: Sequence[NamedPeer]) -> list[Reach]:
    """Both directions; classes with equal cells share a row."""
    found = []
    for direction in Direction:
        matrix = compiled.matrix(direction)
        by_row: dict[tuple[int, ...], list[str]] = {}
        if matrix.enforced:
            for one in peers:
                by_row.setdefault(row_of(compiled, direction, one.peer), []).append(one.title)
        default = "deny" if matrix.default_deny else "allow"
        rows = [
            Row(tuple(titles), _cells(cells, matrix.columns), _summary(cells, matrix.columns, default))
            for cells, titles in by_row.items()
        ]
        found.append(Reach(direction, matrix.enforced, matrix.default_deny, tuple(rows)))
    return found


def _cells(cells: Sequence[int], columns: Columns) -> tuple[Cell, ...]:
    by_cell: dict[int, list[Segment]] = {}
    for one in segments([columns]):
        cell = cells[columns.at(one.proto, one.first)]
        if unpack_cell(cell)[1] > 2:  # the built-in defaults are the row's `otherwise`
            by_cell.setdefault(cell, []).append(one)
    return tuple(
        Cell(text, word(cell), unpack_cell(cell)[1])
        for cell, parts in by_cell.items()
        for text in joined(parts)
    )


def _summary(cells: Sequence[int], columns: Columns, default: str) -> str:
    """The verdicts in words, whatever rules they come from."""
    by_word: dict[str, list[Segment]] = {}
    for one in segments([columns]):
        by_word.setdefault(word(cells[columns.at(one.proto, one.first)]), []).append(one)
    parts = [f"{text} {', '.join(joined(found))}" for text, found in by_word.items() if text != default]
    if len(by_word) == 1:
        return f"{next(iter(by_word))} {EVERYTHING}"
    return "; ".join([*parts, f"otherwise {default}"] if default in by_word else parts)
