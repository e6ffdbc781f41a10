"""GET /v1/mesh and /v1/nodes: the clusters and nodes that this host knows, and how well."""

from typing import Any

from aiohttp import web

from daemon.model.labels import format_labels
from daemon.state.tables import NodeKey, NodeRow, StatusRow, Tables

Json = dict[str, Any]


def routes(tables: Tables) -> list[web.RouteDef]:
    """The routes, bound to the tables that they read."""

    async def mesh(_: web.Request) -> web.StreamResponse:
        return web.json_response(mesh_json(tables))

    async def nodes(request: web.Request) -> web.StreamResponse:
        cluster = request.query.get("cluster", "")
        return web.json_response(nodes_json(tables, cluster))

    return [web.get("/v1/mesh", mesh), web.get("/v1/nodes", nodes)]


def mesh_json(tables: Tables) -> Json:
    """`store` and `publish` are null without a store; `clusters` by name."""
    rows = tables.status.rows
    clusters = {
        key.removeprefix("mesh:"): _row(row) for key, row in sorted(rows.items()) if key.startswith("mesh:")
    }
    return {
        "store": _optional(rows.get("mesh")),
        "publish": _optional(rows.get("mesh publish")),
        "clusters": [{"name": name, **row} for name, row in clusters.items()],
    }


def _optional(row: StatusRow | None) -> Json | None:
    return None if row is None else _row(row)


def _row(row: StatusRow) -> Json:
    return {"ok": row.ok, "text": row.text, "hint": row.hint, "since": row.since, **row.details}


def nodes_json(tables: Tables, cluster: str = "") -> Json:
    """Nodes by cluster and name, of one cluster if it is given."""
    found = sorted(key for key in tables.nodes if cluster in {"", key.cluster})
    return {"nodes": [_node(key, tables.nodes[key]) for key in found]}


def _node(key: NodeKey, row: NodeRow) -> Json:
    return {
        "cluster": key.cluster,
        "name": key.name,
        "addresses": [{"type": kind, "ip": str(prefix)} for kind, prefix in row.addresses],
        "labels": list(format_labels(row.labels)),
        "identity": row.identity,
        "source": row.source,
    }
