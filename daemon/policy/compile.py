"""Policies x identities -> PolicyTables: the verdict matrix, whose look-up cost does not depend on the policy.

Two peers that match the same selectors are one class (a row); two ports that no rule's ports separate are one class
(a column). A deny beats every allow, a layer 7 allow turns a plain one into a redirect, and among rules of equal
strength the lowest number is named, so equal inputs give equal tables whatever their order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.model.identity import Identity, Reserved
from daemon.model.labels import CIDR, RESERVED, Label, LabelSet
from daemon.model.net import WORLD4, WORLD6, Direction, Prefix, Proto
from daemon.model.rule import (
    CidrGroup,
    CidrSelector,
    GroupSelector,
    LabelSelector,
    NamedPort,
    Policy,
    PortMatch,
    PortRange,
    Rule,
    Selector,
    Spec,
    SubjectKind,
)
from daemon.model.verdict import FIRST_RULE, CellFlag, FixedRule, Verdict, pack_cell, unpack_cell
from daemon.policy import lower
from daemon.policy.matching import CidrMatcher, LabelMatcher, Signature, cidr_prefixes, matches
from daemon.policy.tables import Columns, Matrix, PolicyTables, Rows

HOST = Identity(Reserved.HOST)
_WITH_PORTS = (Proto.TCP, Proto.UDP, Proto.SCTP, Proto.ICMP, Proto.ICMPV6)
_WORLDS = (Identity(Reserved.WORLD_IPV4), Identity(Reserved.WORLD_IPV6))
_INIT = Label(RESERVED, "init")


class Subject(NamedTuple):
    """Whose policy is compiled: this host (identity 1) or a workload."""

    identity: Identity
    labels: LabelSet


@dataclass(frozen=True, slots=True)
class Failsafe:
    """Traffic that policy can never close. No prefixes: any peer; prefixes name addresses outside the mesh only."""

    direction: Direction
    proto: Proto
    port: int
    prefixes: tuple[Prefix, ...] = ()


@dataclass(frozen=True, slots=True)
class CompileSettings:
    """What the daemon's configuration means for policy.

    mode: `default`, `always` or `never`. named_ports: name -> (protocol, port) pairs that it resolves to.
    audit_policies: titles of policies whose denials are reported, not enforced, and whose allows open nothing.
    """

    mode: str = "default"
    ipv4: bool = True
    ipv6: bool = True
    cluster_name: str = "default"
    default_local_cluster: bool = False
    node_selector_labels: bool = True
    named_ports: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    failsafe: tuple[Failsafe, ...] = ()
    audit_policies: frozenset[str] = frozenset()
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
) -> "Compiled":
    """What the policies mean for the subject, for every identity and every address. Pure; order does not matter."""
    return _Compiler(policies, groups, subject, settings).tables(identities)


def add_identities(
    compiled: "Compiled", added: Mapping[Identity, LabelSet], removed: Iterable[Identity]
) -> "Compiled":
    """The tables after identities came and went: existing row numbers stay, new rows are appended."""
    return compiled.compiler.changed(compiled, added, removed)


@dataclass(frozen=True, slots=True)
class Compiled(PolicyTables):
    """PolicyTables that remember how to take further identities."""

    compiler: "_Compiler" = field(compare=False, repr=False, kw_only=True)


class _Numbered(NamedTuple):
    """A selected rule with its number and its ports in columns."""

    number: int
    rule: Rule
    columns: tuple[int, ...]
    layer7_columns: tuple[int, ...]


class _Compiler:
    """Everything about a policy set that does not depend on which identities exist."""

    def __init__(
        self,
        policies: Iterable[Policy],
        groups: Mapping[str, CidrGroup],
        subject: Subject,
        settings: CompileSettings,
    ) -> None:
        self.settings = settings
        self.subject = subject
        chosen = selected_specs(policies, subject)
        rules = [rule for _, spec in chosen for rule in spec.rules]
        self.rules = {FIRST_RULE + at: rule.origin for at, rule in enumerate(rules)}
        self._selectors: dict[Selector, int] = {}
        self._peers = [self._numbers(rule.peers) for rule in rules]
        failsafe = [self._failsafe_peers(one) for one in settings.failsafe]
        self._index(groups)
        specs = [spec for _, spec in chosen]
        enforced = [spec for policy, spec in chosen if policy.title not in settings.audit_policies]
        everything = enforcement(specs, subject, settings.mode)
        without_audited = enforcement(enforced, subject, settings.mode)
        self.directions = tuple(
            _Direction(
                direction,
                [
                    (FIRST_RULE + at, rule, self._peers[at])
                    for at, rule in enumerate(rules)
                    if rule.direction is direction
                ],
                [
                    (one, peers)
                    for one, peers in zip(settings.failsafe, failsafe, strict=True)
                    if one.direction is direction
                ],
                everything[0][direction],
                everything[1][direction],
                (without_audited[0][direction], without_audited[1][direction]),
                settings,
            )
            for direction in Direction
        )

    def _numbers(self, peers: Sequence[Selector] | None) -> tuple[int, ...] | None:
        """The numbers of a rule's selectors; equal selectors share one."""
        if peers is None:
            return None
        bound = [self._bind(one) if isinstance(one, LabelSelector) else one for one in peers]
        return tuple(dict.fromkeys(self._selectors.setdefault(one, len(self._selectors)) for one in bound))

    def _bind(self, selector: LabelSelector) -> LabelSelector:
        local = self.settings.default_local_cluster
        return lower.bind_cluster(selector, self.settings.cluster_name, default_local=local)

    def _failsafe_peers(self, one: Failsafe) -> tuple[int, ...] | None:
        return self._numbers([CidrSelector(prefix) for prefix in one.prefixes]) if one.prefixes else None

    def _index(self, groups: Mapping[str, CidrGroup]) -> None:
        self._labels = LabelMatcher(
            {number: one for one, number in self._selectors.items() if isinstance(one, LabelSelector)}
        )
        self._cidrs = CidrMatcher()
        for selector, number in self._selectors.items():
            if isinstance(selector, CidrSelector | GroupSelector):
                self._cidrs.add(number, cidr_prefixes(selector, groups), selector.excepts)
        self._cidrs.name([WORLD4, WORLD6, *self._labels.cidr_prefixes])

    # --- signatures ---------------------------------------------------------------------------------------

    def world_label(self, family: int) -> Label:
        """The label of addresses outside: one for both families in single stack."""
        name = f"{lower.WORLD}-ipv{family}" if self.settings.dual_stack else lower.WORLD
        return Label(RESERVED, name)

    def signature(self, identity: Identity, labels: LabelSet) -> Signature:
        """The selectors that an identity matches."""
        numbers = set(self._labels.match(labels))
        if self.settings.dual_stack and identity in _WORLDS:
            numbers.update(self._labels.match([Label(RESERVED, lower.WORLD)]))
        mask = 0
        for label in labels:
            if label.source == CIDR:
                prefix = lower.label_prefix(label.key)
                mask |= self._cidrs.of_label(prefix) if prefix is not None else 0
        for family in (4, 6):
            if self.world_label(family) in labels:
                mask |= self._cidrs.whole.get(family, 0)
        numbers.update(self._cidrs.numbers(mask))
        return tuple(sorted(numbers))

    def prefix_signature(
        self, family: int, mask: int, whole: bool, cidr_labels: frozenset[Label]
    ) -> Signature:
        """The selectors that addresses of a prefix match; `whole` for the family's /0 itself."""
        numbers = set(self._labels.match([self.world_label(family), *cidr_labels]))
        if whole and self.settings.dual_stack:
            numbers.update(self._labels.match([Label(RESERVED, lower.WORLD)]))
        numbers.update(self._cidrs.numbers(mask))
        return tuple(sorted(numbers))

    # --- tables -------------------------------------------------------------------------------------------

    def tables(self, identities: Mapping[Identity, LabelSet]) -> Compiled:
        """From scratch: rows are numbered in the order of their classes, not of the identities."""
        of_identity = {identity: self.signature(identity, labels) for identity, labels in identities.items()}
        prefixes, of_group = self._prefix_groups()
        wanted = sorted({(), *of_identity.values(), *of_group})
        ingress, egress = (_Rows(one) for one in self.directions)
        host = of_identity.get(HOST)
        rows = {one: Rows(ingress.at(one), egress.at(one)) for one in wanted}
        found = {identity: rows[one] for identity, one in of_identity.items()}
        if host is not None:
            found[HOST] = Rows(ingress.at(host, localhost=self._localhost), egress.at(host))
        return Compiled(
            ingress=ingress.matrix(),
            egress=egress.matrix(),
            rules=self.rules,
            identities=found,
            prefixes=prefixes,
            groups=tuple(rows[one] for one in of_group),
            unknown=rows[()],
            compiler=self,
        )

    @property
    def _localhost(self) -> bool:
        """Whether this host reaches the subject without a rule."""
        return self.settings.allow_localhost and self.subject.identity != HOST

    def _prefix_groups(self) -> tuple[dict[Prefix, int], list[Signature]]:
        """Every prefix that policy names -> its group, and the selectors of each group."""
        by_key: dict[tuple[int, int, bool, frozenset[Label]], int] = {}
        signatures: dict[Signature, int] = {}
        found: dict[Prefix, int] = {}
        labelled = bool(self._labels.cidr_prefixes)
        for prefix, mask in self._cidrs.sweep().items():
            named = (
                frozenset({Label(CIDR, lower.cidr_label_key(prefix))})
                if labelled and prefix.length
                else frozenset()
            )
            key = (prefix.family, mask, prefix.length == 0, named)
            group = by_key.get(key)
            if group is None:
                signature = self.prefix_signature(prefix.family, mask, prefix.length == 0, named)
                group = by_key[key] = signatures.setdefault(signature, len(signatures))
            found[prefix] = group
        return found, list(signatures)

    def changed(
        self, compiled: Compiled, added: Mapping[Identity, LabelSet], removed: Iterable[Identity]
    ) -> Compiled:
        """See add_identities."""
        ingress, egress = (
            _Rows(one, matrix)
            for one, matrix in zip(self.directions, (compiled.ingress, compiled.egress), strict=True)
        )
        identities = dict(compiled.identities)
        for identity in removed:
            identities.pop(identity, None)
        for identity, labels in added.items():
            one = self.signature(identity, labels)
            localhost = identity == HOST and self._localhost
            identities[identity] = Rows(ingress.at(one, localhost=localhost), egress.at(one))
        return Compiled(
            ingress=ingress.matrix(),
            egress=egress.matrix(),
            rules=compiled.rules,
            identities=identities,
            prefixes=compiled.prefixes,
            groups=compiled.groups,
            unknown=compiled.unknown,
            compiler=self,
        )


