"""`meshwall audit`: report what would be dropped, and drop nothing; switched without a restart."""

import argparse
import json
import sys
import time

from daemon.cli.client import DaemonError, Json, ask, fail, listing, output_option, printable, span, table


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs."""
    parser = subparsers.add_parser(
        "audit",
        help="report what would be dropped instead of dropping it, for the host or a policy",
        description="A switch is a policy generation like any other: no packet sees half of it. It is kept over a "
        "restart and goes before `audit` and `audit_policies` of the settings, until `reset`.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in (
        ("on", "verdicts are computed, counted and told; nothing is dropped"),
        ("off", "verdicts are enforced"),
        ("reset", "as the settings say"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument(
            "--policy", default="", metavar="NAME", help="only this policy, as `policy list` names it"
        )
        verb.set_defaults(run=_switch, state=name)
    status = verbs.add_parser("status", help="what is in audit, since when, and who said so")
    output_option(status)
    status.set_defaults(run=listing("/v1/audit", _lines))


def _switch(options: argparse.Namespace) -> int:
    try:
        body = ask(options, "/v1/audit", "POST", state=options.state, policy=options.policy)
    except DaemonError as error:
        return fail(error)
    found: Json = json.loads(body)
    print("\n".join(_lines(found)))
    if not found["in_force"]:
        print("meshwall audit: kept, but not in force yet: `meshwall status` says why", file=sys.stderr)
        return 1
    return 0


def _lines(found: Json) -> list[str]:
    rows: list[tuple[str, ...]] = [("WHAT", "AUDIT", "FOR", "BY")]
    named = {"the whole host": found["host"]} | found["policies"]
    for name, one in named.items():
        if one is not None:
            since = span(time.time() - one["since"])
            rows.append((printable(name), "on" if one["audit"] else "off", since, one["by"]))
    return table(rows)
