"""What a reader of flows asks for, with the meaning of Hubble's GetFlows, and the loop that answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from daemon.flows.decode import Event, events
from daemon.flows.enrich import Directory
from daemon.flows.filters import Filters
from daemon.flows.store import FlowStore
from daemon.model.flow import Flow, Lost, LostSource

STEP = 256  # events judged without letting others run
IDLE_S = 5.0  # between empty answers

Answer = Sequence[Flow | Lost]


@dataclass(frozen=True, slots=True)
class Request:
    """`number`: the newest so many that match (the oldest with `first`), None for all. Times are wall clock.

    With `follow`, `number` is how far to look back; without a number and `since`, only what is new is shown.
    """

    filters: Filters = field(default_factory=Filters)
    number: int | None = None
    first: bool = False
    follow: bool = False
    since_ns: int | None = None
    until_ns: int | None = None


async def observe(store: FlowStore, directory: Directory, request: Request) -> AsyncIterator[Answer]:
    """Flows in the order of their arrival, some at a time, and losses where they happened.

    Losses pass all filters. A reader that is overtaken gets a Lost for what was missed and goes on with what
    is left. Without `follow` it ends with the newest event of the moment in which it began; with it, an
    empty answer comes now and then, so that the caller can see whether anybody is still there.
    """
    view = _View(store, directory, request)
    end = store.end
    noted = store.noted
    position = await view.start(end)
    if position < end:
        noted, _ = store.losses(0, position - 1)
    left = None if request.follow else request.number
    while True:
        missed: list[Flow | Lost] = []
        if position < store.first:
            missed.append(Lost(LostSource.HUBBLE_RING_BUFFER, store.first - position))
            position = store.first
        stop = min(position + STEP, store.end if request.follow else max(end, position))
        wake = store.wake
        flows, past = view.flows(position, stop)
        if left is not None:
            flows = flows[:left]
            left -= len(flows)
        noted, losses = store.losses(noted, stop)
        if flows or losses or missed:
            yield missed + _merged(flows, losses)
        position = stop
        if past or left == 0 or (position >= end and not request.follow):
            return
        if position < store.end or store.wake is not wake:
            await asyncio.sleep(0)
        elif store.closed:
            return
        elif not await _within(IDLE_S, wake):
            yield ()


def oldest_ns(store: FlowStore) -> int | None:
    """Wall-clock time of the oldest event that is still here; None when there is none."""
    if not len(store):
        return None
    (event,) = events(store.read(store.first, store.first + 1))
    return event.time_ns + store.offset_ns(store.first)


def arrivals(store: FlowStore, since_ns: int) -> int:
    """How many of the events that are still here came at or after that wall-clock time."""
    low, high = store.first, store.end
    while low < high:
        middle = (low + high) // 2
        (event,) = events(store.read(middle, middle + 1))
        if event.time_ns + store.offset_ns(middle) < since_ns:
            low = middle + 1
        else:
            high = middle
    return store.end - low


async def _within(seconds: float, wake: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return False
    return True


def _merged(flows: list[Flow], losses: list[tuple[int, Lost]]) -> list[Flow | Lost]:
    if not losses:
        return [*flows]
    keyed: list[tuple[int, int, Flow | Lost]] = [(flow.number, 1, flow) for flow in flows]
    keyed += [(at, 0, lost) for at, lost in losses]
    return [one for _, _, one in sorted(keyed, key=lambda one: one[:2])]


class _View:
    """The store through one request's filters."""

    def __init__(self, store: FlowStore, directory: Directory, request: Request) -> None:
        self._store = store
        self._directory = directory
        self._request = request

    async def start(self, end: int) -> int:
        """Position of the first event to show."""
        request = self._request
        if request.since_ns is None:
            if request.number is None:
                return end if request.follow else self._store.first
            if not request.first:
                return await self._rewind(end, request.number)
        return self._store.first

    async def _rewind(self, end: int, number: int) -> int:
        """Position of the `number`-th newest match, or of the oldest event."""
        stop, left = end, number
        while left > 0 and stop > self._store.first:
            at = max(stop - STEP, self._store.first)
            flows, _ = self.flows(at, stop)
            if len(flows) >= left:
                return flows[-left].number
            left -= len(flows)
            stop = at
            await asyncio.sleep(0)
        return stop

    def flows(self, start: int, stop: int) -> tuple[list[Flow], bool]:
        """The flows to show among events `start` to `stop`, and whether one was newer than asked for."""
        request = self._request
        found: list[Flow] = []
        self._directory.refresh()
        for number, event, offset_ns in self._events(start, stop):
            now = event.time_ns + offset_ns
            if request.until_ns is not None and now > request.until_ns:
                return found, True
            if request.since_ns is not None and now < request.since_ns:
                continue
            flow = self._one(number, event, offset_ns)
            if flow is not None:
                found.append(flow)
        return found, False

    def _events(self, start: int, stop: int) -> Iterator[tuple[int, Event, int]]:
        store = self._store
        for number, event in enumerate(events(store.read(start, stop)), start):
            yield number, event, store.offset_ns(number)

    def _one(self, number: int, event: Event, offset_ns: int) -> Flow | None:
        return self._request.filters.select(event, lambda: self._directory.flow(number, event, offset_ns))
