"""`meshwall observe`: flows as lines, tables or JSON, with hubble's own flags."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any
from urllib.parse import urlencode

from daemon.model.flow import DROP_TEXT, DropReason
from daemon.model.identity import Reserved

DEFAULT_NUMBER = 20
DEFAULT_SOCKET = "/run/meshwall/meshwall.sock"

Json = dict[str, Any]  # decoded lines; every access below has a default


# Arguments


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


# Lines


class Style:
    """Colours, or none; names, or addresses."""

    def __init__(self, *, colour: bool, numeric: bool = False, node: bool = False) -> None:
        self.colour = colour
        self.numeric = numeric
        self.node = node

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text


_VERDICT_COLOURS = {"FORWARDED": "32", "REDIRECTED": "32", "DROPPED": "31", "AUDIT": "33"}
_POLICY_VERDICTS = {"FORWARDED": "ALLOWED", "REDIRECTED": "ALLOWED", "DROPPED": "DENIED", "AUDIT": "AUDITED"}
_MATCH_TYPES = {1: "L3-Only", 2: "L3-L4", 3: "L4-Only", 4: "all", 5: "L3-Proto", 6: "Proto-Only"}


def printable(text: str) -> str:
    """The text with everything escaped that a terminal could obey or hide."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def timestamp(text: str) -> str:
    """`Nov 23 12:22:45.052`, local; `N/A` for what is no time."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%b %e %H:%M:%S.%f")[:-3]
    except ValueError:
        return "N/A"


def side(flow: Json, which: str, style: Style) -> str:
    """Pod, else names, else address, with the port; without an IP the frame has no name at all."""
    end = flow.get(which, {})
    host = ""
    if not style.numeric:
        pod, namespace = end.get("pod_name", ""), end.get("namespace", "")
        host = f"{namespace}/{pod}" if namespace and pod else pod or ",".join(flow.get(f"{which}_names", ()))
    address = flow.get("IP", {}).get(which, "")
    host = host or address or "no IP"
    port = next(iter(flow.get("l4", {"": {}}).values())).get(f"{which}_port")
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host and host == address else f"{host}:{port}"


def identity(flow: Json, which: str) -> str:
    """`world` for 2, `ID:300` for a number without a name."""
    number = flow.get(which, {}).get("identity", 0)
    try:
        return Reserved(number).name.lower().replace("_", "-")
    except ValueError:
        return f"ID:{number}"


def kind(flow: Json) -> str:
    """`Policy denied` for drops, `policy-verdict:all INGRESS` for verdicts."""
    if flow.get("event_type", {}).get("type") == 1:
        name = flow.get("drop_reason_desc", "")
        return DROP_TEXT[DropReason[name]] if name in DropReason.__members__ else str(name)
    match = _MATCH_TYPES.get(flow.get("policy_match_type", 0))
    return f"policy-verdict{':' + match if match else ''} {flow.get('traffic_direction', '')}"


def verdict(flow: Json) -> str:
    """`DROPPED`, or for policy verdicts `ALLOWED`, `AUDITED`."""
    name = str(flow.get("verdict", "VERDICT_UNKNOWN"))
    return name if flow.get("event_type", {}).get("type") == 1 else _POLICY_VERDICTS.get(name, name)


def because(ours: Json) -> str:
    """The deciding rule: `policy=NAME rule=ingress[0] FILE:LINE`; for default denies, who restricts."""
    parts = []
    if "policy" in ours:
        parts.append(f"policy={ours['policy']}")
    if "rule_name" in ours:
        parts.append(f"rule={ours['rule_name']}")
    elif "rule" in ours:
        parts.append(f"rule={ours['rule']}")
    if restricting := ours.get("restricted_by"):
        parts.append(f"restricted-by={','.join(restricting)}")
    if "file" in ours:
        parts.append(f"{ours['file']}:{ours.get('line', 0)}")
    if "log" in ours:
        parts.append(f"log={json.dumps(ours['log'], ensure_ascii=False)}")
    return " ".join(parts)


def _columns(found: Json, style: Style) -> dict[str, str]:
    """The fields of one flow by hubble's column names, escaped."""
    flow, ours = found.get("flow", {}), found.get("meshwall", {})
    columns = {"TIMESTAMP": timestamp(flow.get("time", ""))}
    if style.node:
        columns["NODE"] = flow.get("node_name", "")
    columns["SOURCE"] = side(flow, "source", style)
    columns["DESTINATION"] = side(flow, "destination", style)
    columns["TYPE"] = kind(flow)
    columns["VERDICT"] = verdict(flow)
    columns["SUMMARY"] = flow.get("Summary", "")
    columns["RULE"] = because(ours)
    return {name: printable(text) for name, text in columns.items()}


