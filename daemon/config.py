"""The daemon's settings: one YAML file and MESHWALL_* variables; each mistake is told with its place.

Every key has its help text here; docs/configuration.md is made from this model (`python -m daemon.config`).
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined

from clustermesh.settings import is_loopback, split_endpoint
from daemon.model.net import parse_prefix
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents, shown

DEFAULT_FILE = Path("/etc/meshwall/meshwall.yaml")
ENVIRONMENT = "MESHWALL_"
NOT_SETTINGS = {"MESHWALL_CONFIG", "MESHWALL_SOCKET", "MESHWALL_VECTORS"}  # read by others
AUTO = "auto"  # a device name that stands for the devices this host is reached by
MAX_FILE_BYTES = 1 << 20

ClusterName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]


class ConfigError(Exception):
    """The settings cannot be used. One problem a line, each with file, key, value and expectation."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Section(BaseModel):
    """A part of the settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


class FailsafeEntry(Section):
    """One kind of traffic that no policy can close."""

    direction: Literal["ingress", "egress"] = Field(description="seen from this host")
    protocol: Literal["TCP", "UDP", "SCTP"] = Field(description="transport protocol")
    port: int = Field(ge=1, le=65535, description="destination port of the connection's first packet")
    cidrs: tuple[str, ...] = Field(default=(), description="only these peers, by prefix; empty: any peer")

    @field_validator("cidrs")
    @classmethod
    def _are_prefixes(cls, cidrs: tuple[str, ...]) -> tuple[str, ...]:
        for one in cidrs:
            parse_prefix(one)
        return cidrs


def _entry(
    direction: Literal["ingress", "egress"], protocol: Literal["TCP", "UDP"], port: int
) -> FailsafeEntry:
    return FailsafeEntry(direction=direction, protocol=protocol, port=port)


DEFAULT_FAILSAFE = (
    _entry("ingress", "TCP", 22),
    _entry("ingress", "UDP", 68),
    _entry("ingress", "UDP", 546),
    _entry("egress", "UDP", 53),
    _entry("egress", "TCP", 53),
    _entry("egress", "UDP", 67),
    _entry("egress", "UDP", 547),
)
KUBERNETES_PORTS = (179, 2379, 2380, 6443)


class Etcd(Section):
    """How the shared store is reached."""

    endpoints: tuple[str, ...] = Field(
        min_length=1, description="URLs such as `https://10.0.0.1:2379`; the first that answers is used"
    )
    ca: str = Field(default="", description="file with the CA certificates the server is checked against")
    cert: str = Field(default="", description="file with our client certificate")
    key: str = Field(default="", description="file with its key")
    server_name: str = Field(
        default="", description="name in the server's certificate, if not the endpoint's host"
    )
    username: str = Field(default="", description="user for password authentication")
    password: str = Field(
        default="", repr=False, description="its password; better: `MESHWALL_ETCD__PASSWORD`"
    )
    insecure_transport: bool = Field(
        default=False, description="allow `http://` endpoints on other machines: anybody on the way can lie"
    )

    @field_validator("endpoints")
    @classmethod
    def _are_urls(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for one in endpoints:
            if not re.fullmatch(r"https?://(\[[0-9a-fA-F:]+\]|[^/:\[\]\s]+)(:[0-9]{1,5})?/?", one):
                raise ValueError(f"{shown(one)} is not a URL like https://10.0.0.1:2379")
        return endpoints

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if bool(self.cert) != bool(self.key):
            raise ValueError("cert and key belong together: set both or neither")
        if self.password and not self.username:
            raise ValueError("password is set but username is not")
        if (self.ca or self.cert) and any(one.startswith("http://") for one in self.endpoints):
            raise ValueError("ca, cert and key need https:// endpoints")
        for one in self.endpoints:
            tls, host, _ = split_endpoint(one)
            if not (tls or self.insecure_transport or is_loopback(host)):
                raise ValueError(f"{shown(one)} is not encrypted: use https://, or set insecure_transport")
        return self


class NodePorts(Section):
    """What becomes of ports that the kernel translates to pods (kube-proxy, port mappings of containers)."""

    mode: Literal["enforce", "exempt"] = Field(
        default="enforce",
        description="`enforce`: a packet is judged by the port it came to, before translation; `exempt`: ingress "
        "to the range passes, and is left to policy of the pods behind it",
    )
    range: str = Field(
        default="30000-32767",
        pattern=r"^[0-9]{1,5}-[0-9]{1,5}$",
        description="`FIRST-LAST`, as the API server's `--service-node-port-range`; TCP, UDP and SCTP",
    )

    @property
    def exempt(self) -> tuple[int, int] | None:
        """First and last port that no ingress policy closes."""
        return self.ports if self.mode == "exempt" else None

    @property
    def ports(self) -> tuple[int, int]:
        """First and last."""
        first, _, last = self.range.partition("-")
        return int(first), int(last)

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        first, last = self.ports
        if not 1 <= first <= last <= 65535:
            raise ValueError(f"range: {self.range}: expected FIRST-LAST within 1-65535")
        return self


class MapSizes(Section):
    """Room in the kernel's tables. A change needs `meshwall cleanup` and a restart, since maps are kept."""

    slots: int = Field(
        default=1 << 17, ge=64, le=1 << 24, description="distinct peers: identities and CIDR groups"
    )
    cells: int = Field(
        default=1 << 20, ge=1024, le=1 << 26, description="cells of the verdict matrix, both generations"
    )
    rules: int = Field(default=1 << 14, ge=64, le=1 << 20, description="rules that are counted one by one")
    ip4_blocks: int = Field(
        default=256 + 16_384, ge=512, le=1 << 20, description="blocks of 256 IPv4 prefixes"
    )
    hosts: int = Field(default=1 << 20, ge=64, le=1 << 24, description="single addresses, for each family")
    prefixes6: int = Field(default=1 << 17, ge=64, le=1 << 22, description="IPv6 prefixes")
    conntrack: int = Field(
        default=1 << 17, ge=64, le=1 << 24, description="tracked connections, for each family"
    )
    half_open: int = Field(
        default=1 << 16,
        ge=64,
        le=1 << 24,
        description="connections that are still being opened, for each family: they have a table of their own",
    )
    fragments: int = Field(default=1 << 15, ge=64, le=1 << 20, description="fragmented datagrams at a time")
    events_bytes: int = Field(
        default=1 << 20, ge=4096, le=1 << 28, description="ring of events; a power of two"
    )

    @field_validator("events_bytes")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("must be a power of two")
        return size


