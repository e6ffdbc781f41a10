"""The declared tables, their keys and rows. Sources write them, compilers read values, reconcilers write the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.model.identity import Identity
from daemon.model.labels import LabelSet
from daemon.model.net import Prefix
from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy, RuleOrigin
from daemon.state.table import Table

LOCAL = "local"  # `source` of rows that this host itself knows


class PolicyKey(NamedTuple):
    """One object: kind, namespace (empty for cluster-wide kinds) and name."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class IdentityRow:
    """An identity's labels and who said so: `local`, `file`, or `mesh:<cluster>`."""

    labels: LabelSet
    source: str


class IpKey(NamedTuple):
    """One claim: each source may say something about the same prefix. state/ips.py picks the winner."""

    prefix: Prefix
    source: str


@dataclass(frozen=True, slots=True)
class IpRow:
    """`prefix` belongs to `identity`. `name` is a pod or host name to show; `node` the address of its host."""

    identity: Identity
    name: str = ""
    namespace: str = ""
    node: str = ""


class NodeKey(NamedTuple):
    """A node of any cluster."""

    cluster: str
    name: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node as its cluster publishes it; addresses are (type, prefix)."""

    addresses: tuple[tuple[str, Prefix], ...]
    labels: LabelSet
    identity: Identity
    source: str


@dataclass(frozen=True, slots=True)
class Device:
    """A network device of this host. `master` and `lower` are indexes, 0 for none: the bond, team or bridge that it is
    a port of, and the device that a VLAN or macvlan sits on. `kind` is empty for hardware."""

    name: str
    index: int
    up: bool
    mac: str
    mtu: int
    kind: str = ""
    master: int = 0
    lower: int = 0


@dataclass(frozen=True, slots=True)
class HostRow:
    """This host. The only key is `host`. `labels` are complete (reserved:host and k8s: node labels), or there
    is no row."""

    name: str
    cluster: str
    cluster_id: int
    labels: LabelSet
    addresses: frozenset[Prefix]


@dataclass(frozen=True, slots=True)
class StatusRow:
    """How one part is: key is the part's name (`datapath`, `policy files`, `mesh:<cluster>`, `device:<name>`).

    `warn`: it works, and somebody should know all the same.
    """

    ok: bool
    text: str
    hint: str = ""
    since: float = 0.0  # wall-clock seconds
    details: Mapping[str, object] = field(default_factory=dict)
    warn: bool = False


@dataclass(slots=True)
class Tables:
    """All tables. Built once by daemon/main.py and handed to those who need them."""

    policies: Table[PolicyKey, Policy] = field(default_factory=lambda: Table("policies"))
    cidr_groups: Table[str, CidrGroup] = field(default_factory=lambda: Table("cidr_groups"))
    identities: Table[Identity, IdentityRow] = field(default_factory=lambda: Table("identities"))
    ips: Table[IpKey, IpRow] = field(default_factory=lambda: Table("ips"))
    nodes: Table[NodeKey, NodeRow] = field(default_factory=lambda: Table("nodes"))
    devices: Table[int, Device] = field(default_factory=lambda: Table("devices"))  # by index
    host: Table[str, HostRow] = field(default_factory=lambda: Table("host"))
    problems: Table[str, tuple[Problem, ...]] = field(default_factory=lambda: Table("problems"))
    # number in the kernel -> origin
    rules: Table[int, RuleOrigin] = field(default_factory=lambda: Table("rules"))
    status: Table[str, StatusRow] = field(default_factory=lambda: Table("status"))
