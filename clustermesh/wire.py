"""Keys and values of the shared store, byte for byte as Cilium 1.17 writes them, in both directions.

Pure. `compat` of a decoder: STRICT refuses what is ambiguous or dangerous, CILIUM takes exactly what the
original takes. A value that is refused raises `Malformed` with a coarse reason. Golden data: tests/vectors.
"""

import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from clustermesh import gojson
from clustermesh.gojson import Json, Malformed


class Compat(Enum):
    """How strictly values of others are read."""

    STRICT = "strict"
    CILIUM = "cilium"


STRICT = Compat.STRICT
CILIUM = Compat.CILIUM

# --- keys

HEARTBEAT = "cilium/.heartbeat"
CLUSTER_CONFIG = "cilium/cluster-config/"
SYNCED = "cilium/synced/"
IDENTITIES = "cilium/state/identities/v1"
IDENTITY_MASTERS = f"{IDENTITIES}/id/"
IDENTITY_REFERENCES = f"{IDENTITIES}/value/"
IDENTITY_LOCKS = f"{IDENTITIES}/locks/"
IPS = "cilium/state/ip/v1"
NODES = "cilium/state/nodes/v1"
SERVICES = "cilium/state/services/v1"
SERVICE_EXPORTS = "cilium/state/serviceexports/v1"
CACHE_IDENTITIES = "cilium/cache/identities/v1"
CACHE_IPS = "cilium/cache/ip/v1"
CACHE_NODES = "cilium/cache/nodes/v1"
CACHE_SERVICES = "cilium/cache/services/v1"
CACHE_SERVICE_EXPORTS = "cilium/cache/serviceexports/v1"
ADDRESS_SPACE = "default"  # the only segment under ip/v1 that is read


def component(text: str) -> str:
    """A part of a key; raises ValueError for what would change the key's shape."""
    if not text or text in {".", ".."} or "/" in text:
        raise ValueError(f"{text!r} cannot be part of a key")
    return text


def config_key(cluster: str) -> str:
    return f"{CLUSTER_CONFIG}{component(cluster)}"


def canary_key(cluster: str, resource: str) -> str:
    """`resource` is a prefix without cluster: `IPS`, `CACHE_IPS`, ..."""
    return f"{SYNCED}{component(cluster)}/{resource}"


def identity_key(number: int) -> str:
    return f"{IDENTITY_MASTERS}{number}"


def identity_value_prefix(labels: str) -> str:
    """Below it are the references of all nodes to an identity; `labels` is the canonical string."""
    return f"{IDENTITY_REFERENCES}{labels}/"


def identity_value_key(labels: str, suffix: str) -> str:
    """The reference of one node to an identity."""
    return f"{identity_value_prefix(labels)}{component(suffix)}"


def identity_lock(labels: str) -> str:
    """The lock under which the identity of a label set is allocated; also of `id/<number>`, for collectors."""
    return f"{IDENTITY_LOCKS}{labels}"


def collector_key(cluster: str) -> str:
    """Names the node that removes a cluster's unused identities. Ours alone: the original elects elsewhere."""
    return f"meshwall/collector/{component(cluster)}"


def ip_key(prefix: str) -> str:
    """`prefix` is canonical text: `10.1.0.5`, `fd00::5` or `10.1.2.0/24`."""
    return f"{IPS}/{ADDRESS_SPACE}/{prefix}"


def node_key(cluster: str, node: str) -> str:
    return f"{NODES}/{component(cluster)}/{component(node)}"


def service_key(cluster: str, namespace: str, name: str) -> str:
    return f"{SERVICES}/{component(cluster)}/{component(namespace)}/{component(name)}"


def service_export_key(cluster: str, namespace: str, name: str) -> str:
    return f"{SERVICE_EXPORTS}/{component(cluster)}/{component(namespace)}/{component(name)}"


# --- clusters and numbers

