"""What changes in meaning between two policy sets: which peers and ports get another verdict.

And by which rules.

All peers there can be are told apart by the labels that selectors mention: a key has one of the mentioned
values, another value, or is absent. The search branches on one key at a time and stops where what is left of
both sets is the same, so an unchanged part costs nothing, and two sets that mean the same differ nowhere.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import CIDR, K8S, NODE, RESERVED, Label, LabelSet
from daemon.model.net import Direction, Prefix
from daemon.model.rule import (
    ANY_SOURCE,
    CidrGroup,
    LabelSelector,
    Policy,
    PortRange,
    Requirement,
    RuleOrigin,
    Selector,
)
from daemon.model.verdict import unpack_cell
from daemon.policy.compile import Compiled, CompileSettings, Numbered, Subject, compile_policy
from daemon.policy.explain import Peer
from daemon.policy.lower import CLUSTER_KEY, FQDN, NAMESPACE_KEY
from daemon.policy.matching import holds
from daemon.policy.matrix import NamedPeer, Segment, joined, row_of, segments, word

MAX_CLASSES = 5_000
OTHER = "(other)"  # a value that no selector mentions
_FIXED = (RESERVED, CIDR, FQDN)  # sources whose labels a pod or node does not choose
_ALWAYS = (NAMESPACE_KEY, CLUSTER_KEY)  # keys that every pod has


class PolicySet(NamedTuple):
    """Policies with the groups they refer to."""

    policies: Sequence[Policy]
    groups: Mapping[str, CidrGroup]


class Change(NamedTuple):
    """One class of peers and some ports with another verdict."""

    direction: Direction
    peer: str
    ports: tuple[str, ...]
    before: str
    after: str
    old_rule: RuleOrigin | None
    new_rule: RuleOrigin | None


class Difference(NamedTuple):
    """All changes; `complete` is False when there were too many classes of peers to visit each."""

    changes: tuple[Change, ...]
    complete: bool


class Classes(NamedTuple):
    """Peers that stand for every class."""

    peers: tuple[NamedPeer, ...]
    complete: bool


def differences(old: PolicySet, new: PolicySet, subject: Subject, settings: CompileSettings) -> Difference:
    """Where the sets differ for a subject; empty if they mean the same."""
    before = compile_policy(old.policies, old.groups, subject, {}, settings)
    after = compile_policy(new.policies, new.groups, subject, {}, settings)
    classes = _classes([before, after], subject, prune=True)
    found: dict[
        tuple[Direction, tuple[str, ...], str, str, RuleOrigin | None, RuleOrigin | None], list[str]
    ] = {}
    for one in classes.peers:
        for direction in Direction:
            for ports, words, rules in _compare(before, after, direction, one.peer):
                found.setdefault((direction, ports, *words, *rules), []).append(one.title)
    changes = [
        Change(direction, _titles(titles), ports, was, now, old_rule, new_rule)
        for (direction, ports, was, now, old_rule, new_rule), titles in found.items()
    ]
    return Difference(tuple(changes), classes.complete)


def peer_classes(sets: Sequence[PolicySet], subject: Subject, settings: CompileSettings) -> Classes:
    """Every class of peers that the sets tell apart."""
    compiled = [compile_policy(one.policies, one.groups, subject, {}, settings) for one in sets]
    return _classes(compiled, subject, prune=False)


def _titles(titles: Sequence[str]) -> str:
    return " | ".join(titles) if len(titles) <= 4 else f"{' | '.join(titles[:3])} | {len(titles) - 3} more"


Found = tuple[tuple[str, ...], tuple[str, str], tuple[RuleOrigin | None, RuleOrigin | None]]


def _compare(before: Compiled, after: Compiled, direction: Direction, peer: Peer) -> Iterator[Found]:
    rows = row_of(before, direction, peer), row_of(after, direction, peer)
    columns = before.matrix(direction).columns, after.matrix(direction).columns
    if rows[0] == rows[1] and columns[0] == columns[1] and before.rules == after.rules:
        return
    changed: dict[tuple[int, int], list[Segment]] = {}
    for one in segments(columns):
        cells = tuple(row[column.at(one.proto, one.first)] for row, column in zip(rows, columns, strict=True))
        if word(cells[0]) != word(cells[1]):
            changed.setdefault((cells[0], cells[1]), []).append(one)
    for (old, new), parts in changed.items():
        rules = before.rules.get(unpack_cell(old)[1]), after.rules.get(unpack_cell(new)[1])
        yield joined(parts), (word(old), word(new)), rules


# Classes of peers


def _classes(compiled: Sequence[Compiled], subject: Subject, *, prune: bool) -> Classes:
    settings = compiled[0].compiler.settings
    found: list[NamedPeer] = []
    for number in Reserved:
        worlds = (Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6)
        if number is Reserved.UNKNOWN or number in worlds or number == int(subject.identity):
            continue
        identity = Identity(number)
        found.append(
            NamedPeer(number.name.lower().replace("_", "-"), Peer(identity, reserved_labels(identity)))
        )
    found.append(NamedPeer("unknown identities", Peer()))
    found += _outside(compiled, settings)
    search = _Search(compiled, prune=prune)
    node = reserved_labels(Identity(Reserved.REMOTE_NODE))
    found += search.peers(frozenset(), K8S, "pod")
    if any(one.source == NODE for one in search.requirements) or any(
        one.source == RESERVED and one.key == "remote-node" for one in search.requirements
    ):
        found += search.peers(node, NODE, "node")
    unique = {one.title: one for one in found}
    return Classes(tuple(unique.values()), search.complete)


def _outside(compiled: Sequence[Compiled], settings: CompileSettings) -> list[NamedPeer]:
    """One address for each set of prefixes that all sets treat alike."""
    prefixes = _with_addresses(sorted({prefix for one in compiled for prefix in one.prefixes}))
    families = {family for family, on in ((4, settings.ipv4), (6, settings.ipv6)) if on}
    alike: dict[tuple[object, ...], list[Prefix]] = {}
    for prefix in prefixes:
        if prefix.family in families:
            # asked as a prefix: its own addresses, not those of the prefixes inside it
            key = tuple(one.compiler.address_signature(prefix) for one in compiled)
            alike.setdefault((prefix.length == 0 and prefix.family, key), []).append(prefix)
    found = []
    for members in alike.values():
        title = ", ".join(one.cidr for one in members[:3])
        if len(members) > 3:
            title += f" and {len(members) - 3} more prefixes"
        if members[0].length == 0:
            title = f"other IPv{members[0].family} addresses outside"
        found.append(NamedPeer(title, Peer(address=members[0])))
    return found


def _with_addresses(prefixes: Sequence[Prefix]) -> list[Prefix]:
    """Those of ascending prefixes that have addresses which no other one inside them covers."""
    covered: dict[Prefix, int] = {}
    stack: list[Prefix] = []

    def close(one: Prefix) -> None:
        if stack:
            covered[stack[-1]] = covered.get(stack[-1], 0) + (1 << one.width - one.length)

    for prefix in prefixes:
        while stack and not stack[-1].contains(prefix):
            close(stack.pop())
        stack.append(prefix)
    while stack:
        close(stack.pop())
    return [one for one in prefixes if covered.get(one, 0) < 1 << one.width - one.length]


class _Residue(NamedTuple):
    """A selector of some rules with the requirements that are not decided yet."""

    number: int
    left: tuple[Requirement, ...]


class _Listed(NamedTuple):
    """A rule by what it means: `what` and `peers` are equal for rules that mean the same."""

    rule: Numbered
    what: tuple[object, ...]
    peers: frozenset[Selector] | None
    ranges: tuple[PortRange, ...] | None

    @classmethod
    def of(cls, compiled: Compiled, numbered: Numbered) -> "_Listed":
        """A numbered rule of some tables."""
        rule, compiler = numbered.rule, compiled.compiler
        peers = None if rule.peers is None else frozenset(map(compiler.bind, rule.peers))
        ranges = None if rule.ports is None else tuple(compiler.ranges((*rule.ports, *rule.layer7_ports)))
        what = (rule.direction, rule.deny, rule.ports, rule.layer7_ports, rule.auth)
        return cls(numbered, what, peers, ranges)

    def meets(self, other: "_Listed") -> bool:
        """Whether some packet could match both, as far as direction and ports tell."""
        if self.rule.rule.direction is not other.rule.rule.direction:
            return False
        if self.ranges is None or other.ranges is None:
            return True
        return any(
            one.proto == two.proto and one.first <= two.last and two.first <= one.last
            for one in self.ranges
            for two in other.ranges
        )


def _rules(compiled: Compiled) -> Iterator[Numbered]:
    for direction in compiled.compiler.directions:
        yield from direction.plan.rules


def _relevant(listed: Sequence[Sequence[_Listed]]) -> list[list[_Listed]]:
    """The rules that can have a part in a difference: those of one set only, and those that share ports with them."""
    meanings = [{(one.what, one.peers) for one in rules} for rules in listed]
    common = set.intersection(*meanings)
    changed = [one for rules in listed for one in rules if (one.what, one.peers) not in common]
    return [[one for one in rules if any(one.meets(other) for other in changed)] for rules in listed]


@dataclass
class _Search:
    """Assigns labels key by key. `complete` turns False when the limit cut it short."""

    compiled: Sequence[Compiled]
    prune: bool
    complete: bool = True

    def __post_init__(self) -> None:
        self._seen = 0
        defaults = {tuple((m.enforced, m.default_deny) for m in (c.ingress, c.egress)) for c in self.compiled}
        self._same_defaults = len(defaults) == 1
        self._selectors: dict[LabelSelector, int] = {}
        self._rules: list[list[tuple[Numbered, tuple[int, ...] | None]]] = []
        listed = [[_Listed.of(one, rule) for rule in _rules(one)] for one in self.compiled]
        if self.prune and self._same_defaults:
            listed = _relevant(listed)
        for rules in listed:
            self._rules.append([(one.rule, self._numbered(one)) for one in rules])
        self.requirements = {one for selector in self._selectors for one in selector.requirements}

    def _numbered(self, one: "_Listed") -> tuple[int, ...] | None:
        if one.peers is None:
            return None
        labels = [peer for peer in one.peers if isinstance(peer, LabelSelector)]
        return tuple(self._selectors.setdefault(peer, len(self._selectors)) for peer in labels)

    def peers(self, base: LabelSet, source: str, word_: str) -> Iterator[NamedPeer]:
        """Label sets that begin with `base`, one for each class."""
        keys = self._keys(source)
        others = {one.source for one in self.requirements} - {source, ANY_SOURCE, "container"}
        self._absent = frozenset({*_FIXED, NODE, K8S, *others} - {source})
        start = []
        for selector, number in self._selectors.items():
            residue = self._reduced(selector.requirements, base, decided=frozenset())
            if residue is not None:
                start.append(_Residue(number, residue))
        for labels in self._branch(base, frozenset(), tuple(start), keys):
            shown = sorted(str(one) for one in labels - base)
            title = f"{word_} {', '.join(shown)}" if shown else f"any other {word_}"
            identity = Identity(0) if not base else Identity(Reserved.REMOTE_NODE)
            yield NamedPeer(title, Peer(identity, labels))

    def _keys(self, source: str) -> dict[str, list[str]]:
        """key -> the sources it may come from."""
        found: dict[str, set[str]] = {}
        for one in self.requirements:
            if one.source in (source, ANY_SOURCE, "container"):
                found.setdefault(one.key, set()).add(one.source)
        # A selector without a source differs from one with it only in labels of a foreign source.
        return {
            key: sorted({source, *(sources - {ANY_SOURCE}), *(["container"] if len(sources) > 1 else [])})
            for key, sources in found.items()
        }

    def _reduced(
        self, requirements: Sequence[Requirement], labels: LabelSet, decided: frozenset[str]
    ) -> tuple[Requirement, ...] | None:
        """What is left to decide; None if it cannot match any more."""
        left = []
        for one in requirements:
            if one.source in self._absent or one.key in decided:
                if not holds(one, labels):
                    return None
            else:
                left.append(one)
        return tuple(left)

    def _branch(
        self,
        labels: LabelSet,
        decided: frozenset[str],
        live: tuple[_Residue, ...],
        keys: Mapping[str, list[str]],
    ) -> Iterator[LabelSet]:
        if self._seen >= MAX_CLASSES:
            self.complete = False
            return
        if self.prune and self._same_defaults and self._alike(live):
            return
        key = self._next_key(live)
        if key is None:
            self._seen += 1
            yield labels
            return
        done = decided | {key}
        visited: set[tuple[_Residue, ...]] = set()
        for choice in self._choices(key, keys[key]):
            chosen = labels | choice
            left = []
            for one in live:
                residue = self._reduced(one.left, chosen, done)
                if residue is not None:
                    left.append(_Residue(one.number, residue))
            state = tuple(left)
            if state not in visited:  # two values that leave the same to decide are one class
                visited.add(state)
                yield from self._branch(chosen, done, state, keys)

    def _next_key(self, live: Iterable[_Residue]) -> str | None:
        """The undecided key that most selectors ask about."""
        counts: dict[str, int] = {}
        for one in live:
            for requirement in one.left:
                counts[requirement.key] = counts.get(requirement.key, 0) + 1
        return max(counts, key=lambda key: (counts[key], key)) if counts else None

    def _choices(self, key: str, sources: Sequence[str]) -> Iterator[LabelSet]:
        """Each way a key can be present or absent."""
        values = sorted({value for one in self.requirements if one.key == key for value in one.values})
        options: list[LabelSet] = [frozenset()]
        for source in sources:
            given = [frozenset({Label(source, key, value)}) for value in (*values, OTHER)]
            absent = [] if source == K8S and key in _ALWAYS else [frozenset[Label]()]
            options = [before | one for before in options for one in (*given, *absent)]
        yield from options

    def _alike(self, live: Iterable[_Residue]) -> bool:
        """Whether what is left of every set is the same rules for the same peers."""
        left = {one.number: one.left for one in live}
        views = []
        for rules in self._rules:
            view: set[tuple[object, tuple[Requirement, ...] | None]] = set()
            for numbered, numbers in rules:
                rule = numbered.rule
                what = (rule.direction, rule.deny, rule.ports, rule.layer7_ports, rule.auth)
                if numbers is None:
                    view.add((what, None))
                for number in numbers or ():
                    if number in left:
                        view.add((what, left[number]))
            views.append(view)
        return all(view == views[0] for view in views)
