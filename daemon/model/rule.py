"""Policy in internal form: what is left of a document once it is parsed, checked and lowered."""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from daemon.model.net import Direction, Prefix, Proto

ANY_SOURCE = "any"  # selectors only: a label of any source


class Op(IntEnum):
    """What a requirement asks of one label key."""

    IN = 0
    NOT_IN = 1  # also true when the key is absent
    EXISTS = 2
    NOT_EXISTS = 3
    IN_OR_ABSENT = 4  # not in the language; what a node selector's local cluster means


class Requirement(NamedTuple):
    """One condition on a label set. Source `cidr` matches by containment: the key is a prefix."""

    source: str
    key: str
    op: Op
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        key = f"{self.source}:{self.key}" if self.source != ANY_SOURCE else self.key
        match self.op:
            case Op.IN if len(self.values) == 1:
                return f"{key}={self.values[0]}"
            case Op.IN:
                return f"{key} in ({', '.join(self.values)})"
            case Op.NOT_IN:
                return f"{key} not in ({', '.join(self.values)})"
            case Op.EXISTS:
                return f"{key} exists"
            case Op.IN_OR_ABSENT:
                return f"{key} absent or in ({', '.join(self.values)})"
            case _:
                return f"{key} does not exist"


class ClusterScope(Enum):
    """Whether a selector is bound to the local cluster, which only the compiler knows."""

    ANY = "any"
    LOCAL = "local"  # always
    DEFAULT = "default"  # if the host is configured to mean the local cluster by default
    DEFAULT_NODES = "default-nodes"  # the same for nodes, which may lack the cluster label


class LabelSelector(NamedTuple):
    """All requirements hold. No requirement: every identity whose labels are known."""

    requirements: tuple[Requirement, ...] = ()
    cluster: ClusterScope = ClusterScope.ANY

    def __str__(self) -> str:
        return ", ".join(map(str, self.requirements)) or "every known identity"


class CidrSelector(NamedTuple):
    """Addresses outside the cluster within `prefix` and in none of `excepts`."""

    prefix: Prefix
    excepts: tuple[Prefix, ...] = ()

    def __str__(self) -> str:
        without = f" except {', '.join(one.cidr for one in self.excepts)}" if self.excepts else ""
        return self.prefix.cidr + without


class GroupSelector(NamedTuple):
    """The prefixes of the CIDR group `name`, or of every group whose labels match, without `excepts`."""

    name: str
    labels: LabelSelector | None = None
    excepts: tuple[Prefix, ...] = ()

    def __str__(self) -> str:
        return f"CIDR group {self.name}" if self.labels is None else f"CIDR groups with {self.labels}"


Selector = LabelSelector | CidrSelector | GroupSelector


class PortRange(NamedTuple):
    """Ports (or ICMP types) first to last of one protocol; `whole` also takes packets without ports."""

    proto: int
    first: int
    last: int

    @property
    def whole(self) -> bool:
        """Whether packets of the protocol that carry no port match as well."""
        return self.proto not in (Proto.ICMP, Proto.ICMPV6) and self.first == 0 and self.last == 0xFFFF


class NamedPort(NamedTuple):
    """A port by name, resolved per protocol when compiled; unresolved names match nothing."""

    name: str
    protocols: tuple[int, ...]


PortMatch = PortRange | NamedPort


@dataclass(frozen=True, slots=True)
class CidrGroup:
    """A CiliumCIDRGroup: prefixes that policies name together."""

    name: str
    prefixes: tuple[Prefix, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleOrigin:
    """Where a rule number comes from; `key` is stable between compilations of an unchanged document."""

    policy: str  # name, or namespace/name
    kind: str
    direction: Direction
    deny: bool
    spec: int  # index in `specs`
    index: int  # index in the ingress/egress(Deny) list
    file: str = ""
    line: int = 0
    log: str = ""  # the policy's free-text log tag
    uid: str = ""  # metadata.uid, when there is one
    match: int = 0  # MatchType

    @property
    def key(self) -> tuple[str, str, int, bool, int, int]:
        return (self.kind, self.policy, int(self.direction), self.deny, self.spec, self.index)


class MatchType(IntEnum):
    """By what a rule matches, as Hubble numbers it (policy_match_type)."""

    NONE = 0
    L3_ONLY = 1
    L3_L4 = 2
    L4_ONLY = 3
    ALL = 4
    L3_PROTO = 5
    PROTO_ONLY = 6


def match_type(peers: tuple[Selector, ...] | None, ports: tuple[PortMatch, ...] | None) -> MatchType:
    """Of a rule with these peers and ports; whole protocols count as such only if there is nothing narrower."""
    if ports is None:
        return MatchType.ALL if peers is None else MatchType.L3_ONLY
    if ports and all(isinstance(one, PortRange) and one.whole for one in ports):
        return MatchType.PROTO_ONLY if peers is None else MatchType.L3_PROTO
    return MatchType.L4_ONLY if peers is None else MatchType.L3_L4


@dataclass(frozen=True, slots=True)
class Rule:
    """One element of an ingress, ingressDeny, egress or egressDeny list."""

    origin: RuleOrigin
    peers: tuple[Selector, ...] | None  # ORed, empty: nobody; None: any peer, known or not
    ports: tuple[PortMatch, ...] | None  # ORed, empty: nothing; None: every protocol and port
    layer7_ports: tuple[
        PortMatch, ...
    ] = ()  # ports allowed subject to a layer 7 rule; not repeated in `ports`
    auth: str = ""  # authentication.mode

    @property
    def direction(self) -> Direction:
        return self.origin.direction

    @property
    def deny(self) -> bool:
        return self.origin.deny


class SubjectKind(Enum):
    """What a selector of subjects looks at."""

    NODE = "node"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class Spec:
    """One `spec`, or one element of `specs`: a subject selector and its rules."""

    kind: SubjectKind
    subject: LabelSelector
    rules: tuple[Rule, ...]
    restricts: tuple[bool, bool]  # per direction: has a non-empty list
    default_deny: tuple[bool, bool]  # per direction: asks for default deny
    line: int = 0


class Review(NamedTuple):
    """What people who review rules want to know of a policy, from its annotations; empty where it says nothing."""

    owner: str = ""
    reason: str = ""
    by: str = ""  # the date, YYYY-MM-DD, by which somebody has to look again


NO_REVIEW = Review()


@dataclass(frozen=True, slots=True)
class Policy:
    """One CCNP or CNP document, valid and lowered."""

    name: str
    namespace: str
    kind: str
    file: str
    line: int
    specs: tuple[Spec, ...] = ()
    uid: str = ""
    denied: str = ""  # what a packet that it denies gets: `drop`, `reject`, or empty: as the host is set
    review: Review = NO_REVIEW

    @property
    def title(self) -> str:
        """The name as people write it: `namespace/name`, or `name` for cluster-wide kinds."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name
