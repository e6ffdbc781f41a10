"""What the data path counted: packets and bytes per reason, read from the pinned maps."""

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bpf.layout import HITS, LAYOUT_VERSION, REASONS, maps
from bpf.syscall import LayoutMismatch, PinnedMap
from daemon.model.net import Direction

_HITS = struct.Struct(HITS.format)


class Hits(NamedTuple):
    """Since the maps were made, over all CPUs."""

    packets: int
    bytes: int


def read_reasons(pins: Path) -> Mapping[tuple[Direction, int], Hits]:
    """Hits by direction and bpf.layout.Reason, without zeroes; empty where there is no data path of ours."""
    found: dict[tuple[Direction, int], Hits] = {}
    try:
        with PinnedMap.open(pins / f"v{LAYOUT_VERSION}" / "maps" / "reasons", maps()["reasons"]) as reasons:
            for key, raw in reasons.items():
                hits = Hits(*map(sum, zip(*_HITS.iter_unpack(raw), strict=True)))
                direction, reason = divmod(int.from_bytes(key, sys.byteorder), REASONS)
                if hits.packets:
                    found[Direction(direction), reason] = hits
    except (OSError, LayoutMismatch):
        return {}
    return found
