"""`meshwall mesh status|accept|invite|join|check` and `meshwall node list`."""

import argparse
import json
import time

from daemon.cli import invite, meshcheck
from daemon.cli.client import DaemonError, Json, ask, fail, listing, output_option, printable, span, table


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the nouns `mesh` and `node`."""
    mesh = subparsers.add_parser("mesh", aliases=["clustermesh"], help="other clusters and the shared store")
    verbs = mesh.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = verbs.add_parser("status", help="each cluster: connected, age, counts, what was refused and why")
    output_option(status)
    status.set_defaults(run=listing("/v1/mesh", mesh_lines))
    accept = verbs.add_parser("accept", help="believe the deletions of a cluster that are held back")
    accept.add_argument("cluster", metavar="CLUSTER")
    accept.set_defaults(run=_accept)
    invite.register(verbs)
    meshcheck.register(verbs)
    node = subparsers.add_parser("node", aliases=["nodes"], help="nodes of all clusters")
    verbs = node.add_subparsers(title="commands", metavar="COMMAND", required=True)
    many = verbs.add_parser("list", aliases=["ls"], help="name, addresses and identity of each node")
    output_option(many)
    many.add_argument("--cluster", default="", help="of this cluster only")
    many.add_argument("-l", "--selector", default="", metavar="SELECTOR", help="such as app=web,!canary")
    many.set_defaults(
        run=listing("/v1/nodes", node_lines, lambda one: {"cluster": one.cluster, "selector": one.selector})
    )


def _accept(options: argparse.Namespace) -> int:
    """Exit status 0, 1 out of reach, 2 refused."""
    try:
        found = json.loads(ask(options, "/v1/mesh/accept", "POST", cluster=options.cluster))
    except DaemonError as error:
        return fail(error)
    count = found["accepted"]
    print(f"accepted: {count} deletions" if count else "nothing to accept: no deletions are held")
    return 0


def mesh_lines(found: Json) -> list[str]:
    """The store first, then a row per cluster, then what is wrong and what to do."""
    store, publish, files, clusters = found["store"], found["publish"], found["files"], found["clusters"]
    heads = (("store", store), ("files", files), ("this host", publish))
    lines = [f"{name:10} {_mark(row)} {printable(row['text'])}" for name, row in heads if row]
    if not store and not files:
        lines.append("store      none: identities come from files")
    heading = "CLUSTER ID STATE NODES IDENTITIES ADDRESSES SERVICES REFUSED CONFLICTS HELD REVISION AGE"
    rows: list[tuple[object, ...]] = [tuple(heading.split())]
    rows += [
        (
            one["name"] + (" (this)" if one["own"] else ""),
            one["id"],
            one["state"] if one["connected"] else f"{one['state']}, stale",
            one["nodes"],
            one["identities"],
            one["addresses"],
            one.get("services", 0),
            one["refused"],
            one.get("conflicts", 0),
            one["held"],
            one["revision"] or "-",
            span(time.time() - one["stale_since"]) if one["stale_since"] else "-",
        )
        for one in clusters
    ]
    lines += ["", *table(rows)]
    own = [{**publish, "name": "this host"}] if publish else []
    for one in ([store] if store else []) + own + clusters:
        lines += _remarks(printable(one.get("name", "store")), one)
    return lines


def _remarks(name: str, one: Json) -> list[str]:
    """What is to be said about a store or a cluster besides its row."""
    lines = []
    if not one["ok"]:
        lines.append(f"{name}: {printable(one['text'])}")
        if one["hint"]:
            lines.append(f"  hint: {one['hint']}")
    lines += [f"{name}: warning: {printable(text)}" for text in one.get("warnings", ())]
    for reason, count in sorted(one.get("refused_by_reason", {}).items()):
        lines.append(f"{name}: refused {count} times: {printable(reason)}")
    lines += [f"  {printable(key)}: {printable(why)}" for key, why in one.get("refusals", {}).items()]
    return lines


def node_lines(found: Json) -> list[str]:
    rows: list[tuple[object, ...]] = [("CLUSTER", "NODE", "ADDRESSES", "IDENTITY", "LABELS")]
    rows += [
        (
            one["cluster"],
            one["name"],
            ",".join(address["ip"] for address in one["addresses"]),
            one["identity"] or "-",
            ",".join(one["labels"]),
        )
        for one in found["nodes"]
    ]
    return table(rows)


def _mark(row: Json) -> str:
    return "ok  " if row["ok"] else "FAIL"
