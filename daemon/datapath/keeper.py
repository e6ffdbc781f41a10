"""Keeps the last good state on disk, a moment after it has changed."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from bpf.syscall import LayoutMismatch
from daemon.datapath.snapshot import FILE
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

QUIET_S = 2.0  # changes that come together are written once
APART_S = 10.0  # between two writes, however much changes
RETRY_S = 30.0


class Keeper:
    """Writes `status["last good state"]`. `run` is the task.

    changed: set by whoever changes what is enforced. save: writes it, in a worker thread.
    """

    def __init__(
        self, tables: Tables, directory: Path, changed: asyncio.Event, save: Callable[[Path], int]
    ) -> None:
        self._tables = tables
        self._path = directory / FILE
        self._changed = changed
        self._save = save

    async def run(self) -> None:
        """For ever. A disk that fails is a status row; it is tried again."""
        devices = self._tables.devices.reader(self._changed)
        while True:
            await self._changed.wait()
            await asyncio.sleep(QUIET_S)
            self._changed.clear()
            devices.take()
            try:
                size = await asyncio.to_thread(self._save, self._path)
            except (OSError, LayoutMismatch) as error:
                self._tell(False, f"not written: {error}", "a boot would restore an older state, or none")
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            else:
                self._tell(True, f"written, {size >> 10} KiB", "")
                await asyncio.sleep(APART_S)

    def _tell(self, ok: bool, text: str, hint: str) -> None:
        before = self._tables.status.get("last good state")
        if before is None or (before.ok, before.text) != (ok, text):
            if not ok:
                log.warning("last good state: %s", text)
            self._tables.status.put("last good state", StatusRow(ok, text, hint, time.time()))
