"""CCNP, CNP and CIDR group documents: read strictly, refused with file, line, column, field and expectation.

A document with any error gives Problems and no Policy; the other documents of the file are read all the same.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import NamedTuple

from daemon.model.net import Direction, Prefix, Proto
from daemon.model.problem import Problem
from daemon.model.rule import (
    NO_REVIEW,
    CidrGroup,
    CidrSelector,
    GroupSelector,
    LabelSelector,
    NamedPort,
    Op,
    Policy,
    PortMatch,
    PortRange,
    Requirement,
    Review,
    Rule,
    RuleOrigin,
    Selector,
    Spec,
    SubjectKind,
    match_type,
)
from daemon.policy import lower
from daemon.policy.document import Node, read_documents, shown
from daemon.policy.reader import Reader, filled, suggest

CCNP = "CiliumClusterwideNetworkPolicy"
CNP = "CiliumNetworkPolicy"
CIDR_GROUP = "CiliumCIDRGroup"
POLICY_TEST = "PolicyTest"  # see check.py
API_VERSIONS = {
    CCNP: ("cilium.io/v2",),
    CNP: ("cilium.io/v2",),
    CIDR_GROUP: ("cilium.io/v2", "cilium.io/v2alpha1"),
}
OWN_ANNOTATIONS = "meshwall.io/"
DENIED = OWN_ANNOTATIONS + "denied"
OWNER, WHY, REVIEW_BY = (OWN_ANNOTATIONS + one for one in ("owner", "reason", "review-by"))
_ANNOTATIONS = (DENIED, OWNER, WHY, REVIEW_BY)
DENIED_VALUES = ("drop", "reject")
MAX_PORTS = 40  # in one block
MAX_LISTED_PROBLEMS = 20  # of one plain list
_METADATA = (
    "name", "namespace", "labels", "annotations", "uid", "resourceVersion", "generation", "creationTimestamp",
    "deletionTimestamp", "deletionGracePeriodSeconds", "finalizers", "generateName", "managedFields",
    "ownerReferences", "selfLink",
)  # fmt: skip
_SPEC = (
    "endpointSelector", "nodeSelector", "ingress", "ingressDeny", "egress", "egressDeny", "enableDefaultDeny",
    "labels", "description", "log",
)  # fmt: skip
_OPERATORS = {"In": Op.IN, "NotIn": Op.NOT_IN, "Exists": Op.EXISTS, "DoesNotExist": Op.NOT_EXISTS}
_AUTH_MODES = ("disabled", "required", "test-always-fail")
_REMOVED = "was removed from the language in Cilium 1.19: write the labels into each peer selector instead"

_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_NAME_PART = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_SOURCE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")
_NUMBER = re.compile(r"[0-9]+")
_PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[A-Za-z])[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")
_FQDN_NAME = re.compile(r"[-a-zA-Z0-9_]+(?:[.][-a-zA-Z0-9_]+)*[.]?")
_FQDN_PATTERN = re.compile(r"[-a-zA-Z0-9_*]+(?:[.][-a-zA-Z0-9_*]+)*[.]?")


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """What the language may use on this host.

    node_selector_labels: fromNodes and toNodes are legal.
    extended_protocols: VRRP and IGMP may be named as protocol.
    allow_unenforced: constructs that nothing enforces yet give a warning instead of refusing the document.
    """

    node_selector_labels: bool = True
    extended_protocols: bool = False
    allow_unenforced: bool = False


class Parsed(NamedTuple):
    """What a file holds. A file is fit for use when no problem has severity `error`."""

    policies: tuple[Policy, ...]
    groups: tuple[CidrGroup, ...]
    problems: tuple[Problem, ...]


def parse_documents(text: str, file: str, settings: LanguageSettings | None = None) -> Parsed:
    """Read every document of a file. Never raises; what is wrong is in `problems`."""
    policies: list[Policy] = []
    groups: list[CidrGroup] = []
    problems: list[Problem] = []
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            problems.append(document)
            continue
        for node in _listed(document):
            reader = _Policies(file, settings=settings or LanguageSettings())
            found = reader.document(node)
            problems += reader.problems
            if reader.failed:
                continue
            if isinstance(found, Policy):
                policies.append(found)
            elif found is not None:
                groups.append(found)
    problems += _duplicates(file, policies, groups)
    return Parsed(tuple(policies), tuple(groups), tuple(problems))


def parse_cidr_list(text: str, file: str) -> Parsed:
    """A plain list, one prefix or address a line, `#` for comments: the CIDR group named like the file.

    For lists that outgrow a YAML document: a million prefixes are read in a few seconds.
    """
    name = file.rpartition("/")[2].removesuffix(".cidrs")
    found: dict[Prefix, None] = {}
    problems: list[Problem] = []
    if not _DNS_SUBDOMAIN.fullmatch(name):
        problems.append(Problem(file, 0, 0, "", f"{shown(name)} is not a valid group name: rename the file"))
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        prefix = _listed_prefix(entry)
        if prefix is not None:
            found[prefix] = None
        elif len(problems) < MAX_LISTED_PROBLEMS:
            problems.append(
                Problem(file, number, 1, "", f"{shown(entry)} is not a prefix: expected address/length")
            )
    groups = () if problems else (CidrGroup(name, tuple(found)),)
    return Parsed((), groups, tuple(problems))


def _listed_prefix(text: str) -> Prefix | None:
    """A prefix or address, without the objects that `ip_network` makes: a million of them take seconds."""
    address, slash, length = text.partition("/")
    width = 128 if ":" in address else 32
    try:
        number = int(ipaddress.IPv6Address(address) if ":" in address else ipaddress.IPv4Address(address))
    except ValueError:
        return None
    if "%" in address:
        return None
    if not slash:
        bits = width
    elif _PREFIX_LENGTH.fullmatch(length) and int(length) <= width:
        bits = int(length)
    else:
        return None
    shift = width - bits
    return Prefix(4 if width == 32 else 6, number >> shift << shift, bits)


def _listed(document: Node) -> list[Node]:
    """The items of a `kind: List`, as `kubectl get -o yaml` prints it; otherwise the document itself."""
    kind, items = document.fields.get("kind"), document.fields.get("items")
    if kind is not None and kind.text.endswith("List") and items is not None and items.kind == "list":
        return items.items
    return [document]


def _duplicates(file: str, policies: Sequence[Policy], groups: Sequence[CidrGroup]) -> list[Problem]:
    """One object given twice in a file: which one counts would depend on order."""
    seen: dict[tuple[str, str, str], int] = {}
    found = []
    for policy in policies:
        key = (policy.kind, policy.namespace, policy.name)
        if key in seen:
            text = f"{policy.kind} {policy.title} was already defined in line {seen[key]}: rename one of them"
            found.append(Problem(policy.file, policy.line, 1, "metadata.name", text))
        seen.setdefault(key, policy.line)
    names = [group.name for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
    found += [
        Problem(file, 0, 0, "metadata.name", f"{CIDR_GROUP} {name} is defined more than once")
        for name in twice
    ]
    return found


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the rules of one spec need to know of what surrounds them."""

    policy: str
    kind: str
    namespace: str  # empty for cluster-wide policies
    uid: str
    spec: int
    log: str
    host: bool
    for_init: bool


