"""Pure: services and their exports as files of `services.d` say them.

name: web
namespace: prod
annotations: {service.cilium.io/global: "true", service.cilium.io/affinity: local}
frontends: [10.97.0.10]
ports:
- {name: http, port: 80, targetPort: 8080, protocol: TCP}   # targetPort and protocol may be left out
backends: [10.0.0.5, 10.0.0.6]
check: {http: /healthz, port: http, interval: 5, timeout: 2, rise: 2, fall: 3}   # or {tcp: true}; optional
---
kind: ServiceExport
name: web
namespace: prod
created: 2026-11-23T12:00:00Z
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.services import (
    AFFINITY,
    GLOBAL,
    SHARED,
    Annotations,
    ExportPort,
    Port,
    Ports,
    Service,
    ServiceExport,
    export_time,
    read_annotations,
)
from clustermesh.trust import Trust
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents, shown
from daemon.policy.reader import Reader

MAX_BACKENDS = 1000  # of one service
MAX_PORTS = 100
_FIELDS = ("kind", "name", "namespace", "annotations", "labels", "frontends", "ports", "backends", "check")
_EXPORT_FIELDS = ("kind", "name", "namespace", "created", "type", "sessionAffinity", "ports")
_PORT_FIELDS = ("name", "port", "targetPort", "protocol")
_CHECK_FIELDS = ("tcp", "http", "port", "interval", "timeout", "rise", "fall")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_PATH = re.compile(r"/[!-~]{0,1023}")
_ANNOTATIONS = (*GLOBAL, *SHARED, *AFFINITY)


@dataclass(frozen=True, slots=True)
class Check:
    """How the backends of a service are asked whether they are well: a TCP connection, and with `path` an answer."""

    port: int
    path: str = ""
    interval_s: float = 5.0
    timeout_s: float = 2.0
    rise: int = 2  # good answers in a row after which an unhealthy backend is healthy
    fall: int = 3  # bad ones after which a healthy one is not


@dataclass(frozen=True, slots=True)
class LocalService:
    """A service of a file."""

    service: Service
    wanted: Annotations
    check: Check | None
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class LocalExport:
    """An export of a file; without ports they are those of the service of its name."""

    export: ServiceExport
    file: str
    line: int


Entry = LocalService | LocalExport


@dataclass(frozen=True, slots=True)
class _PortLine:
    """A port of a service: what is asked for, and what backends listen on."""

    name: str
    protocol: str
    port: int
    target: int


def parse_services(
    text: str, file: str, cluster: str, cluster_id: int
) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """The services and exports of a file; with a problem there may be fewer, or none. Never raises."""
    reader = Reader(file)
    found: list[Entry] = []
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            reader.problems.append(document)
        elif document.kind != "null":
            parsed = _entry(reader, document, cluster, cluster_id)
            found += parsed
    return tuple(found), tuple(reader.problems)


def _entry(reader: Reader, root: Node, cluster: str, cluster_id: int) -> Iterator[Entry]:
    kind = root.fields.get("kind")
    chosen = reader.choice(kind, "kind", ("Service", "ServiceExport")) if kind is not None else "Service"
    before = len(reader.problems)
    if chosen == "Service":
        service = _service(reader, root, cluster, cluster_id)
        if len(reader.problems) == before:
            yield service
    elif chosen == "ServiceExport":
        export = _export(reader, root, cluster)
        if len(reader.problems) == before:
            yield export


def _service(reader: Reader, root: Node, cluster: str, cluster_id: int) -> LocalService:
    fields = reader.mapping(root, "", _FIELDS, ("name", "namespace", "ports", "backends"))
    name, namespace = (
        _name(reader, fields.get("name"), "name"),
        _name(reader, fields.get("namespace"), "namespace"),
    )
    ports = _ports(reader, fields.get("ports"))
    frontends = _addresses(reader, fields.get("frontends"), "frontends")
    backends = _addresses(reader, fields.get("backends"), "backends")
    asked = {one.name: Port(one.protocol, one.port) for one in ports}
    served = {one.name: Port(one.protocol, one.target) for one in ports}
    service = Service(
        cluster,
        namespace,
        name,
        frontends=dict.fromkeys(frontends, asked),
        backends=dict.fromkeys(backends, served),
        labels=_texts(reader, fields.get("labels"), "labels"),
        cluster_id=cluster_id,
    )
    wanted = _annotations(reader, fields.get("annotations"))
    check = _check(reader, fields["check"], ports) if "check" in fields else None
    return LocalService(service, wanted, check, reader.file, root.line)


def _annotations(reader: Reader, node: Node | None) -> Annotations:
    texts = _texts(reader, node, "annotations", quoted=False)
    for key, text in texts.items():
        place = node.fields[key] if node is not None else None
        if key not in _ANNOTATIONS and place is not None:
            reader.fail(place, f"annotations.{key}", f"is not one of {', '.join(_ANNOTATIONS)}")
        elif key in AFFINITY and place is not None and text.lower() not in {"local", "remote", "none"}:
            reader.fail(place, f"annotations.{key}", f"{shown(text)} is not one of local, remote, none")
        elif key in (*GLOBAL, *SHARED) and place is not None and text.lower() not in {"true", "false"}:
            reader.fail(place, f"annotations.{key}", f'{shown(text)} is neither "true" nor "false"')
    return read_annotations(texts)


def _texts(reader: Reader, node: Node | None, path: str, *, quoted: bool = True) -> dict[str, str]:
    """A mapping of texts; not `quoted`: true and false are taken as they are."""
    if node is None or not reader.expect(node, path, "mapping"):
        return {}
    return {
        key: value.text if value.kind == "boolean" and not quoted else reader.text(value, f"{path}.{key}")
        for key, value in node.fields.items()
    }


def _ports(reader: Reader, node: Node | None) -> tuple[_PortLine, ...]:
    found: dict[str, _PortLine] = {}
    items = reader.items(node, "ports")
    if node is not None and node.kind == "list" and not 0 < len(items) <= MAX_PORTS:
        reader.fail(node, "ports", f"{len(items)} ports, expected 1 to {MAX_PORTS}")
    for item, path in items:
        fields = reader.mapping(item, path, _PORT_FIELDS, ("port",))
        name = _name(reader, fields["name"], f"{path}.name") if "name" in fields else ""
        number = _number(reader, fields.get("port"), f"{path}.port", (1, 65535))
        target = _number(reader, fields.get("targetPort"), f"{path}.targetPort", (1, 65535), number)
        protocol = "TCP"
        if "protocol" in fields:
            protocol = reader.choice(fields["protocol"], f"{path}.protocol", ("TCP", "UDP", "SCTP"))
        if name in found:
            reader.fail(item, path, f"two ports are called {shown(name)}: give each a name of its own")
        found[name] = _PortLine(name, protocol, int(number), int(target))
    return tuple(found.values())


def _addresses(reader: Reader, node: Node | None, path: str) -> list[str]:
    found: dict[str, None] = {}
    for item, where in reader.items(node, path):
        text = reader.text(item, where)
        if text:
            try:
                family, number = wire.parse_ip(text)
                Trust("").check_prefix("", wire.parse_cidr(text))
                if (address := wire.ip_text(family, number)) in found:
                    reader.fail(item, where, f"{address} is there twice")
                found[address] = None
            except Malformed as error:
                reader.fail(item, where, str(error))
    if node is not None and len(found) > MAX_BACKENDS:
        reader.fail(node, path, f"{len(found)} addresses, at most {MAX_BACKENDS}")
    return list(found)


def _check(reader: Reader, node: Node, ports: tuple[_PortLine, ...]) -> Check | None:
    fields = reader.mapping(node, "check", _CHECK_FIELDS)
    if ("tcp" in fields) == ("http" in fields):
        reader.fail(node, "check", "expected either `tcp: true` or `http: /path`")
        return None
    path = ""
    if "http" in fields:
        path = reader.text(fields["http"], "check.http")
        if path and not _PATH.fullmatch(path):
            reader.fail(fields["http"], "check.http", f"{shown(path)} is not a path like /healthz")
    elif not reader.flag(fields["tcp"], "check.tcp", default=True):
        reader.fail(fields["tcp"], "check.tcp", "false makes no check: leave `check` out")
    return Check(
        _check_port(reader, node, fields.get("port"), ports),
        path,
        _number(reader, fields.get("interval"), "check.interval", (0.5, 3600), 5),
        _number(reader, fields.get("timeout"), "check.timeout", (0.1, 60), 2),
        int(_number(reader, fields.get("rise"), "check.rise", (1, 100), 2)),
        int(_number(reader, fields.get("fall"), "check.fall", (1, 100), 3)),
    )


def _check_port(reader: Reader, check: Node, node: Node | None, ports: tuple[_PortLine, ...]) -> int:
    """The port that backends are asked at: by name, and without one the only TCP port."""
    usable = {one.name: one.target for one in ports if one.protocol == "TCP"}
    if node is not None:
        name = reader.text(node, "check.port")
        if name not in usable:
            reader.fail(node, "check.port", f"{shown(name)} is not the name of a TCP port of this service")
        return usable.get(name, 0)
    if len(usable) != 1:
        reader.fail(check, "check.port", f"required: the service has {len(usable)} TCP ports")
    return next(iter(usable.values()), 0)


def _export(reader: Reader, root: Node, cluster: str) -> LocalExport:
    fields = reader.mapping(root, "", _EXPORT_FIELDS, ("name", "namespace", "created"))
    name, namespace = (
        _name(reader, fields.get("name"), "name"),
        _name(reader, fields.get("namespace"), "namespace"),
    )
    created = reader.text(fields.get("created"), "created")
    if created:
        try:
            created = export_time(created)
        except Malformed as error:
            reader.fail(fields["created"], "created", str(error))
    types, affinities = ("ClusterSetIP", "Headless"), ("None", "ClientIP")
    kind = reader.choice(fields["type"], "type", types) if "type" in fields else types[0]
    session = affinities[0]
    if "sessionAffinity" in fields:
        session = reader.choice(fields["sessionAffinity"], "sessionAffinity", affinities)
    ports = None
    if "ports" in fields:
        ports = tuple(
            ExportPort(one.name, one.protocol, None, one.port) for one in _ports(reader, fields["ports"])
        )
    export = ServiceExport(cluster, name, namespace, created, ports, kind, session)
    return LocalExport(export, reader.file, root.line)


def _name(reader: Reader, node: Node | None, path: str) -> str:
    text = reader.text(node, path)
    if node is not None and node.kind == "string" and not _NAME.fullmatch(text):
        reader.fail(node, path, f"{shown(text)} is not a name: lower case, digits and `-`, 63 at most")
    return text


def _number(
    reader: Reader, node: Node | None, path: str, limits: tuple[float, float], default: float = 0
) -> float:
    """A number within limits; whole if the least one is."""
    least, most = limits
    if node is None or not reader.expect(node, path, "number"):
        return default
    try:
        number = int(node.text) if isinstance(least, int) else float(node.text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        reader.fail(node, path, f"{node.text} is not a number from {least} to {most}")
        return default
    return number


def completed(export: ServiceExport, services: Mapping[tuple[str, str], LocalService]) -> ServiceExport:
    """An export with the ports of the service of its name, if its file gives none."""
    ours = services.get((export.namespace, export.name))
    if export.ports is not None or ours is None:
        return export
    sides: list[Ports] = [
        one for one in (ours.service.frontends or ours.service.backends or {}).values() if one
    ]
    ports = sides[0] if sides else {}
    found = [
        ExportPort(name, port.protocol, None, port.number) for name, port in sorted(ports.items()) if port
    ]
    return replace(export, ports=tuple(found))
