"""Why a verdict is what it is.

The deciding rule, who restricted the subject, and which rule nearly allowed it.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.model.identity import Identity
from daemon.model.labels import CIDR, LabelSet, format_labels
from daemon.model.net import Direction, Prefix, Proto, proto_name
from daemon.model.rule import (
    CidrSelector,
    GroupSelector,
    NamedPort,
    PortMatch,
    PortRange,
    Rule,
    RuleOrigin,
    Selector,
)
from daemon.model.verdict import CellFlag, FixedRule, Verdict, unpack_cell
from daemon.policy.compile import Compiled
from daemon.policy.matching import holds
from daemon.policy.tables import PORTLESS


class Peer(NamedTuple):
    """The other side: an identity with its labels, an address outside the mesh.

    Or (neither) someone unknown.
    """

    identity: Identity = Identity(0)
    labels: LabelSet | None = None
    address: Prefix | None = None

    def __str__(self) -> str:
        if self.address is not None:
            return str(self.address)
        if self.labels is None:
            return f"identity {self.identity} (labels unknown)"
        text = ", ".join(format_labels(self.labels))
        return f"identity {self.identity} ({text})" if self.identity else text


class Query(NamedTuple):
    """One packet: the destination port, or the ICMP type; PORTLESS for packets without either."""

    direction: Direction
    peer: Peer
    proto: int
    port: int = PORTLESS

    @property
    def port_text(self) -> str:
        """`10250/TCP`, `type 8/ICMP`, or the protocol alone."""
        return port_text(self.proto, self.port, self.port)


class Miss(NamedTuple):
    """An allow rule that did not match, and why."""

    rule: RuleOrigin
    fields: tuple[str, ...]  # what missed, as `field: wanted ..., found ...`
    distance: int  # how many conditions missed


_FIXED_REASONS: dict[FixedRule | None, str] = {
    FixedRule.FAILSAFE: "allowed by the failsafe list",
    FixedRule.EXEMPT: "a node port, exempt by the settings",
    FixedRule.LOCALHOST: "this host may reach its own workloads",
    FixedRule.DEFAULT_ALLOW: "no rule denies it, and no policy asks for default deny",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A verdict with its reasons."""

    query: Query
    verdict: Verdict
    enforced: bool
    flags: CellFlag
    fixed: FixedRule | None  # the built-in rule that decided, if no document did
    rule: RuleOrigin | None
    matching: tuple[RuleOrigin, ...] = ()  # all rules that match, the deciding one included
    restricted_by: tuple[RuleOrigin, ...] = ()  # for a default deny: one rule of each policy that asks for it
    nearest: tuple[Miss, ...] = field(default=())

    @property
    def passes(self) -> bool:
        """Whether the packet goes on."""
        return self.verdict in (Verdict.ALLOW, Verdict.REDIRECT) or bool(self.flags & CellFlag.AUDIT)

    @property
    def word(self) -> str:
        """`allow`, `deny`, `redirect` or `audit`."""
        if self.flags & CellFlag.AUDIT:
            return "audit"
        return {Verdict.ALLOW: "allow", Verdict.REDIRECT: "redirect"}.get(self.verdict, "deny")

    @property
    def reason(self) -> str:
        """Why, in a few words that never claim a rule that did not decide."""
        told = " (the sender is told)" if self.flags & CellFlag.REJECT and not self.passes else ""
        return self._cause + told

    @property
    def _cause(self) -> str:
        if not self.enforced:
            return f"no policy restricts {self.query.direction}"
        if self.rule is not None:
            return f"{'denied' if self.verdict is Verdict.DENY else 'allowed'} by {describe(self.rule)}"
        return _FIXED_REASONS.get(self.fixed, "default deny: no rule allows it")


def describe(origin: RuleOrigin) -> str:
    """`policy "x", ingress rule 1 (file:line)`."""
    kind = f"{origin.direction}{'Deny' if origin.deny else ''}"
    where = f" ({origin.file}:{origin.line})" if origin.file else ""
    return f'policy "{origin.policy}", {kind}[{origin.index}]{where}'


