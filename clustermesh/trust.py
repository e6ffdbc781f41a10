"""Pure: may this cluster say this? What is refused raises `Malformed` with a coarse reason, and is counted.

Trust is per cluster and by configuration: its name, its id, and optionally the addresses it may speak for. A
cluster can only make statements about identities of its own range and addresses that are not ours.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from clustermesh import wire
from clustermesh.gojson import Malformed, shown
from clustermesh.services import Service
from clustermesh.wire import STRICT, Cidr, ClusterConfig, Compat, IpEntry, Node, WireLabel

HOST = 1
HEALTH = 4
REMOTE_NODE = 6
INGRESS = 8

_LOCAL_SOURCES = frozenset(
    {"reserved", "cidr", "cidrgroup", "fqdn", "directory"}
)  # said by the local side only
_MAX_LABELS, _MAX_KEY, _MAX_VALUE = 64, 317, 63
_SHORTEST = {4: 8, 6: 16}
# loopback, link-local, multicast, broadcast, this network; the same for IPv6, and IPv4-mapped addresses
_NEVER = {
    4: [wire.parse_cidr(one) for one in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4")]
    + [wire.parse_cidr("255.255.255.255")],
    6: [wire.parse_cidr(one) for one in ("::/127", "fe80::/10", "ff00::/8")],
}


@dataclass(frozen=True, slots=True)
class Quotas:
    """The most entries that one cluster may have here."""

    identities: int = 65_535
    addresses: int = 200_000
    nodes: int = 5_000
    services: int = 20_000  # and as many exports


@dataclass(frozen=True, slots=True)
class Trust:
    """What is believed, of whom. Replace it as a whole when the configuration changes."""

    own_cluster: str
    own_id: int = 0
    max_clusters: int = 255
    clusters: Mapping[str, int] = field(default_factory=dict)  # name -> id; empty: whoever is well-formed
    allowed: Mapping[str, Sequence[Cidr]] = field(default_factory=dict)  # cluster -> ranges it may speak for
    own_node: str = ""  # name of this host in its cluster
    own_addresses: frozenset[Cidr] = frozenset()  # of this host
    protected: tuple[Cidr, ...] = ()  # further ranges of ours: no other cluster speaks for them
    reserved: frozenset[int] = frozenset(
        {HEALTH, REMOTE_NODE}
    )  # numbers below 256 that are taken from others
    quotas: Quotas = field(default_factory=Quotas)
    compat: Compat = STRICT

    def check_config(self, cluster: str, config: ClusterConfig, taken: Mapping[int, str]) -> None:
        """taken: ids that clusters hold already, with their names."""
        if not wire.valid_cluster_name(cluster):
            raise Malformed("cluster_name", f"{shown(cluster)} is not a cluster name")
        if cluster == self.own_cluster and config.id == self.own_id == 0:
            return  # alone, not in a mesh
        if fault := wire.config_fault(config, self.max_clusters, self.compat):
            said = config.max_clusters or 255
            raise Malformed(fault, f"id {config.id}, made for {said} clusters; here 1..{self.max_clusters}")
        if cluster == self.own_cluster:
            if config.id != self.own_id:
                raise Malformed("cluster_id_mismatch", f"the store says id {config.id}, we are {self.own_id}")
            return
        if self.clusters:
            if cluster not in self.clusters:
                raise Malformed("cluster_not_expected", "not one of the configured clusters")
            if self.clusters[cluster] != config.id:
                expected = self.clusters[cluster]
                raise Malformed(
                    "cluster_id_mismatch", f"the store says id {config.id}, configured is {expected}"
                )
        if fault := wire.reservation_fault(config.id, self.own_id, ()):
            raise Malformed(fault, f"id {config.id} is our own")
        if (holder := taken.get(config.id, cluster)) != cluster:
            raise Malformed("cluster_id_taken", f"id {config.id} is held by cluster {holder}")

    def check_identity(self, cluster: str, cluster_id: int, number: int, labels: Sequence[WireLabel]) -> None:
        self.check_range(cluster_id, number)
        mine = [label for label in labels if label.key == wire.CLUSTER_LABEL]
        if len(mine) != 1 or mine[0].source != "k8s" or mine[0].value != cluster:
            raise Malformed("cluster_label", f"must carry k8s:{wire.CLUSTER_LABEL}={cluster} exactly once")
        if self.compat is not STRICT:
            return
        if len(labels) > _MAX_LABELS:
            raise Malformed("too_many_labels", f"{len(labels)} labels, at most {_MAX_LABELS} are taken")
        if len({label.key for label in labels}) != len(labels):
            raise Malformed("duplicate_label", "two labels have one key")
        for label in labels:
            _check_label(label)

    def check_range(self, cluster_id: int, number: int) -> None:
        """Whether an identity number is one that the cluster allocates itself."""
        first, last = wire.identity_range(cluster_id, self.max_clusters)
        if not first <= number <= last:
            raise Malformed("identity_range", f"identity {number} is outside {first}..{last}")

    def address_identity(self, cluster_id: int, number: int) -> int:
        """The identity under which an address of that cluster is installed here.

        A peer's host is a remote node to us. Other reserved numbers are refused unless configured.
        """
        if number == HOST:
            number = REMOTE_NODE
        if number >= wire.RESERVED_BELOW:
            self.check_range(cluster_id, number)
        elif number not in self.reserved and self.compat is STRICT:
            name = wire.reserved_name(number) or "user-reserved"
            raise Malformed("reserved_identity", f"identity {number} ({name}) is not taken from others")
        return number

    def check_prefix(self, cluster: str, cidr: Cidr) -> None:
        """Whether the cluster may speak for these addresses."""
        family, _, length = cidr
        if length < _SHORTEST[family]:
            raise Malformed("prefix_too_short", f"{cidr_text(cidr)} is shorter than /{_SHORTEST[family]}")
        if any(contains(never, cidr) for never in _NEVER[family]):
            raise Malformed("special_address", f"{cidr_text(cidr)} is loopback, link-local or multicast")
        if cidr in self.own_addresses:
            raise Malformed("our_address", f"{cidr_text(cidr)} is this host's")
        if cluster != self.own_cluster:
            self._check_ours(cidr)
        ranges = self.allowed.get(cluster)
        if ranges is not None and not any(contains(one, cidr) for one in ranges):
            raise Malformed(
                "prefix_not_allowed", f"{cidr_text(cidr)} is outside the ranges allowed to {cluster}"
            )

    def _check_ours(self, cidr: Cidr) -> None:
        """Nobody else speaks for a range that overlaps what is ours."""
        is_range = cidr[2] < (32 if cidr[0] == 4 else 128)
        for ours in self.own_addresses if is_range else ():
            if contains(cidr, ours):
                raise Malformed(
                    "our_address", f"{cidr_text(cidr)} holds {cidr_text(ours)}, which is this host's"
                )
        for ours in self.protected:
            if contains(ours, cidr) or (is_range and contains(cidr, ours)):
                raise Malformed("our_address", f"{cidr_text(cidr)} overlaps {cidr_text(ours)}, which is ours")

    def address(self, cluster: str, cluster_id: int, entry: IpEntry) -> tuple[Cidr, int]:
        """The range and the identity of an address entry, as they are installed here."""
        cidr = entry.cidr
        self.check_prefix(cluster, cidr)
        return cidr, self.address_identity(cluster_id, entry.identity)

    def check_node(self, cluster: str, cluster_id: int, node: Node) -> None:
        wire.check_owner(node.cluster, node.cluster_id, cluster, cluster_id, self.max_clusters)

    def check_service(self, cluster: str, cluster_id: int, service: Service) -> None:
        """Whether a cluster may publish a service with these backends: it must not point us to ourselves."""
        wire.check_owner(service.cluster, service.cluster_id, cluster, cluster_id, self.max_clusters)
        if cluster != self.own_cluster and self.compat is STRICT:
            for address in service.backends or ():
                self.check_prefix(cluster, wire.parse_cidr(address))


def _check_label(label: WireLabel) -> None:
    if label.source in _LOCAL_SOURCES:
        raise Malformed(
            "label_source", f"label {shown(str(label))}: {label.source}: is for the local side only"
        )
    if len(label.key) > _MAX_KEY or len(label.value) > _MAX_VALUE:
        raise Malformed("label_length", f"label {shown(label.key)} is longer than {_MAX_KEY}={_MAX_VALUE}")
    if not (label.source + label.key + label.value).isprintable():
        raise Malformed("control_character", f"label {shown(label.key)} has control characters")


def contains(outer: Cidr, inner: Cidr) -> bool:
    """Whether every address of `inner` lies in `outer`."""
    family, number, length = outer
    if family != inner[0] or length > inner[2]:
        return False
    shift = (32 if family == 4 else 128) - length
    return number >> shift == inner[1] >> shift


class RangeSet:
    """Ranges by who has them; finds one that overlaps another range in a few look-ups."""

    def __init__(self) -> None:
        self._by_owner: dict[str, tuple[Cidr, ...]] = {}
        self._networks: dict[tuple[int, int], Counter[int]] = {}  # family and length -> network, shifted

    def __bool__(self) -> bool:
        return bool(self._by_owner)

    def replace(self, owner: str, ranges: Sequence[Cidr]) -> None:
        """From now on these are the owner's."""
        before = self._by_owner.pop(owner, ())
        if ranges:
            self._by_owner[owner] = tuple(ranges)
        for one in before:
            self._count(one, -1)
        for one in ranges:
            self._count(one, 1)

    def _count(self, cidr: Cidr, step: int) -> None:
        family, number, length = cidr
        networks = self._networks.setdefault((family, length), Counter())
        network = number >> (32 if family == 4 else 128) - length
        networks[network] += step
        if not networks[network]:
            del networks[network]
        if not networks:
            del self._networks[family, length]

    def overlap(self, cidr: Cidr) -> Cidr | None:
        """A range that shares addresses with `cidr`, if there is one."""
        family, number, length = cidr
        width = 32 if family == 4 else 128
        for (other, ours), networks in self._networks.items():
            if other == family and ours <= length and networks[number >> width - ours]:
                return family, number >> width - ours << width - ours, ours
            if other == family and ours > length:
                for network in networks:
                    if network >> ours - length == number >> width - length:
                        return family, network << width - ours, ours
        return None