_CLUSTER_NAME = re.compile(r"([a-z0-9][-a-z0-9]*)?[a-z0-9]")
RESERVED_BELOW = 256  # identities that no cluster allocates
LOCAL_SCOPE = 1  # top byte of identities that never leave their host
REMOTE_NODE_SCOPE = 2
SHIFTS = {255: 16, 511: 15}  # max-connected-clusters -> bits of the number that the cluster owns


def valid_cluster_name(name: str) -> bool:
    return len(name) <= 32 and _CLUSTER_NAME.fullmatch(name) is not None


def identity_range(cluster_id: int, max_clusters: int = 255) -> tuple[int, int]:
    """The first and last number a cluster may allocate, both included."""
    shift = SHIFTS[max_clusters]
    return cluster_id << shift or RESERVED_BELOW, ((cluster_id + 1) << shift) - 1


def identity_scope(number: int) -> int:
    """0 for numbers that clusters share, LOCAL_SCOPE or REMOTE_NODE_SCOPE for others."""
    return number >> 24


def identity_cluster(number: int, max_clusters: int = 255) -> int:
    """The id of the cluster that owns a number; 0 for reserved and local ones."""
    return (number & 0xFFFFFF) >> SHIFTS[max_clusters] if identity_scope(number) == 0 else 0


# --- addresses

Cidr = tuple[int, int, int]  # family (4 or 6), network address as an integer, prefix length
_MAPPED = 0xFFFF << 32


@lru_cache(maxsize=256)  # an address is looked at several times in a row
def parse_ip(text: str) -> tuple[int, int]:
    """Family and number of an address as Go's net.ParseIP reads it: no zones, mapped IPv4 is IPv4."""
    try:
        if ":" not in text:
            return 4, int(ipaddress.IPv4Address(text))
        if "%" in text:
            raise Malformed("ip_syntax", f"{gojson.shown(text)} has a zone")
        number = int(ipaddress.IPv6Address(text))
    except ipaddress.AddressValueError as error:
        raise Malformed("ip_syntax", f"{gojson.shown(text)} is not an address") from error
    return (4, number & 0xFFFFFFFF) if number >> 32 == 0xFFFF else (6, number)


def ip_text(family: int, number: int) -> str:
    """Canonical text: dotted IPv4, RFC 5952 IPv6."""
    if family == 4:
        return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return str(ipaddress.IPv6Address(number))


@lru_cache(maxsize=4096)
def _canonical_host(text: str) -> str:
    """Canonical text of a node's address; one string for all the entries of a node."""
    return sys.intern(ip_text(*parse_ip(text)))


def _canonical_ip(value: Json, where: str) -> str:
    """Canonical text of an address field; empty for none."""
    text = gojson.string(value, where)
    return ip_text(*parse_ip(text)) if text else ""


def mask_length(mask: bytes) -> int | None:
    """The prefix length of a netmask; None if its ones are not contiguous or there are no bytes."""
    bits = int.from_bytes(mask, "big")
    width = len(mask) * 8
    length = bits.bit_count()
    return length if mask and bits == ((1 << length) - 1) << (width - length) else None


