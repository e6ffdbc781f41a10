"""/v1/services and /v1/serviceexports: services of all clusters as one, and what is exported."""

from aiohttp import web

from daemon.api.app import ApiError, Json, stream_rows
from daemon.state.services import MergedService, SeenBackend, all_merged, winning
from daemon.state.tables import Tables


def routes(tables: Tables, own_cluster: str) -> list[web.RouteDef]:
    """The routes, bound to the tables that they read."""

    async def services(request: web.Request) -> web.StreamResponse:
        wanted = {name: request.query.get(name, "") for name in ("name", "namespace", "cluster", "affinity")}
        rows = (
            service_json(one)
            for one in all_merged(tables.services.rows, own_cluster)
            if _wanted(one, own_cluster, **wanted)
        )
        return await stream_rows(request, {}, "services", rows)

    async def service(request: web.Request) -> web.StreamResponse:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        for one in all_merged(tables.services.rows, own_cluster):
            if (one.namespace, one.name) == (namespace, name):
                return web.json_response(service_json(one))
        raise ApiError(404, f"no service {namespace}/{name}; `meshwall service list` has the names")

    async def exports(_: web.Request) -> web.StreamResponse:
        return web.json_response({"exports": exports_json(tables)})

    return [
        web.get("/v1/services", services),
        web.get("/v1/services/{namespace}/{name}", service),
        web.get("/v1/serviceexports", exports),
    ]


def _wanted(one: MergedService, own: str, *, name: str, namespace: str, cluster: str, affinity: str) -> bool:
    clusters = {own if source == "local" else source.removeprefix("mesh:") for source in one.sources}
    return (
        name in {"", one.name}
        and namespace in {"", one.namespace}
        and (not cluster or cluster in clusters)
        and affinity in {"", one.affinity or "none"}
    )


def service_json(one: MergedService) -> Json:
    """A service with all its backends; `chosen`: a new connection from here may go there, and `reason` why."""
    return {
        "namespace": one.namespace,
        "name": one.name,
        "global": one.is_global,
        "affinity": one.affinity or "none",
        "sources": list(one.sources),
        "frontends": list(one.frontends),
        "text": one.text,
        "backends": [_backend(backend) for backend in one.backends],
    }


def _backend(one: SeenBackend) -> Json:
    return {
        "address": one.address,
        "ports": list(one.ports),
        "cluster": one.cluster,
        "chosen": one.chosen,
        "reason": one.reason,
    }


def exports_json(tables: Tables) -> list[Json]:
    """Exports by name and cluster; `counts`: where clusters differ, this one is right, for it is the oldest."""
    counting = set(winning(tables.exports.rows).values())
    return [
        {
            "namespace": one.namespace,
            "name": one.name,
            "cluster": one.cluster,
            "source": key.source,
            "created": one.created,
            "type": one.type,
            "session_affinity": one.session_affinity,
            "ports": [f"{port.name}:{port.port}/{port.protocol or 'TCP'}" for port in one.ports or ()],
            "counts": key in counting,
        }
        for key, one in sorted(tables.exports.rows.items())
    ]
