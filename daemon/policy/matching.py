"""Selectors against label sets and prefixes: which selectors an identity or a prefix matches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from daemon.model.labels import CIDR, Label, LabelSet
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


@dataclass(slots=True)
class _Entry:
    """What one label makes true: a mask of atoms, and the selectors that wait for one of them."""

    mask: int
    waiting: tuple[int, ...]


_NOTHING = _Entry(0, ())
_POSITIVE = {Op.NOT_IN: Op.IN, Op.NOT_EXISTS: Op.EXISTS}


class LabelMatcher:
    """Label selectors, indexed so that a label set is tested only against selectors that share a label with it.

    Every requirement is an atom (a bit) or the negation of one; a label makes a fixed mask of atoms true, which is
    computed once per distinct label. A selector waits under one of the atoms it needs.
    """

    def __init__(self, selectors: Mapping[int, LabelSelector]) -> None:
        self._atoms: dict[Requirement, int] = {}
        self._by_key: dict[str, list[tuple[Requirement, int]]] = {}
        self._cidr_atoms: list[tuple[Prefix, Requirement, int]] = []
        self._need: dict[int, int] = {}
        self._forbid: dict[int, int] = {}
        self._waiting: dict[int, list[int]] = {}  # atom -> selectors
        self._always: list[int] = []  # selectors that need no label
        self._entries: dict[Label, _Entry] = {}
        uses: dict[Requirement, int] = {}
        for selector in selectors.values():
            for requirement in selector.requirements:
                uses[requirement] = uses.get(requirement, 0) + 1
        for number, selector in selectors.items():
            self._add(number, selector, uses)

    @property
    def cidr_prefixes(self) -> list[Prefix]:
        """The prefixes that `cidr:` keys name."""
        return [prefix for prefix, _, _ in self._cidr_atoms]

    def _add(self, number: int, selector: LabelSelector, uses: Mapping[Requirement, int]) -> None:
        need = forbid = 0
        needed: list[tuple[int, int]] = []
        for requirement in selector.requirements:
            if requirement.op is Op.IN_OR_ABSENT:  # its atom is the opposite: present with another value
                forbid |= 1 << self._atom(requirement)
            elif requirement.op in _POSITIVE:
                forbid |= 1 << self._atom(requirement._replace(op=_POSITIVE[requirement.op]))
            else:
                atom = self._atom(requirement)
                need |= 1 << atom
                needed.append((uses[requirement], atom))
        self._need[number], self._forbid[number] = need, forbid
        if needed:
            self._waiting.setdefault(min(needed)[1], []).append(number)
        else:
            self._always.append(number)

    def _atom(self, requirement: Requirement) -> int:
        atom = self._atoms.get(requirement)
        if atom is None:
            atom = self._atoms[requirement] = len(self._atoms)
            prefix = label_prefix(requirement.key) if requirement.source == CIDR else None
            if prefix is not None:
                self._cidr_atoms.append((prefix, requirement, atom))
            else:
                self._by_key.setdefault(requirement.key, []).append((requirement, atom))
        return atom

    def _entry(self, label: Label) -> _Entry:
        if label.source == CIDR and self._cidr_atoms:
            inner = label_prefix(label.key)
            atoms = [
                atom
                for outer, one, atom in self._cidr_atoms
                if inner and outer.contains(inner) and (one.op is Op.EXISTS or "" in one.values)
            ]
        else:
            atoms = [
                atom
                for one, atom in self._by_key.get(label.key, ())
                if one.source in (ANY_SOURCE, label.source) and _true(one, label.value)
            ]
        if not atoms:
            return _NOTHING
        waiting = tuple(number for atom in atoms for number in self._waiting.get(atom, ()))
        entry = self._entries[label] = _Entry(sum(1 << atom for atom in atoms), waiting)
        return entry

    def match(self, labels: Iterable[Label]) -> list[int]:
        """The numbers of the selectors that match, in no order, each once."""
        mask = 0
        candidates = list(self._always)
        get = self._entries.get
        for label in labels:
            entry = get(label) or self._entry(label)
            mask |= entry.mask
            candidates += entry.waiting
        need, forbid = self._need, self._forbid
        return list({n for n in candidates if need[n] & mask == need[n] and not forbid[n] & mask})


def _true(requirement: Requirement, value: str) -> bool:
    match requirement.op:
        case Op.EXISTS:
            return True
        case Op.IN:
            return value in requirement.values
        case _:  # IN_OR_ABSENT: the atom says "present with another value"
            return value not in requirement.values


@dataclass(slots=True)
class _Marks:
    """Bits of the selectors that begin at a prefix, and of those whose exception begins there."""

    inside: int = 0
    excepted: int = 0


@dataclass(slots=True)
class CidrMatcher:
    """CIDR selectors and `cidr:` keys over nested prefixes; one bit each, so a million prefixes share few masks.

    marks: what begins at each named prefix. Bits only accumulate from a prefix to those inside it.
    """

    bits: dict[int, int] = field(default_factory=dict)  # selector number -> bit
    marks: dict[Prefix, _Marks] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)  # family -> bits of /0 without exceptions
    masks: dict[Prefix, int] = field(
        default_factory=dict
    )  # what addresses of each prefix match, after `sweep`

    def add(self, number: int, prefixes: Iterable[Prefix], excepts: Iterable[Prefix]) -> None:
        """One selector: addresses in one of `prefixes` and none of `excepts`."""
        bit = self.bits[number] = 1 << len(self.bits)
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
        """Every named prefix -> mask of the selectors that its own addresses match; parents before children."""
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
            self.masks[prefix] = inside & ~excepted
        return self.masks

    def of_label(self, prefix: Prefix) -> int:
        """What an identity with the label `cidr:<prefix>` matches: prefixes around it, no exception touching it.

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
        return [number for number, bit in self.bits.items() if mask & bit] if mask else []


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