class Hubble(Section):
    """Where hubble CLI, Relay and UI connect."""

    enabled: bool = Field(
        default=True, description="serve `hubble.sock` in `run_dir`, for members of `socket_group`"
    )
    listen: str = Field(
        default="", description="also `HOST:PORT` (by convention port 4244), for clients with a certificate"
    )
    cert: str = Field(
        default="",
        description="file with the certificate of `listen`, for `<node>.<cluster>.hubble-grpc.cilium.io`",
    )
    key: str = Field(default="", description="file with its key")
    client_ca: str = Field(default="", description="file with the CA certificates that clients must be of")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.listen and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:\s]+):[0-9]{1,5}", self.listen):
            raise ValueError(f"listen: {shown(self.listen)} is not HOST:PORT")
        if self.listen and not (self.cert and self.key and self.client_ca):
            raise ValueError("listen needs cert, key and client_ca: flows are not shown to strangers")
        if self.listen and not self.enabled:
            raise ValueError("listen is set but enabled is false")
        return self


class Record(Section):
    """Flows on disk, in `flows` below `state_dir`."""

    enabled: bool = Field(default=True, description="keep flows on disk, for `meshwall observe --since 6h`")
    max_mib: int = Field(default=512, ge=16, le=1 << 20, description="MiB at most; the oldest go first")
    max_age_h: int = Field(default=24, ge=1, le=24 * 366, description="hours at most")
    rate: int = Field(
        default=2_000, ge=10, le=100_000, description="events a second at most; the rest is counted as lost"
    )


