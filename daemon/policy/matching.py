"""Selectors against label sets and prefixes: which selectors an identity or a prefix matches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.model.identity import Identity
from daemon.model.labels import CIDR, RESERVED, Label, LabelSet
from daemon.model.net import Prefix
from daemon.model.rule import (
    ANY_SOURCE,
    CidrGroup,
    CidrSelector,
    GroupSelector,
    LabelSelector,
    Op,
    Requirement,
)
from daemon.policy.lower import label_prefix

Signature = tuple[int, ...]  # ascending numbers of the matched selectors: an identity class


def holds(requirement: Requirement, labels: LabelSet) -> bool:
    """Whether one requirement holds for a label set."""
    if requirement.source == CIDR:
        outer = label_prefix(requirement.key)
        inside = [label_prefix(one.key) for one in labels if one.source == CIDR]
        values = [""] if outer and any(one and outer.contains(one) for one in inside) else []
    else:
        values = [
            one.value
            for one in labels
            if one.key == requirement.key and requirement.source in (ANY_SOURCE, one.source)
        ]
    match requirement.op:
        case Op.EXISTS:
            return bool(values)
        case Op.NOT_EXISTS:
            return not values
        case Op.IN:
            return any(value in requirement.values for value in values)
        case Op.NOT_IN:
            return not any(value in requirement.values for value in values)
        case Op.IN_OR_ABSENT:
            return not values or any(value in requirement.values for value in values)


def matches(selector: LabelSelector, labels: LabelSet) -> bool:
    """Whether a bound selector matches a label set."""
    return all(holds(one, labels) for one in selector.requirements)


POPULAR_KEY = 8  # selectors that ask about one key only, from which on their answers are remembered
MAX_STALE = 10_000  # identities that went or changed, from which on the index is made anew
SPECIAL = 1  # bit of a mask: the identity has labels that prefixes are matched by
_POSITIVE = {Op.NOT_IN: Op.IN, Op.NOT_EXISTS: Op.EXISTS}
_WORLD_KEYS = frozenset({"world", "world-ipv4", "world-ipv6"})


class Class(NamedTuple):
    """Identities that no selector tells apart: the atoms that hold, and what prefixes are matched by.

    outside: only for identities with `cidr:` or world labels, their labels and number.
    """

    mask: int
    outside: tuple[Identity, LabelSet] | None = None


@dataclass(slots=True)
class _KeyAtoms:
    """The atoms that ask about one label key, as (source, bit)."""

    exists: list[tuple[str, int]] = field(default_factory=list)
    values: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    others: list[tuple[str, tuple[str, ...], int]] = field(default_factory=list)  # present with another value


class Universe:
    """All identities, grouped by the atoms that hold for them.

    An atom is one requirement without its negation; it gets a bit. A label makes a fixed mask of bits true,
    computed once per distinct label, so that an identity costs one look-up per label. The grouping is a
    cache: it depends on the identities and on every requirement ever asked for, and a finer grouping never
    changes an answer.
    """

    def __init__(self) -> None:
        self.labels: dict[Identity, LabelSet] = {}
        self.class_of: dict[Identity, int] = {}
        self.classes: list[Class] = []
        self._numbers: dict[Class, int] = {}
        self._sizes: list[int] = []
        self._bits: dict[Requirement, int] = {}
        self._by_key: dict[str, _KeyAtoms] = {}
        self._cidr_atoms: list[tuple[Prefix, Requirement, int]] = []
        self._masks: dict[Label, int] = {}
        self._holders: dict[Label, list[Identity]] = {}  # may name identities that lost the label since
        self._by_name: dict[str, set[Label]] = {}
        self._stale = 0  # entries of _holders that may be wrong

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def cidr_prefixes(self) -> list[Prefix]:
        """The prefixes that `cidr:` keys name."""
        return [prefix for prefix, _, _ in self._cidr_atoms]

    # --- atoms --------------------------------------------------------------------------------------------

    def ask(self, selectors: Iterable[LabelSelector]) -> None:
        """Make sure that the grouping tells apart what these selectors tell apart."""
        fresh: dict[str, list[Requirement]] = {}
        for selector in selectors:
            for requirement in selector.requirements:
                atom = positive(requirement)
                if atom not in self._bits:
                    self._register(atom)
                    fresh.setdefault(CIDR if atom.source == CIDR else atom.key, []).append(atom)
        if not fresh:
            return
        for label in [one for one in self._masks if one.key in fresh or one.source == CIDR]:
            del self._masks[label]
        if self.labels:
            self._regroup(fresh)

    def bit(self, requirement: Requirement) -> int:
        """The bit of a requirement's atom."""
        return self._bits[positive(requirement)]

    def _register(self, atom: Requirement) -> None:
        bit = self._bits[atom] = 2 << len(self._bits)  # bit 0 is SPECIAL
        prefix = label_prefix(atom.key) if atom.source == CIDR else None
        if prefix is not None:
            self._cidr_atoms.append((prefix, atom, bit))
            return
        at = self._by_key.setdefault(atom.key, _KeyAtoms())
        if atom.op is Op.EXISTS:
            at.exists.append((atom.source, bit))
        elif atom.op is Op.IN:
            for value in atom.values:
                at.values.setdefault(value, []).append((atom.source, bit))
        else:
            at.others.append((atom.source, atom.values, bit))

    def _regroup(self, fresh: Mapping[str, Sequence[Requirement]]) -> None:
        """Move the identities that new atoms tell apart; a class that moves as a whole keeps its number."""
        touched: set[Identity] = set()
        for key, atoms in fresh.items():
            if key == CIDR or any(one.op is Op.IN_OR_ABSENT for one in atoms):
                touched.update(self.labels)
                continue
            for label in self._by_name.get(key, ()):
                if any(_true(one, label) for one in atoms):
                    touched.update(self._holders[label])
        moving: dict[int, list[Identity]] = {}
        for identity in touched:
            if identity in self.class_of:
                moving.setdefault(self.class_of[identity], []).append(identity)
        for number, members in moving.items():
            self._move(number, members)

    def _move(self, number: int, members: Sequence[Identity]) -> None:
        by_class: dict[Class, list[Identity]] = {}
        for identity in members:
            by_class.setdefault(self.classify(identity, self.labels[identity]), []).append(identity)
        whole = len(members) == self._sizes[number]
        if whole and len(by_class) == 1 and next(iter(by_class)) not in self._numbers:
            (one,) = by_class
            del self._numbers[self.classes[number]]
            self.classes[number] = one
            self._numbers[one] = number
            return
        for one, moved in by_class.items():
            target = self._number(one)
            if target != number:
                self._sizes[number] -= len(moved)
                self._sizes[target] += len(moved)
                for identity in moved:
                    self.class_of[identity] = target

    # --- identities ---------------------------------------------------------------------------------------

    def update(self, identities: Mapping[Identity, LabelSet]) -> None:
        """Make the universe hold exactly these identities."""
        if self.labels == identities:
            return
        gone = self.labels.keys() - identities.keys()
        before = self.labels
        changed = {number: labels for number, labels in identities.items() if before.get(number) != labels}
        self.change(changed, gone)

    def change(self, added: Mapping[Identity, LabelSet], removed: Iterable[Identity]) -> None:
        """Add, relabel and remove some identities."""
        for identity in removed:
            if self.labels.pop(identity, None) is not None:
                self._sizes[self.class_of.pop(identity)] -= 1
                self._stale += 1
        if self._stale > len(self.labels) + MAX_STALE:
            self._forget_stale()
        holders, by_name = self._holders, self._by_name
        for identity, labels in added.items():
            number = self._number(self.classify(identity, labels))
            old = self.class_of.get(identity)
            if old is not None:
                self._sizes[old] -= 1
                self._stale += 1
            self._sizes[number] += 1
            self.class_of[identity] = number
            self.labels[identity] = labels
            for label in labels:
                held = holders.get(label)
                if held is None:
                    held = holders[label] = []
                    by_name.setdefault(label.key, set()).add(label)
                held.append(identity)

    def _forget_stale(self) -> None:
        """Churn must not grow memory: group everything anew."""
        labels, self.labels, self.class_of = self.labels, {}, {}
        self.classes, self._numbers, self._sizes = [], {}, []
        self._holders, self._by_name, self._masks, self._stale = {}, {}, {}, 0
        self.change(labels, ())

    def live_classes(self) -> list[tuple[int, Class]]:
        """The classes that have members."""
        return [
            (at, one) for at, (one, size) in enumerate(zip(self.classes, self._sizes, strict=True)) if size
        ]

    def _number(self, one: Class) -> int:
        number = self._numbers.get(one)
        if number is None:
            number = self._numbers[one] = len(self.classes)
            self.classes.append(one)
            self._sizes.append(0)
        return number

    def classify(self, identity: Identity, labels: LabelSet) -> Class:
        """The class of a label set; the identity's number only matters for the reserved ones."""
        mask = 0
        known, by_key = self._masks, self._by_key
        for label in labels:
            bits = known.get(label)
            if bits is None:
                if label.key not in by_key and label.source not in _OUTSIDE:
                    continue
                bits = known[label] = self._label_mask(label)
            mask |= bits
        return Class(mask, (identity, labels) if mask & SPECIAL else None)

    def mask_of(self, labels: Iterable[Label]) -> int:
        """The atoms that hold for a label set."""
        mask = 0
        for label in labels:
            mask |= self._label_mask(label)
        return mask

    def _label_mask(self, label: Label) -> int:
        if label.source == CIDR:
            inner = label_prefix(label.key)
            mask = SPECIAL
            for outer, atom, bit in self._cidr_atoms:
                if inner and outer.contains(inner) and (atom.op is Op.EXISTS or "" in atom.values):
                    mask |= bit
            return mask
        mask = SPECIAL if label.source == RESERVED and label.key in _WORLD_KEYS else 0
        at = self._by_key.get(label.key)
        if at is None:
            return mask
        for source, bit in (*at.exists, *at.values.get(label.value, ())):
            if source in (ANY_SOURCE, label.source):
                mask |= bit
        for source, values, bit in at.others:
            if source in (ANY_SOURCE, label.source) and label.value not in values:
                mask |= bit
        return mask