def make_mask(length: int, width: int) -> bytes:
    """The netmask of `length` ones in `width` bits."""
    return (((1 << length) - 1) << (width - length)).to_bytes(width // 8, "big")


def parse_cidr(text: str) -> Cidr:
    """`10.0.0.0/8` or `10.0.0.1` as a Cidr; host bits are refused. Raises Malformed."""
    address, slash, written = text.partition("/")
    family, number = parse_ip(address)
    width = 32 if family == 4 else 128
    if slash and not (written.isascii() and written.isdigit() and int(written) <= width):
        raise Malformed("ip_syntax", f"{gojson.shown(text)} is not a prefix")
    length = int(written) if slash else width
    if number & ((1 << (width - length)) - 1):
        raise Malformed("host_bits", f"{gojson.shown(text)} has bits set after its length")
    return family, number, length


class AddrCluster(NamedTuple):
    """An address that may carry the id of its cluster: `10.0.0.1@2`. Never on the wire."""

    address: str
    cluster_id: int = 0

    def __str__(self) -> str:
        return f"{self.address}@{self.cluster_id}" if self.cluster_id else self.address


def parse_addr_cluster(text: str) -> AddrCluster:
    """Read `ip[@id]`; zones are allowed, mapped addresses stay mapped."""
    address, at, number = text.rpartition("@")
    if not at:
        address, number = text, "0"
    if not (number.isascii() and number.isdigit() and int(number) < 1 << 32):
        raise Malformed("cluster_id_syntax", f"{gojson.shown(text)}: the part after @ is not a cluster id")
    return AddrCluster(_plain_address(address), int(number))


def _plain_address(text: str) -> str:
    """Canonical text of an address as Go's netip.ParseAddr reads it."""
    bare, percent, zone = text.partition("%")
    try:
        if ":" not in bare:
            if percent:
                raise Malformed("ip_syntax", f"{gojson.shown(text)}: IPv4 has no zones")
            return str(ipaddress.IPv4Address(bare))
        address = ipaddress.IPv6Address(bare)
    except ipaddress.AddressValueError as error:
        raise Malformed("ip_syntax", f"{gojson.shown(text)} is not an address") from error
    if percent and not zone:
        raise Malformed("ip_syntax", f"{gojson.shown(text)}: the zone is empty")
    mapped = address.ipv4_mapped
    return (f"::ffff:{mapped}" if mapped else str(address)) + percent + zone


# --- identities


class WireLabel(NamedTuple):
    """One label of an identity."""

    source: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.source}:{self.key}={self.value}"


CLUSTER_LABEL = "io.cilium.k8s.policy.cluster"
NAMESPACE_LABEL = "io.kubernetes.pod.namespace"
SERVICE_ACCOUNT_LABEL = "io.cilium.k8s.policy.serviceaccount"


def parse_label(text: str) -> WireLabel:
    """`source:key=value`; `$x` and `reserved.x` are `reserved:x`; no source is `unspec`."""
    if text.startswith("$"):
        text = f"reserved:{text[1:]}"
    elif text.startswith("reserved.") and ":" not in text:
        text = f"reserved:{text[len('reserved.') :]}"
    head, equals, value = text.partition("=")
    source, colon, key = head.partition(":")
    if not colon:
        source, key = "", head
    if source == "reserved" and not key and equals:
        key, value = value, ""
    return WireLabel(source or "unspec", key, value)


def encode_identity(labels: Iterable[str], cluster: str = "") -> bytes:
    """The value of an identity: labels by key, byte-wise; of labels with one key the last wins.

    labels: `source:key=value` texts. With `cluster` the label that every identity of a mesh carries is added.
    """
    chosen = {label.key: label for label in map(parse_label, labels)}
    if cluster:
        chosen[CLUSTER_LABEL] = WireLabel("k8s", CLUSTER_LABEL, cluster)
    return join_labels(sorted(chosen.values(), key=lambda label: label.key)).encode()


def join_labels(labels: Iterable[WireLabel]) -> str:
    """The canonical string, in the order given."""
    return "".join(f"{label.source}:{label.key}={label.value};" for label in labels)


def decode_identity(value: bytes, compat: Compat = STRICT) -> tuple[WireLabel, ...]:
    """The labels in the order written; pieces without a key are dropped."""
    text = gojson.text(value, strict=compat is STRICT)
    labels = (parse_label(piece) for piece in text.split(";") if piece)
    return tuple(label for label in labels if label.key)


def decode_identity_number(name: str) -> int:
    """The number in the last part of an `id/` key."""
    if not (name.isascii() and name.isdigit() and len(name) <= 10):
        raise Malformed("key_syntax", f"{gojson.shown(name)} is not a decimal number")
    return int(name)


