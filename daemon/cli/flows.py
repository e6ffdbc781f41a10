"""`meshwall observe`: flows as lines, tables or JSON, with hubble's own flags."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from daemon.cli.client import socket_path, unreachable
from daemon.model.identity import Reserved

DEFAULT_NUMBER = 20

Json = dict[str, Any]  # filters as they are sent

# Flag -> fields of the left and the right filter. A flag without from or to asks about either side.
_FIELDS = {
    "--from-ip": ("source_ip", "source_ip"),
    "--to-ip": ("destination_ip", "destination_ip"),
    "--ip": ("source_ip", "destination_ip"),
    "--from-port": ("source_port", "source_port"),
    "--to-port": ("destination_port", "destination_port"),
    "--port": ("source_port", "destination_port"),
    "--from-label": ("source_label", "source_label"),
    "--to-label": ("destination_label", "destination_label"),
    "--label": ("source_label", "destination_label"),
    "--from-identity": ("source_identity", "source_identity"),
    "--to-identity": ("destination_identity", "destination_identity"),
    "--identity": ("source_identity", "destination_identity"),
    "--from-pod": ("source_pod", "source_pod"),
    "--to-pod": ("destination_pod", "destination_pod"),
    "--pod": ("source_pod", "destination_pod"),
    "--from-fqdn": ("source_fqdn", "source_fqdn"),
    "--to-fqdn": ("destination_fqdn", "destination_fqdn"),
    "--fqdn": ("source_fqdn", "destination_fqdn"),
    "--from-namespace": ("source_pod", "source_pod"),
    "--to-namespace": ("destination_pod", "destination_pod"),
    "--namespace": ("source_pod", "destination_pod"),
    "--verdict": ("verdict", "verdict"),
    "--protocol": ("protocol", "protocol"),
    "--traffic-direction": ("traffic_direction", "traffic_direction"),
    "--drop-reason-desc": ("drop_reason_desc", "drop_reason_desc"),
    "--tcp-flags": ("tcp_flags", "tcp_flags"),
    "--type": ("event_type", "event_type"),
    "--interface": ("interface", "interface"),
    "--node-name": ("node_name", "node_name"),
    "--cluster": ("node_name", "node_name"),
    "--ip-version": ("ip_version", "ip_version"),
    "--policy": ("policy", "policy"),
    "--rule": ("rule", "rule"),
    "--generation": ("generation", "generation"),
}
_SHORT = {"--type": "-t", "--namespace": "-n"}
_HELP = {
    "--ip": "address or prefix of either side",
    "--port": "TCP, UDP or SCTP port of either side",
    "--label": "label selector, such as k8s:app=web or 'tier in (a, b)'",
    "--identity": "number, or a reserved name such as world",
    "--verdict": "FORWARDED, DROPPED, AUDIT or REDIRECTED",
    "--protocol": "tcp, udp, sctp, icmp, icmpv4 or icmpv6",
    "--drop-reason-desc": "POLICY_DENIED and so on, or one of meshwall's own such as bad-ihl",
    "--tcp-flags": "SYN,ACK and so on: all of them must be set",
    "--type": "drop, drop:NUMBER or policy-verdict",
    "--namespace": "namespace of either side's pod",
    "--node-name": "NODE, CLUSTER/ or CLUSTER/NODE, with * as wildcard",
    "--policy": "name of the deciding policy, or of one that restricts",
    "--rule": "number in the kernel, or as shown: ingress[0], default-deny-ingress",
    "--generation": "of the policy tables that decided",
}
_EVENT_TYPES = {"drop": 1, "trace": 4, "policy-verdict": 5}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `observe` and its alias `monitor`."""
    parser = subparsers.add_parser(
        "observe",
        aliases=["monitor"],
        help="show what was dropped, audited and newly allowed, with the deciding rule",
        description="Show flows: the last 20, or with -f those to come.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("kind", nargs="?", choices=["flows"], help=argparse.SUPPRESS)  # as in hubble
    seek = parser.add_argument_group("which")
    seek.add_argument("-f", "--follow", action="store_true", help="go on with new flows")
    seek.add_argument("--last", type=_count, metavar="N", help=f"the newest N (default {DEFAULT_NUMBER})")
    seek.add_argument("--first", type=_count, metavar="N", help="the oldest N")
    seek.add_argument("--all", action="store_true", help="everything that is still remembered")
    seek.add_argument("--since", type=moment, metavar="TIME", help="5m, 2h30m, 2026-11-23T12:00:00Z")
    seek.add_argument("--until", type=moment, metavar="TIME", help="likewise; the stream ends there")
    narrow = parser.add_argument_group("filters (each may be repeated: any of its values)")
    narrow.add_argument("--not", dest="not_", action=_Not, nargs=0, help="the next filter excludes")
    for flag in _FIELDS:
        names = [_SHORT[flag], flag] if flag in _SHORT else [flag]
        narrow.add_argument(*names, action=_Filter, metavar="VALUE", help=_HELP.get(flag))
    show = parser.add_argument_group("output")
    formats = ["compact", "dict", "json", "jsonpb", "table", "tab"]
    show.add_argument("-o", "--output", choices=formats, default="compact")
    show.add_argument("--numeric", action="store_true", help="addresses instead of names")
    show.add_argument("--print-node-name", action="store_true")


class _Wanted:
    """Filters as they are given: two of a kind, because a flag may mean either side."""

    def __init__(self) -> None:
        self.negate = False
        self.lists: dict[bool, tuple[Json, Json]] = {False: ({}, {}), True: ({}, {})}

    def add(self, flag: str, value: object) -> None:
        for spec, field in zip(self.lists[self.negate], _FIELDS[flag], strict=True):
            spec.setdefault(field, []).append(value)
        self.negate = False

    def entries(self, negated: bool) -> list[Json]:
        left, right = self.lists[negated]
        return [one for one in ([left] if left == right else [left, right]) if one]


class _Not(argparse.Action):
    def __call__(self, _parser: object, namespace: argparse.Namespace, *_rest: object) -> None:
        _own(namespace).negate = True


class _Filter(argparse.Action):
    def __call__(
        self, _parser: object, namespace: argparse.Namespace, values: object, _option: object = None
    ) -> None:
        flag = self.option_strings[-1]
        try:
            value = _convert(flag, str(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        _own(namespace).add(flag, value)


def _own(args: argparse.Namespace) -> _Wanted:
    """The namespace's filters; a fresh set on first use, so that two parses share nothing."""
    if "filters" not in args:
        args.filters = _Wanted()
    found: _Wanted = args.filters
    return found


def _convert(flag: str, value: str) -> object:
    """What the API expects for a flag's value."""
    converter = _CONVERTERS.get(flag)
    return converter(value) if converter else value


def _identity(text: str) -> int:
    name = text.upper().replace("-", "_")
    return int(Reserved[name]) if name in Reserved.__members__ else _count(text)


def _event_type(text: str) -> Json:
    name, colon, sub = text.partition(":")
    if name not in _EVENT_TYPES:
        raise ValueError(f"unknown type {name!r}, expected drop or policy-verdict")
    found: Json = {"type": _EVENT_TYPES[name]}
    return found | {"match_sub_type": True, "sub_type": _count(sub)} if colon else found


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"expected a number, got {text!r}")
    return int(text)


_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|[dhms])")


_CONVERTERS: dict[str, Callable[[str], object]] = {
    "--identity": _identity,
    "--from-identity": _identity,
    "--to-identity": _identity,
    "--namespace": lambda text: f"{text}/",
    "--from-namespace": lambda text: f"{text}/",
    "--to-namespace": lambda text: f"{text}/",
    "--cluster": lambda text: f"{text}/",
    "--tcp-flags": lambda text: dict.fromkeys(text.upper().replace(" ", "").split(","), True),
    "--interface": lambda text: {"name": text},
    "--type": _event_type,
    "--generation": _count,
}


def moment(text: str) -> str:
    """RFC 3339 of `5m` (ago), of a date, or of a time; times without an offset are local."""
    if text and _SPAN.sub("", text) == "":
        ago = sum(float(number) * _UNITS[unit] for number, unit in _SPAN.findall(text))
        return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: expected a span such as 5m, or 2026-11-23T12:00:00Z"
        ) from None


