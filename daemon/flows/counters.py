"""What the data path counted, read from the pinned maps: packets and bytes per reason and per rule."""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bpf.layout import HITS, LAYOUT_VERSION, REASONS, maps
from bpf.syscall import LayoutMismatch, PinnedMap, check_map, map_info, obj_get
from daemon.model.net import Direction

_HITS = struct.Struct(HITS.format)


class Hits(NamedTuple):
    """Over all CPUs. Of a reason: since the maps were made; of a rule: since its number has this meaning."""

    packets: int
    bytes: int


class Counted(NamedTuple):
    """Without zeroes; reasons are numbers of bpf.layout.Reason."""

    reasons: Mapping[tuple[Direction, int], Hits]
    rules: Mapping[int, Hits]


def read_counters(pins: Path, rules: Iterable[int]) -> Counted:
    """The counters of all reasons and of these rules; empty where there is no data path of ours. Blocks."""
    try:
        reasons = _hits(pins, "reasons", range(2 * REASONS))
        by_rule = _hits(pins, "rule_hits", rules)
    except (OSError, LayoutMismatch):
        return Counted({}, {})
    return Counted({(Direction(at // REASONS), at % REASONS): hits for at, hits in reasons.items()}, by_rule)


def _hits(pins: Path, name: str, indexes: Iterable[int]) -> dict[int, Hits]:
    path = pins / f"v{LAYOUT_VERSION}" / "maps" / name
    fd = obj_get(path)
    try:
        size = map_info(fd).max_entries  # what the operator chose
        spec = replace(maps()[name], max_entries=size)
        check_map(fd, spec, str(path))
        counters = PinnedMap(fd, spec)
        rows = {at: counters.lookup(at) or b"" for at in indexes if at < size}
    finally:
        os.close(fd)
    summed = {at: Hits(*map(sum, zip(*_HITS.iter_unpack(raw), strict=True))) for at, raw in rows.items()}
    return {at: hits for at, hits in summed.items() if hits.packets}
