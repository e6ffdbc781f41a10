"""What the data path counted, read from the pinned maps: packets and bytes per reason and per rule."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from bpf.layout import HITS, LAYOUT_VERSION, REASONS, maps
from bpf.syscall import LayoutMismatch, PinnedMap
from daemon.model.net import Direction

_HITS = struct.Struct(HITS.format)


class Hits(NamedTuple):
    """Over all CPUs. Of a reason: since the maps were made; of a rule: since its number has this meaning."""

    packets: int
    bytes: int


def read_reasons(pins: Path) -> Mapping[tuple[Direction, int], Hits]:
    """Hits by direction and bpf.layout.Reason, without zeroes; empty where there is no data path of ours."""
    found = _hits(pins, "reasons", range(2 * REASONS))
    return {(Direction(at // REASONS), at % REASONS): hits for at, hits in found.items()}


def read_rules(pins: Path, rules: Iterable[int]) -> Mapping[int, Hits]:
    """Hits of these rule numbers, without zeroes. Some microseconds a rule: call it in a thread."""
    return _hits(pins, "rule_hits", rules)


def read_answers(pins: Path) -> Mapping[Direction, Hits]:
    """Denied packets whose sender was told, by direction."""
    return {Direction(at): hits for at, hits in _hits(pins, "answered", Direction).items()}


def _hits(pins: Path, name: str, indexes: Iterable[int]) -> dict[int, Hits]:
    try:
        with PinnedMap.open_sized(pins / f"v{LAYOUT_VERSION}" / "maps" / name, maps()[name]) as counters:
            size = counters.spec.max_entries
            rows = {at: counters.lookup(at) or b"" for at in indexes if at < size}
    except (OSError, LayoutMismatch):
        return {}
    summed = {at: Hits(*map(sum, zip(*_HITS.iter_unpack(raw), strict=True))) for at, raw in rows.items()}
    return {at: hits for at, hits in summed.items() if hits.packets}
