"""`meshwall ip list|get` (alias `ipcache`): which address is which identity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daemon.cli.client import Json, filters, listing, origin_options, output_option, table

if TYPE_CHECKING:
    import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    noun = subparsers.add_parser(
        "ip", aliases=["ipcache"], help="which address is which identity, and who says so"
    )
    verbs = noun.add_subparsers(title="commands", metavar="COMMAND", required=True)
    many = verbs.add_parser("list", aliases=["ls"], help="every claim, in address order")
    many.add_argument("--identity", default="", metavar="NUMBER", help="of this identity only")
    many.add_argument("--prefix", dest="address", default="", metavar="CIDR", help="inside it, or around it")
    origin_options(many)
    output_option(many)
    many.set_defaults(run=listing("/v1/ips", _lines, filters("identity", "address", "cluster", "source")))
    single = verbs.add_parser("get", help="the claims that cover an address, or lie in a prefix")
    single.add_argument("address", metavar="ADDRESS")
    output_option(single)
    single.set_defaults(run=listing("/v1/ips", _lines, lambda one: {"address": one.address}))


def _lines(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [("PREFIX", "IDENTITY", "SOURCE", "NAME", "NODE")]
    for one in found["ips"]:
        name = f"{one['namespace']}/{one['name']}" if one["namespace"] else one["name"]
        rows.append((one["cidr"], one["identity"], one["source"], name, one["node"]))
    return table(rows)
