"""Policies x identities -> PolicyTables: the verdict matrix.

Whose look-up cost does not depend on the policy.

Two peers that match the same selectors are one class (a row); two ports that no rule's ports separate are one
class (a column). A deny beats every allow, a layer 7 allow turns a plain one into a redirect, and among rules
of equal strength the lowest number is named, so equal inputs give equal tables whatever their order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from daemon.model.identity import Identity, Reserved
from daemon.model.labels import CIDR, RESERVED, Label, LabelSet
from daemon.model.net import WORLD4, WORLD6, Direction, Prefix, Proto
from daemon.model.rule import (
    CidrGroup,
    CidrSelector,
    GroupSelector,
    LabelSelector,
    Policy,
    PortMatch,
    PortRange,
    Rule,
    RuleOrigin,
    Selector,
    Spec,
    SubjectKind,
)
from daemon.model.verdict import FIRST_RULE, CellFlag, FixedRule, Verdict, pack_cell, unpack_cell
from daemon.policy import lower
from daemon.policy.columns import ColumnBuilder, resolved
from daemon.policy.matching import (
    CidrMatcher,
    Class,
    LabelMatcher,
    Signature,
    Universe,
    cidr_prefixes,
    matches,
)
from daemon.policy.tables import Columns, Matrix, PolicyTables, Rows

HOST = Identity(Reserved.HOST)
_WORLDS = (Identity(Reserved.WORLD_IPV4), Identity(Reserved.WORLD_IPV6))
MAX_LAYER = 256  # changed identities that a table set carries before they are folded in
MAX_ATOMS = 50_000  # an index that has heard of more requirements than this is built anew
_ALLOWED = pack_cell(Verdict.ALLOW, FixedRule.DEFAULT_ALLOW)
_FAILSAFE = pack_cell(Verdict.ALLOW, FixedRule.FAILSAFE)
_EXEMPT = pack_cell(Verdict.ALLOW, FixedRule.EXEMPT)
_NODE_PORT_PROTOCOLS = (Proto.TCP, Proto.UDP, Proto.SCTP)
_LOCALHOST = pack_cell(Verdict.ALLOW, FixedRule.LOCALHOST)
_AUTH = pack_cell(Verdict(0), 0, CellFlag.AUTH)
_HANDSHAKE = ("required", "test-always-fail")
_INIT = Label(RESERVED, "init")


class Subject(NamedTuple):
    """Whose policy is compiled: this host (identity 1) or a workload."""

    identity: Identity
    labels: LabelSet


@dataclass(frozen=True, slots=True)
class Failsafe:
    """Traffic that policy can never close.

    No prefixes: any peer; prefixes name addresses outside the mesh only.
    """

    direction: Direction
    proto: Proto
    port: int
    prefixes: tuple[Prefix, ...] = ()


@dataclass(frozen=True, slots=True)
class CompileSettings:
    """What the daemon's configuration means for policy.

    mode: `default`, `always` or `never`. named_ports: name -> (protocol, port) pairs that it resolves to.
    audit_policies: titles of policies whose denials are reported, not enforced, and whose allows open
    nothing. reject: denied packets are answered, unless the policy says otherwise. exempt_ports: first and last of
    the node ports that no ingress policy closes.
    """

    mode: str = "default"
    ipv4: bool = True
    ipv6: bool = True
    cluster_name: str = "default"
    default_local_cluster: bool = False
    node_selector_labels: bool = True
    named_ports: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    failsafe: tuple[Failsafe, ...] = ()
    exempt_ports: tuple[int, int] | None = None
    audit_policies: frozenset[str] = frozenset()
    reject: bool = False
    allow_localhost: bool = True  # workloads only

    @property
    def dual_stack(self) -> bool:
        return self.ipv4 and self.ipv6


def selects(spec: Spec, subject: Subject) -> bool:
    """Whether a spec applies to the subject."""
    wanted = SubjectKind.NODE if subject.identity == HOST else SubjectKind.ENDPOINT
    return spec.kind is wanted and matches(spec.subject, subject.labels)


def selected_specs(policies: Iterable[Policy], subject: Subject) -> list[tuple[Policy, Spec]]:
    """The specs that apply, in an order that depends on the policies only."""
    ordered = sorted(policies, key=lambda one: (one.kind, one.namespace, one.name, one.file, one.line))
    return [(policy, spec) for policy in ordered for spec in policy.specs if selects(spec, subject)]


def enforcement(
    specs: Iterable[Spec], subject: Subject, mode: str
) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """(enforced, default deny), each per direction."""
    if mode == "never":
        return (False, False), (False, False)
    if mode == "always" or _INIT in subject.labels:
        return (True, True), (True, True)
    chosen = list(specs)
    enforced = any(one.restricts[0] for one in chosen), any(one.restricts[1] for one in chosen)
    return enforced, (any(one.default_deny[0] for one in chosen), any(one.default_deny[1] for one in chosen))


def compile_policy(
    policies: Iterable[Policy],
    groups: Mapping[str, CidrGroup],
    subject: Subject,
    identities: Mapping[Identity, LabelSet],
    settings: CompileSettings,
    *,
    previous: "Compiled | None" = None,
) -> "Compiled":
    """What the policies mean for the subject, for every identity and every address; order does not matter.

    The tables depend on the other arguments only: `previous` (any earlier result) lends its index of
    identities, which makes a change of policy cheap.
    """
    universe = previous.compiler.universe if previous is not None else Universe()
    if len(universe) > MAX_ATOMS:
        universe = Universe()
    compiler = Compiler(policies, groups, subject, settings, universe)
    universe.update(identities)
    return compiler.tables()


def add_identities(
    compiled: "Compiled", added: Mapping[Identity, LabelSet], removed: Iterable[Identity]
) -> "Compiled":
    """The tables after identities came and went: existing row numbers stay, new rows are appended."""
    return compiled.compiler.changed(compiled, added, removed)


@dataclass(frozen=True, slots=True)
class Compiled(PolicyTables):
    """PolicyTables that remember how to take further identities and how to explain themselves."""

    compiler: "Compiler" = field(compare=False, repr=False, kw_only=True)


class Numbered(NamedTuple):
    """A selected rule with its number, the numbers of its selectors (None: anybody) and its columns."""

    number: int
    rule: Rule
    peers: tuple[int, ...] | None
    columns: Sequence[int]
    layer7_columns: Sequence[int]


class Fixed(NamedTuple):
    """Cells that no policy changes: of these peers (None: anybody), in these columns."""

    peers: tuple[int, ...] | None
    columns: Sequence[int]
    cell: int


class Compiler:
    """A policy set for one subject: everything that does not depend on which identities exist."""

    def __init__(
        self,
        policies: Iterable[Policy],
        groups: Mapping[str, CidrGroup],
        subject: Subject,
        settings: CompileSettings,
        universe: Universe,
    ) -> None:
        self.settings = settings
        self.subject = subject
        self.universe = universe
        self.chosen = selected_specs(policies, subject)
        rules = [rule for _, spec in self.chosen for rule in spec.rules]
        self.rules = {FIRST_RULE + at: rule.origin for at, rule in enumerate(rules)}
        of_rules = [policy for policy, spec in self.chosen for _ in spec.rules]
        self._rejecting = {FIRST_RULE + at for at, policy in enumerate(of_rules) if self._rejects(policy)}
        self._selectors: dict[Selector, int] = {}
        self._bound: dict[Selector, int] = {}  # as written -> number
        peers = [self._numbers(rule.peers) for rule in rules]
        failsafe = [self._failsafe_peers(one) for one in settings.failsafe]
        self._index(groups)
        self.directions = tuple(
            _Direction(self._plan(direction, rules, peers, failsafe)) for direction in Direction
        )

    def _plan(
        self,
        direction: Direction,
        rules: Sequence[Rule],
        peers: Sequence[tuple[int, ...] | None],
        failsafe: Sequence[tuple[int, ...] | None],
    ) -> "_Plan":
        settings = self.settings
        specs = [spec for _, spec in self.chosen]
        kept = [spec for policy, spec in self.chosen if policy.title not in settings.audit_policies]
        enforced, default_deny = enforcement(specs, self.subject, settings.mode)
        kept_enforced, kept_default_deny = enforcement(kept, self.subject, settings.mode)
        columns = ColumnBuilder(settings.named_ports)
        found, exempt = [], []
        if enforced[direction]:
            found = [
                (FIRST_RULE + at, rule, peers[at], columns.add(rule.ports), columns.add(rule.layer7_ports))
                for at, rule in enumerate(rules)
                if rule.direction is direction
            ]
            if settings.exempt_ports is not None and direction is Direction.INGRESS:
                ports = tuple(PortRange(proto, *settings.exempt_ports) for proto in _NODE_PORT_PROTOCOLS)
                exempt = [(None, columns.add(ports), _EXEMPT)]
        # also where nothing is enforced: in a panic both directions are, and only these cells pass
        safe = [
            (peers_, columns.add((PortRange(one.proto, one.port, one.port),)), _FAILSAFE)
            for one, peers_ in zip(settings.failsafe, failsafe, strict=True)
            if one.direction is direction
        ]
        built = columns.build()
        return _Plan(
            direction,
            enforced[direction],
            default_deny[direction],
            (kept_enforced[direction], kept_default_deny[direction]),
            built,
            [
                Numbered(number, rule, who, columns.of(plain), columns.of(layer7))
                for number, rule, who, plain, layer7 in found
            ],
            [Fixed(who, columns.of(ports), cell) for who, ports, cell in (*exempt, *safe)],
            frozenset(number for number, rule, *_ in found if rule.origin.policy in settings.audit_policies),
            frozenset(self._rejecting),
            self._default_rejects(direction),
        )

    def _rejects(self, policy: Policy) -> bool:
        return policy.denied == "reject" if policy.denied else self.settings.reject

    def _default_rejects(self, direction: Direction) -> bool:
        """Nobody asks for silence: a default deny belongs to all policies that ask for it."""
        asking = [
            self._rejects(policy)
            for policy, spec in self.chosen
            if spec.default_deny[direction] and policy.title not in self.settings.audit_policies
        ]
        return all(asking) if asking else self.settings.reject

    def _numbers(self, peers: Sequence[Selector] | None) -> tuple[int, ...] | None:
        """The numbers of a rule's selectors; equal selectors share one."""
        if peers is None:
            return None
        return tuple(dict.fromkeys([self._number(one) for one in peers]))

    def _number(self, selector: Selector) -> int:
        number = self._bound.get(selector)
        if number is None:
            bound = self.bind(selector)
            number = self._bound[selector] = self._selectors.setdefault(bound, len(self._selectors))
        return number

    def bind(self, selector: Selector) -> Selector:
        """The selector as this cluster reads it."""
        if not isinstance(selector, LabelSelector):
            return selector
        local = self.settings.default_local_cluster
        return lower.bind_cluster(selector, self.settings.cluster_name, default_local=local)

    def _failsafe_peers(self, one: Failsafe) -> tuple[int, ...] | None:
        return self._numbers([CidrSelector(prefix) for prefix in one.prefixes]) if one.prefixes else None

    def _index(self, groups: Mapping[str, CidrGroup]) -> None:
        labels = {number: one for one, number in self._selectors.items() if isinstance(one, LabelSelector)}
        self.universe.ask(labels.values())
        self._labels = LabelMatcher(self.universe, labels)
        self._cidrs = CidrMatcher()
        for selector, number in self._selectors.items():
            if isinstance(selector, CidrSelector | GroupSelector):
                self._cidrs.add(number, cidr_prefixes(selector, groups), selector.excepts)
        self._cidr_keys = [
            prefix
            for one in labels.values()
            for requirement in one.requirements
            if requirement.source == CIDR and (prefix := lower.label_prefix(requirement.key)) is not None
        ]
        self._cidrs.name([WORLD4, WORLD6, *self._cidr_keys])
        self._prefixes, self._group_signatures = self._prefix_groups()

    # --- signatures ---------------------------------------------------------------------------------------

    def world_label(self, family: int) -> Label:
        """The label of addresses outside: one for both families in single stack."""
        name = f"{lower.WORLD}-ipv{family}" if self.settings.dual_stack else lower.WORLD
        return Label(RESERVED, name)

    def signature(self, identity: Identity, labels: LabelSet) -> Signature:
        """The selectors that an identity matches."""
        return self._class_signature(self.universe.classify(identity, labels))

    def _class_signature(self, one: Class) -> Signature:
        found = self._labels.match(one.mask)
        if one.outside is not None:
            found = list({*found, *self._outside(*one.outside)})
        found.sort()
        return tuple(found)

    def _outside(self, identity: Identity, labels: LabelSet) -> list[int]:
        """What an identity matches beyond its labels.

        CIDR selectors, and for the worlds the selectors of `world`.
        """
        mask = 0
        for label in labels:
            if label.source == CIDR:
                prefix = lower.label_prefix(label.key)
                mask |= self._cidrs.of_label(prefix) if prefix is not None else 0
        for family in (4, 6):
            if self.world_label(family) in labels:
                mask |= self._cidrs.whole.get(family, 0)
        found = self._cidrs.numbers(mask)
        if self.settings.dual_stack and identity in _WORLDS:
            found += self._labels.match(self.universe.mask_of([Label(RESERVED, lower.WORLD)]))
        return found

    def _prefix_signature(self, prefix: Prefix, mask: int) -> Signature:
        """The selectors that the addresses match whose longest named prefix this is."""
        labels = [self.world_label(prefix.family)]
        if self._cidr_keys and prefix.length:
            labels.append(Label(CIDR, lower.cidr_label_key(prefix)))
        found = {*self._labels.match(self.universe.mask_of(labels)), *self._cidrs.numbers(mask)}
        if prefix.length == 0 and self.settings.dual_stack:
            found.update(self._labels.match(self.universe.mask_of([Label(RESERVED, lower.WORLD)])))
        return tuple(sorted(found))

    def _prefix_groups(self) -> tuple[dict[Prefix, int], list[Signature]]:
        """Every prefix that policy names -> its group, and the selectors of each group."""
        signatures: dict[Signature, int] = {}
        found = self._cidrs.sweep()  # masks, replaced by groups in place: there may be a million
        if self._cidr_keys:
            return {
                prefix: signatures.setdefault(self._prefix_signature(prefix, mask), len(signatures))
                for prefix, mask in found.items()
            }, list(signatures)
        by_mask: dict[tuple[int, int, bool], int] = {}
        for prefix, mask in found.items():
            key = (prefix.family, mask, prefix.length == 0)
            group = by_mask.get(key)
            if group is None:
                signature = self._prefix_signature(prefix, mask)
                group = by_mask[key] = signatures.setdefault(signature, len(signatures))
            found[prefix] = group
        return found, list(signatures)

    # --- tables -------------------------------------------------------------------------------------------

    def tables(self) -> Compiled:
        """From scratch for the identities of the universe.

        Rows are numbered by their classes, not by identities.
        """
        ways = self.directions
        of_class: dict[int, tuple[_Row, _Row]] = {}
        for number, one in self.universe.live_classes():
            signature = self._class_signature(one)
            of_class[number] = ways[0].row_of(signature), ways[1].row_of(signature)
        of_group = [(ways[0].row_of(one), ways[1].row_of(one)) for one in self._group_signatures]
        unknown = ways[0].row_of(()), ways[1].row_of(())
        pairs = {*of_class.values(), *of_group, unknown}
        ingress, egress = (_Rows(one) for one in ways)
        for rows_, at in ((ingress, 0), (egress, 1)):
            for row in sorted({pair[at] for pair in pairs}):
                rows_.at(row)
        rows = {pair: Rows(ingress.at(pair[0]), egress.at(pair[1])) for pair in pairs}
        by_class = {number: rows[pair] for number, pair in of_class.items()}
        identities = {identity: by_class[number] for identity, number in self.universe.class_of.items()}
        if HOST in identities and self.localhost:
            here = ways[0].row_of(self.signature(HOST, self.universe.labels[HOST]), localhost=True)
            identities[HOST] = Rows(ingress.at(here), identities[HOST].egress)
        return Compiled(
            ingress=ingress.matrix(),
            egress=egress.matrix(),
            rules=self.rules,
            identities=identities,
            prefixes=self._prefixes,
            groups=tuple(rows[pair] for pair in of_group),
            unknown=rows[unknown],
            compiler=self,
        )

    def changed(
        self, compiled: Compiled, added: Mapping[Identity, LabelSet], removed: Iterable[Identity]
    ) -> Compiled:
        """See add_identities."""
        gone = list(removed)
        self.universe.change(added, gone)
        matrices = (compiled.ingress, compiled.egress)
        ingress, egress = (_Rows(*one) for one in zip(self.directions, matrices, strict=True))
        found: dict[Identity, Rows] = {}
        for identity, labels in added.items():
            one = self.signature(identity, labels)
            localhost = identity == HOST and self.localhost
            here = self.directions[0].row_of(one, localhost=localhost)
            found[identity] = Rows(ingress.at(here), egress.at(self.directions[1].row_of(one)))
        return replace(
            compiled,
            ingress=ingress.matrix(),
            egress=egress.matrix(),
            identities=Layered.over(compiled.identities, found, gone),
        )

    # --- answers for explain.py ---------------------------------------------------------------------------

    def ranges(self, ports: Iterable[PortMatch]) -> list[PortRange]:
        """Ports with names resolved."""
        return resolved(ports, self.settings.named_ports)

    def address_signature(self, address: Prefix) -> Signature:
        """The selectors that an address outside matches: those of its longest named prefix."""
        for length in range(address.length, -1, -1):
            shift = address.width - length
            prefix = Prefix(address.family, address.address >> shift << shift, length)
            if prefix in self._prefixes:
                return self._group_signatures[self._prefixes[prefix]]
        return ()

    def restricting(self, direction: Direction) -> tuple[RuleOrigin, ...]:
        """The first rule of each spec that asks for default deny in a direction."""
        asking = [spec for _, spec in self.chosen if spec.default_deny[direction]]
        return tuple(
            next(rule.origin for rule in spec.rules if rule.direction is direction) for spec in asking
        )

    @property
    def localhost(self) -> bool:
        """Whether this host reaches the subject without a rule."""
        return self.settings.allow_localhost and self.subject.identity != HOST


