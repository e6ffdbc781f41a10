"""/v1/subject: whom policy is compiled for here and how, so that a command can compile as the daemon does."""

from collections.abc import Callable

from aiohttp import web

from daemon.api.app import ApiError, Json
from daemon.model.labels import format_labels
from daemon.policy.compile import CompileSettings
from daemon.state.tables import HostRow, Tables


def routes(tables: Tables, settings: Callable[[], CompileSettings]) -> list[web.RouteDef]:
    """The handler."""

    async def subject(_: web.Request) -> web.StreamResponse:
        host = tables.host.get("host")
        if host is None:
            raise ApiError(503, "this host's labels are not known yet")
        return web.json_response(subject_json(host, settings()))

    return [web.get("/v1/subject", subject)]


def subject_json(host: HostRow, settings: CompileSettings) -> Json:
    """Labels as text; failsafe entries as the settings file has them."""
    return {
        "node": host.name,
        "cluster": settings.cluster_name,
        "labels": list(format_labels(host.labels)),
        "enforcement": settings.mode,
        "ipv4": settings.ipv4,
        "ipv6": settings.ipv6,
        "default_local_cluster": settings.default_local_cluster,
        "node_selector_labels": settings.node_selector_labels,
        "audit_policies": sorted(settings.audit_policies),
        "failsafe": [
            {
                "direction": str(one.direction),
                "protocol": one.proto.name,
                "port": one.port,
                "cidrs": [prefix.cidr for prefix in one.prefixes],
            }
            for one in settings.failsafe
        ],
    }
