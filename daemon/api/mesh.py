"""/v1/mesh and /v1/nodes: the clusters and nodes that this host knows, and how well."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from daemon.api.app import ApiError
from daemon.api.resources import filter_of
from daemon.model.labels import format_labels
from daemon.model.rule import LabelSelector
from daemon.policy.matching import matches
from daemon.state.tables import NodeKey, NodeRow, StatusRow, Tables

Json = dict[str, Any]


CHUNK = 5000  # addresses looked at between two turns for others


def routes(tables: Tables, accept: Callable[[str], Awaitable[int]]) -> list[web.RouteDef]:
    """The routes, bound to the tables that they read. accept: believe the held deletions of a cluster."""

    async def mesh(_: web.Request) -> web.StreamResponse:
        conflicts = await conflicts_by_source(tables)
        found = mesh_json(tables)
        for one in found["clusters"]:
            one["conflicts"] = conflicts[f"mesh:{one['name']}"]
        return web.json_response(found)

    async def accepted(request: web.Request) -> web.StreamResponse:
        cluster = request.query.get("cluster", "")
        if f"mesh:{cluster}" not in tables.status:
            raise ApiError(404, f"no cluster {cluster!r} is known: `meshwall mesh status` lists them")
        return web.json_response({"accepted": await accept(cluster)})

    async def nodes(request: web.Request) -> web.StreamResponse:
        cluster = request.query.get("cluster", "")
        return web.json_response(nodes_json(tables, cluster, filter_of(request).selector))

    return [
        web.get("/v1/mesh", mesh),
        web.post("/v1/mesh/accept", accepted),
        web.get("/v1/nodes", nodes),
    ]


async def conflicts_by_source(tables: Tables) -> Counter[str]:
    """How many ranges of each source another cluster gives another identity."""
    found: Counter[str] = Counter()
    for number, prefix in enumerate(tables.ips.shared()):
        if not number % CHUNK:
            await asyncio.sleep(0)
        rows = [one for one in tables.ips.claims(prefix) if one.source.startswith("mesh:")]
        found.update(one.source for one in rows if any(one.identity != other.identity for other in rows))
    return found


def mesh_json(tables: Tables) -> Json:
    """`store` and `publish` are null without a store; `clusters` by name."""
    rows = tables.status.rows
    clusters = {
        key.removeprefix("mesh:"): _row(row) for key, row in sorted(rows.items()) if key.startswith("mesh:")
    }
    return {
        "store": _optional(rows.get("mesh")),
        "publish": _optional(rows.get("mesh publish")),
        "files": _optional(rows.get("mesh files")),
        "clusters": [{"name": name, **row} for name, row in clusters.items()],
    }


def _optional(row: StatusRow | None) -> Json | None:
    return None if row is None else _row(row)


def _row(row: StatusRow) -> Json:
    return {"ok": row.ok, "text": row.text, "hint": row.hint, "since": row.since, **row.details}


def nodes_json(tables: Tables, cluster: str = "", selector: LabelSelector = LabelSelector(())) -> Json:  # noqa: B008
    """Nodes by cluster and name, of one cluster if it is given, with labels that a selector matches."""
    rows = tables.nodes.rows
    found = sorted(
        key for key, row in rows.items() if cluster in {"", key.cluster} and matches(selector, row.labels)
    )
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
