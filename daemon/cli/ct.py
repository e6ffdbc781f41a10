"""`meshwall ct list|flush`: tracked connections."""

import argparse
import json
from collections.abc import Sequence

from daemon.cli.client import DaemonError, Json, ask, fail, filters, listing, output_option, span, table

FILTERS = filters("address", "port", "state")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    noun = subparsers.add_parser("ct", aliases=["conntrack"], help="tracked connections")
    verbs = noun.add_subparsers(title="commands", metavar="COMMAND", required=True)
    many = verbs.add_parser("list", aliases=["ls"], help="connections whose replies pass")
    output_option(many)
    many.set_defaults(run=listing("/v1/ct", _lines))
    flush = verbs.add_parser(
        "flush",
        help="forget them, or those that are named: replies that no rule allows are cut until the connection is new",
    )
    flush.add_argument("--address", default="", metavar="CIDR", help="with an end in it")
    flush.add_argument("--port", default="", metavar="PORT", help="at either end")
    flush.add_argument("--state", default="", choices=["half-open", "established"], help="in this state")
    flush.set_defaults(run=_flush)


def _lines(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [("PROTO", "LOCAL", "", "REMOTE", "STATE", "AGE", "EXPIRES", "FLAGS")]
    for one in found["connections"]:
        local = _endpoint(one["local"], one["local_port"])
        remote = _endpoint(one["remote"], one["remote_port"])
        arrow = "->" if one["origin"] == "out" else "<-"
        flags = ",".join(one["flags"])
        rows.append(
            (
                one["protocol"],
                local,
                arrow,
                remote,
                one["state"],
                span(one["age_s"]),
                span(one["expires_s"]),
                flags,
            )
        )
    return table(rows)


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _flush(options: argparse.Namespace) -> int:
    try:
        found = json.loads(ask(options, "/v1/ct", "DELETE", **FILTERS(options)))
    except DaemonError as error:
        return fail(error)
    print(f"{found['flushed']} connections forgotten")
    return 0
