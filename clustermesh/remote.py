"""Pure: what clusters say in one store, as state machines; listings and events in, changes out.

Each cluster goes: configuration -> synced markers (canaries) -> entries -> synced; lost keeps everything.
Identities and addresses of all clusters that share a store stand under one prefix: an identity belongs to the
cluster that owns its number, an address to the owner of its identity. What belongs to nobody yet waits.

A key that is missing in a later listing is a deletion only if its cluster has said that it is complete, and
if not too much of it vanished at once; otherwise it is kept and shown as held.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar

from clustermesh import wire
from clustermesh.gojson import Malformed, shown
from clustermesh.kv import Entry, Event
from clustermesh.services import (
    Service,
    ServiceExport,
    decode_service,
    decode_service_export,
    encode_service,
    encode_service_export,
)
from clustermesh.trust import REMOTE_NODE, RangeSet, Trust, cidr_text, node_claims, pod_ranges
from clustermesh.wire import Cidr, ClusterConfig, IpEntry, Node

Item = TypeVar("Item")

CHUNK = 500  # entries between two chances for the event loop: a few milliseconds
FEW = 100  # the same for what takes longer
MAX_REFUSALS = 1000  # remembered per cluster, for people; all are counted
MAX_WAITING = 500_000  # entries of one kind whose cluster is not known or not complete; more are left out
HOLD_SHARE = 0.3  # more of a cluster's keys than this missing at once is held for a while
HOLD_AT_LEAST = 20  # keys; below, a third is nothing unusual


# --- changes


@dataclass(frozen=True, slots=True)
class IdentityUpserted:
    """`labels` are `source:key=value` texts, sorted."""

    cluster: str
    identity: int
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IdentityDeleted:
    cluster: str
    identity: int


@dataclass(frozen=True, slots=True)
class IpUpserted:
    """`name` and `namespace` of the pod or host, `node` the address of its host; each may be empty."""

    cluster: str
    cidr: Cidr
    identity: int
    name: str = ""
    namespace: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class IpDeleted:
    cluster: str
    cidr: Cidr


@dataclass(frozen=True, slots=True)
class NodeUpserted:
    cluster: str
    node: Node


@dataclass(frozen=True, slots=True)
class NodeDeleted:
    cluster: str
    name: str


@dataclass(frozen=True, slots=True)
class ServiceUpserted:
    cluster: str
    service: Service


@dataclass(frozen=True, slots=True)
class ServiceDeleted:
    """`name` is `<namespace>/<name>`."""

    cluster: str
    name: str


@dataclass(frozen=True, slots=True)
class ExportUpserted:
    cluster: str
    export: ServiceExport


@dataclass(frozen=True, slots=True)
class ExportDeleted:
    """`name` is `<namespace>/<name>`."""

    cluster: str
    name: str


@dataclass(frozen=True, slots=True)
class ClusterChanged:
    """Something about the cluster itself: read `Mesh.remotes[cluster]`."""

    cluster: str


Change = (
    IdentityUpserted | IdentityDeleted | IpUpserted | IpDeleted | NodeUpserted | NodeDeleted
    | ServiceUpserted | ServiceDeleted | ExportUpserted | ExportDeleted | ClusterChanged
)  # fmt: skip


# --- the parts of a store that are read


class Kind(Enum):
    CONFIG = "cluster configurations"
    CANARY = "synced markers"
    NODE = "nodes"
    IDENTITY = "identities"
    IP = "addresses"
    SERVICE = "services"
    EXPORT = "service exports"


@dataclass(frozen=True, slots=True)
class Part:
    """One watched prefix. In `cached` parts, which a mirror writes, every key names its cluster."""

    kind: Kind
    prefix: str
    cached: bool = False
    cluster: str = ""  # the part holds this cluster only

    def __str__(self) -> str:
        return self.prefix


def store_of(cluster: str) -> tuple[Part, ...]:
    """The parts of a store that is read for one cluster only: its own, or a mirror with copies of it."""
    kinds = (
        (Kind.NODE, f"{wire.NODES}/{cluster}/", f"{wire.CACHE_NODES}/{cluster}/"),
        (Kind.IDENTITY, f"{wire.IDENTITIES}/id/", f"{wire.CACHE_IDENTITIES}/{cluster}/id/"),
        (Kind.IP, f"{wire.IPS}/{wire.ADDRESS_SPACE}/", f"{wire.CACHE_IPS}/{cluster}/"),
        (Kind.SERVICE, f"{wire.SERVICES}/{cluster}/", f"{wire.CACHE_SERVICES}/{cluster}/"),
        (Kind.EXPORT, f"{wire.SERVICE_EXPORTS}/{cluster}/", f"{wire.CACHE_SERVICE_EXPORTS}/{cluster}/"),
    )
    parts = [
        Part(Kind.CONFIG, wire.config_key(cluster), cluster=cluster),
        Part(Kind.CANARY, f"{wire.SYNCED}{cluster}/", cluster=cluster),
    ]
    for kind, state, cache in kinds:
        parts += [Part(kind, state, cluster=cluster), Part(kind, cache, cached=True, cluster=cluster)]
    return tuple(parts)


SHARED_STORE = (
    Part(Kind.CONFIG, wire.CLUSTER_CONFIG),
    Part(Kind.CANARY, wire.SYNCED),
    Part(Kind.NODE, f"{wire.NODES}/"),
    Part(Kind.NODE, f"{wire.CACHE_NODES}/", cached=True),
    Part(Kind.IDENTITY, f"{wire.IDENTITIES}/id/"),
    Part(Kind.IDENTITY, f"{wire.CACHE_IDENTITIES}/", cached=True),
    Part(Kind.IP, f"{wire.IPS}/{wire.ADDRESS_SPACE}/"),
    Part(Kind.IP, f"{wire.CACHE_IPS}/", cached=True),
    Part(Kind.SERVICE, f"{wire.SERVICES}/"),
    Part(Kind.SERVICE, f"{wire.CACHE_SERVICES}/", cached=True),
    Part(Kind.EXPORT, f"{wire.SERVICE_EXPORTS}/"),
    Part(Kind.EXPORT, f"{wire.CACHE_SERVICE_EXPORTS}/", cached=True),
)

_MARKERS = {
    wire.NODES: (Kind.NODE, False),
    wire.IDENTITIES: (Kind.IDENTITY, False),
    wire.IPS: (Kind.IP, False),
    wire.CACHE_NODES: (Kind.NODE, True),
    wire.CACHE_IDENTITIES: (Kind.IDENTITY, True),
    wire.CACHE_IPS: (Kind.IP, True),
    wire.SERVICES: (Kind.SERVICE, False),
    wire.SERVICE_EXPORTS: (Kind.EXPORT, False),
    wire.CACHE_SERVICES: (Kind.SERVICE, True),
    wire.CACHE_SERVICE_EXPORTS: (Kind.EXPORT, True),
}
_POLICY = (Kind.NODE, Kind.IDENTITY, Kind.IP)  # what policy needs to be complete
_DATA = (*_POLICY, Kind.SERVICE, Kind.EXPORT)
_NAMED = frozenset({Kind.NODE, Kind.CANARY, Kind.SERVICE, Kind.EXPORT})  # their keys name the cluster
_KEPT = {"nodes": Kind.NODE, "services": Kind.SERVICE, "exports": Kind.EXPORT}  # on disk as they are written
_NUMBER = re.compile(rb'"ID":([0-9]{1,10})')


# --- one cluster


class State(Enum):
    """Where a cluster is on its way."""

    WAITING = "waiting for its configuration"
    REFUSED = "refused"
    SYNCING = "waiting for its synced markers"
    SYNCED = "synced"


@dataclass(slots=True, eq=False)
class Remote:
    """One cluster: what it said so far, and where it stands."""

    name: str
    config: ClusterConfig | None = None
    fault: str = ""  # why its configuration was refused
    markers: set[tuple[Kind, bool]] = field(default_factory=set)
    identities: dict[int, tuple[str, ...]] = field(default_factory=dict)
    addresses: int = 0  # keys
    nodes: dict[str, Node] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)  # by `<namespace>/<name>`
    exports: dict[str, ServiceExport] = field(default_factory=dict)
    node_claims: dict[Cidr, dict[str, int]] = field(default_factory=dict)  # address -> node -> identity
    refused: Counter[str] = field(default_factory=Counter)  # reason -> how often
    refusals: dict[str, str] = field(default_factory=dict)  # key -> why, now; bounded
    held_since: float = 0.0  # seconds of a steady clock; 0: nothing is held
    revision: int = 0

    @property
    def cached(self) -> bool:
        return self.config is not None and self.config.cached

    def is_open(self, kind: Kind) -> bool:
        """Whether the cluster's entries of a kind may be read: it has said that they are all there."""
        if self.config is None:
            return False
        return not self.config.synced_canaries or (kind, self.config.cached) in self.markers

    @property
    def state(self) -> State:
        if self.config is None:
            return State.REFUSED if self.fault else State.WAITING
        return State.SYNCED if all(map(self.is_open, _POLICY)) else State.SYNCING

    def refuse(self, key: str, error: Malformed) -> None:
        self.refused[error.reason] += 1
        if len(self.refusals) < MAX_REFUSALS:
            self.refusals[key] = f"{error.reason}: {error}"


