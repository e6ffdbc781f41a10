"""Warnings about valid policies.

Rules that can never match, hidden ones, and the traps that people fall into.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from daemon.model.net import Direction, Prefix, Proto
from daemon.model.problem import Problem
from daemon.model.rule import (
    CidrGroup,
    CidrSelector,
    ClusterScope,
    GroupSelector,
    LabelSelector,
    NamedPort,
    Op,
    Policy,
    PortRange,
    Rule,
    Selector,
    Spec,
    SubjectKind,
)
from daemon.policy import lower
from daemon.policy.compile import Failsafe
from daemon.policy.explain import describe, port_text
from daemon.policy.matching import group_prefixes

_SOURCES = ("any", "k8s", "reserved", "cidr", "node", "fqdn", "cidrgroup", "container", "unspec")
_DROPPED_PREFIXES = ("kubernetes.io/", "io.kubernetes", "k8s.io")
_PASSED_ICMP6 = {1, 2, 3, 4, *range(130, 137), 138, 141, 142, 143, 148, 149, 151, 152, 153}
_JUDGED_ICMP6 = {128, 129}


def advise(
    policies: Sequence[Policy],
    groups: Mapping[str, CidrGroup],
    known_addresses: Mapping[Prefix, str],
    failsafe: Sequence[Failsafe],
) -> list[Problem]:
    """Warnings with the positions of the rules they are about."""
    found: list[Problem] = []
    for policy in policies:
        for spec in policy.specs:
            found += _spec_advice(policy, spec)
            for rule in spec.rules:
                texts = [
                    *_never(rule, spec, groups),
                    *_traps(rule, spec, policy, known_addresses),
                    *_failsafe_covered(rule, spec, failsafe),
                ]
                found += [_warning(rule, text) for text in texts]
    found += [_warning(rule, text) for rule, text in shadowed(policies)]
    return found


def _warning(rule: Rule, text: str) -> Problem:
    origin = rule.origin
    field = f"{origin.direction}{'Deny' if origin.deny else ''}[{origin.index}]"
    return Problem(origin.file, origin.line, 1, field, text, "warning")


def _spec_advice(policy: Policy, spec: Spec) -> Iterator[Problem]:
    def warn(text: str) -> Problem:
        return Problem(policy.file, spec.line, 1, "spec", text, "warning")

    for direction in Direction:
        mine = [rule for rule in spec.rules if rule.direction is direction]
        if mine and all(rule.deny for rule in mine) and spec.default_deny[direction]:
            yield warn(
                f"only denies at {direction}, which still switches on default deny and blocks everything: to "
                f"block only what is listed set enableDefaultDeny.{direction}: false or allow the entity all"
            )
    if spec.kind is SubjectKind.NODE:
        for one in spec.subject.requirements:
            if one.key.startswith(_DROPPED_PREFIXES) or "beta.kubernetes.io" in one.key.split("/")[0]:
                yield warn(
                    f"Cilium drops the node label {one.key} unless told otherwise, so there this selects "
                    "no node; here it does"
                )
    elif policy.kind == "CiliumClusterwideNetworkPolicy":
        if any(one.source == "reserved" and one.key == "host" for one in spec.subject.requirements):
            yield warn("endpointSelector never selects a host, not even with reserved:host: use nodeSelector")
        elif not spec.subject.requirements:
            yield warn(
                "an empty endpointSelector selects every workload but no host: use nodeSelector for hosts"
            )
    for one in spec.subject.requirements:
        if one.source not in _SOURCES:
            yield warn(
                f"the label source {one.source} is not one that any known label has, so nothing matches"
            )


def _never(rule: Rule, spec: Spec, groups: Mapping[str, CidrGroup]) -> Iterator[str]:
    """Why a rule can never match."""
    if rule.peers == () and rule.ports is not None:
        yield "matches nobody: the peer list is empty, or what it names does not exist"
    elif rule.peers == () and rule.ports is None and len(spec.rules) > 1 and not rule.deny:
        yield "an empty rule matches nothing; beside other rules it has no effect"
    if rule.ports == () and not rule.layer7_ports:
        yield "matches no port: a toPorts or icmps block that lists nothing matches nothing"
    for selector in rule.peers or ():
        if isinstance(selector, GroupSelector) and not group_prefixes(selector, groups):
            yield f"{selector} does not exist or is empty here, so this matches nobody"
        elif isinstance(selector, CidrSelector) and selector.prefix in selector.excepts:
            yield f"{selector.prefix.cidr} is excepted as a whole, so nothing is left"
        elif isinstance(selector, LabelSelector):
            yield from _impossible(selector)
    for one in rule.ports or ():
        if isinstance(one, PortRange) and one.proto == Proto.ICMPV6 and spec.kind is SubjectKind.NODE:
            if one.first in _PASSED_ICMP6:
                yield f"ICMPv6 type {one.first} always passes on hosts, so the rule has no effect"
            elif one.first not in _JUDGED_ICMP6:
                yield f"ICMPv6 type {one.first} is always dropped on hosts, so the rule has no effect"


def _impossible(selector: LabelSelector) -> Iterator[str]:
    values: dict[tuple[str, str], set[str]] = {}
    for one in selector.requirements:
        key = (one.source, one.key)
        if one.op is Op.IN:
            before = values.setdefault(key, set(one.values))
            before &= set(one.values)
            if not before:
                yield f"{one.source}:{one.key} cannot have two values at once, so the selector matches nobody"
        if one.op is Op.NOT_EXISTS and key in values:
            yield f"{one.source}:{one.key} cannot be absent and have a value, so the selector matches nobody"
        if one.source not in _SOURCES:
            yield f"no known label has the source {one.source}, so the selector matches nobody"
        if (
            one.source in ("cidr", "fqdn")
            and not lower.mentions_reserved(selector)
            and len(selector.requirements) > 1
        ):
            yield f"pods have no {one.source}: labels; write the prefix in fromCIDR or toCIDR"


def _traps(rule: Rule, spec: Spec, policy: Policy, known: Mapping[Prefix, str]) -> Iterator[str]:
    """Rules that mean something else than they look."""
    word = "from" if rule.direction is Direction.INGRESS else "to"
    whole_cluster = LabelSelector((), ClusterScope.LOCAL) in (rule.peers or ())
    for selector in rule.peers or ():
        if isinstance(selector, CidrSelector):
            yield from _cidr_traps(selector, known, word)
        elif isinstance(selector, LabelSelector) and not whole_cluster:
            yield from _selector_traps(selector, policy, word)
    if rule.peers is None and rule.deny and rule.ports is None:
        yield "denies everybody everything, whatever else is allowed"
    if any(isinstance(one, NamedPort) for one in rule.ports or ()) and spec.kind is SubjectKind.NODE:
        yield "named ports resolve to nothing on hosts unless the configuration names them"


def _cidr_traps(selector: CidrSelector, known: Mapping[Prefix, str], word: str) -> Iterator[str]:
    inside = [
        (prefix, who)
        for prefix, who in known.items()
        if selector.prefix.contains(prefix) and not any(one.contains(prefix) for one in selector.excepts)
    ]
    for prefix, who in inside[:3]:
        yield (
            f"{prefix} is {who}: CIDR peers do not match managed addresses; use {word}Nodes, {word}Entities "
            f"or {word}Endpoints"
        )
    if selector.prefix.length == 0 and not known:
        yield f"{selector.prefix.cidr} means outside the cluster only: no pod, node or health endpoint"


def _selector_traps(selector: LabelSelector, policy: Policy, word: str) -> Iterator[str]:
    reserved = {one.key for one in selector.requirements if one.source == "reserved"}
    if (
        selector.cluster is ClusterScope.ANY
        and reserved == {"remote-node"}
        and len(selector.requirements) == 1
    ):
        yield f"remote-node means the nodes of every connected cluster; {word}Nodes narrows it by node labels"
    if (
        "world" in reserved
        and policy.kind
        and len(selector.requirements) == 1
        and selector.requirements[0].op is Op.IN
    ):
        yield "in dual stack the label reserved:world misses prefixes that policies name: use entity world"
    written = [one for one in selector.requirements if one.key != lower.NAMESPACE_KEY]
    if not written and selector.cluster is ClusterScope.DEFAULT:
        namespaces = [one for one in selector.requirements if one.op is Op.IN]
        if not namespaces and not policy.namespace:
            yield (
                f"an empty {word}Endpoints selector means all pods of all connected clusters: no node, no "
                f"health endpoint, nothing outside; for everybody write {word}Entities: [all]"
            )


def _failsafe_covered(rule: Rule, spec: Spec, failsafe: Sequence[Failsafe]) -> Iterator[str]:
    """Denies of ports that the failsafe list keeps open."""
    if not rule.deny or spec.kind is not SubjectKind.NODE or rule.peers == ():
        return
    kept = [
        port_text(one.proto, one.port, one.port)
        for one in failsafe
        if one.direction is rule.direction and _covers_port(rule, one.proto, one.port)
    ]
    if kept:
        yield f"the default failsafe list keeps {', '.join(kept)} open, so the deny has no effect there"


def _covers_port(rule: Rule, proto: int, port: int) -> bool:
    if rule.ports is None:
        return True
    ranges = (one for one in rule.ports if isinstance(one, PortRange))
    return any(one.proto == proto and one.first <= port <= one.last for one in ranges)


# Shadowed rules


def shadowed(policies: Sequence[Policy]) -> Iterator[tuple[Rule, str]]:
    """Rules that another rule for the same subjects makes useless, and by which; each is reported once."""
    by_subject: dict[tuple[SubjectKind, LabelSelector, Direction], list[Rule]] = {}
    for policy in policies:
        for spec in policy.specs:
            for rule in spec.rules:
                by_subject.setdefault((spec.kind, spec.subject, rule.direction), []).append(rule)
    for rules in by_subject.values():
        if len(rules) <= MAX_COMPARED:
            yield from _shadowed_among(rules)


MAX_COMPARED = 400  # rules of one subject that are compared pairwise


def _shadowed_among(rules: Sequence[Rule]) -> Iterator[tuple[Rule, str]]:
    for at, rule in enumerate(rules):
        if rule.peers == () or rule.ports == () or rule.layer7_ports:
            continue
        for other_at, other in enumerate(rules):
            if other_at == at or other.layer7_ports or (rule.deny and not other.deny):
                continue
            if not _covers(other, rule) or (
                _covers(rule, other) and rule.deny == other.deny and other_at > at
            ):
                continue
            if rule.auth != other.auth and not other.deny:
                continue
            why = "never takes effect: the deny in" if other.deny and not rule.deny else "adds nothing to"
            yield rule, f"{why} {describe(other.origin)}" + (" covers it" if other.deny != rule.deny else "")
            break


def _covers(outer: Rule, inner: Rule) -> bool:
    """Whether every packet that `inner` matches is matched by `outer`, as far as their form tells."""
    return _covers_peers(outer.peers, inner.peers) and _covers_ports(outer, inner)


def _covers_peers(outer: Iterable[Selector] | None, inner: Iterable[Selector] | None) -> bool:
    if outer is None:
        return True
    if inner is None:
        return False
    wide = list(outer)
    return all(any(_covers_selector(one, other) for one in wide) for other in inner)


def _covers_selector(outer: Selector, inner: Selector) -> bool:
    if outer == inner:
        return True
    if isinstance(outer, LabelSelector) and isinstance(inner, LabelSelector):
        return outer.cluster is inner.cluster and set(outer.requirements) <= set(inner.requirements)
    if isinstance(outer, CidrSelector) and isinstance(inner, CidrSelector):
        left = all(any(kept.contains(one) for kept in inner.excepts) for one in outer.excepts)
        apart = all(
            not one.contains(inner.prefix) and not inner.prefix.contains(one) for one in outer.excepts
        )
        return outer.prefix.contains(inner.prefix) and (left or apart)
    return False


def _covers_ports(outer: Rule, inner: Rule) -> bool:
    if outer.ports is None:
        return True
    if inner.ports is None:
        return False
    wide = [one for one in outer.ports if isinstance(one, PortRange)]
    for one in inner.ports:
        if one in outer.ports:
            continue
        if isinstance(one, NamedPort) or not any(
            other.proto == one.proto and other.first <= one.first and one.last <= other.last for other in wide
        ):
            return False
    return True