class _Rows:
    """The rows of one matrix while it grows: equal rows are one."""

    def __init__(self, direction: "_Direction", known: Matrix | None = None) -> None:
        self._direction = direction
        self._rows: list[tuple[int, ...]] = list(known.rows) if known is not None else []
        self._numbers = {row: at for at, row in enumerate(self._rows)}
        self._by_signature: dict[tuple[Signature, bool], int] = {}

    def at(self, signature: Signature, *, localhost: bool = False) -> int:
        """The number of the row of a class."""
        key = (signature, localhost)
        number = self._by_signature.get(key)
        if number is None:
            row = self._direction.row(signature, localhost=localhost)
            number = self._numbers.setdefault(row, len(self._rows))
            if number == len(self._rows):
                self._rows.append(row)
            self._by_signature[key] = number
        return number

    def matrix(self) -> Matrix:
        one = self._direction
        return Matrix(one.enforced, one.default_deny, one.columns, tuple(self._rows))


class _Direction:
    """The rules of one direction with their columns, ready to paint rows."""

    def __init__(
        self,
        direction: Direction,
        rules: Sequence[tuple[int, Rule, tuple[int, ...] | None]],
        failsafe: Sequence[tuple[Failsafe, tuple[int, ...] | None]],
        enforced: bool,
        default_deny: bool,
        without_audited: tuple[bool, bool],
        settings: CompileSettings,
    ) -> None:
        self.direction = direction
        self.enforced = enforced
        self.default_deny = default_deny
        self._without_audited = without_audited
        if not enforced:
            rules, failsafe = (), ()
        columns = _ColumnBuilder()
        resolved = [
            (columns.add(rule.ports, settings), columns.add(rule.layer7_ports, settings))
            for _, rule, _ in rules
        ]
        safe = [columns.add((PortRange(one.proto, one.port, one.port),), settings) for one, _ in failsafe]
        self.columns = columns.build()
        self._rules: dict[int, _Numbered] = {}
        self._by_selector: dict[int, list[int]] = {}
        self._anybody: list[int] = []
        for (number, rule, peers), (plain, layer7) in zip(rules, resolved, strict=True):
            self._rules[number] = _Numbered(number, rule, columns.of(plain), columns.of(layer7))
            if peers is None:
                self._anybody.append(number)
            for selector in peers or ():
                self._by_selector.setdefault(selector, []).append(number)
        self._failsafe = [
            (peers, columns.of(ports)) for (_, peers), ports in zip(failsafe, safe, strict=True)
        ]
        self._audited = frozenset(
            number for number, rule, _ in rules if rule.origin.policy in settings.audit_policies
        )

    def row(self, signature: Signature, *, localhost: bool) -> tuple[int, ...]:
        """The cells of a class."""
        numbers = {number for selector in signature for number in self._by_selector.get(selector, ())}
        numbers.update(self._anybody)
        cells = self._paint(sorted(numbers, reverse=True), (self.enforced, self.default_deny), localhost)
        if self._audited:
            kept = sorted(numbers - self._audited, reverse=True)
            cells = _audit(self._paint(kept, self._without_audited, localhost), cells)
        for peers, columns in self._failsafe:
            if peers is None or not set(peers).isdisjoint(signature):
                for column in columns:
                    cells[column] = pack_cell(Verdict.ALLOW, FixedRule.FAILSAFE)
        return tuple(cells)

    def _paint(self, numbers: Sequence[int], state: tuple[bool, bool], localhost: bool) -> list[int]:
        """Weak before strong, high numbers before low: what is painted last stays."""
        enforced, default_deny = state
        default = pack_cell(Verdict.ALLOW, FixedRule.DEFAULT_ALLOW)
        if enforced and default_deny:
            default = pack_cell(Verdict.DEFAULT_DENY, int(self.direction))
            if localhost and self.direction is Direction.INGRESS:
                default = pack_cell(Verdict.ALLOW, FixedRule.LOCALHOST)
        cells = [default] * self.columns.count
        if not enforced:
            return cells
        found = [self._rules[number] for number in numbers]
        allows = [one for one in found if not one.rule.deny]
        for one in allows:
            cell = pack_cell(Verdict.ALLOW, one.number)
            for column in one.columns:
                cells[column] = cell
        for one in allows:
            cell = pack_cell(Verdict.REDIRECT, one.number)
            for column in one.layer7_columns:
                cells[column] = cell
        self._authenticate(allows, cells)
        for one in found:
            if one.rule.deny:
                cell = pack_cell(Verdict.DENY, one.number)
                for column in one.columns:
                    cells[column] = cell
        return cells

    def _authenticate(self, allows: Sequence[_Numbered], cells: list[int]) -> None:
        flag = pack_cell(Verdict(0), 0, CellFlag.AUTH)
        for one in allows:
            if one.rule.auth in ("required", "test-always-fail"):
                for column in (*one.columns, *one.layer7_columns):
                    cells[column] |= flag


