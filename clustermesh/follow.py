"""Drives remote.py over a store: list, watch, and after a loss list again; meanwhile the last state stays."""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

from clustermesh.kv import KV, Compacted, Denied, Event, KVError, Listing
from clustermesh.pace import Pace
from clustermesh.remote import Change, Kind, Mesh, Part

log = logging.getLogger(__name__)

RETRY_S = 5.0  # at most this long between two tries, so that all is well 10 s after the store is back
CATCH_UP_S = 0.1  # between two looks at what had to wait
QUARANTINE_S = 300.0  # how long a mass deletion is held before it is believed


class Backoff:
    """Growing waits with jitter: the first failure waits least, `reset` starts over."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0) -> None:
        self.first_s = first_s
        self.most_s = most_s
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self.first_s

    async def wait(self) -> None:
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self.most_s)
        await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter


class _ListAgain(Exception):  # noqa: N818 - control flow inside this module
    """Something happened after which only a new listing tells what is true."""


class Follower:
    """Keeps one `Mesh` equal to one store. Run `run` as a task; cancelling it emits nothing.

    emit: called with batches of changes, on the event loop; it must not await and must be quick.
    """

    def __init__(
        self,
        kv: KV,
        mesh: Mesh,
        emit: Callable[[Sequence[Change]], None],
        *,
        name: str = "store",
        backoff: Backoff | None = None,
        quarantine_s: float = QUARANTINE_S,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connected = False
        self.complete = False  # every part was listed once, since the start
        self.lost_since = 0.0  # wall clock; 0 while connected
        self.error = ""
        self.store = 0  # which store this is, if it says so
        self.revision = 0
        self.reconnects = 0
        self.pages = 0  # of listings, ever: whether there is progress
        self.denied: dict[str, str] = {}  # prefix -> what the store said
        self._before = (0, 0)  # store and revision at the end of the last connection
        self._kv = kv
        self._mesh = mesh
        self._emit = emit
        self._name = name
        self._backoff = backoff or Backoff(most_s=RETRY_S)
        self._quarantine_s = quarantine_s
        self._clock = clock
        self._steady = steady  # for what is waited for: the other one may jump
        self.slowed: Counter[str] = Counter()  # cluster -> events that had to wait
        self._pace = Pace()
        self._turn = asyncio.Lock()  # one listing or batch of events at a time goes into the mesh
        self._look = asyncio.Event()  # somebody wants a new listing
        self._changed: list[Callable[[], None]] = []

    def on_connection(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever the store was lost or found."""
        self._changed.append(callback)

    def remember(self, store: int, revision: int, seen_at: float) -> None:
        """What is in the mesh was in this store at this revision, and is as old as that."""
        self._before = self.store, self.revision = store, revision
        self.lost_since = seen_at

    def use(self, kv: KV, *, another: bool) -> None:
        """Follow this store from the next connection on; `another`: it is meant to be a different one."""
        self._remember()
        self._kv, self.connected = kv, False
        if another:
            self._before = 0, 0
            self.store = self.revision = 0

    def list_again(self) -> None:
        """Have everything listed anew, as after an outage."""
        self._look.set()

    async def take(self, changes: Iterator[list[Change]]) -> None:
        """Let the mesh do something, between two batches of events, and tell what it changed."""
        async with self._turn:
            await self._feed(changes)

    async def run(self) -> None:
        """For ever. Every KVError leads to another try; anything else is a bug and goes up."""
        while True:
            try:
                await self._connection()
            except* _ListAgain as group:
                log.info("%s: listing again: %s", self._name, group.exceptions[0])
            except* KVError as group:
                self._lost(str(_first(group)))
            stop_if_cancelled()
            if self.error:
                await self._backoff.wait()

    async def _connection(self) -> None:
        """One connection: list all parts in order, then watch them all until something breaks."""
        self._mesh.relist = False
        self._look.clear()
        self._pace.clear()
        self._remember()
        self.denied.clear()
        revisions: list[tuple[Part, int]] = []
        for part in self._mesh.parts:
            if self._mesh.wanted(part):
                revision = await self._list(part)
                if revision is not None:
                    revisions.append((part, revision))
                self._check_config(part)
        if not revisions:
            raise Denied(next(iter(self.denied.values())))
        if self._mesh.relist:
            raise _ListAgain("a cluster changed its id")
        self._found()
        async with asyncio.TaskGroup() as group:
            for part, revision in revisions:
                group.create_task(self._watch(part, revision + 1))
            group.create_task(self._catch_up())
            # Here and not as a task: of a group that only waits for its end, Python 3.11 counts the
            # failure of a child as a cancellation of us, for ever.
            await self._until_listing()

    def _check_config(self, part: Part) -> None:
        """A store of one cluster is of no use without its configuration. Raises KVError."""
        if part.kind is not Kind.CONFIG or not part.cluster:
            return
        remote = self._mesh.remotes[part.cluster]
        if part.prefix in self.denied:
            raise Denied(self.denied[part.prefix])
        if remote.fault:
            raise KVError(f"{part.prefix}: {remote.fault}")
        if remote.config is None:
            raise KVError(f"{part.prefix} is not there: is this the store of {part.cluster}?")

    async def _list(self, part: Part) -> int | None:
        """Take in what is in a part; the revision, or None if this user may not read it."""
        listing = self._mesh.begin(part)
        page = Listing((), 0)
        try:
            async with aclosing(self._pages(part)) as pages:
                async for page in pages:
                    self.pages += 1
                    async with self._turn:
                        await self._feed(listing.page(page.entries))
        except Denied as error:
            self.denied[part.prefix] = str(error)
            return None
        if page.revision and (page.store != self.store or page.revision < self._before[1]):
            self.store, self.revision = page.store, page.revision
        self.revision = max(self.revision, page.revision)
        async with self._turn:
            await self._feed(listing.end(self._steady(), doubtful=self._doubtful(page)))
        return page.revision

    async def _pages(self, part: Part) -> AsyncGenerator[Listing, None]:
        if part.kind is Kind.CONFIG and part.cluster:
            entry = await self._kv.get(part.prefix)  # rights may cover this one key only
            yield Listing((entry,) if entry else (), 0)
        else:
            async with aclosing(self._kv.pages(part.prefix)) as pages:
                async for page in pages:
                    yield page

    def _doubtful(self, listing: Listing) -> bool:
        """Whether the store went back in time, or is another one, since it was lost."""
        store, revision = self._before
        return bool(revision and listing.revision) and (listing.store != store or listing.revision < revision)

    async def _watch(self, part: Part, revision: int) -> None:
        if part.kind is Kind.CONFIG and part.cluster:
            return  # read once per connection, as the original does
        try:
            async with aclosing(self._kv.watch(part.prefix, revision)) as batches:
                async for events in batches:
                    await self._apply(part, events)
        except Compacted as error:
            raise _ListAgain(f"{part.prefix}: {error}") from error

    async def _apply(self, part: Part, events: Sequence[Event]) -> None:
        async with self._turn:
            self.revision = max(self.revision, events[-1].revision)
            events = self._paced(part, events)
            await self._feed(self._mesh.applied(part, events, self._steady()))
        if self._mesh.relist:
            raise _ListAgain("a cluster changed its id")

    def _paced(self, part: Part, events: Sequence[Event]) -> Sequence[Event]:
        """Those to be looked at now: whoever makes too many changes waits for the rest."""
        now = self._steady()
        admitted = []
        for event in events:
            cluster = self._mesh.speaker(part, event)
            if cluster == self._mesh.trust.own_cluster or self._pace.admit(part, event, cluster, now):
                admitted.append(event)
            else:
                self.slowed[cluster] += 1
        return admitted

    async def _catch_up(self) -> None:
        """Look at what had to wait, as fast as its cluster may go."""
        while True:
            await asyncio.sleep(CATCH_UP_S)
            for part, events in self._pace.due(self._steady()) if self._pace else ():
                async with self._turn:
                    await self._feed(self._mesh.applied(part, events, self._steady()))
            if self._pace.lost and not self._pace:
                raise _ListAgain("a cluster was so fast that changes were left out")

    async def _feed(self, batches: Iterator[list[Change]]) -> None:
        for changes in batches:
            if changes:
                self._emit(changes)
            await asyncio.sleep(0)  # others get their turn between chunks

    async def _until_listing(self) -> None:
        """Believe held deletions once they have been true for long enough, until a new listing is wanted."""
        while not self._look.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(5.0, self._quarantine_s / 10)):
                    await self._look.wait()
            due = self._steady() - self._quarantine_s
            ready = [one.name for one in self._mesh.remotes.values() if 0 < one.held_since <= due]
            if ready:
                await self.take(self._mesh.release(ready))
        raise _ListAgain("asked to")

    def _found(self) -> None:
        if self.error:
            log.info("%s: connected again, at revision %d", self._name, self.revision)
            self.reconnects += 1
        self.connected = self.complete = True
        self.lost_since, self.error = 0.0, ""
        self._backoff.reset()
        self._tell()

    def _remember(self) -> None:
        """Keep what the store was while it was whole: a connection that fails half-way must not change it."""
        if self.connected:
            self._before = self.store, self.revision

    def _lost(self, reason: str) -> None:
        if not self.error:
            log.warning("%s: out of reach, the last state stays in force: %s", self._name, reason)
        self._remember()
        self.error = reason
        self.connected = False
        self.lost_since = self.lost_since or self._clock()
        self._tell()

    def _tell(self) -> None:
        for callback in self._changed:
            callback()


def stop_if_cancelled() -> None:
    """Cancelled all the same: a TaskGroup forgets that when a child fails in the same moment."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
