"""Keeps in the store what this host says: itself, its workloads' addresses and identities, its cluster's markers.

Sources say what there shall be (`publish`, `want`); `run` makes it so, whatever happens to the store. All keys are
leased, so that they go away by themselves when this host does; a clean stop leaves them, and the data outlives a
restart. Nothing is ever written under another cluster's name, or over an address that somebody else holds.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice

from clustermesh import wire
from clustermesh.allocator import Allocator
from clustermesh.collect import Collector
from clustermesh.follow import Backoff, stop_if_cancelled
from clustermesh.gojson import Malformed
from clustermesh.kv import KV, Compare, Entry, KVError, LeaseLost, Put
from clustermesh.leases import Leases
from clustermesh.paced import Paced
from clustermesh.wire import CILIUM, ClusterConfig, Node, NodeAddress

log = logging.getLogger(__name__)

HEARTBEAT_S = 60.0
SETTLE_S = 0.02  # changes this close together are one round
RECHECK_S = 300.0  # between two looks at whether what we wrote is still there
_CANARIES = (wire.IDENTITIES, wire.IPS, wire.NODES, wire.SERVICES, wire.SERVICE_EXPORTS)
_HOST = "host"  # the group of this host's own addresses
_CHUNK, _CHUNK_BYTES = 60, 256 << 10  # keys of one transaction, and their bytes
_AT_ONCE = 500  # addresses between two turns of others
_REMEMBERED = 100_000  # keys of an earlier run that are looked after, at most


@dataclass(frozen=True, slots=True)
class Host:
    """What is told of this host. `addresses` in order: the first of each family is the node's own."""

    cluster: str
    cluster_id: int
    name: str
    addresses: tuple[NodeAddress, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    boot_id: str = ""

    @property
    def address(self) -> str:
        """Where others find the node; empty if nowhere."""
        return self.node.address(4) or self.node.address(6) or ""

    @property
    def node(self) -> Node:
        """What stands under `nodes/v1`."""
        return Node(
            self.name,
            self.cluster,
            self.addresses,
            cluster_id=self.cluster_id,
            source="local",
            labels=dict(self.labels),
            boot_id=self.boot_id,
        )

    @property
    def identity_labels(self) -> str:
        """The label set of the host's own identity: its labels with the source `node`, and its cluster."""
        labels = [f"node:{key}={value}" for key, value in self.labels.items()]
        return wire.encode_identity(labels, self.cluster).decode()


@dataclass(frozen=True, slots=True)
class Address:
    """An address or prefix (canonical text) that belongs to the identity of a label set (canonical string)."""

    prefix: str
    labels: str
    namespace: str = ""
    pod: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """Who writes: one node of a cluster. announce: it also speaks for the cluster, as all do in a shared store."""

    cluster: str
    cluster_id: int
    node: str
    max_clusters: int = 255
    announce: bool = True


@dataclass(frozen=True, slots=True)
class _Written:
    """A key as we left it."""

    value: bytes
    revision: int
    lease: int


class _Refused(Exception):  # noqa: N818 - control flow inside this module
    """The store's idea of our cluster is not ours; nothing is written."""


Remember = Callable[[Mapping[str, str]], Awaitable[None]]


async def _forget(_: Mapping[str, str]) -> None:
    """For writers that need not know their keys in another life."""


class Publisher:
    """One writer. `run` is the task; `expect` names groups without whose word nothing is begun.

    remembered: what `remember` was given in an earlier life, key -> value. Keys of it that nobody wants any more
    are deleted, and numbers of label sets are taken again. on_change: called when status or numbers changed.
    """

    def __init__(
        self,
        kv: KV,
        member: Member,
        *,
        remembered: Mapping[str, str] | None = None,
        remember: Remember = _forget,
        expect: Sequence[str] = (),
        backoff: Backoff | None = None,
        recheck_s: float = RECHECK_S,
        heartbeat_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.ok = False
        self.text = "nothing to publish yet"
        self.error = ""  # the last one of the store, kept when it is over
        self.conflicts: dict[str, str] = {}  # key -> who has it; not ours to overwrite
        self.written: dict[str, _Written] = {}
        self.waiting = 0  # keys that are to be written
        self.member = member
        self._kv = Paced(kv)
        self.leases = Leases(self._kv)
        before = dict(islice((remembered or {}).items(), _REMEMBERED))
        first, last = wire.identity_range(member.cluster_id, member.max_clusters)
        self.allocator = Allocator(
            self._kv, self.leases, first=first, last=last, node=member.node, remembered=_numbers(before),
            changed=self._numbers_changed, reassert_s=recheck_s,
        )  # fmt: skip
        self.collector = Collector(
            self._kv, self.leases, cluster=member.cluster, first=first, last=last, node=member.node
        )
        self._leftovers = {key: one for key, one in before.items() if _is_value(key)}
        self._remember = remember
        self._remembered: Mapping[str, str] = before
        self._expected = set(expect)
        self._groups: dict[str, tuple[Mapping[str, bytes], Sequence[Address]]] = {}
        self._host: Host | None = None
        self._changed = asyncio.Event()
        self._backoff = backoff or Backoff()
        self._recheck_s = recheck_s
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._on_change = on_change
        self._announced = False

    # -- what there shall be

    def publish(self, host: Host) -> None:
        """From now on the store has this host: its node, and its addresses with the identity of its labels."""
        if host != self._host:
            self._host = host
            addresses = [Address(one.ip, host.identity_labels) for one in host.addresses]
            key = wire.node_key(host.cluster, host.name)
            self.want(_HOST, {key: wire.encode_node(host.node)}, addresses)

    def want(
        self, group: str, keys: Mapping[str, bytes] | None = None, addresses: Sequence[Address] = ()
    ) -> None:
        """From now on a group of keys is exactly this; a key belongs to one group."""
        self._groups[group] = (dict(keys or {}), tuple(addresses))
        self.allocator.want(one.labels for _, addresses in self._groups.values() for one in addresses)
        self._changed.set()

    async def _desired(self) -> tuple[dict[str, bytes], set[str]]:
        """The keys as they shall be, and those that wait for the number of their identity.

        Others get their turn meanwhile: what changes then is seen in the next round.
        """
        desired: dict[str, bytes] = {}
        pending: set[str] = set()
        own = self._host.address if self._host else ""
        for keys, addresses in tuple(self._groups.values()):
            desired |= keys
            for index, one in enumerate(addresses):
                if index % _AT_ONCE == _AT_ONCE - 1:
                    await asyncio.sleep(0)
                number = self.allocator.number(one.labels)
                if number is None:
                    pending.add(_ip_key(one.prefix))
                else:
                    desired[_ip_key(one.prefix)] = _ip_value(one, number, own)
        return desired, pending - desired.keys()

    # -- the task

    async def run(self) -> None:
        """For ever; an unreachable store or a lost lease leads to another try."""
        while True:
            try:
                await self._session()
            except* LeaseLost as errors:
                log.warning("publishing anew: %s", _message(errors))
                self.leases.forget()
                self._fail("the lease was lost, writing everything again", _message(errors))
            except* KVError as errors:
                self._fail(f"not published: {_message(errors)}", _message(errors))
            except* _Refused as errors:
                self._fail(_message(errors), "")
            stop_if_cancelled()
            self._kv.outage()
            await self._backoff.wait()

    async def _session(self) -> None:
        while not (self._groups and self._expected <= self._groups.keys()):
            self._changed.clear()
            await self._changed.wait()
        self._announced = False
        self._changed.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.leases.keep())
            if self.member.announce:
                await self._check_config()
                group.create_task(self._heartbeat())
                group.create_task(self.collector.run())
            group.create_task(self.allocator.run())
            await self._follow_changes()  # see follow.py on why not a task

    async def _follow_changes(self) -> None:
        due = self._clock() + self._recheck_s
        await self._verify()
        while True:
            try:
                async with asyncio.timeout(max(0.0, min(due - self._clock(), self._recheck_s))):
                    await self._changed.wait()
            except TimeoutError:
                due = self._clock() + self._recheck_s
                self._announced = False
                await self._verify()
            await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            await self._write()
            self._backoff.reset()

    async def _write(self) -> None:
        """The keys, and then the markers that say the keys are there."""
        desired, pending = await self._desired()
        await self._keep_in_mind(desired)
        await self._put_all(desired)
        await self._delete_all((self.written.keys() | self._leftovers.keys()) - desired.keys() - pending)
        missing = {key for key in desired if key not in self.written} - self.conflicts.keys()
        self.waiting = len(missing | pending)
        if not self.waiting and self.allocator.settled:
            await self._announce()
            self._kv.limit()
        self._tell_state()

    # -- keys

    async def _put_all(self, desired: Mapping[str, bytes]) -> None:
        todo = []
        for key, value in desired.items():
            known = self.written.get(key)
            lease = await self.leases.of(key)
            if known is None or (known.value, known.lease) != (value, lease):
                todo.append(Put(key, value, lease))
        for key in self.conflicts.keys() - desired.keys():
            del self.conflicts[key]
        for chunk in _chunks(todo):
            await asyncio.sleep(0)  # the embedded store never waits for anything
            done = await self._kv.commit([self._as_known(one.key) for one in chunk], chunk)
            if done.done:
                for one in chunk:
                    self.written[one.key] = _Written(one.value or b"", done.revision, one.lease)
                    self.conflicts.pop(one.key, None)
            else:
                for one in chunk:
                    await self._put_one(one)

    async def _put_one(self, put: Put) -> None:
        """As the store may be different from what we know: look, and overwrite what is ours."""
        found = await self._kv.get(put.key)
        self.conflicts.pop(put.key, None)
        if found is not None and found.value != put.value and (holder := self._holder(found)):
            self.conflicts[put.key] = holder
            self.written.pop(put.key, None)
            self.leases.drop(put.key)
            log.warning("%s is taken by %s: not published", put.key, holder)
            return
        if found is not None and (found.value, found.lease) == (put.value, put.lease):
            self.written[put.key] = _Written(found.value, found.mod_revision, found.lease)
            return
        done = await self._kv.commit((_as_seen(found, put.key),), (put,))
        if done.done:
            self.written[put.key] = _Written(put.value or b"", done.revision, put.lease)
        else:
            self._changed.set()  # somebody else writes it right now

    async def _delete_all(self, gone: set[str]) -> None:
        for keys in _pieces(sorted(gone), _CHUNK):
            known = all(key in self.written for key in keys)
            compares = [self._as_known(key) for key in keys]
            if not (known and (await self._kv.commit(compares, [Put(key, None) for key in keys])).done):
                for key in keys:
                    await self._delete_one(key)
            for key in keys:
                self.written.pop(key, None)
                self._leftovers.pop(key, None)
                self.leases.drop(key)

    async def _delete_one(self, key: str) -> None:
        """Only what is as we wrote it, in this life or an earlier one."""
        known = self.written.get(key)
        expected = known.value if known else self._leftovers[key].encode()
        found = await self._kv.get(key)
        if found is not None and found.value == expected:
            await self._kv.commit((_as_seen(found, key),), (Put(key, None),))

    async def _verify(self) -> None:
        """Forget what is not as we left it: it is looked at one by one."""
        for keys in _pieces(sorted(self.written), _CHUNK):
            if not (await self._kv.commit([self._as_known(key) for key in keys])).done:
                for key in keys:
                    found = await self._kv.get(key)
                    if found is None or found.mod_revision != self.written[key].revision:
                        del self.written[key]
        for key in self.conflicts:
            self.written.pop(key, None)

    def _as_known(self, key: str) -> Compare:
        known = self.written.get(key)
        return Compare(key, "mod_revision", known.revision if known else 0)

    def _holder(self, found: Entry) -> str:
        """Who else uses an address or a service's name; empty if nobody does.

        Keys of addresses do not name their cluster, those of services not their host.
        """
        if found.key.startswith((f"{wire.SERVICES}/", f"{wire.SERVICE_EXPORTS}/")):
            return self._other_host(found)
        if not found.key.startswith(wire.IPS) or self._leftovers.get(found.key, "").encode() == found.value:
            return ""
        if found.key in self.written and self.written[found.key].value == found.value:
            return ""
        try:
            entry = wire.decode_ip(found.key.rpartition("/default/")[2], found.value, CILIUM)
        except Malformed:
            return ""
        ours = {one.ip for one in self._host.addresses} if self._host else set()
        if entry.host_ip in ours:
            return ""
        return entry.host_ip or f"identity {entry.identity}"

    def _other_host(self, found: Entry) -> str:
        """A host of our cluster that publishes a service of ours; its lease ends when it is gone."""
        ours = self._leftovers.get(found.key, "").encode() == found.value
        known = self.written.get(found.key)
        if (
            ours
            or not found.lease
            or found.lease in self.leases.all
            or (known and known.value == found.value)
        ):
            return ""
        return "another host of our cluster"

    async def _keep_in_mind(self, desired: Mapping[str, bytes]) -> None:
        """What another life has to know, before it is written: its keys, and the numbers of its label sets."""
        mind = dict(self._leftovers)
        mind |= {key: one.value.decode() for key, one in self.written.items()}
        mind |= {key: value.decode() for key, value in desired.items()}
        node = self.member.node
        for labels, number in self.allocator.known.items():
            mind[wire.identity_value_key(labels, node)] = str(number)
        if mind != self._remembered:
            await self._remember(mind)
            self._remembered = mind

    # -- the cluster

    async def _check_config(self) -> None:
        """Whether the cluster is what we think it is; says who we are if nobody did. Raises _Refused."""
        member = self.member
        key = wire.config_key(member.cluster)
        ours = ClusterConfig(member.cluster_id, True, False, member.max_clusters, True)
        if await self._kv.create(key, wire.encode_config(ours), await self.leases.of(key)):
            return
        found = await self._kv.get(key)
        try:
            theirs = wire.decode_config(found.value) if found else ours
        except Malformed as error:
            raise _Refused(f"{key} is not readable: {error}") from error
        if (theirs.id, theirs.max_clusters or 255) != (ours.id, ours.max_clusters):
            said = f"id {theirs.id}, {theirs.max_clusters or 255} clusters"
            text = f"{key} says {said}; this host is set to id {ours.id}, {ours.max_clusters}"
            raise _Refused(text)

    async def _announce(self) -> None:
        """Everything is written: say so, unless we did."""
        if self._announced or not self.member.announce:
            return
        await self._check_config()
        for resource in _CANARIES:
            key = wire.canary_key(self.member.cluster, resource)
            await self._kv.create(key, self._stamp(), await self.leases.of(key))
        self._announced = True

    async def _heartbeat(self) -> None:
        """Readers reconnect when nobody has written for two minutes; one writer is enough."""
        while True:
            found = await self._kv.get(wire.HEARTBEAT)
            if found is None or self._age_s(found.value) > 0.8 * self._heartbeat_s:
                lease = await self.leases.of(wire.HEARTBEAT)
                await self._kv.put(wire.HEARTBEAT, self._stamp(), lease)
            await asyncio.sleep(self._heartbeat_s / 2)

    def _age_s(self, stamp: bytes) -> float:
        try:
            return abs(self._clock() - datetime.fromisoformat(stamp.decode()).timestamp())
        except ValueError:
            return float("inf")

    def _stamp(self) -> bytes:
        return datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()

    # -- what others see

    def _numbers_changed(self) -> None:
        self._changed.set()
        self._on_change()

    def _fail(self, text: str, error: str) -> None:
        self.error = error or self.error
        self._tell(ok=False, text=text)

    def _tell_state(self) -> None:
        text = f"{len(self.written)} keys, {len(self.allocator.numbers)} identities"
        if self.waiting:
            text += f", {self.waiting} keys wait"
        if self.conflicts:
            text += f", {len(self.conflicts)} are held by others: {', '.join(sorted(self.conflicts)[:5])}"
        problems = self.allocator.problems
        if problems:
            text += f", {len(problems)} label sets without a number: {next(iter(problems.values()))}"
        self._tell(ok=not (self.conflicts or self.waiting or problems), text=text)

    def _tell(self, *, ok: bool, text: str) -> None:
        if (ok, text) != (self.ok, self.text):
            self.ok, self.text = ok, text
            self._on_change()


def _numbers(remembered: Mapping[str, str]) -> dict[str, int]:
    """The label sets and their numbers among remembered keys."""
    found = {}
    for key, value in remembered.items():
        if key.startswith(wire.IDENTITY_REFERENCES) and value.isascii() and value.isdigit():
            found[key.removeprefix(wire.IDENTITY_REFERENCES).rpartition("/")[0]] = int(value)
    return found


@lru_cache(maxsize=1 << 14)  # looked at in every round, and hardly ever different
def _ip_key(prefix: str) -> str:
    return wire.ip_key(wire.ip_entry(prefix, 0).prefix)


@lru_cache(maxsize=1 << 14)
def _ip_value(one: Address, number: int, host: str) -> bytes:
    return wire.encode_ip(wire.ip_entry(one.prefix, number, host, one.namespace, one.pod))


def _is_value(key: str) -> bool:
    return not key.startswith(wire.IDENTITY_REFERENCES)


def _chunks(puts: Sequence[Put]) -> Iterator[list[Put]]:
    """Pieces that fit into one transaction."""
    chunk: list[Put] = []
    size = 0
    for one in puts:
        weight = len(one.key) + len(one.value or b"")
        if chunk and (len(chunk) == _CHUNK or size + weight > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += weight
    if chunk:
        yield chunk


def _pieces(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _as_seen(found: Entry | None, key: str) -> Compare:
    return Compare(key, "mod_revision", found.mod_revision if found else 0)


def _message(errors: BaseExceptionGroup[Exception]) -> str:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def publishable(addresses: Sequence[str]) -> tuple[NodeAddress, ...]:
    """The addresses that others can reach, as a node's: no loopback, no link-local; IPv4 first, in order."""
    chosen = []
    for text in addresses:
        family, number = wire.parse_ip(text)
        if not any(_inside(number, one) for one in _PRIVATE[family]):
            chosen.append((family, number))
    return tuple(NodeAddress("InternalIP", wire.ip_text(*one)) for one in sorted(set(chosen)))


def _inside(number: int, cidr: wire.Cidr) -> bool:
    family, network, length = cidr
    shift = (32 if family == 4 else 128) - length
    return number >> shift == network >> shift


_PRIVATE = {
    4: [wire.parse_cidr(one) for one in ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "224.0.0.0/4")],
    6: [wire.parse_cidr(one) for one in ("::/127", "fe80::/10", "ff00::/8")],
}
