"""`meshwall version`."""

import argparse
from importlib.metadata import PackageNotFoundError, version

from daemon.cli.client import DaemonError, Json, get, output_option, show


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    parser = subparsers.add_parser("version", help="versions of command and daemon")
    output_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        ours = version("meshwall")
    except PackageNotFoundError:
        ours = "unknown"
    try:
        theirs = get(options, "/v1/status")["version"]
    except DaemonError:
        theirs = "out of reach"
    show({"command": ours, "daemon": theirs}, options.output, _lines)
    return 0


def _lines(found: Json) -> list[str]:
    return [f"command {found['command']}", f"daemon  {found['daemon']}"]