class _Rows:
    """The rows of one matrix while it grows: equal rows are one, known rows keep their numbers."""

    def __init__(self, direction: "_Direction", known: Matrix | None = None) -> None:
        self._direction = direction
        self._known = known
        self._rows: list[tuple[int, ...]] = list(known.rows) if known is not None else []
        self._grown = known is None

    def at(self, wanted: "_Row") -> int:
        """The number of a row."""
        row = self._direction.painted(wanted)
        numbers = self._direction.numbers
        number = numbers.get(row)
        if number is None or number >= len(self._rows) or self._rows[number] != row:
            number = self._find(row)
            numbers[row] = number
        return number

    def _find(self, row: tuple[int, ...]) -> int:
        """Only asked when the shared numbering does not know.

        The row is new, or `compiled` is not the latest.
        """
        if self._known is not None and row in self._rows:
            return self._rows.index(row)
        self._rows.append(row)
        self._grown = True
        return len(self._rows) - 1

    def matrix(self) -> Matrix:
        one = self._direction.plan
        if not self._grown and self._known is not None:
            return self._known
        return Matrix(one.enforced, one.default_deny, one.columns, tuple(self._rows))


class _Plan(NamedTuple):
    """The rules of one direction with their columns."""

    direction: Direction
    enforced: bool
    default_deny: bool
    without_audited: tuple[bool, bool]  # enforced, default deny
    columns: Columns
    rules: list[Numbered]
    fixed: list[Fixed]  # later ones are painted over earlier ones
    audited: frozenset[int]
    rejecting: frozenset[int]  # rules whose denials are answered
    default_rejects: bool


