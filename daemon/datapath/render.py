"""PolicyTables to bytes of the kernel maps: columns of the ports, cells of the matrix. Pure."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from bpf.layout import (
    PORTS_END,
    PORTS_ICMP4,
    PORTS_ICMP6,
    PORTS_PROTOCOL,
    PORTS_SCTP,
    PORTS_TCP,
    PORTS_UDP,
)
from daemon.model.net import Proto
from daemon.model.verdict import RULE_BITS
from daemon.policy.tables import Columns, Matrix

RULE_MASK = (1 << RULE_BITS) - 1
_BASES = {
    Proto.TCP: (PORTS_TCP, 0x10000),
    Proto.UDP: (PORTS_UDP, 0x10000),
    Proto.SCTP: (PORTS_SCTP, 0x10000),
    Proto.ICMP: (PORTS_ICMP4, 256),
    Proto.ICMPV6: (PORTS_ICMP6, 256),
}


def port_columns(columns: Columns) -> bytes:
    """The u16 column of every port index of one direction: PORTS_END entries, as in bpf/layout.py."""
    painted = array("H", bytes(2 * PORTS_END))
    for proto, (base, width) in _BASES.items():
        cuts = columns.cuts.get(proto)
        if cuts is None:  # nothing names a port of it: as if it had none
            painted[base : base + width] = array("H", [columns.at(proto)]) * width
            continue
        ends = (*cuts[1:], width)
        for first, end, column in zip(cuts, ends, columns.columns[proto], strict=True):
            painted[base + first : base + min(end, width)] = array("H", [column]) * (min(end, width) - first)
    for number, column in columns.protocols.items():
        painted[PORTS_PROTOCOL + number] = column
    return painted.tobytes()


@dataclass(frozen=True, slots=True)
class CellImage:
    """Rows of both matrices as they lie in the cells map from `base` on; offsets are absolute."""

    base: int
    cells: bytes
    ingress: tuple[int, ...]  # row number -> cell index
    egress: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.base + len(self.cells) // 4


def cell_image(
    ingress: Matrix,
    egress: Matrix,
    numbers: Mapping[int, int],
    base: int,
    skip: tuple[int, int] = (0, 0),
) -> CellImage:
    """The rows from `skip` on (per direction), one after the other. `numbers`: rule index -> kernel rule number."""
    cells, offsets = array("I"), []
    translated: dict[int, int] = {}
    for matrix, first in zip((ingress, egress), skip, strict=True):
        at = []
        for row in matrix.rows[first:]:
            at.append(base + len(cells))
            for cell in set(row) - translated.keys():
                rule = cell & RULE_MASK
                translated[cell] = cell ^ rule | numbers.get(rule, rule)
            cells.extend(map(translated.__getitem__, row))
        offsets.append(tuple(at))
    return CellImage(base, cells.tobytes(), offsets[0], offsets[1])


def cells_needed(ingress: Matrix, egress: Matrix, skip: tuple[int, int] = (0, 0)) -> int:
    """How many cells `cell_image` takes."""
    return sum(
        len(row) for matrix, first in zip((ingress, egress), skip, strict=True) for row in matrix.rows[first:]
    )