_FIXED = {(3, 4): 44, (3, 5): 33, (3, 6): 14}  # etcd's first releases without known ways around its roles


def version_warning(version: str) -> str:
    """What is wrong with a store of this version; empty if nothing is known."""
    numbers = tuple(int(one) for one in version.partition("-")[0].split(".") if one.isdigit())
    if len(numbers) != 3 or numbers[:2] > max(_FIXED) or numbers[2] >= _FIXED.get(numbers[:2], 1 << 30):
        return ""
    fixed = ", ".join(f"{major}.{minor}.{patch}" for (major, minor), patch in _FIXED.items())
    return f"etcd {version} lets users get around their roles: update it to {fixed} or later"


def pod_ranges(node: Node) -> tuple[Cidr, ...]:
    """The ranges that a node hands out to its pods."""
    found = []
    for one in node.cidrs:
        length = wire.mask_length(one.mask or b"")
        if one.ip and length is not None:
            family, number = wire.parse_ip(one.ip)
            shift = (32 if family == 4 else 128) - length
            if shift >= 0:
                found.append((family, number >> shift << shift, length))
    return tuple(found)


def cidr_text(cidr: Cidr) -> str:
    return f"{wire.ip_text(cidr[0], cidr[1])}/{cidr[2]}"


def node_claims(node: Node, trust: Trust) -> Iterable[tuple[Cidr, int]]:
    """The addresses of a node and the identities they have for others."""
    for address in node.addresses or ():
        if address.ip:
            yield wire.parse_cidr(address.ip), REMOTE_NODE
    health = ((node.ipv4_health, HEALTH), (node.ipv6_health, HEALTH))
    ingress = ((node.ipv4_ingress, INGRESS), (node.ipv6_ingress, INGRESS))
    for text, number in (*health, *ingress):
        if text and number in trust.reserved:
            yield wire.parse_cidr(text), number
