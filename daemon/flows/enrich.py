"""Events -> Flows: identities get labels, addresses names, rules a policy and a line. Reads tables, no I/O.

Enrichment happens when somebody looks, not when the packet was judged. What could have changed its meaning
by then is remembered at arrival (`note`): the labels of an identity, and which rules a generation had. A
name is shown only while its address still belongs to the identity that the data path saw.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from bpf.layout import (
    FIRST_RULE,
    RULE_DEFAULT_DENY_EGRESS,
    RULE_DEFAULT_DENY_INGRESS,
    Hook,
    PacketClass,
)
from daemon.flows.decode import Brief, Event, address_text, events, meaning
from daemon.model.flow import Endpoint, Flow
from daemon.model.identity import LOCAL_SCOPE, REMOTE_NODE_SCOPE, Identity, Reserved, reserved_labels
from daemon.model.labels import NODE, Label, LabelSet, format_labels
from daemon.model.net import Direction, Prefix, Proto, compact, packed_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import NodeKey, PolicyKey, Tables

GENERATIONS = 16  # whose rules are remembered
IDENTITIES = 16_384  # whose labels are remembered
SIDES = 4_096  # remote sides kept ready: usual traffic has few of them, a flood of random sources starts over
CLUSTER_LABEL = "k8s:io.cilium.k8s.policy.cluster="

_HOOKS = {int(hook): hook.name.lower().replace("_", "-") for hook in Hook}
_DEFAULT_DENY = frozenset({RULE_DEFAULT_DENY_INGRESS, RULE_DEFAULT_DENY_EGRESS})
_DIRECTIONS = (Direction.INGRESS, Direction.EGRESS)
_WITH_PORTS = frozenset({int(Proto.TCP), int(Proto.UDP), int(Proto.SCTP)})
_LATER_FRAGMENT = int(PacketClass.FRAG_NONFIRST)


class Side(NamedTuple):
    """One side of a flow: what does not depend on the port, in the order of Endpoint's fields around it."""

    address: str
    identity: Identity
    labels: tuple[str, ...]
    namespace: str
    pod: str
    node: str
    cluster: str

    def endpoint(self, port: int, *, local: bool) -> Endpoint:
        return Endpoint(
            self.address,
            port,
            self.identity,
            self.labels,
            self.namespace,
            self.pod,
            self.node,
            self.cluster,
            local,
        )


SideKey = tuple[int, bytes, int, bool]  # family, address, identity, local


class Book(NamedTuple):
    """The rules of a generation, and for each direction the policies that put it under default deny."""

    rules: Mapping[int, RuleOrigin]
    restricting: tuple[tuple[str, ...], tuple[str, ...]]


NO_BOOK = Book({}, ((), ()))


class Known(NamedTuple):
    """What events refer to. `sides` has those only that `plain_side` would not give."""

    node: str
    cluster: str
    devices: Mapping[int, str]
    labels: Mapping[int, tuple[str, ...]]
    sides: Mapping[SideKey, Side]
    books: Mapping[int, Book]


@lru_cache(maxsize=4_096)
def cluster_in(labels: tuple[str, ...]) -> str:
    """The cluster that an identity's labels name; empty when they name none."""
    return next((one[len(CLUSTER_LABEL) :] for one in labels if one.startswith(CLUSTER_LABEL)), "")


def plain_side(key: SideKey, labels: tuple[str, ...]) -> Side:
    """A side of which nothing is known but its identity's labels."""
    family, address, identity, _ = key
    cluster = cluster_in(labels)
    return Side(address_text(family, address), Identity(identity), labels, "", "", "", cluster)