_OUTSIDE = frozenset({CIDR, RESERVED})


def positive(requirement: Requirement) -> Requirement:
    """The requirement without its negation."""
    op = _POSITIVE.get(requirement.op)
    return requirement if op is None else requirement._replace(op=op)


def _true(atom: Requirement, label: Label) -> bool:
    """Whether a label (of the right key) makes an atom hold."""
    if atom.source not in (ANY_SOURCE, label.source):
        return False
    return atom.op is Op.EXISTS or label.value in atom.values


@dataclass(slots=True)
class _OneKey:
    """Selectors that ask for values of one key only: what they say depends on few atoms, so it is remembered."""

    bits: int
    members: tuple[int, ...]
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)


class LabelMatcher:
    """Some label selectors over a universe: from the atoms that hold to the selectors that match.

    Selectors that ask about one popular key are answered by a remembered tuple. Each other one waits under the atom
    that it shares with the fewest others, so a class is tested against few of them.
    """

    def __init__(self, universe: Universe, selectors: Mapping[int, LabelSelector]) -> None:
        self._tests: dict[int, tuple[int, int]] = {}  # number -> bits that must hold, bits that must not
        self._always: list[int] = []  # selectors that need no label
        by_key: dict[str, list[int]] = {}
        needs: dict[int, list[int]] = {}
        uses: dict[int, int] = {}
        for number, selector in selectors.items():
            need, forbid, needed = 0, 0, []
            for requirement in selector.requirements:
                bit = universe.bit(requirement)
                if requirement.op in (Op.IN, Op.EXISTS):
                    need |= bit
                    needed.append(bit)
                    uses[bit] = uses.get(bit, 0) + 1
                else:
                    forbid |= bit
            self._tests[number] = need, forbid
            # Pod selectors ask, besides, whether there is a namespace: one bit more to remember by.
            keys = {one.key for one in selector.requirements if one.op is not Op.EXISTS}
            if len(keys) == 1:
                by_key.setdefault(keys.pop(), []).append(number)
            needs[number] = needed
        self._one_key = [
            self._remembered(members) for members in by_key.values() if len(members) >= POPULAR_KEY
        ]
        for part in self._one_key:
            for number in part.members:
                del needs[number]
        self._waiting: dict[int, list[int]] = {}
        for number, needed in needs.items():
            if needed:
                least = min(needed, key=lambda bit: (uses[bit], bit))
                self._waiting.setdefault(least, []).append(number)
            else:
                self._always.append(number)
        self._any_waiting = 0
        for bit in self._waiting:
            self._any_waiting |= bit

    def _remembered(self, members: Sequence[int]) -> _OneKey:
        bits = 0
        for number in members:
            need, forbid = self._tests[number]
            bits |= need | forbid
        return _OneKey(bits, tuple(members))

    def match(self, mask: int) -> list[int]:
        """The numbers of the selectors that match where these atoms hold, each once."""
        candidates = list(self._always)
        left = mask & self._any_waiting
        while left:
            bit = left & -left
            candidates += self._waiting[bit]
            left ^= bit
        found = self._tested(candidates, mask)
        for part in self._one_key:
            asked = mask & part.bits
            said = part.known.get(asked)
            if said is None:
                said = part.known[asked] = tuple(self._tested(part.members, asked))
            found += said
        return found

    def _tested(self, candidates: Iterable[int], mask: int) -> list[int]:
        tests = self._tests
        found = []
        for number in candidates:
            need, forbid = tests[number]
            if mask & need == need and not mask & forbid:
                found.append(number)
        return found


