"""LoopWatch: how long the event loop did not turn. The worst stall is a figure in status and metrics."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

EVERY_S = 0.1
STALL_S = 0.1  # longer is counted
LOUD_S = 1.0  # longer is logged


@dataclass(slots=True)
class Stalls:
    """Since start."""

    count: int = 0
    worst_s: float = 0.0
    total_s: float = 0.0

    def add(self, late_s: float) -> None:
        """Note one turn that was late by that much."""
        if late_s < STALL_S:
            return
        self.count += 1
        self.total_s += late_s
        self.worst_s = max(self.worst_s, late_s)


class LoopWatch:
    """Measures by sleeping; `beat` is called at each turn, so a stuck loop stops beating."""

    def __init__(self, beat: Callable[[], None] | None = None, beat_every_s: float = 1.0) -> None:
        self.stalls = Stalls()
        self._beat = beat
        self._beat_every_s = beat_every_s

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            due = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            late = loop.time() - due
            self.stalls.add(late)
            if late > LOUD_S:
                log.warning("the event loop stood still for %.1f s", late)
            if self._beat and loop.time() >= next_beat:
                self._beat()
                next_beat = loop.time() + self._beat_every_s