class Enricher:
    """Events to flows, given sides, books and devices: of now (Directory) or as they were recorded."""

    def __init__(self) -> None:
        self.node = self.cluster = ""
        self._since = 0  # earlier events are of another data path, whose generations mean nothing here
        self._books: dict[int, Book] = {}
        self._devices: dict[int, str] = {}

    def flow(self, number: int, event: Event, offset_ns: int) -> Flow:
        """The flow of an event. `offset_ns` is wall clock minus CLOCK_MONOTONIC."""
        (
            time_ns, saddr, daddr, sport_be, dport_be, kind, reason, towards, hook, family, proto, tcp_flags,
            icmp_type, icmp_code, verdict, ethertype_be, identity, rule, ifindex, length,
            generation, packet_class, _,
        ) = event  # fmt: skip
        outgoing = towards != 0
        direction = _DIRECTIONS[outgoing]
        sport = dport = 0
        if proto in _WITH_PORTS:
            sport, dport = int.from_bytes(sport_be, "big"), int.from_bytes(dport_be, "big")
        source = self._side(family, saddr, identity, outgoing).endpoint(sport, local=outgoing)
        destination = self._side(family, daddr, identity, not outgoing).endpoint(dport, local=not outgoing)
        means = meaning(kind, reason, verdict)
        judged = means.judged
        book = self._books.get(generation, NO_BOOK) if number >= self._since else NO_BOOK
        return Flow(
            number,
            time_ns + offset_ns,
            means.type,
            means.verdict,
            means.reason,
            means.drop,
            direction,
            _HOOKS.get(hook) or str(hook),
            self._devices.get(ifindex, ""),
            ifindex,
            family,
            proto,
            int.from_bytes(ethertype_be, "big"),
            tcp_flags,
            icmp_type,
            icmp_code,
            packet_class == _LATER_FRAGMENT,
            length,
            generation,
            rule if judged else None,
            book.rules.get(rule) if judged and rule >= FIRST_RULE else None,
            book.restricting[direction] if judged and rule in _DEFAULT_DENY else (),
            source,
            destination,
            self.node,
            self.cluster,
        )

    def _side(self, family: int, address: bytes, identity: int, local: bool) -> Side:
        raise NotImplementedError


