"""`meshwall mesh status` and `meshwall node list`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_SOCKET = "/run/meshwall/meshwall.sock"

Json = dict[str, Any]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the nouns `mesh` and `node`."""
    mesh = subparsers.add_parser("mesh", aliases=["clustermesh"], help="other clusters and the shared store")
    verbs = mesh.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = verbs.add_parser("status", help="each cluster: connected, age, counts, what was refused and why")
    _output(status)
    status.set_defaults(run=lambda args: _show(args, "/v1/mesh", mesh_lines))
    node = subparsers.add_parser("node", aliases=["nodes"], help="nodes of all clusters")
    verbs = node.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = verbs.add_parser("list", help="name, addresses and identity of each node")
    _output(listing)
    listing.add_argument("--cluster", default="", help="of this cluster only")
    listing.set_defaults(run=lambda args: _show(args, "/v1/nodes", node_lines, cluster=args.cluster))


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json", "yaml"), default="table", help="how to print"
    )


def _show(args: argparse.Namespace, path: str, lines: Callable[[Json], Sequence[str]], **query: str) -> int:
    """Exit status 0, 1 when the daemon cannot be reached."""
    socket = str(getattr(args, "socket", None) or os.environ.get("MESHWALL_SOCKET") or DEFAULT_SOCKET)
    try:
        found = _get(socket, path, query)
    except OSError as error:
        print(f"meshwall: {socket}: {error}; is meshwalld running?", file=sys.stderr)
        return 1
    if args.output == "json":
        print(json.dumps(found, indent=2))
    elif args.output == "yaml":
        import yaml  # noqa: PLC0415 - not needed for --help

        print(yaml.safe_dump(found, sort_keys=False), end="")
    else:
        print("\n".join(lines(found)))
    return 0


def _get(path: str, target: str, query: dict[str, str]) -> Json:
    import http.client  # noqa: PLC0415 - not needed for --help
    import socket  # noqa: PLC0415
    from urllib.parse import urlencode  # noqa: PLC0415

    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    try:
        connection.sock.connect(path)
        wanted = urlencode({name: value for name, value in query.items() if value})
        connection.request("GET", f"{target}?{wanted}" if wanted else target)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise OSError(f"answers {response.status} {response.reason}")
        found: Json = json.loads(body)
    except http.client.HTTPException as error:
        raise OSError(f"does not speak HTTP: {error}") from error
    finally:
        connection.close()
    return found


def mesh_lines(found: Json) -> list[str]:
    """The store first, then a row per cluster, then what is wrong and what to do."""
    store, publish, clusters = found["store"], found["publish"], found["clusters"]
    lines = [
        f"store      {_mark(store)} {store['text']}"
        if store
        else "store      none: identities come from files"
    ]
    if publish:
        lines.append(f"this host  {_mark(publish)} {publish['text']}")
    rows = [("CLUSTER", "ID", "STATE", "NODES", "IDENTITIES", "ADDRESSES", "REFUSED", "HELD", "AGE")]
    rows += [
        (
            _printable(one["name"]) + (" (this)" if one["own"] else ""),
            str(one["id"]),
            one["state"] if one["connected"] else f"{one['state']}, stale",
            str(one["nodes"]),
            str(one["identities"]),
            str(one["addresses"]),
            str(one["refused"]),
            str(one["held"]),
            _age(one["stale_since"]),
        )
        for one in clusters
    ]
    lines += ["", *table(rows)]
    for one in ([store] if store else []) + clusters:
        name = _printable(one.get("name", "store"))
        if not one["ok"]:
            lines.append(f"{name}: {_printable(one['text'])}")
            if one["hint"]:
                lines.append(f"  hint: {one['hint']}")
        for reason, count in sorted(one.get("refused_by_reason", {}).items()):
            lines.append(f"{name}: refused {count} times: {_printable(reason)}")
        for key, why in one.get("refusals", {}).items():
            lines.append(f"  {_printable(key)}: {_printable(why)}")
    return lines


def node_lines(found: Json) -> list[str]:
    rows = [("CLUSTER", "NODE", "ADDRESSES", "IDENTITY", "LABELS")]
    rows += [
        (
            _printable(one["cluster"]),
            _printable(one["name"]),
            ",".join(address["ip"] for address in one["addresses"]) or "-",
            str(one["identity"] or "-"),
            _printable(",".join(one["labels"])) or "-",
        )
        for one in found["nodes"]
    ]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the last is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _mark(row: Json) -> str:
    return "ok  " if row["ok"] else "FAIL"


def _age(since: float) -> str:
    """How long a cluster has been out of reach; `-` if it is not."""
    if not since:
        return "-"
    seconds = max(0, int(time.time() - since))
    return (
        f"{seconds}s" if seconds < 120 else f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h"
    )


def _printable(text: str) -> str:
    """What a cluster wrote cannot control the terminal."""
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
