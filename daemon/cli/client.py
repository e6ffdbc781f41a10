"""Asking the daemon over its socket, and printing the answer as a table, JSON or YAML."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_SOCKET = "/run/meshwall/meshwall.sock"
TIMEOUT_S = 30.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

Json = dict[str, Any]  # decoded answers of our own daemon


class DaemonError(Exception):
    """The daemon cannot be reached or refuses; the text is for a person."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


def socket_path(options: argparse.Namespace) -> str:
    """Option, environment, default."""
    return str(getattr(options, "socket", None) or os.environ.get("MESHWALL_SOCKET") or DEFAULT_SOCKET)


def ask(options: argparse.Namespace, target: str, method: str = "GET", **query: str) -> bytes:
    """The body of a good answer. Raises DaemonError."""
    import http.client  # noqa: PLC0415 - 20 ms, which --help need not wait for
    import socket  # noqa: PLC0415
    from urllib.parse import urlencode  # noqa: PLC0415

    path = socket_path(options)
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(TIMEOUT_S)
    wanted = urlencode({name: value for name, value in query.items() if value})
    try:
        connection.sock.connect(path)
        connection.request(method, f"{target}?{wanted}" if wanted else target)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DaemonError(unreachable(path, error)) from None
    finally:
        connection.close()
    if response.status != 200:
        raise DaemonError(_refusal(body, response.status), refused=True)
    return body


def unreachable(path: str, error: Exception) -> str:
    """Why there was no answer, and the cure."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"no daemon answers at {path}: start it with `systemctl start meshwalld`"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied: be root, or a member of the group meshwall"
    return f"{path}: {error}"


def _refusal(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered with status {status}"


def get(options: argparse.Namespace, target: str, **query: str) -> Json:
    """A decoded answer. Raises DaemonError."""
    found: Json = json.loads(ask(options, target, **query))
    return found


def output_option(parser: argparse.ArgumentParser) -> None:
    """`-o json|yaml|table`."""
    parser.add_argument(
        "-o", "--output", choices=["table", "json", "yaml"], default="table", help="how to print"
    )


def origin_options(parser: argparse.ArgumentParser) -> None:
    """`--cluster` and `--source`: who says so."""
    parser.add_argument("--cluster", default="", metavar="NAME", help="only what this cluster says")
    parser.add_argument(
        "--source", default="", metavar="SOURCE", help="only from this source, such as local or file"
    )


def filters(*names: str) -> Callable[[argparse.Namespace], dict[str, str]]:
    """These options as the query of a listing."""
    return lambda options: {name: getattr(options, name) for name in names}


def listing(
    target: str,
    lines: Callable[[Json], Sequence[str]],
    query: Callable[[argparse.Namespace], dict[str, str]] = lambda _: {},
) -> Callable[[argparse.Namespace], int]:
    """A verb that asks once and prints."""

    def run(options: argparse.Namespace) -> int:
        return printed(options, target, lines, **query(options))

    return run


def printed(
    options: argparse.Namespace, target: str, lines: Callable[[Json], Sequence[str]], **query: str
) -> int:
    """Ask and print. Exit status 0, 1 out of reach, 2 refused."""
    try:
        body = ask(options, target, **query)
    except DaemonError as error:
        return fail(error)
    if options.output == "json":
        print(json.dumps(json.loads(body), indent=2))
    else:
        show(json.loads(body), options.output, lines)
    return 0


def show(found: Json, output: str, lines: Callable[[Json], Sequence[str]]) -> None:
    """Print an answer."""
    if output == "json":
        print(json.dumps(found, indent=2))
    elif output == "yaml":
        import yaml  # noqa: PLC0415 - not needed for --help

        print(yaml.safe_dump(found, sort_keys=False), end="")
    else:
        print("\n".join(lines(found)))


def fail(error: DaemonError) -> int:
    """One line on stderr, and the exit status."""
    print(f"meshwall: {printable(str(error))}", file=sys.stderr)
    return 2 if error.refused else 1


def printable(text: str) -> str:
    """What files and clusters say cannot control the terminal."""
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their widest cell; the last is not padded."""
    texts = [[printable(str(cell)) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]


def span(seconds: float) -> str:
    """`12s`, `5m`, `3h`, `4d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def seconds(text: str) -> float:
    """Of `90s`, `2m` or `1h`; an argparse type."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time: expected 90s, 2m or 1h")
    return float(number) * _UNITS[unit]
