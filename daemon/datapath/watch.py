"""What is looked at now and then: whether somebody has called a panic, and how full the kernel's tables are."""

import asyncio
import logging
import struct
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path

from bpf.features import Ticks
from bpf.layout import CONFIG, LAYOUT_VERSION, MapKind, Panic, Sizes, maps
from bpf.syscall import LayoutMismatch, PinnedMap
from daemon.datapath import panic
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
COUNT_EVERY_S = 15.0  # a million entries take half a second of a worker thread
ALARM = 0.8
# What outsiders can fill at will is apart from the rest for that very reason: it makes no host unready.
FLOODED = ("ct4_new", "ct6_new", "fragments_denied")
FULL = 0.995  # LRU tables keep some entries free for each CPU


class Watch:
    """Writes `status["panic"]` and `status["maps"]`. `run` is the task.

    pressure: what the daemon itself knows of its tables, by map, 0 to 1.
    """

    def __init__(
        self, tables: Tables, pins: Path, sizes: Sizes, pressure: Callable[[], Mapping[str, float]]
    ) -> None:
        self._tables = tables
        self._pins = pins
        self._sizes = sizes
        self._pressure = pressure
        self._counted: dict[str, float] = {}
        self._panic = Panic.NONE

    async def run(self) -> None:
        """For ever."""
        due = 0.0
        while True:
            try:
                self._tell_panic(await asyncio.to_thread(panic.read, self._pins))
                if time.monotonic() >= due:
                    self._counted = await asyncio.to_thread(count, self._pins, self._sizes)
                    due = time.monotonic() + COUNT_EVERY_S
                self._tell_pressure({**self._pressure(), **self._counted})
            except (OSError, LayoutMismatch) as error:
                log.debug("no data path yet: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    def _tell_panic(self, state: panic.PanicState) -> None:
        if state.kind is not self._panic:
            log.warning("panic %s%s", state.kind.name.lower(), f", was {self._panic.name.lower()}")
        before, self._panic = self._tables.status.get("panic"), state.kind
        if state.kind is Panic.NONE:
            self._tables.status.delete("panic")
            return
        means = "every packet passes" if state.kind is Panic.OPEN else "only the failsafe list passes"
        text = f"PANIC {state.kind.name.lower()}: {means}"
        since = before.since if before and before.text == text else time.time()
        hint = "`meshwall panic off` ends it"
        if state.left_s is not None:
            hint += f"; by itself at {time.strftime('%H:%M:%S', time.localtime(time.time() + state.left_s))}"
        details = {"panic": state.kind.name.lower()}
        self._tables.status.put("panic", StatusRow(True, text, hint, since, details, warn=True))

    def _tell_pressure(self, found: Mapping[str, float]) -> None:
        if not found:
            return
        order = sorted(found.items(), key=lambda one: -one[1])
        full = [name for name, share in order if share >= FULL and name not in FLOODED]
        near = [name for name, share in order if share >= ALARM]
        name, share = order[0]
        text = f"fullest: {name} {100 * share:.0f}%"
        if full:
            text = f"full: {', '.join(full)}"
        elif near:
            text = f"nearly full: {', '.join(f'{one} {100 * found[one]:.0f}%' for one in near)}"
        hint = (
            "raise map_sizes (docs/configuration.md); docs/datapath.md says what happens when one is full"
            if near
            else ""
        )
        before = self._tables.status.get("maps")
        since = before.since if before and before.ok == (not full) else time.time()
        details = {"pressure": {one: round(share, 4) for one, share in found.items()}}
        self._tables.status.put("maps", StatusRow(not full, text, hint, since, details, warn=bool(near)))


def count(pins: Path, sizes: Sizes) -> dict[str, float]:
    """The share of each table of the programs' own that is in use. Blocks; OSError when there is no data path.

    Those are LRU: what has expired stays until its place is needed, and does not count.
    """
    shapes = maps(sizes)
    home = pins / f"v{LAYOUT_VERSION}" / "maps"
    with PinnedMap.open(home / "config", shapes["config"]) as config:
        (hz,) = struct.unpack_from("=I", config.lookup(0) or bytes(CONFIG.size), CONFIG.offsets()["hz"])
    ticks = Ticks()
    try:
        now = ticks.now64(hz)
    finally:
        ticks.close()
    found = {}
    for name, spec in shapes.items():
        if spec.kind is MapKind.LRU_HASH and spec.value is not None and "expires" in spec.value.offsets():
            with PinnedMap.open(home / name, spec) as table:
                found[name] = _alive(table, now, spec.value.size // 8) / spec.max_entries
    return found


def _alive(table: PinnedMap, now: int, words: int) -> int:
    """Entries that have not expired; `expires` is the first word of a value."""
    total = 0
    for _, values in table.batches():
        expires = array("Q", values)[::words]
        total += sum(1 for one in expires if one >= now)
    return total