def explain(compiled: Compiled, query: Query, *, nearest: int = 3) -> Explanation:
    """The verdict for one packet. The peer need not be among the identities the tables were compiled for."""
    compiler = compiled.compiler
    signature = peer_signature(compiled, query.peer)
    one = compiler.directions[query.direction]
    localhost = compiler.localhost and query.peer.identity == 1
    matrix = compiled.matrix(query.direction)
    cell = one.row(signature, localhost=localhost)[matrix.columns.at(query.proto, query.port)]
    verdict, number, flags = unpack_cell(cell)
    matching, missed = [], []
    if matrix.enforced:
        for numbered in one.plan.rules:
            rule, peers = numbered.rule, numbered.peers
            peer_hit = peers is None or not set(peers).isdisjoint(signature)
            if peer_hit and _port_hit(compiled, rule, query):
                matching.append(rule.origin)
            elif not rule.deny and verdict is Verdict.DEFAULT_DENY:
                missed.append(_miss(compiled, rule, peer_hit, query))
    origin = compiled.rules.get(number)
    return Explanation(
        query,
        verdict,
        matrix.enforced,
        flags,
        None if origin is not None else FixedRule(number),
        origin,
        tuple(matching),
        compiler.restricting(query.direction) if verdict is Verdict.DEFAULT_DENY else (),
        tuple(sorted(missed, key=lambda miss: (miss.distance, miss.rule.key))[:nearest]),
    )


def peer_signature(compiled: Compiled, peer: Peer) -> tuple[int, ...]:
    """The selectors that a peer matches."""
    compiler = compiled.compiler
    if peer.address is not None:
        return compiler.address_signature(peer.address)
    return () if peer.labels is None else compiler.signature(peer.identity, peer.labels)


def _port_hit(compiled: Compiled, rule: Rule, query: Query) -> bool:
    if rule.ports is None:
        return True
    ranges = compiled.compiler.ranges((*rule.ports, *rule.layer7_ports))
    return any(
        one.proto == query.proto
        and (one.whole if query.port == PORTLESS else one.first <= query.port <= one.last)
        for one in ranges
    )


def _miss(compiled: Compiled, rule: Rule, peer_hit: bool, query: Query) -> Miss:
    """What one allow rule wanted instead."""
    fields: list[str] = []
    distance = 0
    word = "from" if query.direction is Direction.INGRESS else "to"
    if not peer_hit:
        distance, text = _peer_miss(compiled, rule, query.peer)
        fields.append(f"{word}: {text}")
    if not _port_hit(compiled, rule, query):
        distance += 1
        wanted = (
            ", ".join(port_match_text(one) for one in (*(rule.ports or ()), *rule.layer7_ports)) or "nothing"
        )
        name = (
            "icmps"
            if any(isinstance(one, PortRange) and one.proto in (1, 58) for one in rule.ports or ())
            else "toPorts"
        )
        fields.append(f"{name}: wants {wanted}, the packet has {query.port_text}")
    return Miss(rule.origin, tuple(fields), distance)


def _peer_miss(compiled: Compiled, rule: Rule, peer: Peer) -> tuple[int, str]:
    """(conditions that miss, text) of the selector that comes closest."""
    bound = [compiled.compiler.bind(one) for one in rule.peers or ()]
    if not bound:
        return 99, "the rule selects nobody"
    return min((_selector_miss(one, peer) for one in bound), key=lambda found: found[0])


def _selector_miss(selector: Selector, peer: Peer) -> tuple[int, str]:
    labels = peer.labels or frozenset()
    if isinstance(selector, CidrSelector | GroupSelector):
        if peer.address is None and not any(one.source == CIDR for one in labels):
            return 3, f"wants {selector}, but the peer has a cluster identity, which CIDR rules do not match"
        return 2, f"wants {selector}"
    if peer.address is not None:
        return 2 + len(
            selector.requirements
        ), f"wants {selector}, but {peer.address} has no identity here (world)"
    missing = [one for one in selector.requirements if not holds(one, labels)]
    found = []
    for one in missing:
        values = [label.value for label in labels if label.key == one.key]
        found.append(f"{one} (peer has {', '.join(values) if values else 'no such label'})")
    return len(missing), "wants " + ", ".join(found)


def port_text(proto: int, first: int, last: int) -> str:
    """`22/TCP`, `1000-2000/UDP`, `type 8/ICMP`, `all/TCP`."""
    name = proto_name(proto)
    if first == PORTLESS:
        return name
    if proto in (Proto.ICMP, Proto.ICMPV6):
        return f"type {first}/{name}" if first == last else f"types {first}-{last}/{name}"
    if first == 0 and last == 0xFFFF:
        return f"all/{name}"
    return f"{first}/{name}" if first == last else f"{first}-{last}/{name}"


def port_match_text(match: PortMatch) -> str:
    """One entry of a rule's ports."""
    if isinstance(match, NamedPort):
        return f'"{match.name}"/{"+".join(map(proto_name, match.protocols))}'
    return port_text(match.proto, match.first, match.last)
