"""`meshwall trace packet`: what the loaded programs would do with one packet, without sending it. Needs root."""

import argparse
import os
import struct
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.cli.client import DaemonError, Json, get, output_option, printable, show
from daemon.model.flow import TCP_FLAGS, rule_name

if TYPE_CHECKING:
    from bpf.model import Packet
    from bpf.trace import Traced
    from daemon.datapath.tracing import Traces

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
FLAGS = dict(TCP_FLAGS)
PCAP_MAGIC = {
    b"\xa1\xb2\xc3\xd4": ">",
    b"\xa1\xb2\x3c\x4d": ">",
    b"\xd4\xc3\xb2\xa1": "<",
    b"\x4d\x3c\xb2\xa1": "<",
}
PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
LINK_ETHERNET, LINK_RAW = 1, 101
MOST_FRAME = 65_535
EPILOG = """\
examples:
  meshwall trace packet --tcp 198.51.100.7:40000 192.0.2.1:22
  meshwall trace packet --udp [2001:db8::1]:53 [2001:db8::2]:40000 --direction out --vlan 12
  meshwall trace packet --pcap capture.pcap --frame 3
The programs are asked, not a copy of them: connections that are tracked now count. Nothing is sent, counted or
remembered. With the daemon, rules have a policy, file and line, and identities have labels."""


