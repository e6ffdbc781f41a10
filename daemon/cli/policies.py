"""`meshwall policy`: the offline verbs of policy.py, and those that ask the daemon: list, get, accept-empty."""

import argparse
import json
from collections.abc import Sequence
from urllib.parse import quote

from daemon.cli import policy, replay, report
from daemon.cli.client import DaemonError, Json, ask, fail, listing, output_option, printable, printed, table

Subparsers = argparse._SubParsersAction


def register(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add the noun with all its verbs."""
    policy.register(subparsers, (_register_online, replay.register, report.register))


def _register_online(verbs: "Subparsers[argparse.ArgumentParser]") -> None:
    many = verbs.add_parser("list", aliases=["ls"], help="the policies of this host and what became of each")
    output_option(many)
    many.set_defaults(run=listing("/v1/policies", _lines))
    single = verbs.add_parser("get", help="one policy, with its rules")
    single.add_argument("name", metavar="NAME")
    output_option(single)
    single.set_defaults(run=lambda one: printed(one, f"/v1/policies/{quote(one.name)}", _one))
    empty = verbs.add_parser(
        "accept-empty", help="confirm that the emptied policy directory is meant: enforcement by policy ends"
    )
    empty.set_defaults(run=_accept_empty)


def _lines(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [("POLICY", "STATE", "RESTRICTS", "RULES", "SOURCE")]
    rows += [
        (one["name"], one["state"], ",".join(one["directions"]), one["rules"], f"{one['file']}:{one['line']}")
        for one in found["policies"]
    ]
    lines = table(rows)
    lines += [f"{one['name']}: {one['state']}: {one['reason']}" for one in found["policies"] if _odd(one)]
    return [*lines, *map(_finding, found["problems"])]


def _odd(one: Json) -> bool:
    return one["state"] != "enforced" and bool(one["reason"])


def _finding(one: Json) -> str:
    where = f"{one['file']}:{one['line']}:{one['column']}" if one["line"] else one["file"]
    what = f"{one['field']}: {one['message']}" if one["field"] else one["message"]
    return printable(f"{where}: {one['severity']}: {what}")


def _one(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [
        ("policy", found["name"]),
        ("kind", found["kind"]),
        ("state", f"{found['state']} ({found['reason']})" if found["reason"] else found["state"]),
        ("restricts", ", ".join(found["directions"])),
        ("source", f"{found['file']}:{found['line']}"),
    ]
    lines = table(rows)
    for rule in found["rules"]:
        lines.append(printable(f"  {rule['name']} (line {rule['line']}): {rule['action']}"))
        lines.append(
            printable(f"    peers: {'; '.join(rule['peers']) if rule['peers'] is not None else 'anybody'}")
        )
        lines.append(
            printable(f"    ports: {', '.join(rule['ports']) if rule['ports'] is not None else 'all'}")
        )
    return lines


def _accept_empty(options: argparse.Namespace) -> int:
    try:
        found = json.loads(ask(options, "/v1/policies/accept-empty", "POST"))
    except DaemonError as error:
        return fail(error)
    print("accepted: no policy" if found["accepted"] else "nothing to accept: the directory was not emptied")
    return 0
