"""A first draft of a policy from traffic that was seen: as narrow as what was observed, and saying so.

Peers with labels become label selectors, nodes and the like entities, addresses outside become prefixes. Every rule
carries a comment with what it was seen for. The draft allows all of what it was made from, and nothing that
differs from it in port, protocol, or peer as far as labels tell peers apart.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.model.identity import LOCAL_SCOPE, Reserved, reserved_name
from daemon.model.labels import K8S, NODE, RESERVED, Label, LabelSet
from daemon.model.net import Direction, Prefix, Proto, proto_name
from daemon.policy.explain import Peer, port_text
from daemon.policy.replay import Seen
from daemon.policy.tables import PORTLESS

NAMESPACE = "io.kubernetes.pod.namespace"
CLUSTER = "io.cilium.k8s.policy.cluster"
SERVICE_ACCOUNT = "io.cilium.k8s.policy.serviceaccount"
# Labels by which people tell workloads apart, best first; of the others, all are used.
NAMES = ("app.kubernetes.io/name", "app", "k8s-app", "name")
ENTITIES: dict[int, str] = {
    Reserved.HOST: "host",
    Reserved.REMOTE_NODE: "remote-node",
    Reserved.KUBE_APISERVER: "kube-apiserver",
    Reserved.HEALTH: "health",
    Reserved.INIT: "init",
    Reserved.INGRESS: "ingress",
    Reserved.UNMANAGED: "unmanaged",
}
MOST_LISTED = 40  # ports in one list, as the language has it
MOST_ADDRESSES = 64  # one by one; more from outside become the entity world, with a remark
_WORDS = {Direction.INGRESS: "from", Direction.EGRESS: "to"}
_TITLES = {Direction.INGRESS: "ingress", Direction.EGRESS: "egress"}
_WITH_PORTS = (Proto.TCP, Proto.UDP, Proto.SCTP)


class PeerText(NamedTuple):
    """A peer as a rule names it: the field, without its direction, and the value as YAML flow text."""

    field: str  # Endpoints, Nodes, Entities, CIDRSet
    value: str


@dataclass(slots=True)
class _Group:
    """One rule to be: the traffic of one peer."""

    seen: list[Seen] = field(default_factory=list)


class Draft(NamedTuple):
    """The text of the policy, and what it leaves out, in words."""

    text: str
    rules: int
    omitted: tuple[str, ...]


def suggest(seen: Iterable[Seen], *, name: str, node_labels: LabelSet) -> Draft:
    """A CiliumClusterwideNetworkPolicy for the host with these labels that allows the flows, and comments."""
    omitted: list[str] = []
    by_peer: dict[tuple[Direction, PeerText], _Group] = {}
    listed = list(seen)
    crowded = _crowded(listed)
    for one in listed:
        if not _expressible(one):
            omitted.append(
                f"{one.flows} flows of {_what(one)} {_way(one)} {one.name}: cannot be named in a policy"
            )
            continue
        key = (one.query.direction, _peer(one.query.peer, crowded=_port_key(one) in crowded))
        by_peer.setdefault(key, _Group()).seen.append(one)
    lines = [
        "# A draft from observed traffic. It allows what was seen and denies the rest of each direction it names: read",
        "# every rule, remove what should not be, and add what was not seen but must work.",
        "apiVersion: cilium.io/v2",
        "kind: CiliumClusterwideNetworkPolicy",
        "metadata:",
        f"  name: {_quoted(name)}",
        "spec:",
        f"  nodeSelector: {_selector(_subject(node_labels))}",
    ]
    for direction in Direction:
        rules = [(peer, group) for (towards, peer), group in by_peer.items() if towards is direction]
        if not rules:
            continue
        lines.append(f"  {_TITLES[direction]}:")
        for peer, group in sorted(rules, key=lambda rule: -sum(one.flows for one in rule[1].seen)):
            lines += _rule(direction, peer, group.seen)
    if not by_peer:
        lines.append("  ingress: []")
    return Draft("\n".join(lines) + "\n", len(by_peer), tuple(omitted))


def _expressible(one: Seen) -> bool:
    """Whether the policy language has words for protocol, port (0 would mean all of them) and peer."""
    if one.query.proto in _WITH_PORTS:
        named = one.query.port > 0
    else:
        named = one.query.proto in (Proto.ICMP, Proto.ICMPV6) and one.query.port != PORTLESS
    peer = one.query.peer
    return named and (bool(peer.labels) or peer.address is not None)


def _port_key(one: Seen) -> tuple[Direction, int, int]:
    return one.query.direction, one.query.proto, one.query.port


def _crowded(seen: Sequence[Seen]) -> frozenset[tuple[Direction, int, int]]:
    """Ports that too many single addresses talk to."""
    addresses: dict[tuple[Direction, int, int], set[Prefix]] = {}
    for one in seen:
        if one.query.peer.address is not None:
            addresses.setdefault(_port_key(one), set()).add(one.query.peer.address)
    return frozenset(key for key, found in addresses.items() if len(found) > MOST_ADDRESSES)


def _peer(peer: Peer, *, crowded: bool) -> PeerText:
    if peer.address is not None:
        if crowded:
            return PeerText("Entities", "[world]")
        return PeerText("CIDRSet", f"[{{cidr: {_quoted(peer.address.cidr)}}}]")
    entity = ENTITIES.get(peer.identity)
    if entity is not None:
        return PeerText("Entities", f"[{entity}]")
    labels = peer.labels or frozenset()
    if any(one.source == NODE for one in labels):
        return PeerText("Nodes", f"[{_selector({one for one in labels if one.source == NODE})}]")
    telling = _telling(labels)
    # Without a word about the namespace a cluster-wide policy means pods only.
    homeless = not any(one.key == NAMESPACE for one in telling)
    return PeerText("Endpoints", f"[{_selector(telling, homeless=homeless)}]")


def _telling(labels: LabelSet) -> set[Label]:
    """The labels that say which workload it is: its place, its account, and its name if it has a usual one."""
    plain = {one for one in labels if one.source != RESERVED}
    place = {one for one in plain if one.key in (NAMESPACE, CLUSTER, SERVICE_ACCOUNT)}
    for key in NAMES:
        named = {one for one in plain if one.key == key}
        if named:
            return place | named
    return {one for one in plain if not one.key.startswith("io.cilium.k8s.namespace.labels.")}


def _subject(labels: LabelSet) -> set[Label]:
    """The host's name if it has the usual label, else all that was given."""
    own = {one for one in labels if one.source != RESERVED}
    named = {one for one in own if one.key == "kubernetes.io/hostname"}
    return named or own