class WrongPacketError(Exception):
    """The packet cannot be built or read; the text is for a person."""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    noun = subparsers.add_parser("trace", help="what the loaded programs would do with a packet")
    verbs = noun.add_subparsers(title="commands", metavar="COMMAND", required=True)
    packet = verbs.add_parser(
        "packet",
        help="run one packet through the loaded programs, without sending it",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    packet.add_argument("hex", nargs="?", metavar="HEX", help="an Ethernet frame")
    packet.add_argument("--pcap", type=Path, metavar="FILE", help="a frame of a capture")
    packet.add_argument("--frame", type=int, metavar="N", help="which of them (default 1)")
    for name in PROTOCOLS:
        packet.add_argument(
            f"--{name}", nargs=2, metavar=("SRC:PORT", "DST:PORT"), help=f"a {name.upper()} packet"
        )
    packet.add_argument("--icmp", nargs=2, metavar=("SRC", "DST"), help="an ICMP or ICMPv6 packet")
    packet.add_argument("--type", metavar="TYPE[/CODE]", help="of --icmp (default: an echo request)")
    packet.add_argument("--flags", metavar="FLAG,..", help="of --tcp (default SYN)")
    packet.add_argument("--vlan", type=int, action="append", metavar="ID", help="a tag; outermost first")
    packet.add_argument(
        "--direction", choices=["in", "out"], default="in", help="seen from this host (default in)"
    )
    packet.add_argument("--forwarded", action="store_true", help="with `out`: it came in on another device")
    packet.add_argument("--device", metavar="NAME", help="say what is attached there")
    packet.add_argument(
        "--pins", type=Path, metavar="DIR", help="default: of the settings, or /sys/fs/bpf/meshwall"
    )
    packet.add_argument("--config", type=Path, metavar="FILE", help="settings that name the pins")
    output_option(packet)
    packet.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        frame = frame_of(options)
    except WrongPacketError as error:
        return _wrong(str(error))
    if os.geteuid() != 0:
        return _wrong("only root can run the kernel's programs")
    from daemon.cli.cleanup import pins_in_use  # noqa: PLC0415

    pins = options.pins or pins_in_use(options.config, "trace")
    return 2 if pins is None else _trace(options, pins, frame)


def _trace(options: argparse.Namespace, pins: Path, frame: bytes) -> int:
    import socket  # noqa: PLC0415 - not for those who ask for help

    from bpf import attach  # noqa: PLC0415
    from bpf.model import parse  # noqa: PLC0415
    from bpf.syscall import LayoutMismatch  # noqa: PLC0415
    from daemon.datapath.tracing import TraceRefusedError, run  # noqa: PLC0415

    try:
        device = socket.if_nametoindex(options.device) if options.device else 0
    except OSError:
        return _wrong(f"--device: no network device {options.device} in this network namespace")
    try:
        found = run(pins, frame, outgoing=options.direction == "out", forwarded=options.forwarded)
    except TraceRefusedError as error:
        return _wrong(str(error))
    except FileNotFoundError:
        return _wrong(f"there is no data path of this version in {pins}: start meshwalld first")
    except (OSError, LayoutMismatch) as error:
        return _wrong(str(error), 1)
    answer = told(parse(frame), found, options.direction)
    if options.device:
        on = attach.status(pins, device)
        answer["device"] = {"name": options.device, "ingress": on.ingress, "egress": on.egress, "xdp": on.xdp}
    _ask_daemon(options, answer)
    show(answer, options.output, lines)
    return 0


# The packet


def frame_of(options: argparse.Namespace) -> bytes:
    """The frame that the options describe. Raises WrongPacketError."""
    given = [name for name in ("hex", "pcap", "icmp", *PROTOCOLS) if getattr(options, name)]
    if len(given) != 1:
        raise WrongPacketError("one packet, please: HEX, --pcap, --tcp, --udp, --sctp or --icmp")
    (source,) = given
    for name, goes_with in (("flags", ("tcp",)), ("type", ("icmp",)), ("frame", ("pcap",))):
        if getattr(options, name) is not None and source not in goes_with:
            raise WrongPacketError(f"--{name} goes with --{goes_with[0]}")
    if options.vlan and source in ("hex", "pcap"):
        raise WrongPacketError("--vlan goes with a packet that is built here; this one has its tags already")
    if options.forwarded and options.direction != "out":
        raise WrongPacketError(
            "--forwarded goes with --direction out: what comes in is judged the same either way"
        )
    if source == "hex":
        return _from_hex(options.hex)
    if source == "pcap":
        return _from_pcap(options.pcap, 1 if options.frame is None else options.frame)
    return _built(options, source)


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex("".join(text.replace(":", " ").split()))
    except ValueError:
        raise WrongPacketError(f"HEX: {text[:40]!r} is not a frame in hexadecimal digits") from None


def _from_pcap(file: Path, wanted: int) -> bytes:
    """The wanted-th frame, from 1."""
    from bpf.frames import ethernet  # noqa: PLC0415

    if wanted < 1:
        raise WrongPacketError(f"--frame: {wanted}: the first one is 1")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise WrongPacketError(f"--pcap: {file}: {error.strerror}") from None
    if data[:4] == PCAPNG_MAGIC:
        raise WrongPacketError(
            f"--pcap: {file} is pcapng: `editcap -F pcap` or `tcpdump -r .. -w ..` converts it"
        )
    order = PCAP_MAGIC.get(data[:4])
    if order is None or len(data) < 24:
        raise WrongPacketError(f"--pcap: {file} is not a pcap file")
    link = struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF
    if link not in (LINK_ETHERNET, LINK_RAW):
        raise WrongPacketError(f"--pcap: {file} has link type {link}, expected Ethernet (1) or raw IP (101)")
    at = 24
    for number in range(1, wanted + 1):
        if at == len(data):
            raise WrongPacketError(f"--frame: {wanted}: {file} has {number - 1} frames")
        if at + 16 > len(data):
            raise WrongPacketError(f"--pcap: {file} ends inside frame {number}")
        size, whole = struct.unpack_from(f"{order}II", data, at + 8)
        frame = data[at + 16 : at + 16 + size]
        if len(frame) < size:
            raise WrongPacketError(f"--pcap: {file} ends inside frame {number}")
        at += 16 + size
    if size < whole:
        raise WrongPacketError(
            f"--pcap: {file}: frame {wanted} was captured to {size} of {whole} bytes, and would count as cut short: "
            "capture whole packets (`tcpdump -s 0`)"
        )
    if link == LINK_RAW and frame:
        return ethernet(frame, 0x86DD if frame[0] >> 4 == 6 else 0x0800)
    return frame


def _built(options: argparse.Namespace, source: str) -> bytes:
    from bpf import frames  # noqa: PLC0415

    ends = [_end(text, source) for text in getattr(options, source)]
    (src, sport), (dst, dport) = ends
    if ip_address(src).version != ip_address(dst).version:
        raise WrongPacketError(f"--{source}: {src} and {dst} are of different families")
    vlans = tuple(options.vlan or ())
    if any(not 0 <= one <= 4095 for one in vlans):
        raise WrongPacketError("--vlan: expected 0 to 4095")
    if source == "tcp":
        l4 = frames.tcp_segment(sport, dport, _flags(options.flags or "SYN"))
    elif source == "udp":
        l4 = frames.udp_datagram(sport, dport)
    elif source == "sctp":
        l4 = struct.pack(">HHII", sport, dport, 0, 0)
    else:
        six = ip_address(src).version == 6
        kind, code = _icmp_type(options.type or ("128" if six else "8"))
        return frames.ip(src, dst, 58 if six else 1, struct.pack(">BBHI", kind, code, 0, 0), vlans=vlans)
    return frames.ip(src, dst, PROTOCOLS[source], l4, vlans=vlans)


def _end(text: str, source: str) -> tuple[str, int]:
    """Address and port; of ICMP, an address."""
    example = "192.0.2.1" if source == "icmp" else "192.0.2.1:443 or [2001:db8::1]:443"
    wrong = WrongPacketError(f"--{source}: {text!r}: expected {example}")
    address, port = text.strip("[]"), "0"
    if source != "icmp":
        address, colon, port = text.rpartition(":")
        if address.startswith("[") and address.endswith("]"):
            address = address[1:-1]
        elif ":" in address or not colon:
            raise wrong
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise wrong
    try:
        return str(ip_address(address)), int(port)
    except ValueError:
        raise wrong from None


def _flags(text: str) -> int:
    names = [one.strip().upper() for one in text.split(",")]
    if unknown := [one for one in names if one not in FLAGS]:
        raise WrongPacketError(f"--flags: {unknown[0]!r}: expected some of {','.join(FLAGS)}")
    return sum({FLAGS[one] for one in names})


def _icmp_type(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) > 2 or not all(one.isascii() and one.isdigit() and int(one) < 256 for one in parts):
        raise WrongPacketError(f"--type: {text!r}: expected TYPE or TYPE/CODE, numbers to 255")
    return int(parts[0]), int(parts[1]) if len(parts) == 2 else 0


# The answer


def told(packet: "Packet", found: "Traces", direction: str) -> Json:
    """Everything that is known without the daemon. The class and the ends are the programs' own."""
    event = next((one.event for one in found.hooks.values() if one and one.event), None)
    passes, by = found.passes, found.decided_by
    return {
        "direction": direction,
        "verdict": "unknown" if passes is None else "pass" if passes else "drop",
        "decided_by": _name(by) if by is not None else None,
        "packet": _facts(packet) | (_seen(event) if event else {}),
        "hooks": [
            {"hook": _name(hook), **(_hook(one) if one else {"verdict": "not run", "reason": _cut(packet)})}
            for hook, one in found.hooks.items()
        ],
    }


def _name(hook: "object") -> str:
    return str(getattr(hook, "name", hook)).lower().replace("_", "-")


def _cut(packet: "Packet") -> str | None:
    return packet.reason.name if packet.reason is not None else None


def _facts(packet: "Packet") -> Json:
    """What the parser of the model reads in the frame."""
    ends = [str(ip_address(raw)) if raw else None for raw in (packet.src, packet.dst)]
    fragment = None
    if packet.frag_header:
        fragment = {"id": packet.frag_id, "offset": packet.frag_off, "more": packet.frag_more}
    return {
        "class": packet.kind.name,
        "length": packet.length,
        "vlans": packet.vlans,
        "family": packet.family or None,
        "source": ends[0],
        "destination": ends[1],
        "protocol": packet.proto if packet.family else None,
        "source_port": packet.sport,
        "destination_port": packet.dport,
        "tcp_flags": [name for name, bit in FLAGS.items() if packet.tcp_flags & bit],
        "icmp": None if packet.icmp_type is None else {"type": packet.icmp_type, "code": packet.icmp_code},
        "fragment": fragment,
    }


def _seen(event: Json) -> Json:
    """What the program read in it."""
    from bpf.layout import PacketClass  # noqa: PLC0415

    size = {4: 4, 6: 16}.get(event["family"], 0)
    ends = [str(ip_address(event[name][:size])) if size else None for name in ("saddr", "daddr")]
    kind = PacketClass(event["packet_class"])
    seen: Json = {"class": kind.name, "source": ends[0], "destination": ends[1]}
    if (
        event["proto"] in PROTOCOLS.values()
        and kind is not PacketClass.FRAG_NONFIRST
        and kind is not PacketClass.MALFORMED
    ):
        ports = [int.from_bytes(event[name], "big") for name in ("sport_be", "dport_be")]
        seen |= {"source_port": ports[0], "destination_port": ports[1]}
    return seen


def _hook(found: "Traced") -> Json:
    from bpf.layout import Reason  # noqa: PLC0415

    verdict = "pass" if found.passes else "drop"
    event, outcome = found.event, found.outcome
    if event is None or outcome is None:
        return {"verdict": verdict, "reason": Reason.NOT_ENFORCED.name}
    return {
        "verdict": verdict,
        "reason": Reason(int(event["reason"])).name,
        "identity": _identity(int(event["identity"])) if event["family"] else None,
        "rule": {"number": event["rule"], "name": rule_name(int(event["rule"]), None)}
        if outcome["judged"]
        else None,
        "audited": bool(outcome["audited"]),
        "opens": bool(outcome["opens"]),
        "deferred": bool(outcome["deferred"]),
        "answered": bool(outcome["answered"]),
        "generation": event["generation"],
    }


def _identity(number: int) -> Json:
    """With its labels, if those are the same everywhere; the daemon may know more."""
    from daemon.flows.enrich import built_in_labels  # noqa: PLC0415
    from daemon.model.identity import Identity  # noqa: PLC0415
    from daemon.model.labels import format_labels  # noqa: PLC0415

    labels = built_in_labels(Identity(number))
    return {"id": number, "labels": list(format_labels(labels))} if labels else {"id": number}


def _ask_daemon(options: argparse.Namespace, answer: Json) -> None:
    """Add labels of identities and origins of rules. Without a daemon there are numbers, which is said."""
    known: dict[str, Json] = {}
    answer["daemon"] = True
    for hook in answer["hooks"]:
        for kind, key in (("identity", "id"), ("rule", "number")):
            what = hook.get(kind)
            if not what or what.get("name") or not answer["daemon"]:
                continue
            target = f"/v1/{'identities' if kind == 'identity' else 'rules'}/{what[key]}"
            try:
                if target not in known:
                    known[target] = get(options, target)
            except DaemonError as error:
                known[target] = {}
                answer["daemon"] = error.refused  # it runs, and does not know this one
            wanted = ("labels",) if kind == "identity" else ("name", "policy", "kind", "file", "line")
            what |= {name: known[target][name] for name in wanted if name in known[target]}


def lines(answer: Json) -> Sequence[str]:
    """For a person."""
    packet = answer["packet"]
    by = f", by {answer['decided_by']}" if answer["decided_by"] else ""
    shown = [
        f"verdict   {answer['verdict'].upper()}{by}",
        f"packet    {_packet_line(packet, answer['direction'])}",
    ]
    if packet["fragment"]:
        one = packet["fragment"]
        more = "more follow" if one["more"] else "the last"
        shown.append(f"fragment  id {one['id']}, offset {one['offset']}, {more}")
    remote = next((one["identity"] for one in answer["hooks"] if one.get("identity")), None)
    if remote:
        shown.append(f"identity  {remote['id']} {' '.join(remote.get('labels', ()))}".rstrip())
    shown += [f"{one['hook']:<12}{_hook_line(one)}" for one in answer["hooks"]]
    if "device" in answer:
        shown.append(f"device    {answer['device']['name']}: {_attached(answer['device'])}")
    if not answer["daemon"]:
        shown.append("no daemon answers: identities and rules are numbers alone")
    return [printable(one) for one in shown]


def _attached(device: Json) -> str:
    found = [] if device["xdp"] == "off" else [f"XDP {device['xdp']}"]
    found += [f"TCX {name}" for name in ("ingress", "egress") if device[name]]
    return ", ".join(found) or "nothing of ours, so nothing is judged there"


def _packet_line(packet: Json, direction: str) -> str:
    sport, dport = packet["source_port"], packet["destination_port"]
    parts = [f"{direction}, {packet['class']}"]
    if packet["source"]:
        source, destination = _with_port(packet["source"], sport), _with_port(packet["destination"], dport)
        parts.append(f"{source} -> {destination}, protocol {packet['protocol']}")
    if packet["tcp_flags"]:
        parts.append(",".join(packet["tcp_flags"]))
    if packet["icmp"]:
        parts.append(f"type {packet['icmp']['type']} code {packet['icmp']['code']}")
    parts += [f"VLAN {one}" for one in packet["vlans"]]
    return ", ".join([*parts, f"{packet['length']} bytes"])


def _with_port(address: str, port: int | None) -> str:
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _hook_line(hook: Json) -> str:
    if hook["verdict"] == "not run":
        why = f" (the frame is {hook['reason']})" if hook["reason"] else ""
        return f"the kernel's test run takes no such frame{why}"
    if hook.get("deferred"):
        return "left to the next hook, which keeps the connection"
    if hook["reason"] == "NOT_ENFORCED" and hook["hook"] == "xdp":
        return "left to the next hook: nothing to enforce here"
    parts = [hook["verdict"].upper(), hook["reason"]]
    if hook.get("audited"):
        parts.append("(audit: would be dropped)")
    if hook.get("answered"):
        parts.append("and the sender is told, within the budget")
    if rule := hook.get("rule"):
        parts.append(f"rule {rule['number']}{_origin(rule)}")
    return " ".join(parts)


def _origin(rule: Json) -> str:
    text = f" {rule['name']}" if rule.get("name") else ""
    if rule.get("policy"):
        text += f" of {rule['policy']}"
    return f"{text} {rule['file']}:{rule['line']}" if rule.get("file") else text


def _wrong(text: str, code: int = 2) -> int:
    print(f"meshwall trace: {printable(text)}", file=sys.stderr)
    return code
