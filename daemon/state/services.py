"""Pure: one service of what all sources say of its name: which backends, and where a new connection goes and why.

The local part is this host's own file, or else what another host of our cluster publishes; without either there is
nothing to connect to here. What other clusters say is added if the local part is global (clustermesh/services.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from clustermesh.services import (
    AFFINITY,
    GLOBAL,
    Backend,
    LocalBackend,
    Port,
    Ports,
    Service,
    ServiceExport,
    merge,
    selectable,
)
from daemon.state.tables import LOCAL, ServiceKey, ServiceRow


@dataclass(frozen=True, slots=True)
class SeenBackend:
    """A backend, whose it is, and whether a new connection may go there, with the reason."""

    address: str
    ports: tuple[str, ...]  # `http:8080/TCP`
    cluster: str
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class MergedService:
    """A service by namespace and name. `sources` say something about it; `text` tells how it stands."""

    namespace: str
    name: str
    is_global: bool
    affinity: str
    sources: tuple[str, ...]
    frontends: tuple[str, ...]  # `10.97.0.10 http:80/TCP`
    backends: tuple[SeenBackend, ...]
    text: str


def all_merged(rows: Mapping[ServiceKey, ServiceRow], own_cluster: str) -> Iterator[MergedService]:
    """Every service that some source names, in order."""
    by_name: dict[tuple[str, str], dict[str, ServiceRow]] = {}
    for key, row in rows.items():
        by_name.setdefault((key.namespace, key.name), {})[key.source] = row
    for (namespace, name), said in sorted(by_name.items()):
        yield merged(namespace, name, said, own_cluster)


def merged(namespace: str, name: str, rows: Mapping[str, ServiceRow], own_cluster: str) -> MergedService:
    """One service. rows: what each source says of it, `local` or `mesh:<cluster>`."""
    own = f"mesh:{own_cluster}"
    ours = rows.get(LOCAL) or rows.get(own)
    remote = [row.service for source, row in sorted(rows.items()) if source not in {LOCAL, own}]
    if ours is None:
        seen = _unused(remote)
        text = "not here: no service of this name in our cluster"
        return MergedService(namespace, name, False, "", tuple(sorted(rows)), (), seen, text)
    seen = _seen(ours, remote, own_cluster)
    return MergedService(
        namespace,
        name,
        ours.is_global,
        ours.affinity,
        tuple(sorted(rows)),
        tuple(_frontends(ours.service)),
        seen,
        _text(seen, own_cluster),
    )


def _seen(ours: ServiceRow, remote: Sequence[Service], own_cluster: str) -> tuple[SeenBackend, ...]:
    annotations = {GLOBAL[0]: str(ours.is_global).lower(), AFFINITY[0]: ours.affinity}
    local = [LocalBackend(address, ports or {}) for address, ports in (ours.service.backends or {}).items()]
    backends = merge(annotations, local, remote, own_cluster)
    healthy = [one for one in backends if one.cluster or one.address not in ours.unhealthy]
    chosen = {one.address for one in selectable(healthy)}
    preferred = any(one.preferred for one in healthy)
    found = [
        SeenBackend(
            one.address,
            port_texts(one.ports),
            one.cluster or own_cluster,
            one.address in chosen,
            _reason(one, ours, preferred),
        )
        for one in backends
    ]
    if not ours.is_global:
        found += _unused(remote, "the local service is not global")
    return tuple(found)


def _reason(backend: Backend, ours: ServiceRow, preferred: bool) -> str:
    """Why a new connection goes to a backend or does not. preferred: affinity finds what it prefers."""
    if not backend.cluster and backend.address in ours.unhealthy:
        return f"unhealthy: {ours.unhealthy[backend.address]}"
    if ours.affinity not in {"local", "remote"}:
        return "healthy" if ours.is_global else "local only: not global"
    if backend.preferred:
        return f"affinity {ours.affinity}"
    if preferred:
        return f"affinity {ours.affinity}: others are preferred"
    return f"affinity {ours.affinity}, but nothing preferred is healthy"


def _unused(remote: Sequence[Service], why: str = "no local service") -> tuple[SeenBackend, ...]:
    return tuple(
        SeenBackend(address, port_texts(ports or {}), one.cluster, False, why if one.shared else "not shared")
        for one in remote
        for address, ports in sorted((one.backends or {}).items())
    )


def _text(seen: Sequence[SeenBackend], own_cluster: str) -> str:
    chosen = [one for one in seen if one.chosen]
    if not chosen:
        return "no backend that a new connection could go to"
    others = sum(1 for one in chosen if one.cluster != own_cluster)
    return f"{len(chosen)} of {len(seen)} backends, {others} of them in other clusters"


def _frontends(service: Service) -> Iterator[str]:
    for address, ports in sorted((service.frontends or {}).items()):
        yield " ".join([address, *port_texts(ports or {})])


def port_texts(ports: Ports) -> tuple[str, ...]:
    """`http:8080/TCP` each; the name is left out where there is none."""
    return tuple(_port_text(name, port) for name, port in sorted(ports.items()) if port is not None)


def _port_text(name: str, port: Port) -> str:
    text = f"{port.number}/{port.protocol}"
    return f"{name}:{text}" if name else text


def winning(exports: Mapping[ServiceKey, ServiceExport]) -> dict[tuple[str, str], ServiceKey]:
    """By namespace and name the export that counts where clusters differ: the oldest, then by cluster."""
    found: dict[tuple[str, str], ServiceKey] = {}
    for key in sorted(exports, key=lambda one: (exports[one].created, exports[one].cluster, one.source)):
        found.setdefault((key.namespace, key.name), key)
    return found
