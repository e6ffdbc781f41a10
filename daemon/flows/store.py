"""FlowStore: the last events as packed structs in one ring of memory, and the notes of what was lost.

Nobody has a queue: a reader holds a number, the position of the next event that it wants. One who is slower
than the ring is overtaken, and learns how many events that cost him; nobody else notices.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from itertools import islice

from daemon.flows.decode import SIZE
from daemon.model.flow import Lost

CAPACITY = 1 << 16
NOTES = 1_024  # losses remembered
CLOCK_STEP_NS = 1_000_000  # a smaller drift of the wall clock against the monotonic one is not recorded


class FlowStore:
    """Events number `first` up to, not including, `end`. Numbers rise from 0 and are never reused."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.end = 0
        self.noted = 0  # losses so far
        self.closed = False  # nothing will come any more: followers end
        self.wake = asyncio.Event()  # set, and replaced by a new one, when something was added
        self._ring = bytearray(capacity * SIZE)
        self._offsets: deque[tuple[int, int]] = deque(
            maxlen=NOTES
        )  # from this number on, wall clock minus monotonic
        self._losses: deque[tuple[int, Lost]] = deque(maxlen=NOTES)  # before the event of this number

    @property
    def first(self) -> int:
        """The oldest event that is still here; equal to `end` when there is none."""
        return max(0, self.end - self.capacity)

    def __len__(self) -> int:
        return self.end - self.first

    def append(self, raw: bytes, offset_ns: int) -> None:
        """Add a run of whole structs."""
        if not self._offsets or abs(offset_ns - self._offsets[-1][1]) > CLOCK_STEP_NS:
            self._offsets.append((self.end, offset_ns))
        count = len(raw) // SIZE
        kept = memoryview(raw)[max(0, count - self.capacity) * SIZE :]
        at = (self.end + count - len(kept) // SIZE) % self.capacity * SIZE
        head = min(len(kept), len(self._ring) - at)
        self._ring[at : at + head] = kept[:head]
        self._ring[: len(kept) - head] = kept[head:]
        self.end += count
        self._notify()

    def note(self, lost: Lost) -> None:
        """Record a loss at the present end."""
        self._losses.append((self.end, lost))
        self.noted += 1
        self._notify()

    def read(self, start: int, stop: int) -> bytes:
        """Copy of the events `start` to `stop`, all of which must be here."""
        if not self.first <= start <= stop <= self.end:
            raise IndexError(f"events {start} to {stop} of {self.first} to {self.end}")
        at, size = start % self.capacity * SIZE, (stop - start) * SIZE
        head = bytes(self._ring[at : at + size])
        return head + bytes(self._ring[: size - len(head)])

    def offset_ns(self, number: int) -> int:
        """Wall clock minus monotonic clock when that event arrived."""
        at = bisect_right(self._offsets, number, key=lambda one: one[0])
        return self._offsets[max(at - 1, 0)][1]

    def losses(self, seen: int, until: int) -> tuple[int, list[tuple[int, Lost]]]:
        """Losses noted at positions up to `until`, but for the first `seen` of all.

        Returns the number to give as `seen` the next time, and (position, loss) of each.
        """
        oldest = self.noted - len(self._losses)
        fresh = [one for one in islice(self._losses, max(0, seen - oldest), None) if one[0] <= until]
        return max(seen, oldest) + len(fresh), fresh

    def close(self) -> None:
        """Let every follower end."""
        self.closed = True
        self._notify()

    def _notify(self) -> None:
        self.wake.set()
        self.wake = asyncio.Event()