def _audit(enforced: Sequence[int], everything: Sequence[int]) -> list[int]:
    """An audited policy opens nothing and closes nothing; what it would drop is marked."""
    cells = []
    for kept, wanted in zip(enforced, everything, strict=True):
        verdict, rule, flags = unpack_cell(wanted)
        passes = unpack_cell(kept)[0] in (Verdict.ALLOW, Verdict.REDIRECT)
        would_drop = verdict in (Verdict.DENY, Verdict.DEFAULT_DENY)
        cells.append(pack_cell(verdict, rule, flags | CellFlag.AUDIT) if passes and would_drop else kept)
    return cells


class _ColumnBuilder:
    """Port classes: two ports are one class when the same port lists hold them."""

    def __init__(self) -> None:
        self._lists: dict[tuple[PortRange, ...] | None, int] = {None: 0}
        self._columns: dict[int, int] = {0: 0}  # mask of port lists -> column

    def add(self, ports: Sequence[PortMatch] | None, settings: CompileSettings) -> int:
        """The number of a port list; None is every port."""
        if ports is None:
            return 0
        return self._lists.setdefault(_merged(_resolved(ports, settings)), len(self._lists))

    def build(self) -> Columns:
        """Sweep each protocol's ranges once."""
        edges: dict[int, dict[int, int]] = {proto: {} for proto in _WITH_PORTS}
        whole: dict[int, int] = {}
        for ranges, number in self._lists.items():
            for one in ranges or ():
                if one.whole:
                    whole[one.proto] = whole.get(one.proto, 0) | 1 << number
                if one.proto in edges:
                    at = edges[one.proto]
                    at[one.first] = at.get(one.first, 0) ^ 1 << number
                    at[one.last + 1] = at.get(one.last + 1, 0) ^ 1 << number
        cuts: dict[Proto, tuple[int, ...]] = {}
        columns: dict[Proto, tuple[int, ...]] = {}
        for proto in _WITH_PORTS:
            cuts[proto], columns[proto] = self._sweep(edges[proto], 0x100 if proto in (1, 58) else 0x10000)
        protocols = {proto: self._column(mask) for proto, mask in sorted(whole.items())}
        return Columns(cuts, columns, protocols, len(self._columns))

    def _sweep(self, edges: Mapping[int, int], end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        mask, cuts, columns = 0, [0], [0]
        for edge in sorted(edges):
            if edge >= end:
                break
            mask ^= edges[edge]
            column = self._column(mask)
            if edge == 0:
                columns[0] = column
            elif column != columns[-1]:
                cuts.append(edge)
                columns.append(column)
        return tuple(cuts), tuple(columns)

    def _column(self, mask: int) -> int:
        return self._columns.setdefault(mask, len(self._columns))

    def of(self, number: int) -> tuple[int, ...]:
        """The columns of a port list, after `build`."""
        if number == 0:
            return tuple(self._columns.values())
        return tuple(column for mask, column in self._columns.items() if mask >> number & 1)


def _resolved(ports: Iterable[PortMatch], settings: CompileSettings) -> list[PortRange]:
    found = []
    for one in ports:
        if isinstance(one, NamedPort):
            named = settings.named_ports.get(one.name, ())
            found += [PortRange(proto, port, port) for proto, port in named if proto in one.protocols]
        else:
            found.append(one)
    return found


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Ascending and disjoint, adjacent ones joined."""
    found: list[PortRange] = []
    for one in sorted(ranges):
        if found and found[-1].proto == one.proto and one.first <= found[-1].last + 1:
            found[-1] = PortRange(one.proto, found[-1].first, max(found[-1].last, one.last))
        else:
            found.append(one)
    return tuple(found)
