"""The declared tables, their keys and rows. Sources write them, compilers read values, reconcilers write the kernel."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from clustermesh.services import Service, ServiceExport
from daemon.model.identity import Identity
from daemon.model.labels import LabelSet
from daemon.model.net import Prefix, compact, expand
from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy, RuleOrigin
from daemon.state.table import Followed, Table

WHOLE_HOST = ""  # key of `audit`
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
    source: str = field(default="", compare=False)  # as in the key; IpTable sees to it


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


class ServiceKey(NamedTuple):
    """One claim: each source (`local` or `mesh:<cluster>`) may say something about a service of this name.

    state/services.py makes one service of them.
    """

    namespace: str
    name: str
    source: str


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """What a source says. `affinity` is this host's wish: `local`, `remote` or empty; others' is not known.

    `is_global`: merged with what others say. `unhealthy`: backend address -> what its check found; these are in
    `service` too, and in nothing that is published.
    """

    service: Service
    is_global: bool = True
    affinity: str = ""
    unhealthy: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    line: int = 0


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
class AuditRow:
    """Whether a policy, by title, or the host (WHOLE_HOST) only reports. `since`: wall-clock seconds."""

    on: bool
    since: float
    by_command: bool = False  # else by the settings


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


class IpTable(Followed[int]):
    """Claims to addresses, up to a million: one integer and one row each. Readers get prefixes as `compact` numbers.

    `claims` may be called from any thread: what is kept of a prefix is replaced as a whole.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._rows: dict[
            int, IpRow | tuple[IpRow, ...]
        ] = {}  # a tuple where several sources claim the prefix
        self._shared: set[int] = set()  # keys of those
        self.counts: Counter[str] = Counter()  # source -> claims

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[IpKey]:
        for key in self.prefixes():
            for row in self.claims(key):
                yield IpKey(expand(key), row.source)

    def __contains__(self, key: IpKey) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: IpKey) -> IpRow:
        row = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def get(self, key: IpKey) -> IpRow | None:
        """What one source says of a prefix."""
        return next((row for row in self.claims(compact(key.prefix)) if row.source == key.source), None)

    def claims(self, prefix: int) -> tuple[IpRow, ...]:
        """What all sources say of a prefix."""
        rows = self._rows.get(prefix, ())
        return rows if isinstance(rows, tuple) else (rows,)

    def prefixes(self) -> list[int]:
        """Every claimed prefix, as of now."""
        return list(self._rows)

    def shared(self) -> list[int]:
        """Prefixes that several sources claim."""
        return list(self._shared)

    def put(self, key: IpKey, row: IpRow) -> bool:
        """Insert or replace one claim; False when it was there already and equal."""
        number, source = compact(key.prefix), key.source
        if row.source != source:
            row = replace(row, source=source)
        before = self.claims(number)
        others = tuple(one for one in before if one.source != source)
        if len(others) < len(before):
            if row in (one for one in before if one.source == source):
                return False
        else:
            self.counts[source] += 1
        self._keep(number, (*others, row))
        return True

    def delete(self, key: IpKey) -> bool:
        """Remove one claim; False when there was none."""
        number = compact(key.prefix)
        before = self.claims(number)
        others = tuple(one for one in before if one.source != key.source)
        if len(others) == len(before):
            return False
        self.counts[key.source] -= 1
        if not self.counts[key.source]:
            del self.counts[key.source]
        self._keep(number, others)
        return True

    def _keep(self, number: int, rows: tuple[IpRow, ...]) -> None:
        if len(rows) > 1:
            self._rows[number] = rows
            self._shared.add(number)
        else:
            self._shared.discard(number)
            if rows:
                self._rows[number] = rows[0]
            else:
                del self._rows[number]
        self._changed(number)

    def _keys(self) -> Iterable[int]:
        return self._rows


@dataclass(slots=True)
class Tables:
    """All tables. Built once by daemon/main.py and handed to those who need them."""

    policies: Table[PolicyKey, Policy] = field(default_factory=lambda: Table("policies"))
    cidr_groups: Table[str, CidrGroup] = field(default_factory=lambda: Table("cidr_groups"))
    identities: Table[Identity, IdentityRow] = field(default_factory=lambda: Table("identities"))
    ips: IpTable = field(default_factory=lambda: IpTable("ips"))
    nodes: Table[NodeKey, NodeRow] = field(default_factory=lambda: Table("nodes"))
    services: Table[ServiceKey, ServiceRow] = field(default_factory=lambda: Table("services"))
    exports: Table[ServiceKey, ServiceExport] = field(default_factory=lambda: Table("exports"))
    devices: Table[int, Device] = field(default_factory=lambda: Table("devices"))  # by index
    # the one key is `own`: addresses of this host, known before its labels are
    own: Table[str, frozenset[Prefix]] = field(default_factory=lambda: Table("own"))
    host: Table[str, HostRow] = field(default_factory=lambda: Table("host"))
    audit: Table[str, AuditRow] = field(default_factory=lambda: Table("audit"))
    problems: Table[str, tuple[Problem, ...]] = field(default_factory=lambda: Table("problems"))
    # number in the kernel -> origin
    rules: Table[int, RuleOrigin] = field(default_factory=lambda: Table("rules"))
    status: Table[str, StatusRow] = field(default_factory=lambda: Table("status"))