def query(args: argparse.Namespace) -> dict[str, str]:
    """Parameters of GET /v1/flows; ValueError for flags that contradict each other."""
    if args.first is not None and (args.follow or args.last is not None):
        raise ValueError("--first does not go with --follow or --last")
    if args.follow and args.output in ("table", "tab"):
        raise ValueError("a table is drawn at the end, so it does not go with --follow; use -o compact")
    wanted = _own(args)
    if wanted.negate:
        raise ValueError("--not has no filter after it")
    found = {}
    number = args.first if args.first is not None else args.last
    if number is None and not (args.follow or args.all or args.since or args.until):
        number = DEFAULT_NUMBER
    if number is not None:
        found["number"] = str(number)
    for name in ("first", "follow"):
        if getattr(args, name) not in (None, False):
            found[name] = "true"
    if args.since:
        found["since"] = args.since
    if args.until and not args.follow:
        found["until"] = args.until
    for name, negated in (("whitelist", False), ("blacklist", True)):
        if entries := wanted.entries(negated):
            found[name] = json.dumps(entries)
    return found


def run(args: argparse.Namespace) -> int:
    """Exit status 0, 1 when the daemon cannot be reached or goes away, 2 for a request that makes no sense."""
    from http.client import HTTPException  # noqa: PLC0415 - costs 20 ms, which --help need not wait for

    from daemon.cli.flowlines import Style, printable, show, stream  # noqa: PLC0415

    path = socket_path(args)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    style = Style(colour=colour, numeric=args.numeric, node=args.print_node_name)
    try:
        show(stream(path, query(args)), args.output, style, follow=args.follow)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except ValueError as error:
        print(f"meshwall observe: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, HTTPException) as error:
        print(f"meshwall observe: {unreachable(path, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if args.follow:
        print("meshwall observe: the daemon has ended; nothing more will come", file=sys.stderr)
    return 1 if args.follow else 0