@dataclass(slots=True)
class _Marks:
    """Bits of the selectors that begin at a prefix, and of those whose exception begins there."""

    inside: int = 0
    excepted: int = 0


@dataclass(slots=True)
class CidrMatcher:
    """CIDR selectors and `cidr:` keys over nested prefixes; one bit each.

    So a million prefixes share few masks.

    marks: what begins at each named prefix. Bits only accumulate from a prefix to those inside it.
    """

    selectors: list[int] = field(default_factory=list)  # place of a bit -> selector number
    marks: dict[Prefix, _Marks] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)  # family -> bits of /0 without exceptions

    def add(self, number: int, prefixes: Iterable[Prefix], excepts: Iterable[Prefix]) -> None:
        """One selector: addresses in one of `prefixes` and none of `excepts`."""
        bit = 1 << len(self.selectors)
        self.selectors.append(number)
        marks = self.marks
        without = tuple(excepts)
        for prefix in prefixes:
            mark = marks.get(prefix)
            if mark is None:
                mark = marks[prefix] = _Marks()
            mark.inside |= bit
            if prefix.length == 0 and not without:
                self.whole[prefix.family] = self.whole.get(prefix.family, 0) | bit
        for prefix in without:
            marks.setdefault(prefix, _Marks()).excepted |= bit

    def name(self, prefixes: Iterable[Prefix]) -> None:
        """Prefixes that must be told apart although no selector begins there."""
        for prefix in prefixes:
            self.marks.setdefault(prefix, _Marks())

    def sweep(self) -> dict[Prefix, int]:
        """Every named prefix -> mask of the selectors that its own addresses match.

        Parents before children.
        """
        found: dict[Prefix, int] = {}
        stack: list[tuple[Prefix, int, int]] = []
        for prefix in sorted(self.marks):
            while stack and not stack[-1][0].contains(prefix):
                stack.pop()
            mark = self.marks[prefix]
            inside, excepted = mark.inside, mark.excepted
            if stack:
                inside |= stack[-1][1]
                excepted |= stack[-1][2]
            stack.append((prefix, inside, excepted))
            found[prefix] = inside & ~excepted
        return found

    def of_label(self, prefix: Prefix) -> int:
        """What an identity with the label `cidr:<prefix>` matches: prefixes around it.

        No exception touching it.

        /0 without exceptions is not among them: it stands for the world label.
        """
        inside = excepted = 0
        marks = self.marks
        for length in range(prefix.length + 1):
            shift = prefix.width - length
            mark = marks.get(Prefix(prefix.family, prefix.address >> shift << shift, length))
            if mark is not None:
                inside |= mark.inside
                excepted |= mark.excepted
        if not prefix.is_host:
            for other, mark in marks.items():
                if mark.excepted and prefix.contains(other):
                    excepted |= mark.excepted
        return inside & ~excepted & ~self.whole.get(prefix.family, 0)

    def numbers(self, mask: int) -> list[int]:
        """The selector numbers of a mask."""
        found = []
        while mask:
            bit = mask & -mask
            found.append(self.selectors[bit.bit_length() - 1])
            mask ^= bit
        return found


def group_prefixes(selector: GroupSelector, groups: Mapping[str, CidrGroup]) -> Sequence[Prefix]:
    """The prefixes a group selector names; a group that does not exist has none."""
    if selector.labels is None:
        group = groups.get(selector.name)
        return group.prefixes if group is not None else ()
    chosen = [
        group
        for group in groups.values()
        if matches(
            selector.labels, frozenset(Label("cidrgroup", *pair.partition("=")[::2]) for pair in group.labels)
        )
    ]
    return tuple({prefix: None for group in chosen for prefix in group.prefixes})


def cidr_prefixes(
    selector: CidrSelector | GroupSelector, groups: Mapping[str, CidrGroup]
) -> Sequence[Prefix]:
    """The prefixes that a CIDR selector begins at."""
    return (selector.prefix,) if isinstance(selector, CidrSelector) else group_prefixes(selector, groups)
