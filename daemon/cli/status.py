"""`meshwall status`: one screen, what is wrong first, each problem with its cure."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from daemon.cli.client import (
    DaemonError,
    Json,
    fail,
    get,
    output_option,
    printable,
    seconds,
    show,
    span,
    table,
)

RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"
MAX_LISTED = 12  # rows of a section, without --verbose


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "status",
        help="is it working: enforcement, devices, policies, mesh, drops",
        description="Exit status 0: all is well; 1: something is not, or the daemon is out of reach.",
    )
    parser.add_argument("--brief", action="store_true", help="one line")
    parser.add_argument("--verbose", "-v", action="store_true", help="every row of every section")
    parser.add_argument("--wait", action="store_true", help="until all is well")
    parser.add_argument(
        "--wait-duration", type=seconds, default=120.0, metavar="SPAN", help="at most (default 2m)"
    )
    output_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + (options.wait_duration if options.wait else 0)
    while True:
        try:
            found = get(options, "/v1/status")
        except DaemonError as error:
            if time.monotonic() >= deadline:
                return fail(error)
        else:
            if found["ok"] or time.monotonic() >= deadline:
                break
        time.sleep(0.2)
    if options.brief and options.output == "table":
        print(_brief(found))
    else:
        paint = _Paint(colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        show(found, options.output, lambda one: _screen(one, paint, verbose=options.verbose))
    return 0 if found["ok"] else 1


class _Paint:
    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _brief(found: Json) -> str:
    if found["ok"]:
        warned = f" (warnings: {len(found['warnings'])})" if found["warnings"] else ""
        return printable(f"OK: {found['enforcement']['text']}{warned}")
    first = found["problems"][0]
    more = f" (and {len(found['problems']) - 1} more)" if len(found["problems"]) > 1 else ""
    return printable(f"FAIL: {first['part']}: {first['text']}{more}")


def _screen(found: Json, paint: _Paint, *, verbose: bool) -> list[str]:
    lines = []
    for one in found["problems"]:
        lines.append(paint(printable(f"FAIL  {one['part']}: {one['text']}"), RED) + _since(one["since"]))
        if one["hint"]:
            lines.append(printable(f"      hint: {one['hint']}"))
    for one in found["warnings"]:
        colour = RED if one["part"] == "panic" else YELLOW
        lines.append(paint(printable(f"WARN  {one['part']}: {one['text']}"), colour) + _since(one["since"]))
        if one["hint"]:
            lines.append(printable(f"      hint: {one['hint']}"))
    if lines:
        lines.append("")
    rows = _rows(found, paint, verbose=verbose)
    width = max(len(name) for name, _ in rows)
    for name, texts in rows:
        for at, text in enumerate(texts):
            lines.append(f"{(name if at == 0 else '').ljust(width)}  {text}")
    if verbose:
        lines += ["", *_parts(found)]
    return lines


def _rows(found: Json, paint: _Paint, *, verbose: bool) -> list[tuple[str, Sequence[str]]]:
    cluster = found["cluster"]
    where = (
        f"{found['node']} in cluster {cluster['name']} (id {cluster['id']})" if cluster else "not known yet"
    )
    memory = found["memory"]
    own = (memory["resident"] - memory["kernel_tables"]) >> 20
    up = f"meshwalld {found['version']}, up {span(found['uptime_s'])}, {own} MiB"
    up += f" and {memory['kernel_tables'] >> 20} MiB of kernel tables"
    return [
        ("host", [printable(where)]),
        ("daemon", [f"{up}; {_loop(found['event_loop'])}"]),
        ("enforcement", _enforcement(found["enforcement"], paint)),
        ("devices", _devices(found["devices"])),
        ("policies", _policies(found["policies"], paint, verbose=verbose)),
        ("identities", [_by_source(found["identities"])]),
        ("addresses", [_by_source(found["addresses"])]),
        ("mesh", _mesh(found["mesh"], paint)),
        ("drops", _drops(found["drops"], verbose=verbose)),
        ("failsafe", [", ".join(found["failsafe"]) or paint("none: a policy can lock you out", RED)]),
    ]


def _loop(found: Json) -> str:
    if not found["stalls"]:
        return "the event loop never stalled"
    return f"{found['stalls']} event loop stalls, worst {found['worst_s'] * 1000:.0f} ms"


def _enforcement(found: Json, paint: _Paint) -> list[str]:
    text = printable(found["text"])
    if found["panic"]:
        lines = [paint(text, RED)]
    elif found["audit"]:
        lines = [paint(f"AUDIT: {text}{_since(found['audit_since'])}", YELLOW)]
    else:
        lines = [text if found["ok"] else paint(text, RED)]
    if found["audit_policies"]:
        lines.append(paint(printable(f"audited policies: {', '.join(found['audit_policies'])}"), YELLOW))
    sides = []
    for name in ("ingress", "egress"):
        side = found[name]
        if side:
            state = (
                "open"
                if not side["enforced"]
                else "default deny"
                if side["default_deny"]
                else "deny rules only"
            )
            sides.append(f"{name}: {state}")
    if found["generation"] is not None:
        sides.append(f"generation {found['generation']}")
    if found["mode"] != "default":
        sides.append(f"mode {found['mode']}")
    return [*lines, ", ".join(sides)] if sides else lines


def _devices(found: list[Json]) -> list[str]:
    if not found:
        return ["none is filtered"]
    lines = []
    for one in found:
        note = f" ({one['note']})" if one.get("note") else ""
        lines.append(printable(f"{one['name']}: {one['text']}{note}"))
    return lines


def _policies(found: Json, paint: _Paint, *, verbose: bool) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in found["by_state"].items())
    lines = [f"{found['total']}" + (f": {states}" if states else "")]
    if found["findings"]:
        lines[0] += paint(f"; {found['findings']} findings in files", RED)
    shown = found["list"] if verbose else [one for one in found["list"] if one["state"] != "enforced"]
    for one in shown[: None if verbose else MAX_LISTED]:
        reason = f" ({one['reason']})" if one["reason"] else ""
        lines.append(printable(f"{one['name']}: {one['state']}{reason}"))
    if not verbose and len(shown) > MAX_LISTED:
        lines.append(f"and {len(shown) - MAX_LISTED} more: meshwall policy list")
    return lines


def _by_source(found: Json) -> str:
    sources = ", ".join(f"{count} from {source}" for source, count in found["by_source"].items())
    return printable(f"{found['total']}" + (f": {sources}" if sources else ""))


def _mesh(found: Json, paint: _Paint) -> list[str]:
    store = found["store"]
    lines = [printable(store["text"]) if store else "no store"]
    for one in found["clusters"]:
        own = ", this cluster" if one["own"] else ""
        counts = f"{one['nodes']} nodes, {one['identities']} identities, {one['addresses']} addresses"
        text = printable(f"{one['name']} (id {one['id']}{own}): {one['text']}; {counts}")
        if one["stale_since"]:
            text += f", stale for {span(time.time() - one['stale_since'])}"
        lines.append(text if one["ok"] else paint(text, RED))
    return lines


def _drops(found: list[Json], *, verbose: bool) -> list[str]:
    if not found:
        return ["none"]
    worst = sorted(found, key=lambda one: -int(one["packets"]))
    lines = [f"{one['packets']} {one['direction']}: {one['reason']}" for one in worst]
    if verbose or len(lines) <= MAX_LISTED:
        return lines
    return [*lines[:MAX_LISTED], f"and {len(lines) - MAX_LISTED} more reasons: --verbose"]


def _parts(found: Json) -> list[str]:
    rows: list[Sequence[object]] = [("PART", "", "STATE")]
    rows += [(name, "ok" if row["ok"] else "FAIL", row["text"]) for name, row in found["parts"].items()]
    return table(rows)


def _since(since: float) -> str:
    return f" (for {span(time.time() - since)})" if since else ""