class _Row(NamedTuple):
    """What decides the cells of a row: the places of the rules that show in it, and of the fixed cells."""

    rules: tuple[int, ...]
    fixed: tuple[int, ...]
    localhost: bool


class _Direction:
    """Paints the rows of one direction.

    Rules have places: denies before allows, then those with the broadest selectors. Of two rules of equal strength
    the first shows, so that a narrow rule inside a broad one does not make a row of its own.
    """

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.numbers: dict[tuple[int, ...], int] = {}  # row -> number in the latest tables
        self._painted: dict[_Row, tuple[int, ...]] = {}
        self._placed = sorted(
            plan.rules, key=lambda one: (not one.rule.deny, _narrowness(one.rule), one.number)
        )
        self._reach = [self._covered(one) for one in self._placed]
        self._anybody = [at for at, one in enumerate(self._placed) if one.peers is None]
        self._by_selector: dict[int, list[int]] = {}
        for at, one in enumerate(self._placed):
            for selector in one.peers or ():
                self._by_selector.setdefault(selector, []).append(at)
        self._cells = {
            one.number: pack_cell(Verdict.DENY, one.number, _answering(one.number in plan.rejecting))
            if one.rule.deny
            else pack_cell(Verdict.ALLOW, one.number)
            for one in plan.rules
        }

    def _covered(self, one: Numbered) -> int:
        """The columns of a rule as bits; -1 for rules that always show, because they do more than allow or deny."""
        if self.plan.audited or one.layer7_columns or one.rule.auth in _HANDSHAKE:
            return -1
        return sum(1 << column for column in one.columns)

    def row(self, signature: Signature, *, localhost: bool) -> tuple[int, ...]:
        """The cells of a class."""
        return self.painted(self.row_of(signature, localhost=localhost))

    def row_of(self, signature: Signature, *, localhost: bool = False) -> _Row:
        """Which row a class has; equal for classes that only differ in rules that other rules hide."""
        fixed = tuple(
            at
            for at, one in enumerate(self.plan.fixed)
            if one.peers is None or not set(one.peers).isdisjoint(signature)
        )
        if not self.plan.enforced:
            return _Row((), fixed, localhost=False)
        places = list(self._anybody)
        by_selector = self._by_selector
        for selector in signature:
            places += by_selector.get(selector, ())
        reach, shown, hidden = self._reach, [], 0
        for at in sorted(set(places)):
            bits = reach[at]
            if bits < 0:
                shown.append(at)
            elif bits & ~hidden:
                shown.append(at)
                hidden |= bits
        return _Row(tuple(shown), fixed, localhost)

    def painted(self, row: _Row) -> tuple[int, ...]:
        """The cells of a row."""
        cells = self._painted.get(row)
        if cells is None:
            cells = self._painted[row] = self._paint_row(row)
        return cells

    def _paint_row(self, row: _Row) -> tuple[int, ...]:
        plan = self.plan
        rules = [self._placed[at] for at in reversed(row.rules)]
        cells = self._paint(rules, (plan.enforced, plan.default_deny), row.localhost)
        if plan.audited:
            kept = [one for one in rules if one.number not in plan.audited]
            cells = _audit(self._paint(kept, plan.without_audited, row.localhost), cells)
        for at in row.fixed:
            for column in plan.fixed[at].columns:
                cells[column] = plan.fixed[at].cell
        return tuple(cells)

    def _paint(self, found: Sequence[Numbered], state: tuple[bool, bool], localhost: bool) -> list[int]:
        """Weak before strong, last place before first: what is painted last stays."""
        enforced, default_deny = state
        if not enforced:
            return [_ALLOWED] * self.plan.columns.count
        cells = [self._default(default_deny, localhost)] * self.plan.columns.count
        layer7, auth, denies = [], [], []
        for one in found:
            if one.rule.deny:
                denies.append(one)
                continue
            cell = self._cells[one.number]
            for column in one.columns:
                cells[column] = cell
            if one.layer7_columns:
                layer7.append(one)
            if one.rule.auth in _HANDSHAKE:
                auth.append(one)
        for one in layer7:
            cell = pack_cell(Verdict.REDIRECT, one.number)
            for column in one.layer7_columns:
                cells[column] = cell
        for one in auth:
            for column in (*one.columns, *one.layer7_columns):
                cells[column] |= _AUTH
        for one in denies:
            cell = self._cells[one.number]
            for column in one.columns:
                cells[column] = cell
        return cells

    def _default(self, default_deny: bool, localhost: bool) -> int:
        if not default_deny:
            return _ALLOWED
        if localhost and self.plan.direction is Direction.INGRESS:
            return _LOCALHOST
        return pack_cell(
            Verdict.DEFAULT_DENY, int(self.plan.direction), _answering(self.plan.default_rejects)
        )


