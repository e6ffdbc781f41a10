"""Pure: global services and MCS exports on the wire, and the merge of one service over all clusters."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from clustermesh import gojson, wire
from clustermesh.gojson import Json, Malformed
from clustermesh.wire import STRICT, Compat


class Port(NamedTuple):
    """A port of a frontend or backend. `protocol` is text: unknown ones are kept."""

    protocol: str
    number: int


Ports = Mapping[str, Port | None]  # port name -> port


@dataclass(frozen=True, slots=True)
class Service:
    """`services/v1/<cluster>/<namespace>/<name>`. None is a null; addresses are as written."""

    cluster: str
    namespace: str
    name: str
    frontends: Mapping[str, Ports | None] | None = field(default_factory=dict)
    backends: Mapping[str, Ports | None] | None = field(default_factory=dict)
    hostnames: Mapping[str, str] | None = field(default_factory=dict)
    labels: Mapping[str, str] | None = field(default_factory=dict)
    selector: Mapping[str, str] | None = field(default_factory=dict)
    include_external: bool = False
    shared: bool = False
    cluster_id: int = 0


def encode_service(service: Service) -> bytes:
    return gojson.dump(
        {
            "cluster": service.cluster,
            "namespace": service.namespace,
            "name": service.name,
            "frontends": _sides_out(service.frontends),
            "backends": _sides_out(service.backends),
            "hostnames": wire.sorted_map(service.hostnames),
            "labels": wire.sorted_map(service.labels),
            "selector": wire.sorted_map(service.selector),
            "includeExternal": service.include_external,
            "shared": service.shared,
            "clusterID": service.cluster_id,
        }
    )


def _sides_out(sides: Mapping[str, Ports | None] | None) -> dict[str, object] | None:
    if sides is None:
        return None
    return {address: _ports_out(ports) for address, ports in sorted(sides.items())}


def _ports_out(ports: Ports | None) -> dict[str, object] | None:
    if ports is None:
        return None
    return {
        name: None if port is None else {"Protocol": port.protocol, "Port": port.number}
        for name, port in sorted(ports.items())
    }


_MAPS = frozenset({"frontends", "backends", "hostnames", "labels", "selector"})
_SERVICE = {
    name.casefold(): name
    for name in ("cluster", "namespace", "name", *_MAPS, "includeExternal", "shared", "clusterID")
}
_PORT = {"protocol": "Protocol", "port": "Port"}


def decode_service(name: str, value: bytes, compat: Compat = STRICT) -> Service:
    """The service under `services/v1/<cluster>/<name>`, name being `<namespace>/<name>`.

    Whether cluster and id are those of the publisher is for `wire.check_owner`.
    """
    strict = compat is STRICT
    document = gojson.parse(gojson.text(value, strict=strict), strict=strict)
    found = gojson.members(document, _SERVICE, "service", _MAPS)

    def sides(member: str) -> dict[str, Ports | None] | None:
        return gojson.mapping(found[member], _ports, member) if member in found else {}

    def texts(member: str) -> dict[str, str] | None:
        return gojson.mapping(found[member], gojson.string, member) if member in found else {}

    service = Service(
        gojson.string(found.get("cluster"), "cluster"),
        gojson.string(found.get("namespace"), "namespace"),
        gojson.string(found.get("name"), "name"),
        sides("frontends"),
        sides("backends"),
        texts("hostnames"),
        texts("labels"),
        texts("selector"),
        gojson.boolean(found.get("includeExternal"), "includeExternal"),
        gojson.boolean(found.get("shared"), "shared"),
        gojson.unsigned(found.get("clusterID"), 32, "clusterID"),
    )
    _check_key(name, service.cluster, service.namespace, service.name)
    for address in (*(service.frontends or ()), *(service.backends or ())):
        _plain_ip(address, strict=strict)
    return service


def _ports(value: Json, where: str) -> Ports | None:
    return gojson.mapping(value, _port, where)


def _port(value: Json, where: str) -> Port | None:
    if value is None:
        return None
    found = gojson.members(value, _PORT, where, frozenset())
    protocol = gojson.string(found.get("Protocol"), f"{where}.Protocol")
    return Port(protocol, gojson.unsigned(found.get("Port"), 16, f"{where}.Port"))


def _check_key(name: str, cluster: str, namespace: str, service: str) -> None:
    if not (cluster and namespace and service):
        raise Malformed("required_field_missing", "cluster, namespace and name must not be empty")
    if name != f"{namespace}/{service}":
        raise Malformed("key_mismatch", f"the key says {gojson.shown(name)}, the value {namespace}/{service}")


def _plain_ip(text: str, *, strict: bool) -> None:
    if "@" in text:
        raise Malformed("ip_syntax", f"{gojson.shown(text)} carries a cluster id")
    wire.parse_addr_cluster(text)
    if strict and "%" in text:
        raise Malformed("ip_syntax", f"{gojson.shown(text)} has a zone")


# --- MCS-API exports


class ExportPort(NamedTuple):
    """A port of an exported service; empty texts are left out on the wire."""

    name: str
    protocol: str
    app_protocol: str | None
    port: int


@dataclass(frozen=True, slots=True)
class ServiceExport:
    """`serviceexports/v1/<cluster>/<namespace>/<name>`. `timeout_s` is of ClientIP affinity."""

    cluster: str
    name: str
    namespace: str
    created: str  # RFC 3339
    ports: tuple[ExportPort, ...] | None
    type: str
    session_affinity: str
    affinity_config: bool = False  # sessionAffinityConfig is there
    client_ip: bool = False  # with a clientIP in it
    timeout_s: int | None = None


def encode_service_export(export: ServiceExport) -> bytes:
    written: dict[str, object] = {
        "cluster": export.cluster,
        "name": export.name,
        "namespace": export.namespace,
        "exportCreationTimestamp": export.created,
        "ports": None if export.ports is None else [_export_port_out(one) for one in export.ports],
        "type": export.type,
        "sessionAffinity": export.session_affinity,
    }
    if export.affinity_config:
        timeout = {} if export.timeout_s is None else {"timeoutSeconds": export.timeout_s}
        written["sessionAffinityConfig"] = {"clientIP": timeout} if export.client_ip else {}
    return gojson.dump(written)


def _export_port_out(port: ExportPort) -> dict[str, object]:
    return {
        **({"name": port.name} if port.name else {}),
        **({"protocol": port.protocol} if port.protocol else {}),
        **({"appProtocol": port.app_protocol} if port.app_protocol is not None else {}),
        "port": port.port,
    }


_EXPORT_FIELDS = (
    "cluster", "name", "namespace", "exportCreationTimestamp", "ports", "type", "sessionAffinity",
    "sessionAffinityConfig",
)  # fmt: skip
_EXPORT = {name.casefold(): name for name in _EXPORT_FIELDS}
_EXPORT_PORT = {"name": "name", "protocol": "protocol", "appprotocol": "appProtocol", "port": "port"}


def decode_service_export(name: str, value: bytes, compat: Compat = STRICT) -> ServiceExport:
    """The export under `serviceexports/v1/<cluster>/<name>`, name being `<namespace>/<name>`."""
    strict = compat is STRICT
    document = gojson.parse(gojson.text(value, strict=strict), strict=strict)
    nullable = frozenset({"ports", "exportCreationTimestamp", "sessionAffinityConfig"})
    found = gojson.members(document, _EXPORT, "export", nullable)
    config = found.get("sessionAffinityConfig")
    inner = gojson.members(config, {"clientip": "clientIP"}, "sessionAffinityConfig", frozenset({"clientIP"}))
    client = gojson.members(
        inner.get("clientIP"), {"timeoutseconds": "timeoutSeconds"}, "clientIP", frozenset({"timeoutSeconds"})
    )
    timeout = client.get("timeoutSeconds")
    export = ServiceExport(
        gojson.string(found.get("cluster"), "cluster"),
        gojson.string(found.get("name"), "name"),
        gojson.string(found.get("namespace"), "namespace"),
        export_time(found.get("exportCreationTimestamp")),
        gojson.array(found.get("ports"), _export_port, "ports"),
        gojson.string(found.get("type"), "type"),
        gojson.string(found.get("sessionAffinity"), "sessionAffinity"),
        config is not None,
        inner.get("clientIP") is not None,
        None if timeout is None else gojson.signed32(timeout, "timeoutSeconds"),
    )
    _check_key(name, export.cluster, export.namespace, export.name)
    if not export.created:
        raise Malformed("required_field_missing", "exportCreationTimestamp must not be empty")
    if export.type not in {"ClusterSetIP", "Headless"}:
        raise Malformed("enum_value", f"type: {gojson.shown(export.type)} is not ClusterSetIP or Headless")
    if export.session_affinity not in {"ClientIP", "None"}:
        raise Malformed("enum_value", f"sessionAffinity: {gojson.shown(export.session_affinity)}")
    return export


def _export_port(value: Json, where: str) -> ExportPort:
    found = gojson.members(value, _EXPORT_PORT, where, frozenset({"appProtocol"}))
    app = found.get("appProtocol")
    return ExportPort(
        gojson.string(found.get("name"), f"{where}.name"),
        gojson.string(found.get("protocol"), f"{where}.protocol"),
        None if app is None else gojson.string(app, f"{where}.appProtocol"),
        gojson.signed32(found.get("port"), f"{where}.port"),
    )


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)


def export_time(value: Json) -> str:
    """A time as Kubernetes writes it: UTC, whole seconds. Empty for null and for year 1, its zero."""
    if value is None:
        return ""
    written = gojson.expect(value, str, "exportCreationTimestamp", "a time")
    if not _RFC3339.fullmatch(written):
        raise Malformed("time_syntax", f"exportCreationTimestamp: {gojson.shown(written)} is not RFC 3339")
    try:
        moment = datetime.fromisoformat(written).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Malformed(
            "time_syntax", f"exportCreationTimestamp: {gojson.shown(written)} is not RFC 3339"
        ) from error
    return "" if moment.year == 1 else moment.strftime("%Y-%m-%dT%H:%M:%SZ")


# --- the merge

GLOBAL = ("service.cilium.io/global", "io.cilium/global-service")  # each with its older alias
SHARED = ("service.cilium.io/shared", "io.cilium/shared-service")
AFFINITY = ("service.cilium.io/affinity", "io.cilium/service-affinity")


class Annotations(NamedTuple):
    """What the annotations of a local service ask for. `affinity` is lower case."""

    is_global: bool
    shared: bool
    affinity: str


def read_annotations(annotations: Mapping[str, str]) -> Annotations:
    """Only `true` in any case is true; without `global` nothing else counts."""

    def value(names: tuple[str, str]) -> str | None:
        return next((annotations[name] for name in names if name in annotations), None)

    if (value(GLOBAL) or "").lower() != "true":
        return Annotations(False, False, "")
    shared = value(SHARED)
    return Annotations(True, shared is None or shared.lower() == "true", (value(AFFINITY) or "").lower())


@dataclass(frozen=True, slots=True)
class LocalBackend:
    """A backend of the local service."""

    address: str
    ports: Ports
    terminating: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend of the merged service; `cluster` is empty for local ones."""

    address: str
    ports: Ports
    cluster: str
    preferred: bool
    terminating: bool


def merge(
    annotations: Mapping[str, str], local: Iterable[LocalBackend], remote: Iterable[Service], own_cluster: str
) -> tuple[Backend, ...]:
    """All backends of one local service, by address. remote: what each cluster says of that name.

    Of one address in two places the local one wins, then the cluster with the lowest id.
    """
    wanted = read_annotations(annotations)
    merged: dict[str, Backend] = {}
    if wanted.is_global:
        others = [one for one in remote if one.shared and one.cluster != own_cluster]
        for service in sorted(others, key=lambda one: one.cluster_id, reverse=True):
            for address, ports in (service.backends or {}).items():
                preferred = wanted.affinity == "remote"
                merged[address] = Backend(address, ports or {}, service.cluster, preferred, terminating=False)
    for backend in local:
        preferred = wanted.affinity == "local"
        merged[backend.address] = Backend(backend.address, backend.ports, "", preferred, backend.terminating)
    return tuple(merged[address] for address in sorted(merged))


def selectable(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    """Where new connections go: preferred active ones if there are any, else active, else terminating."""
    all_of_them = tuple(backends)
    active = tuple(one for one in all_of_them if not one.terminating)
    preferred = tuple(one for one in active if one.preferred)
    return preferred or active or all_of_them