class Claim(NamedTuple):
    """What one key says about an address. There are very many: they share what they can."""

    remote: Remote
    long: bool  # the key has a length although it is a host's: `10.0.0.1/32`
    identity: int
    name: str
    namespace: str
    node: str


Claims = Claim | tuple[Claim, ...]  # of one address or range; nearly always one
Saved = list[Any]  # a piece of what is kept on disk, as JSON has it: kind, cluster, rows


class _Later(Exception):  # noqa: N818 - control flow inside this module
    """The entry belongs to `remote`, which may not be read yet, or to a cluster that is not known."""

    def __init__(self, remote: Remote | None, *, for_host: bool = False) -> None:
        self.remote = remote
        self.for_host = for_host  # until a node says that it has the entry's host address


class _Elsewhere(Exception):  # noqa: N818 - control flow inside this module
    """The entry belongs to a cluster that is read from a store of its own."""


class _Book:
    """The keys of one part: whose they are, which wait, and which the last listing no longer had."""

    def __init__(self) -> None:
        self.owner: dict[str, Remote] = {}  # not of addresses
        self.claims: dict[int, Claims] = {}  # of addresses, by `_packed` range: there are very many
        self.waiting: dict[str, bytes] = {}
        self.for_host: dict[str, bytes] = {}  # those that wait for a node
        self.gone: dict[str, Remote] = {}