def _answering(rejects: bool) -> CellFlag:
    return CellFlag.REJECT if rejects else CellFlag.NONE


def _narrowness(rule: Rule) -> int:
    """How many conditions a peer has to meet, by the rule's broadest selector."""
    if rule.peers is None:
        return 0
    return min(
        (len(one.requirements) if isinstance(one, LabelSelector) else 2 for one in rule.peers), default=9
    )


def _audit(enforced: Sequence[int], everything: Sequence[int]) -> list[int]:
    """An audited policy opens nothing and closes nothing; what it would drop is marked."""
    cells = []
    for kept, wanted in zip(enforced, everything, strict=True):
        verdict, rule, flags = unpack_cell(wanted)
        passes = unpack_cell(kept)[0] in (Verdict.ALLOW, Verdict.REDIRECT)
        would_drop = verdict in (Verdict.DENY, Verdict.DEFAULT_DENY)
        cells.append(pack_cell(verdict, rule, flags | CellFlag.AUDIT) if passes and would_drop else kept)
    return cells


class Layered(Mapping[Identity, Rows]):
    """A mapping over a large one with a few changes.

    So that one identity does not cost a copy of all others.
    """

    __slots__ = ("_base", "_changes")

    def __init__(self, base: Mapping[Identity, Rows], changes: Mapping[Identity, Rows | None]) -> None:
        self._base = base
        self._changes = changes

    @classmethod
    def over(
        cls, known: Mapping[Identity, Rows], added: Mapping[Identity, Rows], removed: Iterable[Identity]
    ) -> "Mapping[Identity, Rows]":
        """`known` without `removed` and with `added`; flattened when the changes become many."""
        gone: dict[Identity, Rows | None] = dict.fromkeys(removed)
        if isinstance(known, Layered):
            base, changes = known._base, {**known._changes, **gone, **added}
        else:
            base, changes = known, {**gone, **added}
        if len(changes) <= MAX_LAYER:
            return cls(base, changes)
        flat = dict(base)
        for identity, rows in changes.items():
            if rows is None:
                flat.pop(identity, None)
            else:
                flat[identity] = rows
        return flat

    def __getitem__(self, identity: Identity) -> Rows:
        if identity in self._changes:
            rows = self._changes[identity]
            if rows is None:
                raise KeyError(identity)
            return rows
        return self._base[identity]

    def __iter__(self) -> Iterator[Identity]:
        yield from (one for one in self._base if one not in self._changes)
        yield from (one for one, rows in self._changes.items() if rows is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
