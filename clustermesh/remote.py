"""Pure: what clusters say in one store, as state machines; listings and events in, changes out.

Each cluster goes: configuration -> synced markers (canaries) -> entries -> synced; lost keeps everything.
Identities and addresses of all clusters that share a store stand under one prefix: an identity belongs to the
cluster that owns its number, an address to the owner of its identity. What belongs to nobody yet waits.

A key that is missing in a later listing is a deletion only if its cluster has said that it is complete, and
if not too much of it vanished at once; otherwise it is kept and shown as held.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, TypeVar

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.kv import Entry, Event
from clustermesh.trust import REMOTE_NODE, Trust, cidr_text, node_claims
from clustermesh.wire import Cidr, ClusterConfig, Node

Item = TypeVar("Item")

CHUNK = 500  # entries between two chances for the event loop: a few milliseconds
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
class ClusterChanged:
    """Something about the cluster itself: read `Mesh.remotes[cluster]`."""

    cluster: str


Change = (
    IdentityUpserted | IdentityDeleted | IpUpserted | IpDeleted | NodeUpserted | NodeDeleted | ClusterChanged
)


# --- the parts of a store that are read


class Kind(Enum):
    CONFIG = "cluster configurations"
    CANARY = "synced markers"
    NODE = "nodes"
    IDENTITY = "identities"
    IP = "addresses"


@dataclass(frozen=True, slots=True)
class Part:
    """One watched prefix. In `cached` parts, which a mirror writes, every key names its cluster."""

    kind: Kind
    prefix: str
    cached: bool = False
    cluster: str = ""  # the part holds this cluster only

    def __str__(self) -> str:
        return self.prefix


SHARED_STORE = (
    Part(Kind.CONFIG, wire.CLUSTER_CONFIG),
    Part(Kind.CANARY, wire.SYNCED),
    Part(Kind.NODE, f"{wire.NODES}/"),
    Part(Kind.NODE, f"{wire.CACHE_NODES}/", cached=True),
    Part(Kind.IDENTITY, f"{wire.IDENTITIES}/id/"),
    Part(Kind.IDENTITY, f"{wire.CACHE_IDENTITIES}/", cached=True),
    Part(Kind.IP, f"{wire.IPS}/{wire.ADDRESS_SPACE}/"),
    Part(Kind.IP, f"{wire.CACHE_IPS}/", cached=True),
)

_MARKERS = {
    wire.NODES: (Kind.NODE, False),
    wire.IDENTITIES: (Kind.IDENTITY, False),
    wire.IPS: (Kind.IP, False),
    wire.CACHE_NODES: (Kind.NODE, True),
    wire.CACHE_IDENTITIES: (Kind.IDENTITY, True),
    wire.CACHE_IPS: (Kind.IP, True),
}
_DATA = (Kind.NODE, Kind.IDENTITY, Kind.IP)


# --- one cluster


class State(Enum):
    """Where a cluster is on its way."""

    WAITING = "waiting for its configuration"
    REFUSED = "refused"
    SYNCING = "waiting for its synced markers"
    SYNCED = "synced"


class Claim(NamedTuple):
    """One statement about an address. `origin` see `_origin`, or `node:<name>`, which ranks lower."""

    origin: str
    identity: int
    name: str
    namespace: str
    node: str

    @property
    def rank(self) -> tuple[bool, str]:
        return self.origin.startswith("node:"), self.origin


@dataclass(slots=True)
class Remote:
    """One cluster: what it said so far, and where it stands."""

    name: str
    config: ClusterConfig | None = None
    fault: str = ""  # why its configuration was refused
    markers: set[tuple[Kind, bool]] = field(default_factory=set)
    identities: dict[int, tuple[str, ...]] = field(default_factory=dict)
    claims: dict[Cidr, tuple[Claim, ...]] = field(default_factory=dict)  # the first is the one that counts
    nodes: dict[str, Node] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)  # reason -> how often
    refusals: dict[str, str] = field(default_factory=dict)  # key -> why, now; bounded
    held_since: float = 0.0  # wall clock; 0: nothing is held
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
        return State.SYNCED if all(map(self.is_open, _DATA)) else State.SYNCING

    def refuse(self, key: str, error: Malformed) -> None:
        self.refused[error.reason] += 1
        if len(self.refusals) < MAX_REFUSALS:
            self.refusals[key] = f"{error.reason}: {error}"


class _Later(Exception):  # noqa: N818 - control flow inside this module
    """The entry belongs to `remote`, which may not be read yet, or to a cluster that is not known."""

    def __init__(self, remote: Remote | None, *, for_host: bool = False) -> None:
        self.remote = remote
        self.for_host = for_host  # until a node says that it has the entry's host address


class _Book:
    """The keys of one part: whose they are, which wait, and which the last listing no longer had."""

    def __init__(self) -> None:
        self.owner: dict[str, Remote] = {}
        self.waiting: dict[str, bytes] = {}
        self.for_host: dict[str, bytes] = {}  # those that wait for a node
        self.gone: dict[str, Remote] = {}


class Mesh:
    """All clusters of one store. Iterators that are returned do their work while consumed, chunk by chunk."""

    def __init__(self, trust: Trust, parts: Sequence[Part] = SHARED_STORE) -> None:
        self.trust = trust
        self.parts = parts
        self.remotes: dict[str, Remote] = {}
        self.strays: Counter[str] = Counter()  # refused, and nobody's
        self.relist = False  # set when only a new listing can tell what is true
        self._books = {part: _Book() for part in parts}
        self._by_id: dict[int, Remote] = {}
        self._node_owner: dict[str, Remote] = {}  # address -> cluster of the node that has it
        self._touched: set[str] = set()
        self._new_clusters = False  # a configuration or a marker came: what waited may be readable now
        self._new_hosts = False  # an address of a node came
        self._speaker: Remote | None = None  # whose entry is being looked at, once that is known
        for name in trust.clusters:
            self._remote(name)

    # -- what a driver calls

    def begin(self, part: Part) -> "Relisting":
        """A new listing of a part: only differences come out of it."""
        book = self._books[part]
        if part.kind is Kind.CANARY:
            for remote in self.remotes.values():
                remote.markers.clear()
        book.waiting.clear()
        book.for_host.clear()
        return Relisting(self, part, dict(book.owner))

    def listed(
        self, part: Part, entries: Sequence[Entry], now: float, *, doubtful: bool = False
    ) -> Iterator[list[Change]]:
        """A listing in one piece."""
        listing = self.begin(part)
        yield from listing.page(entries)
        yield from listing.end(now, doubtful=doubtful)

    def applied(self, part: Part, events: Sequence[Event]) -> Iterator[list[Change]]:
        """What the events of a watch change."""
        yield from self._chunked(events, lambda event: self._event(part, event))
        yield from self._wake()

    def release(self) -> Iterator[list[Change]]:
        """Believe the deletions that were held."""
        for remote in self.remotes.values():
            if remote.held_since:
                remote.held_since = 0.0
                self._touched.add(remote.name)
        for part, book in self._books.items():
            gone = [key for key, remote in book.gone.items() if remote.is_open(part.kind)]
            yield from self._chunked(gone, lambda key, part=part: self._delete(part, key))  # type: ignore[misc]
        yield from self._statuses()

    def protect(self, node: str, addresses: Iterable[Cidr]) -> None:
        """From now on these are this host's name and addresses, for which no cluster may speak."""
        self.trust = replace(self.trust, own_node=node, own_addresses=frozenset(addresses))

    def counts(self, remote: Remote) -> dict[str, int]:
        """How much there is of a cluster, and what is not in force."""
        held = sum(owner is remote for book in self._books.values() for owner in book.gone.values())
        return {
            "nodes": len(remote.nodes),
            "identities": len(remote.identities),
            "addresses": len(remote.claims),
            "refused": len(remote.refusals),
            "held": held,
        }

    @property
    def waiting(self) -> int:
        """Entries whose cluster is not known or not complete yet."""
        return sum(len(book.waiting) + len(book.for_host) for book in self._books.values())

    # -- from keys to clusters

    def _remote(self, name: str) -> Remote:
        if name not in self.remotes:
            self.remotes[name] = Remote(name)
            self._touched.add(name)
        return self.remotes[name]

    def _event(self, part: Part, event: Event) -> Iterable[Change]:
        changes = (
            self._delete(part, event.key)
            if event.value is None
            else self._upsert(part, event.key, event.value)
        )
        owner = self._books[part].owner.get(event.key)
        if owner is not None:
            owner.revision = event.revision
        return changes

    def _upsert(self, part: Part, key: str, value: bytes) -> Iterable[Change]:
        book = self._books[part]
        rest = key[len(part.prefix) :]
        book.waiting.pop(key, None)
        book.for_host.pop(key, None)
        book.gone.pop(key, None)
        owner = book.owner.get(key)
        self._speaker = None
        try:
            return self._accept(part, key, rest, value)
        except _Later as later:
            # An address that moved to a cluster we cannot read is no longer what the old one said.
            changes = self._delete(part, key) if owner is not None and later.remote is not owner else ()
            if len(book.waiting) + len(book.for_host) < MAX_WAITING:
                (book.for_host if later.for_host else book.waiting)[key] = value
            else:
                self.strays["too_many_waiting"] += 1
            return changes
        except Malformed as error:
            remote = self._speaker or owner or self._named(part, rest)
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
                return self._node(part, key, rest, value)
            case Kind.IDENTITY:
                return self._identity(part, key, rest, value)
            case Kind.IP:
                return self._ip(part, key, rest, value)

    def _named(self, part: Part, rest: str) -> Remote | None:
        """The cluster that a key names, if its part works that way."""
        if part.cluster:
            return self._remote(part.cluster)
        if part.kind is Kind.CONFIG:
            return self._remote(rest)
        if part.cached or part.kind in {Kind.NODE, Kind.CANARY}:
            return self.remotes.get(rest.partition("/")[0])
        return None

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

    def _own(self, part: Part, key: str, remote: Remote, size: int, quota: int) -> Iterable[Change]:
        """Book a key as a cluster's; what another cluster said under it before goes away."""
        book = self._books[part]
        before = book.owner.get(key)
        if before is remote:
            remote.refusals.pop(key, None)
            return ()
        if size >= quota:
            raise Malformed("quota", f"cluster {remote.name} has {size} {part.kind.value} already")
        changes = self._delete(part, key) if before is not None else ()
        book.owner[key] = remote
        remote.refusals.pop(key, None)
        self._touched.add(remote.name)
        return changes

    # -- kinds of entries

    def _config(self, name: str, value: bytes) -> Iterable[Change]:
        if not wire.valid_cluster_name(name):
            self.strays["cluster_name"] += 1
            return ()
        if name not in self.remotes and len(self.remotes) > self.trust.max_clusters:
            self.strays["too_many_clusters"] += 1
            return ()
        remote = self._remote(name)
        self._touched.add(name)
        try:
            config = wire.decode_config(value, self.trust.compat)
            holders = {number: holder.name for number, holder in self._by_id.items()}
            self.trust.check_config(name, config, holders)
        except Malformed as error:
            remote.fault = f"{error.reason}: {error}"
            remote.refuse(wire.config_key(name), error)
            return ()
        remote.fault = ""
        remote.refusals.pop(wire.config_key(name), None)
        changes: Iterable[Change] = ()
        if remote.config is not None and (remote.config.id, remote.cached) != (config.id, config.cached):
            changes = self._drain(remote)
        if remote.config != config:
            self._new_clusters = True
        remote.config = config
        self._by_id[config.id] = remote
        return changes

    def _drain(self, remote: Remote) -> list[Change]:
        """A cluster that changed its id starts from nothing; its entries are read again."""
        changes = self._forget(remote)
        if remote.config is not None:
            self._by_id.pop(remote.config.id, None)
        self.relist = True
        return changes

    def _forget(self, remote: Remote) -> list[Change]:
        changes: list[Change] = [NodeDeleted(remote.name, name) for name in remote.nodes]
        changes += [
            IpDeleted(remote.name, cidr) for cidr, claims in remote.claims.items() if _in_force(claims)
        ]
        changes += [IdentityDeleted(remote.name, number) for number in remote.identities]
        for book in self._books.values():
            for keys in (book.owner, book.gone):
                for key in [key for key, owner in keys.items() if owner is remote]:
                    del keys[key]
        self._node_owner = {ip: owner for ip, owner in self._node_owner.items() if owner is not remote}
        remote.nodes.clear()
        remote.claims.clear()
        remote.identities.clear()
        remote.refusals.clear()
        return changes

    def _marker(self, part: Part, rest: str) -> Iterable[Change]:
        name, _, resource = (part.cluster, "", rest) if part.cluster else rest.partition("/")
        remote = self.remotes.get(name)
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
        if part.cached:
            head, slash, rest = rest.partition("/id/")
            if not slash or "/" in head:
                return ()  # a mirror copies the siblings of id/ too
        number = wire.decode_identity_number(rest)
        if not value:
            raise Malformed("empty_value", "an identity without labels")
        owner = named or self._by_id.get(wire.identity_cluster(number, self.trust.max_clusters))
        remote, config = self._reader(part, owner)
        labels = wire.decode_identity(value, self.trust.compat)
        self.trust.check_identity(remote.name, config.id, number, labels)
        changes = [*self._own(part, key, remote, len(remote.identities), self.trust.quotas.identities)]
        texts = tuple(sorted(map(str, labels)))
        if remote.identities.get(number) != texts:
            remote.identities[number] = texts
            changes.append(IdentityUpserted(remote.name, number, texts))
        return changes

    def _ip(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        named = self._named(part, rest)
        if part.cached:
            rest = rest.partition("/")[2]
        entry = wire.decode_ip(rest, value, self.trust.compat)
        if entry.identity == 0:  # an endpoint that has no identity yet
            return self._delete(part, key) if key in self._books[part].owner else ()
        owner = named or self._address_owner(entry.identity, entry.host_ip)
        if owner is None and entry.identity < wire.RESERVED_BELOW:
            raise _Later(None, for_host=True)
        remote, config = self._reader(part, owner)
        if remote.name == self.trust.own_cluster and entry.cidr in self.trust.own_addresses:
            return ()  # what this host itself published
        cidr, identity = self.trust.address(remote.name, config.id, entry)
        changes = [*self._own(part, key, remote, len(remote.claims), self.trust.quotas.addresses)]
        claim = Claim(_origin(rest), identity, entry.pod, entry.namespace, entry.host_ip)
        changes += self._claim(remote, cidr, claim.origin, claim)
        return changes

    def _address_owner(self, identity: int, host_ip: str) -> Remote | None:
        """By the number; hosts have reserved numbers, and belong to the cluster of their node."""
        if identity < wire.RESERVED_BELOW:
            return self._node_owner.get(host_ip)
        if wire.identity_scope(identity):
            raise Malformed("identity_range", f"identity {identity} never leaves its host")
        return self._by_id.get(wire.identity_cluster(identity, self.trust.max_clusters))

    def _claim(self, remote: Remote, cidr: Cidr, origin: str, claim: Claim | None) -> list[Change]:
        """Set or remove one statement about an address; a change only if the one that counts changes."""
        before = remote.claims.get(cidr, ())
        after = tuple(one for one in before if one.origin != origin)
        if claim is not None:
            after = (claim,) if not after else tuple(sorted((*after, claim), key=lambda one: one.rank))
        if after:
            remote.claims[cidr] = after
        else:
            remote.claims.pop(cidr, None)
        old, new = _in_force(before), _in_force(after)
        if old == new:
            return []
        if new is None:
            return [IpDeleted(remote.name, cidr)]
        _, identity, name, namespace, node = new
        return [IpUpserted(remote.name, cidr, identity, name, namespace, node)]

    def _node(self, part: Part, key: str, rest: str, value: bytes) -> Iterable[Change]:
        name, _, node_name = (part.cluster, "", rest) if part.cluster else rest.partition("/")
        remote, config = self._reader(part, self.remotes.get(name))
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

    def _believed(self, remote: Remote, node: Node) -> Node:
        """A node with those of its addresses that its cluster may speak for; this host's own node is left whole."""
        if remote.name == self.trust.own_cluster and node.name == self.trust.own_node:
            return node
        kept = tuple(
            one for one in node.addresses or () if one.ip and wire.parse_cidr(one.ip) in remote.claims
        )
        return replace(node, addresses=kept)

    def _node_addresses(self, remote: Remote, before: Node | None, node: Node | None) -> list[Change]:
        """The claims of a node's own addresses; with `node` None they go."""
        some = node or before
        if some is None:
            return []
        old = dict(node_claims(before, self.trust)) if before else {}
        new: dict[Cidr, int] = {}
        for cidr, identity in node_claims(node, self.trust) if node else ():
            if remote.name == self.trust.own_cluster and some.name == self.trust.own_node:
                continue
            try:
                self.trust.check_prefix(remote.name, cidr)
                new[cidr] = identity
            except Malformed as error:
                remote.refuse(f"node {some.name} {cidr_text(cidr)}", error)
        changes: list[Change] = []
        origin = f"node:{some.name}"
        for cidr in old.keys() - new.keys():
            text = wire.ip_text(cidr[0], cidr[1])
            if self._node_owner.get(text) is remote:
                del self._node_owner[text]
            changes += self._claim(remote, cidr, origin, None)
        for cidr, identity in new.items():
            text = wire.ip_text(cidr[0], cidr[1])
            self._new_hosts |= self._node_owner.get(text) is not remote
            self._node_owner[text] = remote
            claim = Claim(origin, identity, some.name, "", "")
            changes += self._claim(remote, cidr, origin, claim)
        return changes

    # -- leaving

    def _delete(self, part: Part, key: str) -> Iterable[Change]:
        book = self._books[part]
        book.waiting.pop(key, None)
        book.for_host.pop(key, None)
        book.gone.pop(key, None)
        remote = book.owner.pop(key, None)
        if remote is None:
            if (named := self._named_before(key)) is not None:
                named.refusals.pop(key, None)
            return ()
        self._touched.add(remote.name)
        remote.refusals.pop(key, None)
        rest = key[len(part.prefix) :]
        if part.cached:
            rest = rest.partition("/")[2]
        match part.kind:
            case Kind.IDENTITY:
                number = int(rest.rpartition("/")[2])
                remote.identities.pop(number, None)
                return [IdentityDeleted(remote.name, number)]
            case Kind.IP:
                return self._claim(remote, wire.parse_cidr(rest), _origin(rest), None)
            case Kind.NODE:
                name = rest if part.cached or part.cluster else rest.partition("/")[2]
                changes = self._node_addresses(remote, remote.nodes.pop(name, None), None)
                return [*changes, NodeDeleted(remote.name, name)]
            case _:
                return ()  # configurations and markers: their deletion means nothing

    def _named_before(self, key: str) -> Remote | None:
        """Who remembers a refusal of this key."""
        return next((one for one in self.remotes.values() if key in one.refusals), None)

    def _sweep(
        self, part: Part, missing: dict[str, Remote], now: float, *, doubtful: bool
    ) -> Iterator[list[Change]]:
        """Delete what a listing no longer has, as far as the clusters are complete; hold the rest."""
        if not missing:
            return
        book = self._books[part]
        lost = Counter(remote.name for remote in missing.values())
        total = Counter(remote.name for remote in book.owner.values())
        sweep: list[str] = []
        for key, remote in missing.items():
            count = lost[remote.name]
            mass = count >= HOLD_AT_LEAST and count > HOLD_SHARE * total[remote.name]
            if (mass or doubtful) and not remote.held_since:
                remote.held_since = now
                self._touched.add(remote.name)
            if remote.is_open(part.kind) and not remote.held_since:
                sweep.append(key)
            else:
                book.gone[key] = remote
                self._touched.add(remote.name)
        yield from self._chunked(sweep, lambda key: self._delete(part, key))

    def _wake(self) -> Iterator[list[Change]]:
        """Look again at what waited, if something that it can wait for is new."""
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


def _in_force(claims: tuple[Claim, ...]) -> Claim | None:
    """The claim that becomes an address of its own.

    That a node's address is a remote node's is said by the node; it would only hide the node's labels.
    """
    if not claims:
        return None
    if claims[0].identity == REMOTE_NODE and claims[-1].origin.startswith("node:"):
        return None
    return claims[0]


def _origin(rest: str) -> str:
    """Which key said it: one range can have two, `10.0.0.1` and `10.0.0.1/32`. Short, for there are many."""
    return rest if "/" in rest else ""


class Relisting:
    """A listing under way, page by page. One that is never ended deletes nothing."""

    def __init__(self, mesh: Mesh, part: Part, missing: dict[str, Remote]) -> None:
        self._mesh = mesh
        self._part = part
        self._missing = missing  # keys of former listings that this one has not shown yet

    def page(self, entries: Sequence[Entry]) -> Iterator[list[Change]]:
        """Some of the entries, in any order."""
        for entry in entries:
            self._missing.pop(entry.key, None)
        return self._mesh._chunked(entries, self._upsert)

    def _upsert(self, entry: Entry) -> Iterable[Change]:
        return self._mesh._upsert(self._part, entry.key, entry.value)

    def end(self, now: float, *, doubtful: bool = False) -> Iterator[list[Change]]:
        """That was everything. `now` is wall-clock seconds, for what is held.

        doubtful: the store is not the one it was (wiped, restored), so what is missing is held.
        """
        yield from self._mesh._sweep(self._part, self._missing, now, doubtful=doubtful)
        yield from self._mesh._wake()