class Directory(Enricher):
    """What is known of identities, addresses, rules and devices, for flows that are being looked at.

    `generation_now` tells what the data path enforces (None: unknown); the pipeline keeps it up to date.
    """

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.generation_now: Callable[[], int | None] = lambda: None
        self._tables = tables
        self._labels: dict[int, tuple[LabelSet, tuple[str, ...]]] = {}
        self._book = NO_BOOK
        self._book_revision = -1
        self._revisions: tuple[int, ...] = ()
        self._sides: dict[SideKey, Side] = {}
        self._host_labels = format_labels(reserved_labels(Identity(Reserved.HOST)))
        self._nodes: dict[Prefix, NodeKey] = {}

    def note(self, seen: Iterable[Brief]) -> None:
        """Remember what these events mean now, before the tables move on."""
        if self._tables.rules.revision != self._book_revision:
            self._take_rules()
        for one in seen:
            if one.identity not in self._labels:
                self.labels(one.identity)
            if one.generation not in self._books:
                self._keep_book(one.generation, self._book_of(one.generation))

    def rule(self, generation: int, number: int) -> RuleOrigin | None:
        """Where a rule of a generation comes from, as far as it was noted."""
        return self._books.get(generation, NO_BOOK).rules.get(number)

    def new_data_path(self, number: int) -> None:
        """Generations count anew, beginning with the event of this number."""
        self._books.clear()
        self._since = number
        self._take_rules()

    def known(self, raw: bytes) -> Known:
        """Everything that a run of whole events needs to be understood later, as of the last `refresh`."""
        sides: dict[SideKey, Side] = {}
        generations, interfaces, identities = set(), set(), set()
        for event in events(raw):
            outgoing = event.direction != 0
            for address, local in ((event.saddr, outgoing), (event.daddr, not outgoing)):
                key = (event.family, address, event.identity, local)
                if key not in sides:
                    sides[key] = self._side(*key)
            generations.add(event.generation)
            interfaces.add(event.ifindex)
            identities.add(event.identity)
        return Known(
            self.node,
            self.cluster,
            {index: name for index in interfaces if (name := self._devices.get(index))},
            {one: labels for one in identities if (labels := self.labels(one))},
            {key: side for key, side in sides.items() if side != plain_side(key, self.labels(key[2]))},
            {one: book for one in generations if (book := self._books.get(one))},
        )

    def labels(self, identity: int) -> tuple[str, ...]:
        """The labels of an identity as text; those it last had when it has gone."""
        row = self._tables.identities.get(Identity(identity))
        found = row.labels if row else built_in_labels(identity)
        known = self._labels.get(identity)
        if known and (not found or known[0] == found):
            return known[1]
        if not found:
            return ()
        if len(self._labels) >= IDENTITIES:
            del self._labels[next(iter(self._labels))]
        text = format_labels(found)
        self._labels[identity] = (found, text)
        return text

    def _side(self, family: int, address: bytes, identity: int, local: bool) -> Side:
        key = (family, address, identity, local)
        found = self._sides.get(key)
        if found is None:
            found = self._local(family, address) if local else self._remote(family, address, identity)
            if len(self._sides) >= SIDES:
                self._sides.clear()
            self._sides[key] = found
        return found

    def _local(self, family: int, address: bytes) -> Side:
        host = Identity(Reserved.HOST)
        text = address_text(family, address)
        return Side(text, host, self._host_labels, "", "", self.node, self.cluster)

    def _remote(self, family: int, address: bytes, identity: int) -> Side:
        plain = plain_side((family, address, identity, False), self.labels(identity))
        if not family:
            return plain
        prefix = packed_prefix(address[:4] if family == 4 else address)
        for row in self._tables.ips.claims(compact(prefix)):
            if row.name and row.identity == identity:
                return Side(
                    plain.address, plain.identity, plain.labels, row.namespace, row.name, "", plain.cluster
                )
        key = self._nodes.get(prefix)
        if key is None:
            return plain
        labels = self._node_labels(key) if identity >= REMOTE_NODE_SCOPE else plain.labels
        return Side(plain.address, plain.identity, labels, "", "", key.name, key.cluster)

    def _node_labels(self, key: NodeKey) -> tuple[str, ...]:
        """A node that the data path numbered itself: the policy language sees its labels as `node:`."""
        row = self._tables.nodes.get(key)
        labels = {Label(NODE, one.key, one.value) for one in row.labels} if row else set()
        return format_labels(reserved_labels(Identity(Reserved.REMOTE_NODE)) | labels)

    def refresh(self) -> None:
        """Forget what was derived from tables that have changed since. Call it before a run of `flow`."""
        tables = self._tables
        revisions = (
            tables.identities.revision, tables.ips.revision, tables.nodes.revision, tables.host.revision,
            tables.devices.revision,
        )  # fmt: skip
        if revisions == self._revisions:
            return
        before, self._revisions = self._revisions, revisions
        self._sides.clear()
        if before[2:5] == revisions[2:5]:
            return
        for host in tables.host.rows.values():
            self.node, self.cluster = host.name, host.cluster
            self._host_labels = format_labels(host.labels)
        self._devices = {index: device.name for index, device in tables.devices.rows.items()}
        self._nodes = {prefix: key for key, row in tables.nodes.rows.items() for _, prefix in row.addresses}

    def _take_rules(self) -> None:
        """Copy tables.rules, which belongs to the generation that is enforced now.

        A flip may be a moment ahead of the table. That does no harm: the data path gives the number of a rule
        to no other rule in the next generation, so until the table follows a rule may lack its name, but has
        no wrong one.
        """
        rules = self._tables.rules
        self._book, self._book_revision = self._book_now(), rules.revision
        generation = self.generation_now()
        if generation is not None:
            self._keep_book(generation, self._book)

    def _book_of(self, generation: int) -> Book:
        """The rules of a generation that nothing was heard of: those before it if a later one is known."""
        if all(known < generation for known in self._books):
            return self._book
        earlier = [known for known in self._books if known < generation]
        return self._books[max(earlier)] if earlier else NO_BOOK

    def _keep_book(self, generation: int, book: Book) -> None:
        if len(self._books) >= GENERATIONS and generation not in self._books:
            del self._books[min(self._books)]
        self._books[generation] = book

    def _book_now(self) -> "Book":
        rules = dict(self._tables.rules.rows)
        asking: tuple[set[str], set[str]] = (set(), set())
        for origin in rules.values():
            if self._restricts(origin):
                asking[origin.direction].add(origin.policy)
        return Book(rules, (tuple(sorted(asking[0])), tuple(sorted(asking[1]))))

    def _restricts(self, origin: RuleOrigin) -> bool:
        """Whether the rule's part of its policy asks for default deny; so it is unless it says otherwise."""
        namespace, _, name = origin.policy.rpartition("/")
        policy = self._tables.policies.get(PolicyKey(origin.kind, namespace, name))
        if policy is None or origin.spec >= len(policy.specs):
            return True
        return policy.specs[origin.spec].default_deny[origin.direction]


def built_in_labels(identity: int) -> LabelSet:
    """Of reserved identities, and of numbers that the data path gives to prefixes and nodes by itself."""
    if LOCAL_SCOPE <= identity < REMOTE_NODE_SCOPE:
        return reserved_labels(Identity(Reserved.WORLD))
    if REMOTE_NODE_SCOPE <= identity < REMOTE_NODE_SCOPE + LOCAL_SCOPE:
        return reserved_labels(Identity(Reserved.REMOTE_NODE))
    return reserved_labels(Identity(identity))