@dataclass(slots=True)
class _Policies(Reader):
    """Reads one document and collects all that is wrong with it."""

    settings: LanguageSettings = field(default_factory=LanguageSettings)

    def unenforced(self, node: Node, path: str, what: str) -> None:
        """Legal, but nothing here enforces it: refused by name unless the caller only wants to be told."""
        hint = (
            "" if self.settings.allow_unenforced else " (--allow-unenforced reports it instead of refusing)"
        )
        severity = "warning" if self.settings.allow_unenforced else "error"
        message = f"not enforced yet: {what}{hint}"
        self.problems.append(Problem(self.file, node.line, node.column, path, message, severity))

    # --- objects ------------------------------------------------------------------------------------------

    def document(self, node: Node) -> Policy | CidrGroup | None:
        """The policy or group of one document."""
        if not self.expect(node, "", "mapping"):
            return None
        kind = node.fields.get("kind")
        if kind is None:
            self.fail(node, "kind", f"required, but missing: one of {', '.join(API_VERSIONS)}")
            return None
        if kind.text == POLICY_TEST:
            return None  # tests live beside the policies they are about
        if not self.choice(kind, "kind", tuple(API_VERSIONS)):
            return None
        known = ["apiVersion", "kind", "metadata", "spec", "status"]
        if kind.text != CIDR_GROUP:
            known.append("specs")
        fields = self.mapping(node, "", known, ("apiVersion", "metadata"))
        if "apiVersion" in fields:
            self.choice(fields["apiVersion"], "apiVersion", API_VERSIONS[kind.text])
        metadata = self.metadata(fields.get("metadata"))
        if kind.text == CIDR_GROUP:
            return self.cidr_group(node, fields.get("spec"), metadata.name, metadata.labels)
        return self.policy(node, fields, kind.text, metadata)

    def metadata(self, node: Node | None) -> "_Metadata":
        if node is None:
            return _Metadata("", "", "")
        fields = self.mapping(node, "metadata", _METADATA)
        if node.kind == "mapping" and "name" not in fields:
            self.fail(node, "metadata.name", "required, but missing")
        name = self.dns_name(fields.get("name"), "metadata.name")
        namespace = self.dns_name(fields.get("namespace"), "metadata.namespace", empty=True)
        uid = self.text(fields.get("uid"), "metadata.uid")
        labels = fields.get("labels")
        pairs: list[str] = []
        if labels is not None and labels.kind != "null" and self.expect(labels, "metadata.labels", "mapping"):
            for key, value in labels.fields.items():
                pairs.append(f"{key}={self.text(value, f'metadata.labels.{key}')}")
        ours = self.annotations(fields.get("annotations"))
        review = Review(
            self.text(ours.get(OWNER), f"metadata.annotations.{OWNER}"),
            self.text(ours.get(WHY), f"metadata.annotations.{WHY}"),
            self.date(ours.get(REVIEW_BY), f"metadata.annotations.{REVIEW_BY}"),
        )
        return _Metadata(name, namespace, uid, tuple(pairs), self.denied(ours.get(DENIED)), review)

    def annotations(self, node: Node | None) -> Mapping[str, Node]:
        """Those of ours; one of ours that does not exist is a mistake in writing."""
        path = "metadata.annotations"
        if node is None or node.kind == "null" or not self.expect(node, path, "mapping"):
            return {}
        ours = {key: value for key, value in node.fields.items() if key.startswith(OWN_ANNOTATIONS)}
        for key, value in ours.items():
            if key not in _ANNOTATIONS:
                self.fail(
                    value, f"{path}.{key}", f"unknown annotation: expected one of {', '.join(_ANNOTATIONS)}"
                )
        return ours

    def denied(self, node: Node | None) -> str:
        """What a denied packet gets."""
        text = self.text(node, f"metadata.annotations.{DENIED}")
        if node is not None and text not in DENIED_VALUES:
            expected = " or ".join(DENIED_VALUES)
            path = f"metadata.annotations.{DENIED}"
            self.fail(node, path, f"{shown(text)} is not known: expected {expected}")
        return text

    def date(self, node: Node | None, path: str) -> str:
        """A day as YYYY-MM-DD."""
        text = self.text(node, path)
        if node is None or not text:
            return ""
        try:
            return date.fromisoformat(text).isoformat()
        except ValueError:
            self.fail(node, path, f"{shown(text)} is not a day: expected YYYY-MM-DD, quoted")
            return ""

    def dns_name(self, node: Node | None, path: str, *, empty: bool = False) -> str:
        """A Kubernetes object name."""
        text = self.text(node, path)
        if node is None or node.kind != "string" or (empty and not text):
            return text
        if len(text) > 253 or not _DNS_SUBDOMAIN.fullmatch(text):
            expected = "lower-case letters, digits, '-' and '.', at most 253, a letter or digit at both ends"
            self.fail(node, path, f"{shown(text)} is not a valid name: expected {expected}")
        return text

    def cidr_group(
        self, node: Node, spec: Node | None, name: str, labels: tuple[str, ...]
    ) -> CidrGroup | None:
        if spec is None:
            self.fail(node, "spec", "required, but missing")
            return None
        fields = self.mapping(spec, "spec", ("externalCIDRs",), ("externalCIDRs",))
        listed = self.items(fields.get("externalCIDRs"), "spec.externalCIDRs")
        found = [self.prefix(item, path) for item, path in listed]
        return CidrGroup(name, tuple(dict.fromkeys(one for one in found if one is not None)), labels)

    def policy(self, node: Node, fields: Mapping[str, Node], kind: str, metadata: "_Metadata") -> Policy:
        namespace = (metadata.namespace or "default") if kind == CNP else ""
        listed: list[tuple[Node, str]] = []
        if "spec" in fields:
            listed.append((fields["spec"], "spec"))
        listed += self.items(fields.get("specs"), "specs")
        if not listed and not self.failed:
            self.fail(node, "spec", "required, but missing: a policy needs spec or specs")
        policy = Policy(
            metadata.name, namespace, kind, self.file, node.line,
            uid=metadata.uid, denied=metadata.denied, review=metadata.review,
        )  # fmt: skip
        specs = [self.spec(item, path, index, policy) for index, (item, path) in enumerate(listed)]
        return replace(policy, specs=tuple(one for one in specs if one is not None))

    # --- one spec -----------------------------------------------------------------------------------------

    def spec(self, node: Node, path: str, index: int, policy: Policy) -> Spec | None:
        fields = self.mapping(node, path, _SPEC)
        if node.kind != "mapping":
            return None
        kind, subject = self.subject(node, fields, path, policy)
        self.text(fields.get("description"), f"{path}.description")
        self.rule_labels(fields.get("labels"), f"{path}.labels")
        log = self.mapping(fields["log"], f"{path}.log", ("value",)) if "log" in fields else {}
        scope = _Scope(
            policy.title, policy.kind, policy.namespace, policy.uid, index,
            log=self.text(log.get("value"), f"{path}.log.value"),
            host=kind is SubjectKind.NODE,
            for_init=kind is SubjectKind.ENDPOINT and lower.mentions_reserved(subject, "init"),
        )  # fmt: skip
        rules: list[Rule] = []
        restricts = [False, False]
        for direction in Direction:
            for deny in (False, True):
                name = f"{direction}{'Deny' if deny else ''}"
                for at, (item, item_path) in enumerate(self.items(fields.get(name), f"{path}.{name}")):
                    restricts[direction] = True
                    rules.append(self.rule(item, item_path, (direction, deny, at), scope))
        if not any(restricts) and not self.failed:
            expected = "at least one of ingress, ingressDeny, egress, egressDeny with an element"
            self.fail(
                node,
                path,
                f"the rule has no effect: expected {expected} (an element `- {{}}` means default deny)",
            )
        asked = self.default_deny(fields.get("enableDefaultDeny"), f"{path}.enableDefaultDeny")
        default_deny = tuple(has and wanted for has, wanted in zip(restricts, asked, strict=True))
        return Spec(
            kind,
            subject,
            tuple(rules),
            (restricts[0], restricts[1]),
            (default_deny[0], default_deny[1]),
            node.line,
        )

    def subject(
        self, node: Node, fields: Mapping[str, Node], path: str, policy: Policy
    ) -> tuple[SubjectKind, LabelSelector]:
        """Which subjects a spec applies to: exactly one of the two selectors."""
        given = [name for name in ("endpointSelector", "nodeSelector") if name in fields]
        if len(given) != 1:
            found = "both are there" if given else "neither is there"
            self.fail(node, path, f"expected exactly one of endpointSelector and nodeSelector, {found}")
            return SubjectKind.ENDPOINT, LabelSelector()
        where = f"{path}.{given[0]}"
        pinned = policy.namespace if given[0] == "endpointSelector" else ""
        selector = self.selector(fields[given[0]], where, namespace=pinned)
        if given[0] == "nodeSelector":
            if policy.kind == CNP:
                self.fail(
                    fields["nodeSelector"], where, f"a namespaced policy cannot select nodes: use {CCNP}"
                )
            return SubjectKind.NODE, selector
        if policy.kind == CNP and lower.mentions_reserved(selector, "init"):
            self.fail(fields["endpointSelector"], where, f"reserved:init has no namespace: use {CCNP}")
        return SubjectKind.ENDPOINT, selector

    def default_deny(self, node: Node | None, path: str) -> tuple[bool, bool]:
        if node is None:
            return True, True
        fields = self.mapping(node, path, ("ingress", "egress"))
        return (
            self.flag(fields.get("ingress"), f"{path}.ingress", True),
            self.flag(fields.get("egress"), f"{path}.egress", True),
        )

    def rule_labels(self, node: Node | None, path: str) -> None:
        """Labels of the rule itself: no effect on traffic, but their shape is checked."""
        for item, where in self.items(node, path):
            fields = self.mapping(item, where, ("key", "source", "value"), ("key",))
            for name, value in fields.items():
                self.text(value, f"{where}.{name}")

    # --- selectors ----------------------------------------------------------------------------------------

    def selector(self, node: Node, path: str, *, namespace: str = "") -> LabelSelector:
        """A label selector as written; with a namespace it is pinned to it, whatever its matchLabels say of that."""
        fields = self.mapping(node, path, ("matchLabels", "matchExpressions"))
        pinned = [lower.pinned(namespace)] if namespace else []
        found: list[Requirement] = list(pinned)
        where: dict[tuple[str, str], tuple[str, str]] = {}
        labels = fields.get("matchLabels")
        if labels is not None and self.expect(labels, f"{path}.matchLabels", "mapping"):
            for text, value in labels.fields.items():
                at = f"{path}.matchLabels.{text}"
                source, key = self.label_key(labels.keys[text], at)
                wanted = self.label_value(value, at)
                before = where.setdefault((source, key), (text, wanted))
                if before != (text, wanted) and before[1] != wanted:
                    self.fail(
                        labels.keys[text],
                        at,
                        f"{shown(text)} and {shown(before[0])} are the same key with two values",
                    )
                if not pinned or (source, key) != pinned[0][:2]:
                    found.append(Requirement(source, key, Op.IN, (wanted,)))
        for item, at in self.items(fields.get("matchExpressions"), f"{path}.matchExpressions"):
            requirement = self.expression(item, at)
            if requirement is not None:
                found.append(requirement)
        return lower.canonical(found)

    def expression(self, node: Node, path: str) -> Requirement | None:
        fields = self.mapping(node, path, ("key", "operator", "values"), ("key", "operator"))
        key_node, operator_node = fields.get("key"), fields.get("operator")
        if key_node is None or operator_node is None or not self.expect(key_node, f"{path}.key", "string"):
            return None
        source, key = self.label_key(key_node, f"{path}.key")
        operator = self.choice(operator_node, f"{path}.operator", tuple(_OPERATORS))
        values = [
            self.label_value(item, at) for item, at in self.items(fields.get("values"), f"{path}.values")
        ]
        if not operator:
            return None
        op = _OPERATORS[operator]
        if op in (Op.IN, Op.NOT_IN) and not values:
            self.fail(fields.get("values", node), f"{path}.values", f"{operator} needs at least one value")
        if op in (Op.EXISTS, Op.NOT_EXISTS) and values:
            self.fail(fields["values"], f"{path}.values", f"{operator} takes no values")
        return Requirement(source, key, op, tuple(sorted(set(values))))

    def label_key(self, node: Node, path: str) -> tuple[str, str]:
        """(source, key) of a selector key, checked against the Kubernetes syntax after the source."""
        source, key = lower.split_key(node.text)
        prefix, slash, name = key.rpartition("/")
        bad_prefix = slash and (len(prefix) > 253 or not _DNS_SUBDOMAIN.fullmatch(prefix))
        if not _SOURCE.fullmatch(source) or bad_prefix or not _NAME_PART.fullmatch(name):
            expected = (
                "source:key with a Kubernetes label key, `prefix/name` or `name` of at most 63 characters"
            )
            self.fail(node, path, f"{shown(node.text)} is not a label key: expected {expected}")
        elif source == "cidr" and lower.label_prefix(key) is None:
            self.fail(
                node, path, f"{shown(node.text)} does not name a prefix: expected for example cidr:10.0.0.0/8"
            )
        return source, key

    def label_value(self, node: Node, path: str) -> str:
        text = self.text(node, path)
        if node.kind == "string" and not _LABEL_VALUE.fullmatch(text):
            expected = (
                "letters, digits, '-', '_' and '.', at most 63, starting and ending with a letter or digit"
            )
            self.fail(node, path, f"{shown(text)} is not a label value: expected {expected}")
        return text

    # --- one rule -----------------------------------------------------------------------------------------

    def rule(self, node: Node, path: str, at: tuple[Direction, bool, int], scope: _Scope) -> Rule:
        """One element of a list; `at` is direction, deny and index."""
        direction, deny, index = at
        origin = RuleOrigin(
            scope.policy,
            scope.kind,
            direction,
            deny,
            scope.spec,
            index,
            self.file,
            node.line,
            scope.log,
            scope.uid,
        )
        word = "from" if direction is Direction.INGRESS else "to"
        peer_fields = [
            f"{word}{name}" for name in ("Endpoints", "Entities", "CIDR", "CIDRSet", "Nodes", "Groups")
        ]
        if direction is Direction.EGRESS:
            peer_fields += ["toServices"] if deny else ["toServices", "toFQDNs"]
        known = [*peer_fields, f"{word}Requires", "toPorts", "icmps"]
        if not deny:
            known.append("authentication")
        fields = dict(self.mapping(node, path, known))
        removed = fields.pop(f"{word}Requires", None)
        if removed is not None:
            self.fail(removed, f"{path}.{word}Requires", _REMOVED)
        peers = self.peers(node, fields, path, peer_fields, scope)
        if "toServices" in fields and filled(fields.get("toPorts")):
            self.fail(
                fields["toPorts"],
                f"{path}.toPorts",
                "cannot be combined with toServices: a service has its ports",
            )
        ports, layer7 = self.ports(fields, path, direction, deny, scope)
        if peers is None and not any(name in fields for name in peer_fields) and ports is None:
            peers = ()  # `- {}`: matches nothing, its only effect is default deny
        every = None if ports is None else (*ports, *layer7)
        origin = replace(origin, match=int(match_type(peers, every)))
        return Rule(origin, peers, ports, layer7, self.authentication(fields.get("authentication"), path))

    def authentication(self, node: Node | None, path: str) -> str:
        if node is None:
            return ""
        path = f"{path}.authentication"
        fields = self.mapping(node, path, ("mode",), ("mode",))
        if "mode" not in fields:
            return ""
        mode = self.choice(fields["mode"], f"{path}.mode", _AUTH_MODES)
        if mode in ("required", "test-always-fail"):
            self.unenforced(
                fields["mode"], f"{path}.mode", "mutual authentication needs a handshake between agents"
            )
        return mode

    def peers(
        self, node: Node, fields: Mapping[str, Node], path: str, names: Sequence[str], scope: _Scope
    ) -> tuple[Selector, ...] | None:
        """The selectors of the one peer field; None if there is none, or it is the entity `all`."""
        full = [name for name in names if filled(fields.get(name))]
        if len(full) > 1:
            self.fail(
                node, path, f"{' and '.join(full)} cannot be combined in one rule: write one rule for each"
            )
        found: list[Selector] = []
        everybody = False
        given = [name for name in names if name in fields]
        for name in given:
            part = self.peer_field(name, fields[name], f"{path}.{name}", scope)
            if part is None:
                everybody = True
            else:
                found += part
        if any(not filled(fields[name]) for name in given):
            return ()  # a peer field with an empty list: nobody, whatever else is written
        return None if everybody or not given else tuple(dict.fromkeys(found))

    def peer_field(  # noqa: PLR0911 - one field of the language each
        self, name: str, node: Node, path: str, scope: _Scope
    ) -> Sequence[Selector] | None:
        kind = name.removeprefix("from").removeprefix("to")
        listed = self.items(node, path)
        match kind:
            case "Endpoints":
                return [
                    lower.endpoint_peer(self.selector(item, at), scope.namespace, for_init=scope.for_init)
                    for item, at in listed
                ]
            case "Entities":
                entities = [self.choice(item, at, lower.ENTITIES) for item, at in listed]
                if "all" in entities:
                    return None
                return [one for entity in entities if entity for one in lower.entity(entity) or ()]
            case "CIDR":
                prefixes = [self.prefix(item, at) for item, at in listed]
                return lower.cidr_peers([CidrSelector(one) for one in prefixes if one is not None])
            case "CIDRSet":
                entries = [self.cidr_entry(item, at) for item, at in listed]
                return lower.cidr_peers([one for one in entries if one is not None])
            case "Nodes":
                if not self.settings.node_selector_labels:
                    self.fail(node, path, "needs node selector labels, which are off in the configuration")
                return [lower.node_peer(self.selector(item, at)) for item, at in listed]
            case "FQDNs":
                return self.fqdns(node, path, listed)
            case "Services":
                return self.services(node, path, listed)
            case _:
                return self.cloud_groups(node, path, listed)

    # --- prefixes -----------------------------------------------------------------------------------------

    def prefix(self, node: Node, path: str) -> Prefix | None:
        """A prefix with its length written out; host bits are masked off."""
        if not self.expect(node, path, "string"):
            return None
        address, slash, length = node.text.partition("/")
        exact = slash and "%" not in address and _PREFIX_LENGTH.fullmatch(length)
        try:
            network = ipaddress.ip_network(f"{address}/{length}" if exact else "", strict=False)
        except ValueError:
            hint = (
                f' (did you mean "{address}/{128 if ":" in address else 32}"?)'
                if _is_address(node.text)
                else ""
            )
            self.fail(node, path, f"{shown(node.text)} is not a prefix: expected address/length{hint}")
            return None
        return Prefix(network.version, int(network.network_address), network.prefixlen)

    def cidr_entry(self, node: Node, path: str) -> CidrSelector | GroupSelector | None:
        """One element of a CIDRSet."""
        fields = self.mapping(node, path, ("cidr", "cidrGroupRef", "cidrGroupSelector", "except"))
        given = [name for name in ("cidr", "cidrGroupRef", "cidrGroupSelector") if name in fields]
        listed = [
            (item, at, self.prefix(item, at))
            for item, at in self.items(fields.get("except"), f"{path}.except")
        ]
        excepts = tuple(sorted({one for _, _, one in listed if one is not None}))
        if len(given) != 1:
            if node.kind == "mapping":
                found = " and ".join(given) if given else "none"
                expected = "exactly one of cidr, cidrGroupRef, cidrGroupSelector"
                self.fail(node, path, f"expected {expected}, found {found}")
            return None
        value, where = fields[given[0]], f"{path}.{given[0]}"
        if given[0] == "cidrGroupRef":
            return GroupSelector(self.dns_name(value, where), None, excepts)
        if given[0] == "cidrGroupSelector":
            return GroupSelector("", self.selector(value, where), excepts)
        prefix = self.prefix(value, where)
        if prefix is None:
            return None
        for item, at, one in listed:
            if one is not None and not prefix.contains(one):
                self.fail(item, at, f"{one.cidr} does not lie inside {prefix.cidr}")
        return CidrSelector(prefix, excepts)

    # --- names, services, cloud groups --------------------------------------------------------------------

    def fqdns(self, node: Node, path: str, listed: list[tuple[Node, str]]) -> list[Selector]:
        found: list[Selector] = []
        for item, at in listed:
            name = self.fqdn(item, at)
            if name:
                found.append(lower.fqdn_peer(name))
        if listed:
            self.unenforced(node, path, "names need a source of DNS answers")
        return found

    def fqdn(self, node: Node, path: str) -> str:
        fields = self.mapping(node, path, ("matchName", "matchPattern"))
        if node.kind == "mapping" and len(fields) != 1:
            self.fail(node, path, f"expected exactly one of matchName and matchPattern, found {len(fields)}")
            return ""
        for name, value in fields.items():
            text = self.text(value, f"{path}.{name}")
            pattern = _FQDN_NAME if name == "matchName" else _FQDN_PATTERN
            if value.kind == "string" and (len(text) > 255 or not pattern.fullmatch(text)):
                allowed = "letters, digits, '-', '_', '.'" + (" and '*'" if name == "matchPattern" else "")
                self.fail(value, f"{path}.{name}", f"{shown(text)} is not a DNS name: expected {allowed}")
            return text
        return ""

    def services(self, node: Node, path: str, listed: list[tuple[Node, str]]) -> list[Selector]:
        """Checked, and for now matching nobody: no table of services exists to resolve them."""
        for item, at in listed:
            fields = self.mapping(item, at, ("k8sService", "k8sServiceSelector"))
            if "k8sService" in fields:
                named = self.mapping(fields["k8sService"], f"{at}.k8sService", ("serviceName", "namespace"))
                for name, value in named.items():
                    self.text(value, f"{at}.k8sService.{name}")
            if "k8sServiceSelector" in fields:
                where = f"{at}.k8sServiceSelector"
                chosen = self.mapping(
                    fields["k8sServiceSelector"], where, ("selector", "namespace"), ("selector",)
                )
                if "selector" in chosen:
                    self.selector(chosen["selector"], f"{where}.selector")
                self.text(chosen.get("namespace"), f"{where}.namespace")
        if listed:
            self.unenforced(node, path, "services need a source of their backends")
        return []

    def cloud_groups(self, node: Node, path: str, listed: list[tuple[Node, str]]) -> list[Selector]:
        for item, at in listed:
            fields = self.mapping(item, at, ("aws",))
            if "aws" in fields:
                names = ("labels", "securityGroupsIds", "securityGroupsNames", "region")
                aws = self.mapping(fields["aws"], f"{at}.aws", names)
                self.string_map(aws.get("labels"), f"{at}.aws.labels")
                for name in ("securityGroupsIds", "securityGroupsNames"):
                    for value, where in self.items(aws.get(name), f"{at}.aws.{name}"):
                        self.text(value, where)
                self.text(aws.get("region"), f"{at}.aws.region")
        if listed:
            self.unenforced(node, path, "cloud groups need a cloud provider; use a CiliumCIDRGroup")
        return []

    def string_map(self, node: Node | None, path: str) -> None:
        if node is not None and self.expect(node, path, "mapping"):
            for key, value in node.fields.items():
                self.text(value, f"{path}.{key}")

    # --- ports and types ----------------------------------------------------------------------------------

    def ports(
        self, fields: Mapping[str, Node], path: str, direction: Direction, deny: bool, scope: _Scope
    ) -> tuple[tuple[PortMatch, ...] | None, tuple[PortMatch, ...]]:
        """(plain ports, ports with a layer 7 part); the first is None for every port and protocol."""
        to_ports, icmps = fields.get("toPorts"), fields.get("icmps")
        if filled(to_ports) and filled(icmps):
            self.fail(fields["icmps"], f"{path}.icmps", "cannot be combined with toPorts: write two rules")
        plain: list[PortMatch] = []
        layer7: list[PortMatch] = []
        for item, at in self.items(to_ports, f"{path}.toPorts"):
            matches, has_layer7 = self.port_block(item, at, direction, deny, scope)
            (layer7 if has_layer7 else plain).extend(matches)
        for item, at in self.items(icmps, f"{path}.icmps"):
            plain += self.icmp_block(item, at)
        if not filled(to_ports) and not filled(icmps):
            return None, ()
        return tuple(dict.fromkeys(plain)), tuple(dict.fromkeys(layer7))

    def port_block(
        self, node: Node, path: str, direction: Direction, deny: bool, scope: _Scope
    ) -> tuple[list[PortMatch], bool]:
        known = ["ports"]
        if not deny:
            known += ["rules", "serverNames", "listener", "terminatingTLS", "originatingTLS"]
        fields = self.mapping(node, path, known)
        listed = self.items(fields.get("ports"), f"{path}.ports")
        if len(listed) > MAX_PORTS:
            self.fail(
                fields["ports"], f"{path}.ports", f"{len(listed)} ports, at most {MAX_PORTS} fit in a block"
            )
        entries = [self.port(item, at) for item, at in listed]
        kind = self.layer7(fields, path, entries, direction, scope)
        return [match for entry in entries for match in entry.matches], bool(kind)

    def port(self, node: Node, path: str) -> "_Port":
        """One ports entry. Port "0" without endPort is every port of the protocol."""
        fields = self.mapping(node, path, ("port", "endPort", "protocol"))
        protocols = tuple(lower.PORT_PROTOCOLS)
        if self.settings.extended_protocols:
            protocols += tuple(lower.EXTENDED_PROTOCOLS)
        protocol = "ANY"
        if "protocol" in fields:
            protocol = self.choice(fields["protocol"], f"{path}.protocol", protocols)
        end = self.end_port(fields.get("endPort"), f"{path}.endPort")
        if protocol in lower.EXTENDED_PROTOCOLS:
            return self.extended(fields, path, protocol, node)
        if "port" not in fields:
            if node.kind == "mapping":
                self.fail(node, f"{path}.port", "required, but missing")
            return _Port(node, protocol)
        numbers = lower.PORT_PROTOCOLS.get(protocol, ())
        value = fields["port"]
        if not self.expect(value, f"{path}.port", "string"):
            return _Port(node, protocol)
        if _PORT_NAME.fullmatch(value.text):
            return _Port(node, protocol, name=value.text, matches=(NamedPort(value.text.lower(), numbers),))
        number = self.port_number(value, f"{path}.port")
        if number is None:
            return _Port(node, protocol)
        last = max(number, end)
        if number == 0 and end == 0:
            last = 0xFFFF
        ranges = tuple(PortRange(proto, number, last) for proto in numbers)
        return _Port(node, protocol, zero=number == 0 and end == 0, ranged=last > number > 0, matches=ranges)

    def extended(self, fields: Mapping[str, Node], path: str, protocol: str, node: Node) -> "_Port":
        """VRRP or IGMP: a protocol without ports."""
        value = fields.get("port")
        if value is not None and self.text(value, f"{path}.port") not in ("", "0"):
            self.fail(value, f"{path}.port", f'{protocol} has no ports: leave it out or write "0"')
        return _Port(node, protocol, matches=(PortRange(lower.EXTENDED_PROTOCOLS[protocol], 0, 0xFFFF),))

    def end_port(self, node: Node | None, path: str) -> int:
        if node is None:
            return 0
        if (
            node.kind != "number"
            or not _NUMBER.fullmatch(node.text)
            or len(node.text) > 5
            or int(node.text) > 0xFFFF
        ):
            self.fail(node, path, f"expected a number from 0 to 65535, found {node.shown()}")
            return 0
        return int(node.text)

    def port_number(self, node: Node, path: str) -> int | None:
        text = node.text
        if _NUMBER.fullmatch(text) and len(text) > 1 and text.startswith("0"):
            self.fail(
                node, path, f"{shown(text)} has a leading zero, which Cilium reads as octal: leave it out"
            )
        elif not _NUMBER.fullmatch(text) or len(text) > 5 or int(text) > 0xFFFF:
            expected = (
                "a number from 0 to 65535 or a service name of up to 15 letters, digits and inner hyphens"
            )
            self.fail(node, path, f"{shown(text)} is not a port: expected {expected}")
        else:
            return int(text)
        return None

    def icmp_block(self, node: Node, path: str) -> list[PortMatch]:
        fields = self.mapping(node, path, ("fields",))
        listed = self.items(fields.get("fields"), f"{path}.fields")
        if len(listed) > MAX_PORTS:
            self.fail(
                fields["fields"],
                f"{path}.fields",
                f"{len(listed)} fields, at most {MAX_PORTS} fit in a block",
            )
        found: list[PortMatch] = []
        for item, at in listed:
            parts = self.mapping(item, at, ("family", "type"), ("type",))
            family = (
                self.choice(parts["family"], f"{at}.family", ("IPv4", "IPv6"))
                if "family" in parts
                else "IPv4"
            )
            number = self.icmp_type(parts["type"], f"{at}.type", family) if "type" in parts else None
            if number is not None:
                found.append(PortRange(Proto.ICMPV6 if family == "IPv6" else Proto.ICMP, number, number))
        return found

    def icmp_type(self, node: Node, path: str, family: str) -> int | None:
        """A type by number (also quoted) or name."""
        names = lower.ICMP6_TYPES if family == "IPv6" else lower.ICMP4_TYPES
        if node.kind in ("number", "string"):
            text = node.text
            if node.kind == "string" and text in names:
                return names[text]
            if (
                _NUMBER.fullmatch(text)
                and len(text) <= 3
                and (text == "0" or text[0] != "0")
                and int(text) <= 255
            ):
                return int(text)
        near = suggest(node.text, tuple(names))
        self.fail(
            node, path, f"expected 0 to 255 or the name of an {family} ICMP type, found {node.shown()}{near}"
        )
        return None

    # --- layer 7 ------------------------------------------------------------------------------------------

    def layer7(
        self,
        fields: Mapping[str, Node],
        path: str,
        ports: Sequence["_Port"],
        direction: Direction,
        scope: _Scope,
    ) -> str:
        """The kind of layer 7 part of a block (`http`, `dns`, `listener`...), empty if there is none."""
        kind = (
            self.layer7_rules(fields["rules"], f"{path}.rules", direction, scope) if "rules" in fields else ""
        )
        if kind:
            self.layer7_ports(fields["rules"], f"{path}.ports", kind, ports)
        for name in ("terminatingTLS", "originatingTLS"):
            if name in fields:
                self.tls(fields[name], f"{path}.{name}")
        names = self.items(fields.get("serverNames"), f"{path}.serverNames")
        for item, at in names:
            if self.expect(item, at, "string") and not _FQDN_PATTERN.fullmatch(item.text):
                self.fail(item, at, f"expected a server name, found {item.shown()}")
        if names and kind and "terminatingTLS" not in fields:
            where = f"{path}.serverNames"
            self.fail(
                fields["serverNames"],
                where,
                "cannot be combined with layer 7 rules unless terminatingTLS is set",
            )
        if "listener" in fields:
            self.listener(fields["listener"], f"{path}.listener", kind, direction)
        extra = [name for name in ("terminatingTLS", "originatingTLS", "listener") if name in fields]
        if names:
            extra.append("serverNames")
        if extra and scope.host:
            self.fail(fields[extra[0]], f"{path}.{extra[0]}", "is not supported in host policies")
        elif extra or kind:
            first = "rules" if kind else extra[0]
            self.unenforced(fields[first], f"{path}.{first}", "layer 7 rules need a proxy")
        return kind or (extra[0] if extra else "")

    def layer7_rules(self, node: Node, path: str, direction: Direction, scope: _Scope) -> str:
        """The one kind of rules that is present and not empty."""
        kinds = ("http", "kafka", "dns", "l7proto", "l7")
        fields = self.mapping(node, path, kinds)
        given = [name for name in kinds if name in fields and name != "l7"]
        if node.kind == "mapping" and len(given) != 1:
            self.fail(
                node, path, f"expected exactly one of http, kafka, dns, found {' and '.join(given) or 'none'}"
            )
            return ""
        if not given:
            return ""
        kind = given[0]
        if kind == "l7proto":
            self.fail(
                fields["l7proto"],
                f"{path}.l7proto",
                "generic layer 7 protocols were removed from the language",
            )
            return ""
        listed = self.items(fields[kind], f"{path}.{kind}")
        for item, at in listed:
            self.layer7_rule(kind, item, at)
        if not listed:
            return ""
        if scope.host and direction is Direction.INGRESS:
            self.fail(fields[kind], f"{path}.{kind}", "layer 7 rules are not supported at ingress of hosts")
        elif scope.host and kind != "dns":
            self.fail(
                fields[kind], f"{path}.{kind}", f"{kind} rules are not supported in host policies, only dns"
            )
        elif kind == "dns" and direction is Direction.INGRESS:
            self.fail(fields[kind], f"{path}.{kind}", "dns rules are for egress only")
        return kind

    def layer7_rule(self, kind: str, node: Node, path: str) -> None:
        if kind == "dns":
            self.fqdn(node, path)
            return
        names = {
            "http": ("path", "method", "host", "headers", "headerMatches"),
            "kafka": ("role", "apiKey", "apiVersion", "clientID", "topic"),
        }[kind]
        fields = self.mapping(node, path, names)
        if kind == "kafka" and "role" in fields:
            self.choice(fields["role"], f"{path}.role", ("produce", "consume"))
            if "apiKey" in fields:
                self.fail(fields["apiKey"], f"{path}.apiKey", "cannot be combined with role")
        for name, value in fields.items():
            at = f"{path}.{name}"
            if name == "headers":
                for item, where in self.items(value, at):
                    self.text(item, where)
            elif name == "headerMatches":
                for item, where in self.items(value, at):
                    self.header_match(item, where)
            else:
                text = self.text(value, at)
                if kind == "http":
                    self.regular_expression(value, at, text)

    def regular_expression(self, node: Node, path: str, text: str) -> None:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            self.fail(node, path, f"{shown(text)} is not a regular expression: {error}")

    def header_match(self, node: Node, path: str) -> None:
        fields = self.mapping(node, path, ("name", "value", "mismatch", "secret"), ("name",))
        self.text(fields.get("name"), f"{path}.name")
        self.text(fields.get("value"), f"{path}.value")
        if "mismatch" in fields:
            self.choice(fields["mismatch"], f"{path}.mismatch", ("LOG", "ADD", "DELETE", "REPLACE"))
        if "secret" in fields:
            self.secret(fields["secret"], f"{path}.secret")

    def secret(self, node: Node, path: str) -> None:
        for name, value in self.mapping(node, path, ("name", "namespace"), ("name",)).items():
            self.text(value, f"{path}.{name}")

    def layer7_ports(self, node: Node, path: str, kind: str, ports: Sequence["_Port"]) -> None:
        if kind == "dns" and not ports:
            self.fail(node, path, "dns rules need a port, usually 53")
        for port in ports:
            if port.zero:
                self.fail(port.node, path, "layer 7 rules cannot be used with port 0")
            if kind == "dns" and port.ranged:
                self.fail(port.node, path, "dns rules do not support port ranges")
            if kind != "dns" and port.protocol not in ("TCP", ""):
                self.fail(
                    port.node, path, f"{kind} rules apply to TCP only, not {port.protocol}: set protocol: TCP"
                )

    def tls(self, node: Node, path: str) -> None:
        names = ("secret", "trustedCA", "certificate", "privateKey")
        for name, value in self.mapping(node, path, names, ("secret",)).items():
            if name == "secret":
                self.secret(value, f"{path}.secret")
            else:
                self.text(value, f"{path}.{name}")

    def listener(self, node: Node, path: str, kind: str, direction: Direction) -> None:
        fields = self.mapping(node, path, ("envoyConfig", "name", "priority"), ("envoyConfig", "name"))
        self.text(fields.get("name"), f"{path}.name")
        if "envoyConfig" in fields:
            config = self.mapping(fields["envoyConfig"], f"{path}.envoyConfig", ("kind", "name"), ("name",))
            for name, value in config.items():
                self.text(value, f"{path}.envoyConfig.{name}")
        if "priority" in fields:
            self.expect(fields["priority"], f"{path}.priority", "number")
        if direction is Direction.INGRESS:
            self.fail(node, path, "listeners are for egress only")
        elif kind:
            self.fail(node, path, "cannot be combined with layer 7 rules")


class _Metadata(NamedTuple):
    name: str
    namespace: str
    uid: str
    labels: tuple[str, ...] = ()  # key=value
    denied: str = ""
    review: Review = NO_REVIEW


@dataclass(frozen=True, slots=True)
class _Port:
    """A ports entry, with what the checks of layer 7 rules ask about it."""

    node: Node
    protocol: str
    name: str = ""
    zero: bool = False
    ranged: bool = False
    matches: tuple[PortMatch, ...] = ()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
