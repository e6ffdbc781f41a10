"""`meshwall policy report`: evidence for a rule review, as Markdown, CSV, JSON or a table."""

import argparse
import csv
import io
import json
import time
from collections.abc import Sequence

from daemon.cli.client import DaemonError, Json, fail, get, output_option, printable, printed, span, table
from daemon.cli.flows import moment

Subparsers = argparse._SubParsersAction
_COLUMNS = ("policy", "rule", "action", "peers", "ports", "owner", "reason", "review by", "packets", "last hit",
            "remark", "source")  # fmt: skip


def register(verbs: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "report",
        help="every rule with owner, reason, review date, hits, last hit and what shadows it",
        description="Evidence for a rule review. Owner, reason and review date are the annotations meshwall.io/owner, "
        "meshwall.io/reason and meshwall.io/review-by of a policy.",
    )
    parser.add_argument("-o", "--output", choices=["table", "markdown", "csv", "json"], default="table")
    parser.add_argument(
        "--unused-for",
        type=_days,
        metavar="DAYS",
        help="only rules without a hit for so long, and counted so long",
    )
    parser.set_defaults(run=_run)
    log = verbs.add_parser(
        "log",
        help="who changed what and when: policies with their change in meaning, and requests to the daemon",
    )
    log.add_argument(
        "--since", type=moment, default="", metavar="TIME", help="5m, 2h30m or a time (default: all)"
    )
    output_option(log)
    log.set_defaults(run=lambda one: printed(one, "/v1/changes", _log_lines, since=one.since))


def _log_lines(found: Json) -> list[str]:
    lines = []
    for one in found["changes"]:
        rest = [
            f"{name}: {', '.join(value) if isinstance(value, list) else value}"
            for name, value in one.items()
            if name not in ("time", "act", "who", "meaning", "complete") and value not in ("", [])
        ]
        lines.append(printable(f"{one['time']} {one['act']} by {one['who']}; {'; '.join(rest)}"))
        lines += [printable(f"    {text}") for text in one.get("meaning", [])]
        if one.get("complete") is False:
            lines.append("    and more: too much to list")
    return lines or ["nothing recorded in that time"]


def _days(text: str) -> int:
    if not text.removesuffix("d").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected days, such as 90 or 90d")
    return int(text.removesuffix("d"))


def _run(options: argparse.Namespace) -> int:
    try:
        found = get(options, "/v1/report")
    except DaemonError as error:
        return fail(error)
    rules = found["rules"]
    if options.unused_for is not None:
        rules = [one for one in rules if _unused(one, time.time() - 86_400 * options.unused_for)]
    if options.output == "json":
        print(json.dumps(found | {"rules": rules}, indent=2))
        return 0
    rows = [_row(one) for one in rules]
    print(_FORMATS[options.output](rows, found), end="")
    return 0


def _unused(one: Json, before: float) -> bool:
    return bool(one["counted_since"]) and one["counted_since"] < before and one["last_hit"] < before


def _row(one: Json) -> tuple[str, ...]:
    remarks = [one["useless"]]
    if one["review_due"]:
        remarks.append("review is due")
    if not one["last_hit"]:
        since = span(time.time() - one["counted_since"]) if one["counted_since"] else ""
        remarks.append(f"no hit in {since}" if since else "not counted yet")
    if one["state"] != "enforced":
        remarks.append(one["state"])
    return (
        one["policy"],
        one["name"],
        one["action"],
        "anybody" if one["peers"] is None else "; ".join(one["peers"]) or "nobody",
        "all" if one["ports"] is None else ", ".join(one["ports"]) or "none",
        one["owner"],
        one["reason"],
        one["review_by"],
        str(one["packets"]),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(one["last_hit"])) if one["last_hit"] else "never",
        "; ".join(filter(None, remarks)),
        f"{one['file']}:{one['line']}",
    )


def _table(rows: Sequence[tuple[str, ...]], _: Json) -> str:
    return "\n".join(table([tuple(one.upper() for one in _COLUMNS), *rows])) + "\n"


def _markdown(rows: Sequence[tuple[str, ...]], found: Json) -> str:
    made = time.strftime("%Y-%m-%d %H:%M %z", time.localtime(found["made"]))
    lines = [
        f"# Rules of {_cell(found['cluster'])}/{_cell(found['node'])}, {made}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
    ]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Nothing in a cell may end it, or be markup."""
    return "".join(f"\\{one}" if one in "\\|`*_[]<>#" else one for one in printable(text))


def _csv(rows: Sequence[tuple[str, ...]], _: Json) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    writer.writerows([_plain(one) for one in row] for row in rows)
    return out.getvalue()


def _plain(text: str) -> str:
    """A spreadsheet must not take a cell for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


_FORMATS = {"table": _table, "markdown": _markdown, "csv": _csv}
