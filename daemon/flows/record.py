"""Recorder: one more follower of the flow store, which writes what it sees to disk.

It reads behind the ring of the kernel and in front of nobody: where it is slower than the traffic, or the disk is
full, events are left out, counted and said. Files are bounded in size and age together; the oldest go first.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from daemon.flows.decode import SIZE, events
from daemon.flows.enrich import Known
from daemon.flows.pipeline import FlowPipeline
from daemon.flows.segments import (
    EVENTS,
    KNOWN,
    SUFFIX,
    Frame,
    begun_ns,
    columns,
    files,
    pack,
    pack_known,
)
from daemon.state.tables import StatusRow, Tables

WRITE_EVERY_S = 2.0
FRAME_EVENTS = 8_192
TURN = 1_024  # events described without letting others run
FILE_S = 600
FILE_BYTES = 64 << 20
_NS = 1_000_000_000

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """`most_bytes` and `age_s` bound all files together; `rate` is events per second, on average of a write."""

    directory: Path
    most_bytes: int
    age_s: float
    rate: int


class Recorder:
    """Keeps the directory. `run` is the task; `lost` counts what was not recorded."""

    def __init__(self, settings: RecordSettings, pipeline: FlowPipeline, tables: Tables) -> None:
        self.lost = 0
        self._settings = settings
        self._pipeline = pipeline
        self._tables = tables
        self._position = 0
        self._file = _File(settings.directory)

    async def run(self) -> None:
        """Until cancelled. A disk that fails is a status row; recording goes on when it works again."""
        self._position = max(self._position, self._pipeline.store.first)
        try:
            while True:
                await asyncio.sleep(WRITE_EVERY_S)
                await self._write()
        finally:
            self._file.close()

    async def _write(self) -> None:
        store = self._pipeline.store
        end = store.end
        start = max(self._position, store.first, end - int(self._settings.rate * WRITE_EVERY_S))
        self.lost += start - self._position
        frames = [
            await self._frame(at, min(at + FRAME_EVENTS, end)) for at in range(start, end, FRAME_EVENTS)
        ]
        self._position = end
        try:
            if frames:
                await asyncio.to_thread(self._file.write, frames)
            await asyncio.to_thread(prune, self._settings, time.time_ns())
        except OSError as error:
            self.lost += sum(frame.events for frame, _, _ in frames)
            self._file.close()
            self._status(f"not recorded: {error}", ok=False)
        else:
            self._status("recording", ok=True)

    async def _frame(self, start: int, stop: int) -> tuple[Frame, bytes, Known]:
        """The events and what they refer to, before the tables move on."""
        store, directory = self._pipeline.store, self._pipeline.directory
        raw = store.read(start, stop)
        known: Known | None = None
        for at in range(0, len(raw), TURN * SIZE):
            directory.refresh()
            known = merged(known, directory.known(raw[at : at + TURN * SIZE]))
            await asyncio.sleep(0)
        offset = store.offset_ns(start)
        times = [event.time_ns + offset for event in events(raw)]
        frame = Frame(EVENTS, stop - start, start, self._pipeline.started_ns, offset, min(times), max(times))
        assert known is not None  # noqa: S101 - a frame has events
        return frame, raw, known

    def _status(self, text: str, *, ok: bool) -> None:
        hint = "" if ok else "free space in state_dir, or turn recording off with `record.enabled: false`"
        before = self._tables.status.get("record")
        since = before.since if before and (before.ok, before.text) == (ok, text) else time.time()
        details = {"lost": self.lost}
        self._tables.status.put("record", StatusRow(ok, text, hint, since, details))


def merged(first: Known | None, second: Known) -> Known:
    """Both; what the second says of a thing wins."""
    if first is None:
        return second
    return second._replace(
        devices={**first.devices, **second.devices},
        labels={**first.labels, **second.labels},
        sides={**first.sides, **second.sides},
        books={**first.books, **second.books},
    )


def news(before: Known | None, now: Known) -> Known | None:
    """What `now` adds to or changes in what was said before; None when that is nothing."""
    if before is None:
        return now
    fresh = now._replace(
        devices=_fresh(before.devices, now.devices),
        labels=_fresh(before.labels, now.labels),
        sides=_fresh(before.sides, now.sides),
        books=_fresh(before.books, now.books),
    )
    same = (before.node, before.cluster) == (now.node, now.cluster)
    return None if same and not any(fresh[2:]) else fresh


def _fresh(before: Mapping[K, V], now: Mapping[K, V]) -> dict[K, V]:
    return {key: value for key, value in now.items() if before.get(key) != value}


class _File:
    """The file that is being written. Every file says all that its own events refer to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handle: IO[bytes] | None = None
        self._begun_ns = 0
        self._said: Known | None = None

    def write(self, frames: list[tuple[Frame, bytes, Known]]) -> None:
        """Append. OSError when the disk will not have it: the caller closes, and the next write begins a new file."""
        now = time.time_ns()
        if self._handle is None or now - self._begun_ns > FILE_S * _NS or self._handle.tell() > FILE_BYTES:
            self._open(now)
        assert self._handle is not None  # noqa: S101 - just opened
        for frame, raw, known in frames:
            if fresh := news(self._said, known):
                self._handle.write(pack(frame._replace(kind=KNOWN, events=0), pack_known(fresh)))
                self._said = merged(self._said, known)
            self._handle.write(pack(frame, columns(raw)))
        self._handle.flush()

    def _open(self, now_ns: int) -> None:
        self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / f"{now_ns}{SUFFIX}"
        self._handle = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._begun_ns = now_ns

    def close(self) -> None:
        """What was written stays."""
        self._said = None
        if self._handle:
            with contextlib.suppress(OSError):  # a full disk: the reader stops before the torn frame
                self._handle.close()
            self._handle = None


def prune(settings: RecordSettings, now_ns: int) -> None:
    """Remove files that are too old, then the oldest until the rest fits. The newest, which is written to, stays."""
    sizes = [(path, path.stat().st_size) for path in files(settings.directory)]
    total = sum(size for _, size in sizes)
    for path, size in sizes[:-1]:
        ended_before = now_ns - begun_ns(path) > (settings.age_s + FILE_S) * _NS
        if total > settings.most_bytes or ended_before:
            path.unlink(missing_ok=True)
            total -= size
