"""Identity numbers for label sets, by the original's protocol over the shared store.

Master key `id/<number>` = labels, without lease; a reference `value/<labels>/<node>` = number of each node that
uses it, leased; every step under the lock `locks/<labels>`. Only a transaction that creates the master gives a
number its meaning, so that two allocators that race may cost a retry, and never two meanings for one number.

`Allocator.want` says which label sets are in use here; `run` is the task that keeps their numbers.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.kv import KV, Compacted, Compare, Entry, Event, Put
from clustermesh.leases import Leases, LockLost, Locks

log = logging.getLogger(__name__)

ATTEMPTS = 16
ATTEMPT_S = 0.02  # wait after the first attempt, doubled after each
_LONGEST_S = 5.0
REASSERT_S = 300.0
_AT_ONCE = 8  # label sets that are looked after at a time
_CHUNK = 60  # label sets whose keys one transaction asserts: two conditions each


class AllocationError(Exception):
    """There is no number for a label set; the message says why."""


class _Again(Exception):  # noqa: N818 - control flow inside this module
    """Somebody else was faster: look again."""


# --- decisions


@dataclass(frozen=True, slots=True)
class Reuse:
    """Refer to a number whose master is there."""

    number: int
    master: Entry


@dataclass(frozen=True, slots=True)
class Create:
    """Write the master of a number that nobody has, and refer to it."""

    number: int


def references(entries: Iterable[Entry], labels: str) -> dict[str, int]:
    """Node -> number, of the references to exactly this label set; others may share its beginning."""
    prefix = wire.identity_value_prefix(labels)
    found = {}
    for entry in entries:
        head, slash, node = entry.key.rpartition("/")
        if head + slash == prefix and entry.value.isdigit():
            found[node] = int(entry.value)
    return found


def decide(
    labels: str,
    referenced: Collection[int],
    masters: Mapping[int, Entry | None],
    held: int | None,
    fresh: Callable[[], int],
) -> Reuse | Create:
    """What to do for a label set, under its lock.

    referenced: numbers that nodes refer to for it. held: the one that this node uses, or had before. masters: what
    is under `id/` for each of these and for every other number that may stand for the label set.
    The oldest number in use wins, so that all nodes end with the same one after the store came apart.
    """
    mine = {number: entry for number, entry in masters.items() if entry and entry.value == labels.encode()}
    used = {number: entry for number, entry in mine.items() if number in referenced}
    lost = [number for number in referenced if masters[number] is None]
    if used or (mine and not lost):
        group = used or mine
        number = min(group, key=lambda one: (group[one].create_revision, one))
        return Reuse(number, group[number])
    if lost:
        return Create(held if held in lost else min(lost))
    if held is not None and masters[held] is None:
        return Create(held)
    return Create(fresh())


# --- the allocator


@dataclass(frozen=True, slots=True)
class _Held:
    """A number that this node uses. `master`, `reference`: revisions at which we saw or wrote those keys."""

    number: int
    master: int
    reference: int
    lease: int
    verified: bool = True


class Allocator:
    """Keeps a number for each label set in use on this node.

    first, last: the cluster's range. node: ends the reference keys, unique in the cluster. remembered: numbers
    that label sets had before, taken again if nobody else has them. changed: called when a number came, went or
    became another one.
    """

    def __init__(
        self,
        kv: KV,
        leases: Leases,
        *,
        first: int,
        last: int,
        node: str,
        remembered: Mapping[str, int] | None = None,
        changed: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
        reassert_s: float = REASSERT_S,
        attempt_s: float = ATTEMPT_S,
    ) -> None:
        self.problems: dict[str, str] = {}  # label set -> why it has no number
        self._kv = kv
        self._leases = leases
        self._locks = Locks(kv)
        self._first, self._last = first, last
        self._node = wire.component(node)
        self._hints = {one: number for one, number in (remembered or {}).items() if self._owns(number)}
        self._tell = changed
        self._rng = rng or random.SystemRandom()
        self._reassert_s = reassert_s
        self._attempt_s = attempt_s
        self._wanted: frozenset[str] = frozenset()
        self._told = asyncio.Event()  # `want` was called
        self._held: dict[str, _Held] = {}
        self._touched: set[str] = set(self._hints)  # label sets whose reference of ours may be in the store
        self._masters: dict[int, str] = {}  # of our range: number -> labels, as the watch has told
        self._numbers: dict[str, set[int]] = {}  # the other way round
        self._seen: dict[int, int] = {}  # revision of the last event of a number
        self._listed_at = 0
        self._listed = asyncio.Event()
        self._wake = asyncio.Event()

    def want(self, labels: Iterable[str]) -> None:
        """From now on these label sets (canonical strings) are in use here, and no others."""
        self._told.set()
        wanted = frozenset(labels)
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    @property
    def range(self) -> tuple[int, int]:
        """The first and the last number that may be given."""
        return self._first, self._last

    def number(self, labels: str) -> int | None:
        """The number of a label set, once it is certain that the store agrees."""
        held = self._held.get(labels)
        return held.number if held and held.verified else None

    @property
    def numbers(self) -> dict[str, int]:
        """All numbers that are held, certain or not."""
        return {labels: held.number for labels, held in self._held.items()}

    @property
    def known(self) -> dict[str, int]:
        """The numbers of the wanted label sets, as far as they are known, be it from an earlier life."""
        known = {labels: number for labels, number in self._hints.items() if labels in self._wanted}
        return known | self.numbers

    @property
    def present(self) -> Mapping[int, str]:
        """The numbers of our range that the store has, with their labels; a live view."""
        return self._masters

    @property
    def settled(self) -> bool:
        """Whether every wanted label set has a certain number or a problem, and no other is held."""
        done = {labels for labels in self._wanted if labels in self.problems or self.number(labels)}
        return done == self._wanted and self._held.keys() | self._touched <= self._wanted

    async def run(self) -> None:
        """Until the store fails (KVError, in a group). Start it again then; nothing is forgotten meanwhile."""
        self._listed.clear()
        for labels, held in self._held.items():
            self._held[labels] = replace(held, verified=False)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            await self._listed.wait()
            await self._told.wait()
            await self._locks.clean()
            await self._assert(sorted(self._held.keys() & self._wanted))
            await self._keep()

    async def allocate(self, labels: str) -> int:
        """A number for a label set, whatever it takes. Raises AllocationError, KVError."""
        await self._listed.wait()
        attempt = 0
        while True:
            try:
                return await self._attempt(labels)
            except (_Again, LockLost) as error:
                attempt += 1
                if attempt == ATTEMPTS:
                    raise AllocationError(f"no number after {ATTEMPTS} attempts: {error}") from error
                wait_s = min(self._attempt_s * 2 ** (attempt - 1), _LONGEST_S)
                await asyncio.sleep(wait_s * self._rng.uniform(0.8, 1.2))

    async def release(self, labels: str) -> None:
        """This node does not use a label set any more: its own reference goes, the master stays."""
        key = wire.identity_value_key(labels, self._node)
        await self._kv.delete(key)
        self._leases.drop(key)
        self._held.pop(labels, None)
        self._touched.discard(labels)

    # -- keeping what is wanted

    async def _keep(self) -> None:
        while True:
            self._wake.clear()
            for labels in sorted((self._held.keys() | self._touched) - self._wanted):
                await self.release(labels)
            self.problems = {one: why for one, why in self.problems.items() if one in self._wanted}
            await self._allocate_all([one for one in sorted(self._wanted) if self.number(one) is None])
            self._tell()
            try:
                async with asyncio.timeout(self._reassert_s):
                    await self._wake.wait()
            except TimeoutError:
                await self._assert(sorted(self._held))

    async def _allocate_all(self, missing: Sequence[str]) -> None:
        todo = iter(missing)  # shared: each worker takes the next
        left = set(missing)
        done = asyncio.Event()

        async def work() -> None:
            for labels in todo:
                try:
                    await self.allocate(labels)
                    self.problems.pop(labels, None)
                except AllocationError as error:
                    self.problems[labels] = str(error)
                    log.warning("no identity for %s: %s", labels, error)
                left.discard(labels)
                await asyncio.sleep(0)  # the embedded store never waits for anything
            if not left:
                done.set()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(missing))):
                group.create_task(work())
            if missing:
                await done.wait()  # in the body: see follow.py on groups that only wait for their end

    async def _attempt(self, labels: str) -> int:
        value_prefix = wire.identity_value_prefix(labels)
        async with self._locks.hold(wire.identity_lock(labels)) as lock:
            listing = await self._kv.list(value_prefix, linear=True)
            known = references(listing.entries, labels)
            held = self._held.get(labels)
            remembered = held.number if held else self._hints.get(labels)
            referenced = {one for one in known.values() if self._owns(one)}
            numbers = referenced | self._numbers.get(labels, set())
            if remembered is not None:
                numbers.add(remembered)
            masters = {number: await self._kv.get(wire.identity_key(number)) for number in sorted(numbers)}
            choice = decide(labels, referenced, masters, remembered, self._free)
            return await self._refer(labels, choice, lock)

    async def _refer(self, labels: str, choice: Reuse | Create, lock: Compare) -> int:
        """Write what was chosen, in one transaction that fails if anything of it is not true any more."""
        key, master = wire.identity_value_key(labels, self._node), wire.identity_key(choice.number)
        lease = await self._leases.of(key)
        self._touched.add(labels)
        reference = Put(key, str(choice.number).encode(), lease)
        if isinstance(choice, Reuse):
            revision = choice.master.mod_revision
            done = await self._kv.commit((lock, Compare(master, "mod_revision", revision)), (reference,))
        else:
            puts = (Put(master, labels.encode()), reference)
            done = await self._kv.commit((lock, Compare(master, "version", 0)), puts)
            revision = done.revision
        if not done.done:
            await self._why(choice.number)
        self._held[labels] = _Held(choice.number, revision, done.revision, lease)
        self._hints[labels] = choice.number
        if self._seen.get(choice.number, self._listed_at) > revision:
            self._doubt(labels)  # the watch was faster, and knows of something that came after
        else:
            self._remember(choice.number, labels)
        self._tell()
        return choice.number

    async def _why(self, number: int) -> None:
        """Learn from a transaction that failed. Raises _Again."""
        found = await self._kv.get(wire.identity_key(number))
        if found is None:
            raise _Again("the lock was lost")
        self._remember(number, found.value.decode(errors="replace"))
        raise _Again(f"identity {number} was taken meanwhile")

    def _free(self) -> int:
        """A random number of our range that nobody is known to have."""
        size = self._last - self._first + 1
        if len(self._masters) >= size:
            raise AllocationError(f"all {size} identities of {self._first}..{self._last} are taken")
        for _ in range(64):
            number = self._rng.randrange(self._first, self._last + 1)
            if number not in self._masters:
                return number
        return self._rng.choice(
            [one for one in range(self._first, self._last + 1) if one not in self._masters]
        )

    def _owns(self, number: int) -> bool:
        return self._first <= number <= self._last

    # -- asserting what is held

    async def _assert(self, some: Sequence[str]) -> None:
        """See that the keys of these label sets are as we left them; those that are not are looked at anew."""
        for start in range(0, len(some), _CHUNK):
            await self._assert_chunk([one for one in some[start : start + _CHUNK] if one in self._held])

    async def _assert_chunk(self, some: Sequence[str]) -> None:
        compares, puts, leases = [], [], {}
        for labels in some:
            held = self._held[labels]
            key = wire.identity_value_key(labels, self._node)
            leases[labels] = await self._leases.of(key)
            compares.append(Compare(wire.identity_key(held.number), "mod_revision", held.master))
            if leases[labels] == held.lease:
                compares.append(Compare(key, "mod_revision", held.reference))
            else:
                puts.append(Put(key, str(held.number).encode(), leases[labels]))
        done = await self._kv.commit(compares, puts)
        if done.done:
            for labels, lease in leases.items():
                held = self._held[labels]
                reference = held.reference if lease == held.lease else done.revision
                self._held[labels] = _Held(held.number, held.master, reference, lease)
        elif len(some) == 1:
            self._doubt(some[0])
        else:
            middle = len(some) // 2
            await self._assert_chunk(some[:middle])
            await self._assert_chunk(some[middle:])

    def _doubt(self, labels: str) -> None:
        """What we hold for a label set may not be what the store has: look at it anew."""
        held = self._held.get(labels)
        if held is not None:
            self._held[labels] = replace(held, verified=False)
            self._wake.set()

    # -- the masters of everybody

    async def _follow(self) -> None:
        """Know the masters of our range; notice when those that we use change. For ever."""
        prefix = wire.IDENTITY_MASTERS
        while True:
            self._masters.clear()
            self._numbers.clear()
            self._seen.clear()
            revision = 0
            async with aclosing(self._kv.pages(prefix)) as pages:
                async for page in pages:
                    for entry in page.entries:
                        self._saw(Event(entry.key, entry.value, entry.mod_revision))
                    revision = page.revision
            self._listed_at = revision
            for labels, held in tuple(self._held.items()):
                if self._masters.get(held.number) != labels and revision >= held.master:
                    self._doubt(labels)
            self._listed.set()
            try:
                async with aclosing(self._kv.watch(prefix, revision + 1)) as batches:
                    async for events in batches:
                        for event in events:
                            self._saw(event)
            except Compacted:
                continue

    def _saw(self, event: Event) -> None:
        try:
            number = wire.decode_identity_number(event.key.rpartition("/")[2])
        except Malformed:
            return
        if not self._owns(number):
            return
        self._seen[number] = event.revision
        before = self._masters.get(number)
        if event.value is None:
            self._forget(number)
        else:
            self._remember(number, event.value.decode(errors="replace"))
        for labels in {before, self._masters.get(number)} - {None}:
            self._compare(labels or "", number, event)

    def _compare(self, labels: str, number: int, event: Event) -> None:
        """A master of a label set came or went: is that the number we use for it?"""
        held = self._held.get(labels)
        if held is None:
            return
        says_so = event.value is not None and event.value == labels.encode()
        if held.number != number:
            if says_so:
                self._doubt(labels)  # a second number for it, new or old news: see which one stays
        elif event.revision > held.master:
            if says_so:
                self._held[labels] = replace(held, master=event.revision)
            else:
                self._doubt(labels)

    def _remember(self, number: int, labels: str) -> None:
        self._forget(number)
        self._masters[number] = labels
        self._numbers.setdefault(labels, set()).add(number)

    def _forget(self, number: int) -> None:
        labels = self._masters.pop(number, None)
        if labels is not None:
            self._numbers[labels].discard(number)
            if not self._numbers[labels]:
                del self._numbers[labels]


async def users(kv: KV) -> dict[int, list[str]]:
    """Who refers to each number, in a store that may hold several clusters: number -> nodes. Raises KVError."""
    found: dict[int, list[str]] = {}
    async with aclosing(kv.pages(wire.IDENTITY_REFERENCES)) as pages:
        async for page in pages:
            for one in page.entries:
                if one.value.isdigit():
                    found.setdefault(int(one.value), []).append(one.key.rpartition("/")[2])
    return found