def compact(found: Json, style: Style) -> str:
    """One line in the layout of hubble's compact output, followed by the deciding rule."""
    flow = found.get("flow", {})
    of = _columns(found, style)
    node = f" [{of['NODE']}]" if style.node else ""
    arrow = "->" if flow.get("is_reply") is False else "<>"
    ends = [
        f"{style.paint(of[name.upper()], '36')} ({style.paint(identity(flow, name), '35')})"
        for name in ("source", "destination")
    ]
    shown = style.paint(of["VERDICT"], _VERDICT_COLOURS.get(str(flow.get("verdict")), ""))
    rule = " " + style.paint(of["RULE"], "2") if of["RULE"] else ""
    return (
        f"{of['TIMESTAMP']}{node}: {ends[0]} {arrow} {ends[1]} {of['TYPE']} {shown} ({of['SUMMARY']}){rule}"
    )


def dictionary(found: Json, style: Style) -> str:
    """One field a line."""
    columns = _columns(found, style)
    width = max(map(len, columns))
    return "\n".join(f"{name:>{width}}: {text}" for name, text in columns.items())


def table(rows: Sequence[Json], style: Style) -> Iterator[str]:
    """All flows in columns."""
    shown = [_columns(one, style) for one in rows]
    if not shown:
        return
    widths = {name: max(len(name), *(len(one[name]) for one in shown)) for name in shown[0]}
    for one in [{name: name for name in widths}, *shown]:
        yield "   ".join(f"{one[name]:<{width}}" for name, width in widths.items()).rstrip()


def lost_text(found: Json) -> str:
    """A loss in words."""
    lost = found["lost_events"]
    count, held_back = int(lost.get("num_events_lost", 0)), found.get("meshwall", {}).get("suppressed", 0)
    parts = []
    if count:
        parts.append(f"{count} flows lost: {_LOST_BECAUSE.get(lost.get('source'), 'unknown cause')}")
    if held_back:
        parts.append(
            f"{held_back} events not sent: more of one kind in a second than the event budget allows"
        )
    return "; ".join(parts)


_LOST_BECAUSE = {
    "PERF_EVENT_RING_BUFFER": "the kernel's event buffer was full",
    "OBSERVER_EVENTS_QUEUE": "records of another version",
    "HUBBLE_RING_BUFFER": "this reader was slower than the traffic; narrow the filter",
}


# Running


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.connect(self._path)


def stream(path: str, parameters: dict[str, str]) -> Iterator[str]:
    """The lines of GET /v1/flows; ValueError when the daemon refuses, OSError when it is out of reach."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", f"/v1/flows?{urlencode(parameters)}")
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(_refusal(response.read(), response.status))
        for raw in response:
            yield raw.decode("utf-8", "replace").rstrip("\n")
    finally:
        connection.close()


def _refusal(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered with status {status}"


def run(args: argparse.Namespace) -> int:
    """Exit status 0, 1 when the daemon cannot be reached, 2 for a request that makes no sense."""
    path = getattr(args, "socket", None) or os.environ.get("MESHWALL_SOCKET") or DEFAULT_SOCKET
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    style = Style(colour=colour, numeric=args.numeric, node=args.print_node_name)
    try:
        _show(stream(path, query(args)), args.output, style)
    except ValueError as error:
        print(f"meshwall observe: {printable(str(error))}", file=sys.stderr)
        return 2
    except (OSError, HTTPException) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"meshwall observe: {path}: {error}; is meshwalld running?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _show(lines: Iterator[str], output: str, style: Style) -> None:
    write: Callable[[str], object] = lambda text: print(text, flush=True)  # noqa: E731
    rows: list[Json] = []
    for at, text in enumerate(lines):
        if output == "json":
            write(text)
            continue
        found = json.loads(text)
        if output == "jsonpb":
            found.pop("meshwall", None)
            write(json.dumps(found, separators=(",", ":")))
        elif "lost_events" in found:
            print(f"meshwall observe: {lost_text(found)}", file=sys.stderr, flush=True)
        elif output == "dict":
            write(("------------\n" if at else "") + dictionary(found, style))
        elif output == "compact":
            write(compact(found, style))
        else:
            rows.append(found)
    for text in table(rows, style):
        write(text)
