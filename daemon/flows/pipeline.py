"""FlowPipeline: events out of the kernel into the store, and what was counted and lost on the way."""

import asyncio
import contextlib
import logging
import os
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from bpf.layout import BUDGET, LAYOUT_VERSION, REASONS, maps
from bpf.syscall import LayoutMismatch, PinnedMap, map_info, obj_get
from daemon.flows.decode import SIZE, Brief, briefs, meaning
from daemon.flows.enrich import Directory
from daemon.flows.observe import Answer, Request, observe
from daemon.flows.ring import Ring
from daemon.flows.store import CAPACITY, FlowStore
from daemon.model.flow import FlowVerdict, Lost, LostSource, matched_by
from daemon.model.net import Direction
from daemon.model.rule import MatchType
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

BATCH = 2_048  # events taken in one turn of the loop: about 2 ms
POLL_S = 1.0  # between two looks at the kernel's loss counters and at the pins

_BUDGET = struct.Struct(BUDGET.format)


@dataclass(slots=True)
class FlowCounters:
    """What was seen since start; numbers only rise."""

    events: Counter[Brief] = field(default_factory=Counter)  # with identity, rule and generation left at 0
    verdicts: Counter[tuple[Direction, MatchType, FlowVerdict]] = field(default_factory=Counter)
    lost: int = 0  # the kernel's ring was full
    suppressed: Counter[int] = field(
        default_factory=Counter
    )  # by Reason: over the budget of events per second
    foreign: int = 0  # records of another size than ours


class FlowPipeline:
    """Owns the store. `run` reads the kernel until cancelled; any number of readers may `observe`."""

    def __init__(self, tables: Tables, pins: Path, *, capacity: int = CAPACITY) -> None:
        self.store = FlowStore(capacity)
        self.directory = Directory(tables)
        self.counters = FlowCounters()
        self.started_ns = time.time_ns()
        self._tables = tables
        self.pins = pins
        self._maps = pins / f"v{LAYOUT_VERSION}" / "maps"
        self._losses_before: tuple[int, dict[int, int]] | None = None
        self._changed = asyncio.Event()
        self._rules = tables.rules.reader(self._changed)

    def observe(self, request: Request) -> AsyncIterator[Answer]:
        """Flows and losses, as daemon.flows.observe describes."""
        return observe(self.store, self.directory, request)

    async def run(self) -> None:
        """Read the ring buffer whenever there is one; it may appear, vanish and be replaced."""
        loop = asyncio.get_running_loop()
        self.store.closed = False
        source: _Source | None = None
        due = loop.time()
        try:
            while True:
                if loop.time() >= due:
                    source = self._look(source)
                    due = loop.time() + POLL_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._changed.wait()
                self._changed.clear()
                if self._rules.take():
                    self.directory.note(())
        finally:
            if source:
                self._close(source)
            self.store.close()

    def take(self, ring: Ring) -> None:
        """Move one batch from the kernel's ring to the store."""
        batch = ring.read(BATCH)
        self.counters.foreign += batch.foreign
        if batch.foreign:
            self.store.note(Lost(LostSource.OBSERVER_EVENTS_QUEUE, batch.foreign))
        if batch.raw:
            self.append(batch.raw)

    def append(self, raw: bytes) -> None:
        """Count and store a run of whole events."""
        seen = {Brief._make(key): count for key, count in Counter(briefs(raw)).items()}
        self.directory.note(seen)
        for one, count in seen.items():
            self.counters.events[one._replace(identity=0, rule=0, generation=0)] += count
            means = meaning(one.kind, one.reason, 0)
            if means.judged:
                origin = self.directory.rule(one.generation, one.rule)
                match = matched_by(one.rule, origin)
                self.counters.verdicts[Direction(one.direction), match, means.verdict] += count
        self.store.append(raw, time.time_ns() - time.monotonic_ns())

    def _look(self, source: "_Source | None") -> "_Source | None":
        """The source to read from now on, and what it has lost."""
        if source and not source.current():
            self._close(source)
            source = None
        source = source or self._open()
        if source:
            self._note_losses(source)
        return source

    def _open(self) -> "_Source | None":
        try:
            source = _Source(self._maps, self)
        except FileNotFoundError:
            self._status(ok=False, text="no data path yet", hint="")
            return None
        except (OSError, LayoutMismatch) as error:
            self._status(ok=False, text=str(error), hint="flows are not read; enforcement is not affected")
            return None
        self._losses_before = None
        self.directory.generation_now = source.generation
        self.directory.new_data_path(self.store.end)
        self._status(ok=True, text="reading events", hint="")
        return source

    def _close(self, source: "_Source") -> None:
        self.directory.generation_now = lambda: None
        source.close()

    def _status(self, *, ok: bool, text: str, hint: str) -> None:
        before = self._tables.status.get("flows")
        if before is None or (before.ok, before.text) != (ok, text):
            log.log(logging.INFO if ok else logging.WARNING, "flows: %s", text)
            self._tables.status.put("flows", StatusRow(ok, text, hint, time.time()))

    def _note_losses(self, source: "_Source") -> None:
        """Note what the kernel did not send since the last look."""
        lost, suppressed = source.losses()
        if self._losses_before is None:  # what an earlier daemon did not get is not news
            self._losses_before = lost, suppressed
            return
        lost_before, suppressed_before = self._losses_before
        self._losses_before = lost, suppressed
        fresh = {reason: count - suppressed_before.get(reason, 0) for reason, count in suppressed.items()}
        held_back = sum(fresh.values())
        if lost <= lost_before and held_back <= 0:
            return
        self.counters.lost += lost - lost_before
        self.counters.suppressed.update(fresh)
        self.store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, lost - lost_before, held_back))


class _Source:
    """The pinned maps of one data path, wired to the running loop."""

    def __init__(self, directory: Path, pipeline: FlowPipeline) -> None:
        self._path = directory / "events"
        self._inode = self._path.stat().st_ino
        with contextlib.ExitStack() as undo:
            self._budgets = undo.enter_context(PinnedMap.open(directory / "budgets", maps()["budgets"]))
            with PinnedMap.open(directory / "config", maps()["config"]) as config:
                self._config = undo.enter_context(contextlib.closing(config.mmap(writable=False)))
            self._fd = obj_get(self._path)
            undo.callback(os.close, self._fd)
            self._ring = Ring(self._fd, map_info(self._fd).max_entries, SIZE)
            undo.callback(self._ring.close)
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, pipeline.take, self._ring)
            undo.callback(self._loop.remove_reader, self._fd)
            self._undo = undo.pop_all()

    def generation(self) -> int:
        """What the data path enforces now."""
        return int(memoryview(self._config)[:4].cast("I")[0])

    def current(self) -> bool:
        """Whether the pin still names the map that we read."""
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def losses(self) -> tuple[int, dict[int, int]]:
        """Events lost, and by reason suppressed, since the maps were made; over all CPUs."""
        lost, suppressed = 0, {}
        for reason in range(REASONS):
            rows = [_BUDGET.unpack(raw) for raw in self._budgets.lookup_percpu(reason)]
            lost += sum(row[3] for row in rows)
            held_back = sum(row[2] for row in rows)
            if held_back:
                suppressed[reason] = held_back
        return lost, suppressed

    def close(self) -> None:
        """Stop reading; what is in the ring stays there."""
        self._undo.close()
