"""`meshwall identity list|get`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from daemon.cli.client import Json, filters, listing, origin_options, output_option, printed, table

if TYPE_CHECKING:
    import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    noun = subparsers.add_parser(
        "identity", aliases=["identities"], help="security identities and their labels"
    )
    verbs = noun.add_subparsers(title="commands", metavar="COMMAND", required=True)
    many = verbs.add_parser("list", aliases=["ls"], help="all of them, reserved ones first")
    many.add_argument(
        "--label", default="", metavar="LABEL", help="only with this label, such as k8s:app=web"
    )
    many.add_argument(
        "-l", "--selector", default="", metavar="SELECTOR", help="such as app=web,tier!=db,!canary"
    )
    many.add_argument(
        "--nodes", action="store_const", const="true", default="", help="allocated ones, and who uses them"
    )
    origin_options(many)
    output_option(many)
    many.set_defaults(
        run=listing("/v1/identities", _lines, filters("label", "selector", "cluster", "source", "nodes"))
    )
    single = verbs.add_parser("get", help="one, with its addresses")
    single.add_argument("identity", metavar="NUMBER|NAME")
    output_option(single)
    single.set_defaults(run=lambda one: printed(one, f"/v1/identities/{quote(one.identity, safe='')}", _one))


def _lines(found: Json) -> Sequence[str]:
    some = found["identities"]
    nodes = any("nodes" in one for one in some)
    rows: list[Sequence[object]] = [("IDENTITY", "SOURCE", *(["NODES"] if nodes else []), "LABELS")]
    rows += [
        (
            one["id"],
            one["source"],
            *([", ".join(one["nodes"])] if nodes else []),
            ", ".join(one["labels"]),
        )
        for one in some
    ]
    return table(rows)


def _one(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [("identity", found["id"]), ("source", found["source"])]
    rows += [("label", one) for one in found["labels"]]
    rows += [("address", f"{one['cidr']} ({one['source']})") for one in found["ips"]]
    return table(rows)
