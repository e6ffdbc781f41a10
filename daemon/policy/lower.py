"""What the language adds to what is written.

Implicit selector parts, entities, names of ports and ICMP types.
"""

import re

from daemon.model.labels import K8S, RESERVED
from daemon.model.net import WORLD4, WORLD6, Prefix, Proto, parse_prefix
from daemon.model.rule import (
    ANY_SOURCE,
    CidrSelector,
    ClusterScope,
    GroupSelector,
    LabelSelector,
    Op,
    Requirement,
    Selector,
)

NAMESPACE_KEY = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels."
CLUSTER_KEY = "io.cilium.k8s.policy.cluster"
SERVICE_ACCOUNT_KEY = "io.cilium.k8s.policy.serviceaccount"
FQDN = "fqdn"

WORLD = "world"
WORLD_IPV4 = "world-ipv4"
WORLD_IPV6 = "world-ipv6"

PORT_PROTOCOLS: dict[str, tuple[int, ...]] = {
    "TCP": (Proto.TCP,),
    "UDP": (Proto.UDP,),
    "SCTP": (Proto.SCTP,),
    "ANY": (Proto.TCP, Proto.UDP, Proto.SCTP),
}
EXTENDED_PROTOCOLS = {"VRRP": 112, "IGMP": 2}

ICMP4_TYPES = {
    "EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8,
    "RouterAdvertisement": 9, "RouterSelection": 10, "TimeExceeded": 11, "ParameterProblem": 12,
    "Timestamp": 13, "TimestampReply": 14, "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEchoReply":
    43,
}  # fmt: skip
ICMP6_TYPES = {
    "DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4, "EchoRequest":
    128, "EchoReply": 129, "MulticastListenerQuery": 130, "MulticastListenerReport": 131,
    "MulticastListenerDone": 132, "RouterSolicitation": 133, "RouterAdvertisement": 134,
    "NeighborSolicitation": 135, "NeighborAdvertisement": 136, "RedirectMessage": 137, "RouterRenumbering":
    138, "ICMPNodeInformationQuery": 139, "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141, "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144, "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146, "MobilePrefixAdvertisement": 147, "DuplicateAddressRequestCodeSuffix":
    157, "DuplicateAddressConfirmationCodeSuffix": 158, "ExtendedEchoRequest": 160, "ExtendedEchoReply":
    161,
}  # fmt: skip

ENTITIES = (
    "all", "world", "cluster", "host", "init", "ingress", "unmanaged", "remote-node", "health", "none",
    "kube-apiserver",
)  # fmt: skip
_CLUSTER_ENTITIES = ("host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver")
_DASHED_V6 = re.compile(r"^[0-9a-f]*(?:-[0-9a-f]*)+$")


def split_key(text: str) -> tuple[str, str]:
    """(source, key) of a selector key; no source means `any`. `$x` and `reserved.x` are `reserved:x`."""
    if text.startswith("$"):
        return RESERVED, text[1:]
    source, colon, key = text.partition(":")
    if colon:
        return source, key
    if text.startswith(f"{RESERVED}."):
        return RESERVED, text[len(RESERVED) + 1 :]
    return ANY_SOURCE, text


def _has_key(selector: LabelSelector, *keys: str) -> bool:
    return any(one.key in keys and one.source in (K8S, ANY_SOURCE) for one in selector.requirements)


def mentions_reserved(selector: LabelSelector, key: str = "") -> bool:
    """Whether any key has the source `reserved` (and, if given, is `key`)."""
    return any(one.source == RESERVED and (not key or one.key == key) for one in selector.requirements)


def canonical(requirements: list[Requirement], cluster: ClusterScope = ClusterScope.ANY) -> LabelSelector:
    """One spelling for selectors that ask the same."""
    return LabelSelector(tuple(sorted(set(requirements))), cluster)


def pinned(namespace: str) -> Requirement:
    """What pins the subject of a namespaced policy to its namespace."""
    return Requirement(K8S, NAMESPACE_KEY, Op.IN, (namespace,))


