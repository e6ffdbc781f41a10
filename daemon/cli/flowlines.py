"""Flows as lines: hubble's compact, dict and table layouts, and the stream that they come from."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from http.client import HTTPConnection
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any
from urllib.parse import urlencode

from daemon.model.flow import DROP_TEXT, DropReason
from daemon.model.identity import Reserved

Json = dict[str, Any]  # decoded lines; every access below has a default


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


def show(lines: Iterator[str], output: str, style: Style, *, follow: bool) -> None:
    """Print the lines of a stream; losses go to stderr, except as JSON."""
    flush = follow or sys.stdout.isatty()
    write: Callable[[str], object] = lambda text: print(text, flush=flush)  # noqa: E731
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