class Mesh:
    """All clusters of one store. Iterators that are returned do their work while consumed, chunk by chunk.

    ids: id -> cluster of all stores together, shared by their meshes. elsewhere: clusters that
    have a store of their own; what this one says of them is not read.
    """

    def __init__(
        self,
        trust: Trust,
        parts: Sequence[Part] = SHARED_STORE,
        *,
        ids: dict[int, str] | None = None,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        self.trust = trust
        self.parts = parts
        self.remotes: dict[str, Remote] = {}
        self.strays: Counter[str] = Counter()  # refused, and nobody's
        self.relist = False  # set when only a new listing can tell what is true
        self.elsewhere = elsewhere
        self._numbers: dict[int, int] = {}  # one object for each identity that addresses have
        self._ids = {} if ids is None else ids
        self._books = {part: _Book() for part in parts}
        self._by_id: dict[int, Remote] = {}
        self._node_owner: dict[str, Remote] = {}  # address -> cluster of the node that has it
        self._pods = RangeSet()  # of our own cluster's nodes
        self._touched: set[str] = set()
        self._new_clusters = False  # a configuration or a marker came: what waited may be readable now
        self._new_hosts = False  # an address of a node came
        self._speaker: Remote | None = None  # whose entry is being looked at, once that is known
        self._leaving: list[Remote] = []  # what they said goes
        for name in [part.cluster for part in parts if part.kind is Kind.CONFIG and part.cluster] or [
            name for name in trust.clusters if name not in elsewhere
        ]:
            self._remote(name)

    # -- what a driver calls

    def wanted(self, part: Part) -> bool:
        """Whether a part can hold what counts: of a store with one cluster, only one layout does."""
        if not part.cluster or part.kind not in _DATA:
            return True
        config = self._remote(part.cluster).config
        return config is not None and config.cached == part.cached

    def begin(self, part: Part) -> "Relisting":
        """A new listing of a part: only differences come out of it."""
        book = self._books[part]
        if part.kind is Kind.CANARY:
            for remote in self.remotes.values():
                remote.markers.clear()
        book.waiting.clear()
        book.for_host.clear()
        return Relisting(self, part, dict(book.owner), book.claims.copy())

    def listed(
        self, part: Part, entries: Sequence[Entry], now: float, *, doubtful: bool = False
    ) -> Iterator[list[Change]]:
        """A listing in one piece."""
        listing = self.begin(part)
        yield from listing.page(entries)
        yield from listing.end(now, doubtful=doubtful)

    def applied(self, part: Part, events: Sequence[Event], now: float) -> Iterator[list[Change]]:
        """What the events of a watch change. `now` is seconds of a steady clock, for what is held."""
        held = self._mass(part, events)
        for remote in set(held.values()):
            self._hold(remote, now)
        yield from self._chunked(events, lambda event: self._event(part, event, held))
        yield from self._wake()

    def release(self, names: Iterable[str]) -> Iterator[list[Change]]:
        """Believe the deletions of these clusters that were held."""
        chosen = [one for name in names if (one := self.remotes.get(name)) is not None and one.held_since]
        for remote in chosen:
            remote.held_since = 0.0
            self._touched.add(remote.name)
        for part, book in self._books.items():
            gone = [key for key, one in book.gone.items() if one in chosen and one.is_open(part.kind)]
            yield from self._chunked(gone, lambda key, part=part: self._delete(part, key))  # type: ignore[misc]
        yield from self._statuses()

    def leave(self, name: str) -> Iterator[list[Change]]:
        """Forget a cluster and what it said."""
        remote = self.remotes.pop(name, None)
        if remote is not None:
            self._give_back_id(remote)
            self._leaving.append(remote)
            self._touched.add(name)
        yield from self._wake()

    def expire(self) -> Iterator[list[Change]]:
        """Forget what all clusters but our own said; they stay, and say it again at the next listing."""
        self._leaving += [one for one in self.remotes.values() if one.name != self.trust.own_cluster]
        yield from self._wake()

    def protect(
        self, node: str, addresses: Iterable[Cidr], ranges: Iterable[Cidr] = ()
    ) -> Iterator[list[Change]]:
        """From now on these are this host's name and addresses, and ranges of ours, for which no other cluster may
        speak. What was said of them before goes."""
        trust = replace(
            self.trust, own_node=node, own_addresses=frozenset(addresses), protected=tuple(ranges)
        )
        if trust == self.trust:
            return
        self.trust = trust
        for part, book in self._books.items():
            yield from self._chunked(list(book.claims), partial(self._recheck, part))
            if part.kind is Kind.SERVICE:
                yield from self._chunked(list(book.owner.items()), partial(self._recheck_service, part))
        yield from self._statuses()

    def counts(self, remote: Remote) -> dict[str, int]:
        """How much there is of a cluster, and what is not in force."""
        held = sum(owner is remote for book in self._books.values() for owner in book.gone.values())
        return {
            "nodes": len(remote.nodes),
            "identities": len(remote.identities),
            "addresses": remote.addresses,
            "services": len(remote.services),
            "exports": len(remote.exports),
            "refused": len(remote.refusals),
            "held": held,
        }

    @property
    def waiting(self) -> int:
        """Entries whose cluster is not known or not complete yet."""
        return sum(len(book.waiting) + len(book.for_host) for book in self._books.values())

    def speaker(self, part: Part, event: Event) -> str:
        """The cluster that an event comes from, as far as its key or the identity in it tells; cheap."""
        if (owner := self._owner(part, event.key)) is not None:
            return owner.name
        rest = event.key[len(part.prefix) :]
        if part.cluster:
            return part.cluster
        if part.cached or part.kind not in {Kind.IDENTITY, Kind.IP}:
            return rest.partition("/")[0]
        found = _NUMBER.search(event.value or b"") if part.kind is Kind.IP else None
        text = found[1].decode() if found else rest
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
        remote = self._by_id.get(wire.identity_cluster(number, self.trust.max_clusters))
        return remote.name if remote is not None else ""

    # -- what is kept on disk

    def dump(self) -> Iterator[Saved]:
        """What is known, piece by piece; `restore` takes it back."""
        for remote in list(self.remotes.values()):
            if remote.config is not None:
                markers = sorted([kind.name, cached] for kind, cached in remote.markers)
                yield ["cluster", remote.name, wire.encode_config(remote.config).decode(), markers]
                nodes = list(remote.nodes.items())
                for start in range(0, len(nodes), FEW):
                    some = nodes[start : start + FEW]
                    yield [
                        "nodes",
                        remote.name,
                        [[name, wire.encode_node(one).decode()] for name, one in some],
                    ]
                numbers = list(remote.identities.items())
                for start in range(0, len(numbers), CHUNK):
                    yield ["identities", remote.name, numbers[start : start + CHUNK]]
                said = [(name, encode_service(one)) for name, one in remote.services.items()]
                for start in range(0, len(said), CHUNK):
                    yield _texts("services", remote, said[start : start + CHUNK])
                said = [(name, encode_service_export(one)) for name, one in remote.exports.items()]
                for start in range(0, len(said), CHUNK):
                    yield _texts("exports", remote, said[start : start + CHUNK])
        for cached, book in self._address_books().items():
            ranges = list(book.claims)
            for start in range(0, len(ranges), CHUNK):
                rows = [
                    [claim.remote.name, *_unpacked(packed), claim.long, *claim[2:]]
                    for packed in ranges[start : start + CHUNK]
                    for claim in _each(book.claims.get(packed))
                ]
                yield ["addresses", cached, rows]

    def restore(self, pieces: Iterable[Saved]) -> Iterator[list[Change]]:
        """Take back what `dump` gave, as far as today's trust allows it. Raises ValueError for anything else."""
        for piece in pieces:
            try:
                yield self._restore(*piece)
            except (TypeError, KeyError, IndexError, Malformed) as error:
                raise ValueError(f"not what was written: {error}") from error
        self._new_clusters = self._new_hosts = False
        yield from self._statuses()

    def _restore(self, kind: str, name: str, rows: Any, markers: Any = ()) -> list[Change]:
        changes: list[Change] = []
        if kind == "cluster":
            list(self._config(name, rows.encode()))
            if (remote := self.remotes.get(name)) is not None and remote.config is not None:
                remote.markers = {(Kind[one], cached) for one, cached in markers}
        elif kind in _KEPT:
            for one, text in rows:
                changes += self._restore_entry(_KEPT[kind], name, one, text.encode())
        elif kind == "identities":
            for number, labels in rows:
                changes += self._restore_identity(name, number, labels)
        elif kind == "addresses":
            for row in rows:
                changes += self._restore_address(*row)
        return changes

    def _restore_entry(self, kind: Kind, cluster: str, name: str, value: bytes) -> Iterable[Change]:
        part = self._part(kind, cluster)
        if part is None:
            return ()
        rest = name if part.cluster else f"{cluster}/{name}"
        return self._upsert(part, f"{part.prefix}{rest}", value)

    def _restore_identity(self, cluster: str, number: int, labels: Sequence[str]) -> Iterable[Change]:
        part, remote = self._part(Kind.IDENTITY, cluster), self.remotes.get(cluster)
        if part is None or remote is None or remote.config is None:
            return ()
        self.trust.check_range(remote.config.id, number)
        key = (
            f"{part.prefix}{number}"
            if part.cluster or not part.cached
            else f"{part.prefix}{cluster}/id/{number}"
        )
        self._books[part].owner[key] = remote
        texts = tuple(map(sys.intern, labels))
        remote.identities[number] = texts
        return (IdentityUpserted(cluster, number, texts),)

    def _restore_address(
        self, cluster: str, family: int, address: int, length: int, long: bool, *said: Any
    ) -> Iterable[Change]:
        part, remote = self._part(Kind.IP, cluster), self.remotes.get(cluster)
        if part is None or remote is None or remote.config is None:
            return ()
        cidr = (family, address, length)
        try:
            self.trust.check_prefix(cluster, cidr)
            identity, name, namespace, node = said
            number = self.trust.address_identity(remote.config.id, identity)
        except Malformed as error:
            remote.refuse(cidr_text(cidr), error)
            return ()
        claim = Claim(
            remote,
            long,
            self._numbers.setdefault(number, number),
            name,
            sys.intern(namespace),
            sys.intern(node),
        )
        remote.addresses += 1
        return self._claim(part, remote, cidr, long, claim)

    def _part(self, kind: Kind, cluster: str) -> Part | None:
        """The part in which a cluster's entries of a kind stand, if it is one of ours."""
        remote = self.remotes.get(cluster)
        if remote is None or remote.config is None:
            return None
        return next((one for one in self.parts if one.kind is kind and one.cached == remote.cached), None)

    def _address_books(self) -> dict[bool, _Book]:
        return {part.cached: book for part, book in self._books.items() if part.kind is Kind.IP}

    # -- from keys to clusters

    def _remote(self, name: str) -> Remote:
        if name not in self.remotes:
            self.remotes[name] = Remote(name)
            self._touched.add(name)
        return self.remotes[name]

    def _event(self, part: Part, event: Event, held: Mapping[str, Remote]) -> Iterable[Change]:
        self._speaker = None
        if event.value is not None:
            changes = self._upsert(part, event.key, event.value)
        elif event.key in held:
            self._books[part].gone[event.key] = held[event.key]
            changes = ()
        else:
            changes = self._delete(part, event.key)
        if self._speaker is not None:
            self._speaker.revision = event.revision
        return changes

    def _upsert(self, part: Part, key: str, value: bytes) -> Iterable[Change]:
        book = self._books[part]
        rest = key[len(part.prefix) :]
        if book.waiting or book.for_host or book.gone:
            book.waiting.pop(key, None)
            book.for_host.pop(key, None)
            book.gone.pop(key, None)
        self._speaker = None
        try:
            return self._accept(part, key, rest, value)
        except _Elsewhere:
            return self._delete(part, key)
        except _Later as later:
            # An address that moved to a cluster we cannot read is no longer what the old one said.
            owner = self._owner(part, key)
            changes = self._delete(part, key) if owner is not None and later.remote is not owner else ()
            if len(book.waiting) + len(book.for_host) < MAX_WAITING:
                (book.for_host if later.for_host else book.waiting)[key] = value
            else:
                self.strays["too_many_waiting"] += 1
            return changes
        except Malformed as error:
            remote = self._speaker or self._owner(part, key) or self._named(part, rest)
            if remote is None:
                self.strays[error.reason] += 1
            else:
                remote.refuse(key, error)
                self._touched.add(remote.name)
        return ()

    def _accept(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        match part.kind:
            case Kind.CONFIG:
                return self._config(rest or part.cluster, value)
            case Kind.CANARY:
                return self._marker(part, rest)
            case Kind.NODE:
                read = self._node
            case Kind.IDENTITY:
                read = self._identity
            case Kind.IP:
                read = self._ip
            case Kind.SERVICE:
                read = self._service
            case Kind.EXPORT:
                read = self._export
        return read(part, key, rest, value)

    def _named(self, part: Part, rest: str) -> Remote | None:
        """The cluster that a key names, if its part works that way."""
        if part.cluster:
            return self._remote(part.cluster)
        if part.kind is Kind.CONFIG:
            return self._remote(rest) if rest not in self.elsewhere else None
        if part.cached or part.kind in _NAMED:
            name = rest.partition("/")[0]
            if name in self.elsewhere:
                raise _Elsewhere
            return self.remotes.get(name)
        return None

    def _numbered(self, number: int) -> Remote | None:
        """The cluster that owns an identity."""
        cluster = wire.identity_cluster(number, self.trust.max_clusters)
        found = self._by_id.get(cluster)
        if found is None and self._ids.get(cluster) in self.elsewhere:
            raise _Elsewhere
        return found

    def _reader(self, part: Part, remote: Remote | None) -> tuple[Remote, ClusterConfig]:
        """The owner of an entry, if it may be read here and now."""
        if (
            remote is None
            or remote.config is None
            or remote.cached != part.cached
            or not remote.is_open(part.kind)
        ):
            raise _Later(remote)
        self._speaker = remote
        return remote, remote.config

    def _owner(self, part: Part, key: str) -> Remote | None:
        """Whose a key is, if it is in force."""
        if part.kind is not Kind.IP:
            return self._books[part].owner.get(key)
        found = self._claim_of(part, key)
        return found[1].remote if found else None

    def _claim_of(self, part: Part, key: str) -> tuple[Cidr, Claim] | None:
        """What a key of an address part says, if that is in force."""
        rest = key[len(part.prefix) :]
        named, rest = _cut(part, rest)
        try:
            cidr = wire.parse_cidr(rest)
        except Malformed:
            return None
        if rest != _address_text(cidr, long="/" in rest):
            return None  # another spelling is another key
        long = _is_long(rest, cidr)
        for claim in _each(self._books[part].claims.get(_packed(cidr))):
            if claim.long == long and named in {"", claim.remote.name}:
                return cidr, claim
        return None

    def _own(self, part: Part, key: str, remote: Remote, size: int, quota: int) -> Iterable[Change]:
        """Book a key as a cluster's; what another cluster said under it before goes away."""
        before = self._owner(part, key)
        if remote.refusals:
            remote.refusals.pop(key, None)
        if before is remote:
            return ()
        if size >= quota:
            raise Malformed("quota", f"cluster {remote.name} has {size} {part.kind.value} already")
        changes = self._delete(part, key) if before is not None else ()
        if part.kind is Kind.IP:
            remote.addresses += 1
        else:
            self._books[part].owner[key] = remote
        self._speaker = remote
        self._touched.add(remote.name)
        return changes

    # -- kinds of entries

    def _config(self, name: str, value: bytes) -> Iterable[Change]:
        if not wire.valid_cluster_name(name):
            self.strays["cluster_name"] += 1
            return ()
        if name in self.elsewhere:
            return ()
        if name not in self.remotes and len(self.remotes) > self.trust.max_clusters:
            self.strays["too_many_clusters"] += 1
            return ()
        remote = self._remote(name)
        self._touched.add(name)
        try:
            config = wire.decode_config(value, self.trust.compat)
            self.trust.check_config(name, config, self._ids)
        except Malformed as error:
            remote.fault = f"{error.reason}: {error}"
            remote.refuse(wire.config_key(name), error)
            return ()
        if remote.config is not None and (remote.config.id, remote.cached) != (config.id, config.cached):
            # It starts from nothing; its entries are read again.
            self._give_back_id(remote)
            self._leaving.append(remote)
            self.relist = True
            remote = self.remotes[name] = Remote(name, refused=remote.refused)
        remote.fault = ""
        remote.refusals.pop(wire.config_key(name), None)
        if remote.config != config:
            self._new_clusters = True
        remote.config = config
        self._by_id[config.id] = remote
        self._ids[config.id] = name
        return ()

    def _give_back_id(self, remote: Remote) -> None:
        if remote.config is not None and self._by_id.get(remote.config.id) is remote:
            del self._by_id[remote.config.id]
            self._ids.pop(remote.config.id, None)

    def _marker(self, part: Part, rest: str) -> Iterable[Change]:
        name, _, resource = (part.cluster, "", rest) if part.cluster else rest.partition("/")
        remote = self.remotes.get(name)
        if name in self.elsewhere:
            raise _Elsewhere
        if remote is None:
            raise _Later(None)
        marker = _MARKERS.get(resource)
        if marker is not None and marker not in remote.markers:
            remote.markers.add(marker)
            self._new_clusters = True
            self._touched.add(name)
        return ()

    def _identity(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        if part.cached and not part.cluster:
            head, slash, rest = rest.partition("/id/")
            if not slash or "/" in head:
                return ()  # a mirror copies the siblings of id/ too
        number = wire.decode_identity_number(rest)
        if not value:
            raise Malformed("empty_value", "an identity without labels")
        remote, config = self._reader(part, named or self._numbered(number))
        labels = wire.decode_identity(value, self.trust.compat)
        self.trust.check_identity(remote.name, config.id, number, labels)
        changes = [*self._own(part, key, remote, len(remote.identities), self.trust.quotas.identities)]
        texts = tuple(sorted(sys.intern(str(one)) for one in labels))
        if remote.identities.get(number) != texts:
            remote.identities[number] = texts
            changes.append(IdentityUpserted(remote.name, number, texts))
        return changes

    def _ip(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        rest = _cut(part, rest)[1]
        entry = wire.decode_ip(rest, value, self.trust.compat)
        if entry.identity == 0:  # an endpoint that has no identity yet
            return self._delete(part, key)
        owner = named or self._address_owner(entry.identity, entry.host_ip)
        if owner is None and entry.identity < wire.RESERVED_BELOW:
            raise _Later(None, for_host=True)
        remote, config = self._reader(part, owner)
        if remote.name == self.trust.own_cluster:
            if entry.cidr in self.trust.own_addresses:
                return ()  # what this host itself published
        else:
            self._check_ours(remote, entry)
        cidr, identity = self.trust.address(remote.name, config.id, entry)
        changes = [*self._own(part, key, remote, remote.addresses, self.trust.quotas.addresses)]
        long = _is_long(rest, cidr)
        identity = self._numbers.setdefault(identity, identity)
        claim = Claim(remote, long, identity, entry.pod, sys.intern(entry.namespace), entry.host_ip)
        changes += self._claim(part, remote, cidr, long, claim)
        return changes

    def _check_ours(self, remote: Remote, entry: IpEntry) -> None:
        """Nobody else speaks for nodes and pods of our own cluster."""
        self._check_our_node(remote, entry.ip)
        if self._pods and (ours := self._pods.overlap(entry.cidr)) is not None:
            raise Malformed("our_address", f"{entry.prefix} overlaps {cidr_text(ours)}, pods of our cluster")

    def _check_our_node(self, remote: Remote, address: str) -> None:
        owner = self._node_owner.get(address)
        if owner is not None and owner is not remote and owner.name == self.trust.own_cluster:
            raise Malformed("our_address", f"{address} is a node of our cluster")

    def _address_owner(self, identity: int, host_ip: str) -> Remote | None:
        """By the number; hosts have reserved numbers, and belong to the cluster of their node."""
        if identity < wire.RESERVED_BELOW:
            return self._node_owner.get(host_ip)
        if wire.identity_scope(identity):
            raise Malformed("identity_range", f"identity {identity} never leaves its host")
        return self._numbered(identity)

    def _claim(
        self, part: Part | None, remote: Remote, cidr: Cidr, long: bool, claim: Claim | None
    ) -> list[Change]:
        """Set or remove what one key says of an address; a change only if what counts changes."""
        old = self._in_force(remote, cidr)
        if part is not None:
            book, packed = self._books[part].claims, _packed(cidr)
            before = book.get(packed)
            if isinstance(before, tuple) and not isinstance(before, Claim):
                kept = [one for one in before if one.remote is not remote or one.long != long]
                kept += [claim] if claim is not None else []
                _put_claims(book, packed, kept)
            elif before is None or (before.remote is remote and before.long == long):
                _put_claims(book, packed, [claim] if claim is not None else [])
            elif claim is not None:
                book[packed] = (before, claim)
        return self._told(remote, cidr, old)

    def _told(self, remote: Remote, cidr: Cidr, old: Claim | None) -> list[Change]:
        """How an address changed for others, after `old` was what counted."""
        new = self._in_force(remote, cidr)
        if old == new:
            return []
        if new is None:
            return [IpDeleted(remote.name, cidr)]
        return [IpUpserted(remote.name, cidr, *new[2:])]

    def _in_force(self, remote: Remote, cidr: Cidr) -> Claim | None:
        """What a cluster says of an address that becomes a row of its own.

        That a node's address is a remote node's is said by the node; it would only hide the node's labels.
        """
        found: Claim | None = None
        for part, book in self._books.items():
            if part.kind is Kind.IP and part.cached == remote.cached:
                for one in _each(book.claims.get(_packed(cidr))):
                    if one.remote is remote and (found is None or found.long):
                        found = one
        nodes = remote.node_claims.get(cidr)
        if nodes and found is None:
            name = min(nodes)
            found = Claim(remote, False, nodes[name], name, "", "")
        return None if nodes and found is not None and found.identity == REMOTE_NODE else found

    def _node(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        node_name = _cut(part, rest)[1]
        remote, config = self._reader(part, named)
        node = wire.decode_node(node_name, value, self.trust.compat)
        self.trust.check_node(remote.name, config.id, node)
        changes = [*self._own(part, key, remote, len(remote.nodes), self.trust.quotas.nodes)]
        before = remote.nodes.get(node_name)
        if before == node:
            return changes
        changes += self._node_addresses(remote, before, node)
        remote.nodes[node_name] = node
        changes.append(NodeUpserted(remote.name, self._believed(remote, node)))
        return changes

    def _service(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        name = _cut(part, rest)[1]
        remote, config = self._reader(part, named)
        service = decode_service(name, value, self.trust.compat)
        self.trust.check_service(remote.name, config.id, service)
        changes = [*self._own(part, key, remote, len(remote.services), self.trust.quotas.services)]
        if remote.services.get(name) != service:
            remote.services[name] = service
            changes.append(ServiceUpserted(remote.name, service))
        return changes

    def _export(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        name = _cut(part, rest)[1]
        remote, _ = self._reader(part, named)
        export = decode_service_export(name, value, self.trust.compat)
        if export.cluster != remote.name:
            raise Malformed(
                "cluster_mismatch", f"the export is of {shown(export.cluster)}, not {remote.name}"
            )
        changes = [*self._own(part, key, remote, len(remote.exports), self.trust.quotas.services)]
        if remote.exports.get(name) != export:
            remote.exports[name] = export
            changes.append(ExportUpserted(remote.name, export))
        return changes

    def _recheck_service(self, part: Part, found: tuple[str, Remote]) -> Iterable[Change]:
        """Take back a service that points to what has become ours."""
        key, remote = found
        service = remote.services.get(_cut(part, key[len(part.prefix) :])[1])
        if service is None or remote.config is None:
            return ()
        try:
            self.trust.check_service(remote.name, remote.config.id, service)
        except Malformed as error:
            changes = self._delete(part, key)
            remote.refuse(key, error)
            return changes
        return ()

    def _believed(self, remote: Remote, node: Node) -> Node:
        """A node with those of its addresses that its cluster may speak for; this host's own node is left whole."""
        if remote.name == self.trust.own_cluster and node.name == self.trust.own_node:
            return node
        kept = tuple(
            one
            for one in node.addresses or ()
            if one.ip and node.name in remote.node_claims.get(wire.parse_cidr(one.ip), ())
        )
        return replace(node, addresses=kept)

    def _node_addresses(self, remote: Remote, before: Node | None, node: Node | None) -> list[Change]:
        """The claims of a node's own addresses; with `node` None they go."""
        some = node or before
        if some is None:
            return []
        if remote.name == self.trust.own_cluster:
            self._pods.replace(some.name, pod_ranges(node) if node else ())
            if some.name == self.trust.own_node:
                return []
        new = self._allowed_claims(remote, node) if node else {}
        old = {cidr for cidr, _ in node_claims(before, self.trust)} if before else set()
        changes: list[Change] = []
        for cidr in old - new.keys():
            counted = self._in_force(remote, cidr)
            claims = remote.node_claims.get(cidr, {})
            claims.pop(some.name, None)
            if not claims:
                remote.node_claims.pop(cidr, None)
                if self._node_owner.get(text := wire.ip_text(cidr[0], cidr[1])) is remote:
                    del self._node_owner[text]
            changes += self._told(remote, cidr, counted)
        for cidr, identity in new.items():
            counted = self._in_force(remote, cidr)
            text = wire.ip_text(cidr[0], cidr[1])
            self._new_hosts |= self._node_owner.get(text) is not remote
            self._node_owner[text] = remote
            remote.node_claims.setdefault(cidr, {})[some.name] = identity
            changes += self._told(remote, cidr, counted)
        return changes

    def _allowed_claims(self, remote: Remote, node: Node) -> dict[Cidr, int]:
        """A node's addresses that its cluster may speak for; a node cannot take over another cluster's node."""
        found: dict[Cidr, int] = {}
        for cidr, identity in node_claims(node, self.trust):
            try:
                self.trust.check_prefix(remote.name, cidr)
                self._check_our_node(remote, wire.ip_text(cidr[0], cidr[1]))
                found[cidr] = identity
            except Malformed as error:
                remote.refuse(f"node {node.name} {cidr_text(cidr)}", error)
        return found

    # -- leaving

    def _delete(self, part: Part, key: str) -> Iterable[Change]:
        book = self._books[part]
        book.waiting.pop(key, None)
        book.for_host.pop(key, None)
        book.gone.pop(key, None)
        if part.kind is Kind.IP:
            found = self._claim_of(part, key)
            remote = found[1].remote if found else None
        else:
            found, remote = None, book.owner.pop(key, None)
        if remote is None:
            if (named := self._named_before(key)) is not None:
                named.refusals.pop(key, None)
            return ()
        self._speaker = remote
        self._touched.add(remote.name)
        remote.refusals.pop(key, None)
        if found is not None:
            remote.addresses -= 1
            return self._claim(part, remote, found[0], found[1].long, None)
        return self._gone(part, remote, key[len(part.prefix) :])

    def _gone(self, part: Part, remote: Remote, rest: str) -> Iterable[Change]:
        """What the deletion of an entry that was in force changes."""
        match part.kind:
            case Kind.IDENTITY:
                number = int(rest.rpartition("/")[2])
                remote.identities.pop(number, None)
                return [IdentityDeleted(remote.name, number)]
            case Kind.NODE:
                name = _cut(part, rest)[1]
                changes = self._node_addresses(remote, remote.nodes.pop(name, None), None)
                return [*changes, NodeDeleted(remote.name, name)]
            case Kind.SERVICE:
                name = _cut(part, rest)[1]
                remote.services.pop(name, None)
                return [ServiceDeleted(remote.name, name)]
            case Kind.EXPORT:
                name = _cut(part, rest)[1]
                remote.exports.pop(name, None)
                return [ExportDeleted(remote.name, name)]
            case _:
                return ()  # configurations and markers: their deletion means nothing

    def _named_before(self, key: str) -> Remote | None:
        """Who remembers a refusal of this key."""
        return next((one for one in self.remotes.values() if key in one.refusals), None)

    def _recheck(self, part: Part, packed: int) -> Iterable[Change]:
        """Take back what is no longer allowed to be said of a range."""
        changes: list[Change] = []
        cidr = _unpacked(packed)
        for claim in _each(self._books[part].claims.get(packed)):
            try:
                self.trust.check_prefix(claim.remote.name, cidr)
            except Malformed as error:
                claim.remote.refuse(cidr_text(cidr), error)
                claim.remote.addresses -= 1
                self._touched.add(claim.remote.name)
                changes += self._claim(part, claim.remote, cidr, claim.long, None)
        return changes

    def _left(self, remote: Remote) -> Iterator[list[Change]]:
        """Everything that a cluster said goes."""
        for book in self._books.values():
            for keys in (book.owner, book.gone):
                for key in [key for key, owner in keys.items() if owner is remote]:
                    del keys[key]
        yield from self._chunked(list(remote.nodes), lambda name: self._node_left(remote, name))
        for part, book in self._books.items():
            yield from self._chunked(list(book.claims), partial(self._ip_left, part, remote))
        numbers, remote.identities = list(remote.identities), {}
        yield from self._chunked(numbers, lambda number: [IdentityDeleted(remote.name, number)])
        services, remote.services = list(remote.services), {}
        yield from self._chunked(services, lambda name: [ServiceDeleted(remote.name, name)])
        exports, remote.exports = list(remote.exports), {}
        yield from self._chunked(exports, lambda name: [ExportDeleted(remote.name, name)])
        remote.refusals.clear()
        remote.addresses = 0
        remote.held_since = 0.0

    def _node_left(self, remote: Remote, name: str) -> Iterable[Change]:
        changes = self._node_addresses(remote, remote.nodes.pop(name, None), None)
        return [*changes, NodeDeleted(remote.name, name)]

    def _ip_left(self, part: Part, remote: Remote, packed: int) -> Iterable[Change]:
        changes: list[Change] = []
        for claim in _each(self._books[part].claims.get(packed)):
            if claim.remote is remote:
                changes += self._claim(part, remote, _unpacked(packed), claim.long, None)
        return changes

    def _mass(self, part: Part, events: Sequence[Event]) -> dict[str, Remote]:
        """Deletions that would take so much of a cluster at once that they are not believed yet."""
        last = {event.key: event for event in events} if len(events) >= HOLD_AT_LEAST else {}
        gone = [key for key, event in last.items() if event.value is None]
        if len(gone) < HOLD_AT_LEAST or part.kind not in _DATA:
            return {}
        owners = {key: remote for key in gone if (remote := self._owner(part, key)) is not None}
        lost = Counter(owners.values())
        mass = {one for one, count in lost.items() if self._is_mass(part, one, count)}
        return {key: remote for key, remote in owners.items() if remote in mass}

    def _is_mass(self, part: Part, remote: Remote, lost: int) -> bool:
        sizes = {
            Kind.NODE: len(remote.nodes), Kind.IDENTITY: len(remote.identities),
            Kind.SERVICE: len(remote.services), Kind.EXPORT: len(remote.exports),
        }  # fmt: skip
        size = sizes.get(part.kind, remote.addresses)
        return lost >= HOLD_AT_LEAST and lost > HOLD_SHARE * size

    def _hold(self, remote: Remote, now: float) -> None:
        remote.held_since = remote.held_since or now
        self._touched.add(remote.name)

    def _sweep(
        self, part: Part, missing: dict[str, Remote], now: float, *, doubtful: bool
    ) -> Iterator[list[Change]]:
        """Delete what a listing no longer has, as far as the clusters are complete; hold the rest."""
        if not missing:
            return
        book = self._books[part]
        for remote, count in Counter(missing.values()).items():
            if part.kind in _DATA and (doubtful or self._is_mass(part, remote, count)):
                self._hold(remote, now)
        sweep: list[str] = []
        for number, (key, remote) in enumerate(missing.items()):
            if not number % CHUNK:
                yield []
            if remote.is_open(part.kind) and not remote.held_since:
                sweep.append(key)
            else:
                book.gone[key] = remote
                self._touched.add(remote.name)
        yield from self._chunked(sweep, lambda key: self._delete(part, key))

    def _wake(self) -> Iterator[list[Change]]:
        """Let go who leaves; look again at what waited, if something that it can wait for is new."""
        while self._leaving:
            yield from self._left(self._leaving.pop())
        while self._new_clusters or self._new_hosts:
            clusters, self._new_clusters, self._new_hosts = self._new_clusters, False, False
            for part, book in self._books.items():
                waiting = [*book.for_host.items(), *(book.waiting.items() if clusters else ())]
                yield from self._chunked(waiting, lambda pair, part=part: self._upsert(part, *pair))  # type: ignore[misc]
                if clusters and part.kind in _DATA:
                    done = [k for k, r in book.gone.items() if r.is_open(part.kind) and not r.held_since]
                    yield from self._chunked(done, lambda key, part=part: self._delete(part, key))  # type: ignore[misc]
        yield from self._statuses()

    def _statuses(self) -> Iterator[list[Change]]:
        if self._touched:
            touched, self._touched = sorted(self._touched), set()
            yield [ClusterChanged(name) for name in touched]

    @staticmethod
    def _chunked(items: Sequence[Item], act: Callable[[Item], Iterable[Change]]) -> Iterator[list[Change]]:
        for start in range(0, len(items), CHUNK):
            changes: list[Change] = []
            for item in items[start : start + CHUNK]:
                changes.extend(act(item))
            yield changes


def _texts(kind: str, remote: Remote, said: Iterable[tuple[str, bytes]]) -> Saved:
    return [kind, remote.name, [[name, value.decode()] for name, value in said]]


def _each(claims: Claims | None) -> tuple[Claim, ...]:
    """One claim or several as a tuple of them."""
    if claims is None:
        return ()
    return (claims,) if isinstance(claims, Claim) else claims


def _packed(cidr: Cidr) -> int:
    """A range as one number: half the memory of a tuple."""
    family, number, length = cidr
    return number << 9 | length << 1 | (family == 6)


def _unpacked(packed: int) -> Cidr:
    return (6 if packed & 1 else 4), packed >> 9, packed >> 1 & 255


def _put_claims(book: dict[int, Claims], packed: int, claims: Sequence[Claim]) -> None:
    if not claims:
        book.pop(packed, None)
    else:
        book[packed] = claims[0] if len(claims) == 1 else tuple(claims)


def _cut(part: Part, rest: str) -> tuple[str, str]:
    """The cluster that a key names, or nothing, and what comes after it."""
    if part.cluster or not (part.cached or part.kind in _NAMED):
        return "", rest
    name, _, rest = rest.partition("/")
    return name, rest


def _is_long(rest: str, cidr: Cidr) -> bool:
    """Whether a key spells out the length of a single address: `10.0.0.1` and `10.0.0.1/32` are two keys."""
    return cidr[2] == (32 if cidr[0] == 4 else 128) and "/" in rest


def _address_text(cidr: Cidr, *, long: bool) -> str:
    text = wire.ip_text(cidr[0], cidr[1])
    return f"{text}/{cidr[2]}" if long else text


class Relisting:
    """A listing under way, page by page. One that is never ended deletes nothing."""

    def __init__(self, mesh: Mesh, part: Part, missing: dict[str, Remote], claims: dict[int, Claims]) -> None:
        self._mesh = mesh
        self._part = part
        self._missing = missing  # keys of former listings that this one has not shown yet
        self._claims = claims  # the same of addresses

    def page(self, entries: Sequence[Entry]) -> Iterator[list[Change]]:
        """Some of the entries, in any order."""
        return self._mesh._chunked(entries, self._upsert)

    def _upsert(self, entry: Entry) -> Iterable[Change]:
        if self._claims:
            self._seen(entry.key)
        else:
            self._missing.pop(entry.key, None)
        return self._mesh._upsert(self._part, entry.key, entry.value)

    def _seen(self, key: str) -> None:
        named, rest = _cut(self._part, key[len(self._part.prefix) :])
        try:
            cidr = wire.parse_cidr(rest)
        except Malformed:
            return
        before = self._claims.get(_packed(cidr))
        if before is None or rest != _address_text(cidr, long="/" in rest):
            return
        long = _is_long(rest, cidr)
        kept = [one for one in _each(before) if one.long != long or named not in {"", one.remote.name}]
        _put_claims(self._claims, _packed(cidr), kept)

    def end(self, now: float, *, doubtful: bool = False) -> Iterator[list[Change]]:
        """That was everything. `now` is seconds of a steady clock, for what is held.

        doubtful: the store is not the one it was (wiped, restored), so what is missing is held.
        """
        for number, (packed, claims) in enumerate(self._claims.items()):
            if not number % CHUNK:
                yield []  # a turn for others
            cidr = _unpacked(packed)
            for claim in _each(claims):
                long = claim.long or cidr[2] != (32 if cidr[0] == 4 else 128)
                text = _address_text(cidr, long=long)
                named = self._part.cached and not self._part.cluster
                rest = f"{claim.remote.name}/{text}" if named else text
                self._missing[f"{self._part.prefix}{rest}"] = claim.remote
        yield from self._mesh._sweep(self._part, self._missing, now, doubtful=doubtful)
        yield from self._mesh._wake()