# --- cluster config


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`cilium/cluster-config/<cluster>`. `max_clusters` 0 means that the writer did not say: 255."""

    id: int
    synced_canaries: bool = False
    cached: bool = False
    max_clusters: int = 0
    service_exports: bool | None = None


def encode_config(config: ClusterConfig) -> bytes:
    capabilities: dict[str, object] = {}
    if config.synced_canaries:
        capabilities["syncedCanaries"] = True
    if config.cached:
        capabilities["cached"] = True
    if config.max_clusters:
        capabilities["maxConnectedClusters"] = config.max_clusters
    if config.service_exports is not None:
        capabilities["serviceExportsEnabled"] = config.service_exports
    return gojson.dump({**({"id": config.id} if config.id else {}), "capabilities": capabilities})


_CONFIG = {"id": "id", "capabilities": "capabilities"}
_CAPABILITIES = {
    name.casefold(): name
    for name in ("syncedCanaries", "cached", "maxConnectedClusters", "serviceExportsEnabled")
}
_NEVER_NULL: frozenset[str] = frozenset()


def decode_config(value: bytes, compat: Compat = STRICT) -> ClusterConfig:
    strict = compat is STRICT
    document = gojson.parse(gojson.text(value, strict=strict), strict=strict)
    outer = gojson.members(document, _CONFIG, "config", _NEVER_NULL)
    inner = gojson.members(
        outer.get("capabilities"), _CAPABILITIES, "capabilities", frozenset({"serviceExportsEnabled"})
    )
    exports = inner.get("serviceExportsEnabled")
    return ClusterConfig(
        gojson.unsigned(outer.get("id"), 32, "id"),
        gojson.boolean(inner.get("syncedCanaries"), "syncedCanaries"),
        gojson.boolean(inner.get("cached"), "cached"),
        gojson.unsigned(inner.get("maxConnectedClusters"), 32, "maxConnectedClusters"),
        None if exports is None else gojson.boolean(exports, "serviceExportsEnabled"),
    )


# --- addresses and their identities


class NamedPort(NamedTuple):
    """A container port that policy can name."""

    name: str
    port: int
    protocol: str


@dataclass(frozen=True, slots=True)
class IpEntry:
    """One address or prefix and its identity. `mask` None: a host entry. `ip` is canonical text or empty."""

    ip: str
    mask: bytes | None = None
    host_ip: str = ""
    identity: int = 0
    key: int = 0
    metadata: str = ""
    namespace: str = ""
    pod: str = ""
    named_ports: tuple[NamedPort, ...] | None = None

    @property
    def prefix(self) -> str:
        """The last part of the key that this entry must have."""
        ip = self.ip or "<nil>"
        return ip if self.mask is None else f"{ip}/{mask_length(self.mask) or 0}"

    @property
    def cidr(self) -> Cidr:
        """The range; raises Malformed for entries that name none, or an ambiguous one."""
        if not self.ip:
            raise Malformed("no_address", "the entry has no address")
        family, number = parse_ip(self.ip)
        width = 32 if family == 4 else 128
        if self.mask is None:
            return family, number, width
        length = mask_length(self.mask)
        if length is None or len(self.mask) * 8 != width:
            raise Malformed(
                "mask", f"mask {self.mask.hex() or '(empty)'} of {self.ip} is not {width} contiguous bits"
            )
        if number & ((1 << (width - length)) - 1):
            raise Malformed("host_bits", f"{self.prefix} has bits set after its length")
        return family, number, length


def ip_entry(prefix: str, identity: int, host_ip: str = "", namespace: str = "", pod: str = "") -> IpEntry:
    """The entry of `10.1.0.5`, `fd00::5` or `10.1.2.0/24`. Its key is `ip_key(entry.prefix)`."""
    family, number, length = parse_cidr(prefix)
    mask = make_mask(length, 32 if family == 4 else 128) if "/" in prefix else None
    node = ip_text(*parse_ip(host_ip)) if host_ip else ""
    return IpEntry(ip_text(family, number), mask, node, identity, namespace=namespace, pod=pod)


def encode_ip(entry: IpEntry) -> bytes:
    written: dict[str, object] = {
        "IP": entry.ip,
        "Mask": gojson.base64_text(entry.mask),
        "HostIP": entry.host_ip,
        "ID": entry.identity,
        "Key": entry.key,
        "Metadata": entry.metadata,
    }
    if entry.namespace:
        written["K8sNamespace"] = entry.namespace
    if entry.pod:
        written["K8sPodName"] = entry.pod
    if entry.named_ports:
        written["NamedPorts"] = [
            {"Name": one.name, "Port": one.port, "Protocol": one.protocol} for one in entry.named_ports
        ]
    return gojson.dump(written)


_IP_FIELDS = (
    "IP", "Mask", "HostIP", "ID", "Key", "Metadata", "K8sNamespace", "K8sPodName", "NamedPorts",
)  # fmt: skip
_IP = {name.casefold(): name for name in _IP_FIELDS}
_IP_NULLABLE = frozenset({"Mask", "NamedPorts"})
_PORT = {name.casefold(): name for name in ("Name", "Port", "Protocol")}

# What the original itself writes for hosts without named ports, strings without escapes: three times as fast
# as the general way, with the same result (a test compares them).
_PLAIN = r'"([^"\\\x00-\x1f]*)"'
_IP_AS_WRITTEN = re.compile(
    rf'{{"IP":{_PLAIN},"Mask":null,"HostIP":{_PLAIN},"ID":(0|[1-9]\d{{0,8}}),"Key":(0|[1-9]\d?),"Metadata":{_PLAIN}'
    rf'(?:,"K8sNamespace":{_PLAIN})?(?:,"K8sPodName":{_PLAIN})?}}',
    re.ASCII,
)


def decode_ip(name: str, value: bytes, compat: Compat = STRICT) -> IpEntry:
    """The entry under `ip/v1/default/<name>`; the name must be the canonical text of the value."""
    strict = compat is STRICT
    source = gojson.text(value, strict=strict)
    found = _IP_AS_WRITTEN.fullmatch(source)
    if found is not None:
        ip, host_ip, number, key, metadata, namespace, pod = found.groups("")
        entry = IpEntry(
            ip_text(*parse_ip(ip)) if ip else "",
            None,
            _canonical_host(host_ip) if host_ip else "",
            int(number),
            int(key),
            metadata,
            sys.intern(namespace),
            pod,
        )
    else:
        entry = _decode_ip_document(gojson.parse(source, strict=strict))
    if entry.prefix != name:
        raise Malformed("key_mismatch", f"the key says {gojson.shown(name)}, the value {entry.prefix}")
    return entry


def _decode_ip_document(document: Json) -> IpEntry:
    found = gojson.members(document, _IP, "entry", _IP_NULLABLE)
    ports = gojson.array(found.get("NamedPorts"), _decode_port, "NamedPorts")
    return IpEntry(
        _canonical_ip(found.get("IP"), "IP"),
        gojson.octets(found.get("Mask"), "Mask"),
        _canonical_ip(found.get("HostIP"), "HostIP"),
        gojson.unsigned(found.get("ID"), 32, "ID"),
        gojson.unsigned(found.get("Key"), 8, "Key"),
        gojson.string(found.get("Metadata"), "Metadata"),
        gojson.string(found.get("K8sNamespace"), "K8sNamespace"),
        gojson.string(found.get("K8sPodName"), "K8sPodName"),
        ports or None,
    )


def _decode_port(value: Json, where: str) -> NamedPort:
    found = gojson.members(value, _PORT, where, _NEVER_NULL)
    return NamedPort(
        gojson.string(found.get("Name"), f"{where}.Name"),
        gojson.unsigned(found.get("Port"), 16, f"{where}.Port"),
        gojson.string(found.get("Protocol"), f"{where}.Protocol"),
    )


# --- nodes


class NodeAddress(NamedTuple):
    """`InternalIP`, `ExternalIP`, `CiliumInternalIP`, ... and the address in canonical text."""

    type: str
    ip: str


class NodeCidr(NamedTuple):
    """An allocation range as the original writes it; `ip` None is a range object without content."""

    ip: str | None
    mask: bytes | None

    def __str__(self) -> str:
        return f"{self.ip}/{mask_length(self.mask or b'') or 0}"


@dataclass(frozen=True, slots=True)
class Node:
    """`nodes/v1/<cluster>/<name>`, fields in the order of the wire. None is a null."""

    name: str
    cluster: str
    addresses: tuple[NodeAddress, ...] | None = None
    ipv4_cidr: NodeCidr | None = None
    ipv4_more_cidrs: tuple[NodeCidr | None, ...] | None = None
    ipv6_cidr: NodeCidr | None = None
    ipv6_more_cidrs: tuple[NodeCidr | None, ...] | None = None
    ipv4_health: str = ""
    ipv6_health: str = ""
    ipv4_ingress: str = ""
    ipv6_ingress: str = ""
    cluster_id: int = 0
    source: str = ""
    encryption_key: int = 0
    labels: Mapping[str, str] | None = field(default=None)
    annotations: Mapping[str, str] | None = field(default=None)
    identity: int = 0
    wireguard_key: str = ""
    boot_id: str = ""

    @property
    def cidrs(self) -> tuple[NodeCidr, ...]:
        """All allocation ranges, IPv4 first."""
        ranges = (
            self.ipv4_cidr,
            *(self.ipv4_more_cidrs or ()),
            self.ipv6_cidr,
            *(self.ipv6_more_cidrs or ()),
        )
        return tuple(one for one in ranges if one is not None)

    def address(self, family: int) -> str | None:
        """The node's address: InternalIP, else ExternalIP, else the first that is not the data path's own."""
        mine = [one for one in self.addresses or () if one.ip and parse_ip(one.ip)[0] == family]
        for wanted in ("InternalIP", "ExternalIP"):
            for one in mine:
                if one.type == wanted:
                    return one.ip
        return next((one.ip for one in mine if one.type != "CiliumInternalIP"), None)


def node_cidr(prefix: str) -> NodeCidr:
    """The range `10.1.0.0/24` as a node writes it."""
    family, number, length = parse_cidr(prefix)
    return NodeCidr(ip_text(family, number), make_mask(length, 32 if family == 4 else 128))


def encode_node(node: Node) -> bytes:
    addresses = node.addresses
    return gojson.dump(
        {
            "Name": node.name,
            "Cluster": node.cluster,
            "IPAddresses": None if addresses is None else [{"Type": a.type, "IP": a.ip} for a in addresses],
            "IPv4AllocCIDR": _cidr_out(node.ipv4_cidr),
            "IPv4SecondaryAllocCIDRs": _cidrs_out(node.ipv4_more_cidrs),
            "IPv6AllocCIDR": _cidr_out(node.ipv6_cidr),
            "IPv6SecondaryAllocCIDRs": _cidrs_out(node.ipv6_more_cidrs),
            "IPv4HealthIP": node.ipv4_health,
            "IPv6HealthIP": node.ipv6_health,
            "IPv4IngressIP": node.ipv4_ingress,
            "IPv6IngressIP": node.ipv6_ingress,
            "ClusterID": node.cluster_id,
            "Source": node.source,
            "EncryptionKey": node.encryption_key,
            "Labels": sorted_map(node.labels),
            "Annotations": sorted_map(node.annotations),
            "NodeIdentity": node.identity,
            "WireguardPubKey": node.wireguard_key,
            "BootID": node.boot_id,
        }
    )


def _cidr_out(cidr: NodeCidr | None) -> dict[str, str | None] | None:
    if cidr is None:
        return None
    return {} if cidr.ip is None else {"IP": cidr.ip, "Mask": gojson.base64_text(cidr.mask)}


def _cidrs_out(cidrs: Sequence[NodeCidr | None] | None) -> list[dict[str, str | None] | None] | None:
    return None if cidrs is None else [_cidr_out(one) for one in cidrs]


def sorted_map(values: Mapping[str, str] | None) -> dict[str, str] | None:
    """A map with free names in the order Go writes it."""
    return None if values is None else dict(sorted(values.items()))


_NODE_FIELDS = (
    "Name", "Cluster", "IPAddresses", "IPv4AllocCIDR", "IPv4SecondaryAllocCIDRs", "IPv6AllocCIDR",
    "IPv6SecondaryAllocCIDRs", "IPv4HealthIP", "IPv6HealthIP", "IPv4IngressIP", "IPv6IngressIP", "ClusterID",
    "Source", "EncryptionKey", "Labels", "Annotations", "NodeIdentity", "WireguardPubKey", "BootID",
)  # fmt: skip
_NODE = {name.casefold(): name for name in _NODE_FIELDS}
_NODE_NULLABLE = frozenset(_NODE_FIELDS[2:7]) | {"Labels", "Annotations"}
_ADDRESS = {"type": "Type", "ip": "IP"}
_NODE_CIDR = {"ip": "IP", "mask": "Mask"}


def decode_node(name: str, value: bytes, compat: Compat = STRICT) -> Node:
    """The node under `nodes/v1/<cluster>/<name>`. Cluster and id are checked by trust.py."""
    strict = compat is STRICT
    document = gojson.parse(gojson.text(value, strict=strict), strict=strict)
    found = gojson.members(document, _NODE, "node", _NODE_NULLABLE)

    def text(field_name: str) -> str:
        return gojson.string(found.get(field_name), field_name)

    def ip(field_name: str) -> str:
        return _canonical_ip(found.get(field_name), field_name)

    node = Node(
        text("Name"),
        text("Cluster"),
        gojson.array(found.get("IPAddresses"), _decode_address, "IPAddresses"),
        _decode_cidr(found.get("IPv4AllocCIDR"), "IPv4AllocCIDR"),
        gojson.array(found.get("IPv4SecondaryAllocCIDRs"), _decode_cidr, "IPv4SecondaryAllocCIDRs"),
        _decode_cidr(found.get("IPv6AllocCIDR"), "IPv6AllocCIDR"),
        gojson.array(found.get("IPv6SecondaryAllocCIDRs"), _decode_cidr, "IPv6SecondaryAllocCIDRs"),
        ip("IPv4HealthIP"),
        ip("IPv6HealthIP"),
        ip("IPv4IngressIP"),
        ip("IPv6IngressIP"),
        gojson.unsigned(found.get("ClusterID"), 32, "ClusterID"),
        text("Source"),
        gojson.unsigned(found.get("EncryptionKey"), 8, "EncryptionKey"),
        gojson.mapping(found.get("Labels"), gojson.string, "Labels"),
        gojson.mapping(found.get("Annotations"), gojson.string, "Annotations"),
        gojson.unsigned(found.get("NodeIdentity"), 32, "NodeIdentity"),
        text("WireguardPubKey"),
        text("BootID"),
    )
    if not node.name or not node.cluster:
        raise Malformed(
            "required_field_missing", f"Name and Cluster of node {gojson.shown(name)} must not be empty"
        )
    if strict and ("/" in node.name or node.name in {".", ".."}):
        raise Malformed("key_syntax", f"node name {gojson.shown(node.name)} cannot be part of a key")
    if node.name != name:
        raise Malformed(
            "key_mismatch", f"the key says {gojson.shown(name)}, the value {gojson.shown(node.name)}"
        )
    return node


def _decode_address(value: Json, where: str) -> NodeAddress:
    found = gojson.members(value, _ADDRESS, where, _NEVER_NULL)
    return NodeAddress(
        gojson.string(found.get("Type"), f"{where}.Type"), _canonical_ip(found.get("IP"), f"{where}.IP")
    )


def _decode_cidr(value: Json, where: str) -> NodeCidr | None:
    if value is None:
        return None
    found = gojson.members(value, _NODE_CIDR, where, frozenset({"Mask"}))
    if not found:
        return NodeCidr(None, None)
    return NodeCidr(
        _canonical_ip(found.get("IP"), f"{where}.IP"), gojson.octets(found.get("Mask"), f"{where}.Mask")
    )


# --- who may say what: the checks of the original readers (trust.py has ours)

_RESERVED_NAMES = {
    0: "unknown", 1: "host", 2: "world", 3: "unmanaged", 4: "health", 5: "init", 6: "remote-node",
    7: "kube-apiserver", 8: "ingress", 9: "world-ipv4", 10: "world-ipv6", 11: "encrypted-overlay",
}  # fmt: skip


def reserved_name(number: int) -> str | None:
    """`remote-node` for 6; None for numbers without a built-in name."""
    return _RESERVED_NAMES.get(number)


def check_id(cluster_id: int, max_clusters: int) -> str | None:
    """Why a cluster id is impossible, as a coarse word; None if it is possible."""
    if cluster_id == 0:
        return "cluster_id_zero"
    return "cluster_id_too_large" if cluster_id > max_clusters else None


def check_owner(cluster: str, cluster_id: int, owner: str, owner_id: int, max_clusters: int) -> None:
    """Raise Malformed unless a value names the cluster under whose key it stands."""
    if fault := check_id(cluster_id, max_clusters):
        raise Malformed(fault, f"cluster id {cluster_id} is not one of 1..{max_clusters}")
    if cluster != owner:
        raise Malformed(
            "cluster_name_mismatch", f"the value says cluster {gojson.shown(cluster)}, the key {owner}"
        )
    if cluster_id != owner_id:
        raise Malformed(
            "cluster_id_mismatch", f"the value says cluster id {cluster_id}, the cluster has {owner_id}"
        )


def config_fault(config: ClusterConfig, max_clusters: int, compat: Compat = STRICT) -> str | None:
    """Why a reader in this mode cannot use a cluster, as a coarse word.

    The original looks at the other side's mode only when its own is 511, and would misread numbers otherwise.
    """
    if fault := check_id(config.id, max_clusters):
        return fault
    if (compat is STRICT or max_clusters == 511) and (config.max_clusters or 255) != max_clusters:
        return "max_clusters_mismatch"
    return None


def reservation_fault(cluster_id: int, own_id: int, taken: Iterable[int]) -> str | None:
    """Why this id cannot be given to one more cluster."""
    if cluster_id == 0:
        return "cluster_id_zero"
    if cluster_id == own_id:
        return "cluster_id_is_local"
    return "cluster_id_taken" if cluster_id in taken else None


_SOURCES = (
    "kube-apiserver", "local", "kvstore", "custom-resource", "k8s", "clustermesh", "api", "generated",
    "restored", "unspec",
)  # fmt: skip
_NEVER_OVER = {
    "k8s": {"clustermesh", "api", "generated", "restored", "unspec"},
    "clustermesh": {"api", "generated", "restored", "unspec"},
    "api": {"generated", "restored", "unspec"},
    "generated": {"restored", "unspec"},
    "restored": {"unspec"},
    "unspec": set[str](),
}


def may_overwrite(existing: str, new: str) -> bool:
    """Whether the original lets one source replace what another said about a prefix (we keep both)."""
    if existing in _NEVER_OVER:
        return new not in _NEVER_OVER[existing]
    return new in _SOURCES[: _SOURCES.index(existing) + 1]