def _selector(labels: Iterable[Label], *, homeless: bool = False) -> str:
    """`{matchLabels: {...}}`; labels of nodes and of the k8s source go without it, as people write them."""
    pairs = [
        f"{_quoted(one.key if one.source in (K8S, NODE) else f'{one.source}:{one.key}')}: {_quoted(one.value)}"
        for one in sorted(labels)
    ]
    nowhere = (
        f", matchExpressions: [{{key: {_quoted(NAMESPACE)}, operator: DoesNotExist}}]" if homeless else ""
    )
    return f"{{matchLabels: {{{', '.join(pairs)}}}{nowhere}}}"


def _rule(direction: Direction, peer: PeerText, seen: Sequence[Seen]) -> list[str]:
    lines = [f"  # {_comment(one)}" for one in sorted(seen, key=lambda one: -one.flows)[:8]]
    if len(seen) > 8:
        lines.append(f"  # and {len(seen) - 8} more kinds of flow")
    lines.append(f"  - {_WORDS[direction]}{peer.field}: {peer.value}")
    ports = _runs({(one.query.proto, one.query.port) for one in seen if one.query.proto in _WITH_PORTS})
    if ports:
        lines.append("    toPorts:")
    for at in range(0, len(ports), MOST_LISTED):
        lines.append("    - ports:")
        lines += [f"      - {one}" for one in ports[at : at + MOST_LISTED]]
    types = sorted({(one.query.proto, one.query.port) for one in seen if one.query.proto not in _WITH_PORTS})
    if types and ports:  # a rule has either
        lines.append(f"  - {_WORDS[direction]}{peer.field}: {peer.value}")
    if types:
        lines.append("    icmps:")
    for at in range(0, len(types), MOST_LISTED):
        lines.append("    - fields:")
        lines += [
            f"      - {{family: {'IPv4' if proto == Proto.ICMP else 'IPv6'}, type: {number}}}"
            for proto, number in types[at : at + MOST_LISTED]
        ]
    return lines


def _runs(seen: Iterable[tuple[int, int]]) -> list[str]:
    """Ports as YAML flow mappings; neighbours, all of which were seen, as a range."""
    runs: list[list[int]] = []
    for proto, port in sorted(seen):
        if runs and runs[-1][0] == proto and runs[-1][2] == port - 1 and port > 1:
            runs[-1][2] = port
        else:
            runs.append([proto, port, port])
    return [
        f'{{port: "{first}", '
        + (f"endPort: {last}, " if last > first else "")
        + f"protocol: {proto_name(proto)}}}"
        for proto, first, last in runs
    ]


def _comment(one: Seen) -> str:
    verdict = "" if one.verdict == "allow" else f", then {'audited' if one.verdict == 'audit' else 'dropped'}"
    text = f"{one.name}: {_what(one)}, {one.flows} times, {one.first} to {one.last}{verdict}"
    return "".join(char if char.isprintable() else "?" for char in text)


def _what(one: Seen) -> str:
    return port_text(one.query.proto, one.query.port, one.query.port)


def _way(one: Seen) -> str:
    return _WORDS[one.query.direction]


def _quoted(text: str) -> str:
    """A YAML scalar: JSON strings are."""
    return json.dumps(text)


def peer_name(peer: Peer) -> str:
    """What people call a peer that has no name of its own."""
    if peer.address is not None:
        return str(peer.address)
    return reserved_name(peer.identity) or str(peer)


def is_outside(identity: int) -> bool:
    """Whether an identity stands for addresses, not for somebody with labels."""
    return identity in (Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6) or (
        LOCAL_SCOPE <= identity < 2 * LOCAL_SCOPE
    )