def endpoint_peer(selector: LabelSelector, namespace: str, *, for_init: bool) -> LabelSelector:
    """A fromEndpoints/toEndpoints element with its implicit parts.

    `namespace` is empty in cluster-wide policies.
    """
    if mentions_reserved(selector):
        return selector
    requirements = list(selector.requirements)
    if not _has_key(selector, NAMESPACE_KEY):
        if not namespace:
            if not for_init:
                requirements.append(Requirement(K8S, NAMESPACE_KEY, Op.EXISTS))
        elif not any(
            one.key.startswith(NAMESPACE_LABELS) and one.source in (K8S, ANY_SOURCE) for one in requirements
        ):
            requirements.append(Requirement(K8S, NAMESPACE_KEY, Op.IN, (namespace,)))
    scope = ClusterScope.ANY if _has_key(selector, CLUSTER_KEY) else ClusterScope.DEFAULT
    return canonical(requirements, scope)


def node_peer(selector: LabelSelector) -> LabelSelector:
    """A fromNodes/toNodes element: remote nodes only."""
    scoped = any(one.key == CLUSTER_KEY for one in selector.requirements)
    requirements = [*selector.requirements, Requirement(RESERVED, "remote-node", Op.EXISTS)]
    return canonical(requirements, ClusterScope.ANY if scoped else ClusterScope.DEFAULT_NODES)


def bind_cluster(selector: LabelSelector, cluster: str, *, default_local: bool) -> LabelSelector:
    """The selector with its cluster scope written out as a requirement."""
    match selector.cluster:
        case ClusterScope.LOCAL:
            added = Requirement(K8S, CLUSTER_KEY, Op.IN, (cluster,))
        case ClusterScope.DEFAULT if default_local:
            added = Requirement(K8S, CLUSTER_KEY, Op.IN, (cluster,))
        case ClusterScope.DEFAULT_NODES if default_local:
            added = Requirement(ANY_SOURCE, CLUSTER_KEY, Op.IN_OR_ABSENT, (cluster,))
        case _:
            return LabelSelector(selector.requirements)
    return canonical([*selector.requirements, added])


def _reserved(name: str) -> LabelSelector:
    return LabelSelector((Requirement(RESERVED, name, Op.EXISTS),))


def entity(name: str) -> tuple[Selector, ...] | None:
    """The selectors of an entity; None for `all`, the true wildcard."""
    match name:
        case "all":
            return None
        case "none":
            return ()
        case "world":
            return _reserved(WORLD), _reserved(WORLD_IPV4), _reserved(WORLD_IPV6)
        case "cluster":
            return (*map(_reserved, _CLUSTER_ENTITIES), LabelSelector((), ClusterScope.LOCAL))
        case _:
            return (_reserved(name),)


def cidr_peers(entries: list[CidrSelector | GroupSelector]) -> tuple[Selector, ...]:
    """The selectors of a CIDR list. Both families' everything together are also the family-less world."""
    whole = {one.prefix for one in entries if isinstance(one, CidrSelector) and not one.excepts}
    both = (_reserved(WORLD),) if {WORLD4, WORLD6} <= whole else ()
    return (*entries, *both)


def fqdn_peer(name: str) -> LabelSelector:
    """Addresses that answers for a name or pattern gave: the identity carries the selector's own text."""
    return LabelSelector((Requirement(FQDN, name.lower().removesuffix("."), Op.EXISTS),))


def label_prefix(key: str) -> Prefix | None:
    """The prefix of a `cidr:` label key.

    IPv6 is written with `-` for `:` and `0` at an end that would be empty.
    """
    text = key
    if "." not in key:
        address, slash, length = key.partition("/")
        if not _DASHED_V6.match(address):
            return None
        text = address.replace("-", ":") + slash + length
    try:
        return parse_prefix(text)
    except ValueError:
        return None


def cidr_label_key(prefix: Prefix) -> str:
    """The inverse of label_prefix, as Cilium stores it."""
    text = prefix.cidr
    if prefix.family == 4:
        return text
    address, _, length = text.partition("/")
    address = address.replace(":", "-")
    address = ("0" if address.startswith("-") else "") + address + ("0" if address.endswith("-") else "")
    return f"{address}/{length}"