class Config(Section):
    """All settings."""

    node_name: str = Field(
        default_factory=lambda: socket.gethostname().partition(".")[0],
        min_length=1,
        max_length=253,
        description="name of this host in the mesh; default: the host name up to the first dot",
    )
    cluster_name: ClusterName = Field(
        default="default", description="name of the cluster this host belongs to"
    )
    cluster_id: int = Field(
        default=0, ge=0, le=511, description="its number; 0: a cluster that is in no mesh"
    )
    node_labels: dict[str, str] = Field(
        default={}, description="labels of this host, which `nodeSelector` matches (without `k8s:`)"
    )
    node_file: Path | None = Field(
        default=None,
        description="YAML file with further labels (`labels: {key: value}`); until it exists "
        "policy stays as it was, and on the first start ever only the failsafe list passes",
    )
    policy_dir: Path = Field(
        default=Path("/etc/meshwall/policies.d"), description="directory of policies, watched"
    )
    policy_owner_check: bool = Field(
        default=True, description="refuse policies that are not root's, or that group or others may write"
    )
    identities_file: Path = Field(
        default=Path("/etc/meshwall/identities.yaml"),
        description="identities and addresses of peers, used without etcd",
    )
    workloads_dir: Path = Field(
        default=Path("/etc/meshwall/workloads.d"),
        description="directory of this host's workloads, watched: their labels get identities, their "
        "addresses are published (with etcd this needs publish and cluster_id)",
    )
    services_dir: Path = Field(
        default=Path("/etc/meshwall/services.d"),
        description="directory of this host's services and their exports, watched: global ones are published",
    )
    pins: Path = Field(
        default=Path("/sys/fs/bpf/meshwall"), description="bpf file system directory of programs and maps"
    )
    run_dir: Path = Field(
        default=Path("/run/meshwall"), description="the control socket `meshwall.sock` and the lock"
    )
    state_dir: Path = Field(
        default=Path("/var/lib/meshwall"), description="the last good version of each policy"
    )
    socket_group: str = Field(
        default="meshwall", description="members may ask the daemon; only root may change"
    )
    devices: tuple[str, ...] = Field(
        default=(AUTO,),
        description="network devices that are filtered: names, patterns (`eth*`), or `auto` for all "
        "that carry the host's own traffic; an empty list attaches to nothing",
    )
    xdp: Literal["auto", "native", "generic", "off"] = Field(
        default="auto", description="early drop; `auto`: native where the driver can, else TCX alone"
    )
    audit: bool = Field(
        default=False, description="report verdicts and drop nothing, until `meshwall audit` says otherwise"
    )
    audit_policies: tuple[str, ...] = Field(
        default=(), description="policies whose denials are reported, not enforced; the same holds"
    )
    denied: Literal["drop", "reject"] = Field(
        default="drop",
        description="what a denied packet gets unless its policy says: silence, or a TCP reset or ICMP error",
    )
    enforcement: Literal["default", "always", "never"] = Field(
        default="default",
        description="`default`: a direction is closed when a policy selects it; `always`; `never`",
    )
    default_local_cluster: bool = Field(
        default=False, description="selectors without a cluster label mean this cluster only"
    )
    node_selector_labels: bool = Field(default=True, description="`fromNodes` and `toNodes` may be used")
    allow_unenforced: bool = Field(
        default=False, description="accept policies with parts that nothing enforces yet, with a warning"
    )
    failsafe: tuple[FailsafeEntry, ...] = Field(
        default=DEFAULT_FAILSAFE, description="traffic that policy can never close; see below"
    )
    failsafe_kubernetes: bool = Field(
        default=False, description=f"also TCP {', '.join(map(str, KUBERNETES_PORTS))}, both directions"
    )
    i_can_reach_the_console: bool = Field(
        default=False, description="allows an empty failsafe list, with which a policy can lock you out"
    )
    node_ports: NodePorts = Field(
        default=NodePorts(), description="ports that are translated to pods; see below"
    )
    etcd: Etcd | None = Field(
        default=None, description="the shared store; without it this host knows its own files only"
    )
    clusters: dict[ClusterName, int] = Field(
        default={}, description="other clusters that are believed, name to id; empty: every well-formed one"
    )
    clusters_dir: Path | None = Field(
        default=None, description="directory with a file for each remote cluster that has an etcd of its own"
    )
    cluster_prefixes: dict[ClusterName, tuple[str, ...]] = Field(
        default={}, description="the addresses that a cluster may speak for; not named: all that are not ours"
    )
    protected_prefixes: tuple[str, ...] = Field(
        default=(), description="addresses of ours, such as pods, that no other cluster may speak for"
    )
    remote_stale_after: int = Field(
        default=0,
        ge=0,
        description="seconds after which a store that is out of reach is not believed any more; 0: never",
    )
    max_connected_clusters: Literal[255, 511] = Field(
        default=255, description="as in every cluster of the mesh"
    )
    publish: bool = Field(
        default=True, description="tell the shared store about this host (needs cluster_id)"
    )
    flows: int = Field(
        default=65_536, ge=256, le=1 << 24, description="flows that are remembered for `meshwall observe`"
    )
    record: Record = Field(default=Record(), description="flows kept on disk; see below")
    hubble: Hubble = Field(default=Hubble(), description="the API of Hubble; see below")
    map_sizes: MapSizes = Field(default=MapSizes(), description="room in the kernel's tables; see below")
    audit_log_days: int = Field(
        default=180,
        ge=1,
        le=3660,
        description="how long records of changes are kept (`audit` in `state_dir`)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level logged"
    )

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.run_dir / "meshwall.sock"

    @property
    def failsafes(self) -> tuple[FailsafeEntry, ...]:
        """The failsafe list with its profile."""
        if not self.failsafe_kubernetes:
            return self.failsafe
        ports = [
            FailsafeEntry(direction=direction, protocol="TCP", port=port)
            for port in KUBERNETES_PORTS
            for direction in ("ingress", "egress")
        ]
        return (*self.failsafe, *(one for one in ports if one not in self.failsafe))

    @field_validator("xdp", mode="before")
    @classmethod
    def _off_is_a_word(cls, xdp: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if xdp is False else xdp

    @field_validator("clusters")
    @classmethod
    def _ids(cls, clusters: dict[str, int]) -> dict[str, int]:
        for name, number in clusters.items():
            if not 1 <= number <= 511:
                raise ValueError(f"{name}: expected an id of 1..511, found {number}")
        if len(set(clusters.values())) != len(clusters):
            raise ValueError("two clusters have the same id")
        return clusters

    @field_validator("protected_prefixes")
    @classmethod
    def _are_prefixes(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parse_prefix(text)
        return texts

    @field_validator("cluster_prefixes")
    @classmethod
    def _hold_prefixes(cls, clusters: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for texts in clusters.values():
            for text in texts:
                parse_prefix(text)
        return clusters

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.failsafe and not self.i_can_reach_the_console:
            raise ValueError("failsafe is empty: set i_can_reach_the_console if that is meant")
        if self.cluster_id > self.max_connected_clusters:
            raise ValueError(f"cluster_id {self.cluster_id} is above {self.max_connected_clusters}")
        if self.cluster_id in self.clusters.values() and self.cluster_id:
            raise ValueError(f"clusters: id {self.cluster_id} is this cluster's own")
        if self.cluster_name in self.clusters:
            raise ValueError(f"clusters: {self.cluster_name} is this cluster's own name")
        paths = (self.policy_dir, self.pins, self.run_dir, self.state_dir, self.identities_file)
        for one in (*paths, *([self.clusters_dir] if self.clusters_dir else [])):
            if not one.is_absolute():
                raise ValueError(f"{one} is not an absolute path")
        return self


def load(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings. A default file that does not exist is an empty one; a named one must exist.

    Raises ConfigError.
    """
    path = file or Path(environment.get("MESHWALL_CONFIG") or DEFAULT_FILE)
    named = file is not None or bool(environment.get("MESHWALL_CONFIG"))
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if named:
            raise ConfigError([Problem(str(path), 0, 0, "", "no such file")]) from None
        raw = b""
    except OSError as error:
        raise ConfigError([Problem(str(path), 0, 0, "", f"cannot be read: {error.strerror}")]) from None
    return parse(raw, str(path), environment)


def parse(raw: bytes, file: str, environment: Mapping[str, str]) -> Config:
    """The settings in a file's bytes, overlaid by the environment; pure. Raises ConfigError."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(file, line, 1, "", "not UTF-8 text")]) from None
    root = _root(text, file)
    values: dict[str, object] = {}
    if root is not None:
        plain = _plain(root)
        if not isinstance(plain, dict):
            raise ConfigError([Problem(file, root.line, root.column, "", "expected `key: value` lines")])
        values = plain
    values, origins = _overlaid(values, environment)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_problems(error, file, root, origins)) from None


def _root(text: str, file: str) -> Node | None:
    documents = list(read_documents(text, file))
    problems = [one for one in documents if isinstance(one, Problem)]
    if len(documents) > 1 and not problems:
        problems.append(Problem(file, 0, 0, "", "has more than one document, expected one"))
    if problems:
        raise ConfigError(problems)
    found = [one for one in documents if isinstance(one, Node) and one.kind != "null"]
    return found[0] if found else None


def _plain(node: Node) -> object:
    """What a node says, as plain Python."""
    match node.kind:
        case "mapping":
            return {name: _plain(value) for name, value in node.fields.items()}
        case "list":
            return [_plain(one) for one in node.items]
        case "number":
            return int(node.text) if re.fullmatch(r"-?[0-9]+", node.text) else float(node.text)
        case "boolean":
            return node.text.lower() in ("true", "yes", "on")
        case "null":
            return None
        case _:
            return node.text


def _overlaid(
    values: dict[str, object], environment: Mapping[str, str]
) -> tuple[dict[str, object], dict[tuple[str, ...], str]]:
    """Values with MESHWALL_KEY and MESHWALL_SECTION__KEY over them; and which variable set what."""
    origins: dict[tuple[str, ...], str] = {}
    merged = dict(values)
    for name, text in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT) or name in NOT_SETTINGS:
            continue
        path = tuple(name.removeprefix(ENVIRONMENT).lower().split("__"))
        origins[path] = name
        at = merged
        for part in path[:-1]:
            inner = at.get(part)
            at[part] = at = dict(inner) if isinstance(inner, dict) else {}
        at[path[-1]] = _from_variable(path, text)
    return merged, origins


def _from_variable(path: tuple[str, ...], text: str) -> object:
    """YAML, except that lists may be written with commas and text needs no quotes."""
    kind = _kind_of(path)
    if kind is str:
        return text
    if kind is tuple and not text.lstrip().startswith("["):
        return [one.strip() for one in text.split(",") if one.strip()]
    try:
        root = _root(text, "environment")
    except ConfigError:
        return text
    return _plain(root) if root is not None else None


def _kind_of(path: tuple[str, ...]) -> type | None:
    """str, tuple or None for anything else that a key may hold."""
    model: type[BaseModel] = Config
    annotation: Any = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return None
        annotation = field.annotation
        inner = _model_in(annotation)
        model = inner or model
    origin = get_origin(annotation)
    if origin is tuple and get_args(annotation)[0] is str:
        return tuple
    return (
        str if annotation in (str, Path, Path | None) or (origin is Literal and _texts(annotation)) else None
    )


def _texts(annotation: Any) -> bool:
    return all(isinstance(one, str) for one in get_args(annotation))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section an annotation holds, inside `X | None` and `tuple[X, ...]` too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for one in get_args(annotation):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _problems(
    error: ValidationError, file: str, root: Node | None, origins: Mapping[tuple[str, ...], str]
) -> list[Problem]:
    found = []
    for one in error.errors(include_url=False):
        path = tuple(str(part) for part in one["loc"])
        variable = next(
            (origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), None
        )
        message = _message(one["type"], one["msg"], path, one["input"])
        if variable:
            found.append(Problem(f"environment variable {variable}", 0, 0, "", message))
            continue
        node = _node_at(root, path) if one["type"] != "extra_forbidden" else _key_at(root, path)
        line, column = (node.line, node.column) if node else (0, 0)
        found.append(Problem(file, line, column, _dotted(path), message))
    return found


def _message(kind: str, text: str, path: tuple[str, ...], value: object) -> str:
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(path)}"
    if kind == "missing":
        return "required key is missing"
    if kind == "value_error":
        return text.removeprefix("Value error, ")
    expected = text[0].lower() + text[1:]
    if path and "password" in path[-1]:
        return expected
    return f"{expected}, found {_brief(value)}"


def _brief(value: object) -> str:
    if isinstance(value, str):
        return shown(value)
    return (
        "null"
        if value is None
        else f"a {type(value).__name__}"
        if isinstance(value, dict | list)
        else str(value)
    )


def _suggestion(path: tuple[str, ...]) -> str:
    import difflib  # noqa: PLC0415 - on the error path only

    model: type[BaseModel] = Config
    for part in path[:-1]:
        field = model.model_fields.get(part)
        model = (field and _model_in(field.annotation)) or model
    close = difflib.get_close_matches(path[-1], list(model.model_fields), 1)
    return f", did you mean {close[0]}?" if close else "; docs/configuration.md lists the keys"


def _node_at(root: Node | None, path: tuple[str, ...]) -> Node | None:
    """The node at a path, or the nearest one above it."""
    node = root
    for part in path:
        if node is None:
            return None
        inner = node.fields.get(part)
        if inner is None and part.isdigit() and int(part) < len(node.items):
            inner = node.items[int(part)]
        if inner is None:
            return node
        node = inner
    return node


def _key_at(root: Node | None, path: tuple[str, ...]) -> Node | None:
    parent = _node_at(root, path[:-1])
    return parent.keys.get(path[-1], parent) if parent else None


def _dotted(path: tuple[str, ...]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text


# The reference page


def reference() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "`meshwalld` reads `/etc/meshwall/meshwall.yaml` (or `--config FILE`, or `MESHWALL_CONFIG`).",
        "No key is required and the file may be missing. An environment variable wins over the file:",
        "`MESHWALL_LOG_LEVEL` sets `log_level`, `MESHWALL_ETCD__ENDPOINTS` sets `etcd.endpoints` (lists are",
        "separated by commas).",
        "",
        "A mistake ends the start with exit status 2 and one line naming file, line, key and expectation.",
        "What the kernel enforces stays as it was. Settings take effect at a restart; policies, node file and",
        "identities file whenever they change, and at `systemctl reload meshwalld`.",
        "",
        "This page is made from the settings model: `python -m daemon.config > docs/configuration.md`.",
        "",
    ]
    for title, model, text in (
        ("Settings", Config, ""),
        ("etcd", Etcd, "Keys below `etcd`."),
        ("failsafe", FailsafeEntry, "Entries of the `failsafe` list. The default list:"),
        ("record", Record, "Keys below `record`. " + (Record.__doc__ or "")),
        ("hubble", Hubble, "Keys below `hubble`."),
        ("node_ports", NodePorts, "Keys below `node_ports`. " + (NodePorts.__doc__ or "")),
        ("map_sizes", MapSizes, "Keys below `map_sizes`. " + (MapSizes.__doc__ or "")),
    ):
        lines += [f"## {title}", ""]
        lines += [text, ""] if text else []
        if model is FailsafeEntry:
            lines += [f"* {one.direction} {one.protocol} {one.port}" for one in DEFAULT_FAILSAFE] + [""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *_rows(model), ""]
    return "\n".join(lines)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = _type_text(field.annotation)
        yield f"| `{name}` | {kind} | {_default_text(name, field.default)} | {field.description} |"


def _default_text(name: str, default: object) -> str:
    if default is PydanticUndefined:
        return "host name" if name == "node_name" else "required"
    if name in ("failsafe", "node_ports", "record", "hubble", "map_sizes"):
        return "below"
    if default is None or default in ((), {}, ""):
        return "-"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    names = {str: "text", int: "number", bool: "`true`, `false`", Path: "path"}
    if origin in (Annotated, Union, UnionType):
        text = _type_text(arguments[0])
    elif origin is Literal:
        text = ", ".join(f"`{one}`" for one in arguments)
    elif origin is tuple:
        text = f"list of {_type_text(arguments[0])}"
    elif origin is dict:
        text = f"map of {_type_text(arguments[1])}"
    else:
        text = names.get(annotation, "section")
    return text


if __name__ == "__main__":
    print(reference(), end="")
