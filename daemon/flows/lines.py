"""Flows as Hubble's JSON: one GetFlowsResponse a line, with what is ours under `meshwall`."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

from daemon.model.flow import Endpoint, Flow, FlowType, FlowVerdict, Lost, matched_by, summary, tcp_flag_names
from daemon.model.net import Proto

Json = dict[str, object]

_L4 = {
    Proto.TCP: "TCP",
    Proto.UDP: "UDP",
    Proto.SCTP: "SCTP",
    Proto.ICMP: "ICMPv4",
    Proto.ICMPV6: "ICMPv6",
}


def line(one: Flow | Lost, started_ns: int) -> str:
    """One line of the stream. Characters outside printable ASCII are escaped, as JSON can."""
    found = flow_json(one, started_ns) if isinstance(one, Flow) else lost_json(one)
    return _encode(found) + "\n"


_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def lost_json(lost: Lost) -> Json:
    """A loss; `num_events_lost` is text, as protobuf's JSON has it for 64 bits."""
    found: Json = {"lost_events": {"source": lost.source.name, "num_events_lost": str(lost.count)}}
    if lost.suppressed:
        found["meshwall"] = {"suppressed": lost.suppressed}
    return found


def flow_json(flow: Flow, started_ns: int) -> Json:
    """GetFlowsResponse in protobuf's JSON (snake case, defaults left out), and a member `meshwall`."""
    moment = rfc3339(flow.time_ns)
    node = f"{flow.cluster or 'default'}/{flow.node}" if flow.node else ""
    drop = flow.type is FlowType.DROP
    shown: Json = {
        "time": moment,
        "uuid": _uuid(started_ns, flow.number),
        "verdict": flow.verdict.name,
    }
    if drop and flow.drop:
        shown["drop_reason"] = int(flow.drop)
    if flow.family:
        shown["IP"] = {
            "source": flow.source.address,
            "destination": flow.destination.address,
            "ipVersion": f"IPv{flow.family}",
        }
        if l4 := _l4(flow):
            shown["l4"] = l4
    shown["source"] = _endpoint(flow.source)
    shown["destination"] = _endpoint(flow.destination)
    shown["Type"] = "L3_L4"
    if node:
        shown["node_name"] = node
    for name, side in (("source_names", flow.source), ("destination_names", flow.destination)):
        if side.node and not side.local:
            shown[name] = [side.node]
    shown["event_type"] = _without_defaults(
        {"type": int(flow.type), "sub_type": int(flow.drop) if drop else 0}
    )
    shown["traffic_direction"] = flow.direction.name
    if not drop and (match := matched_by(flow.rule, flow.origin)):
        shown["policy_match_type"] = int(match)
    if not drop:
        shown["is_reply"] = False
    elif flow.drop:
        shown["drop_reason_desc"] = flow.drop.name
    if flow.ifindex:
        shown["interface"] = _without_defaults({"index": flow.ifindex, "name": flow.interface})
    shown["Summary"] = summary(flow)
    if flow.origin and (member := _policy_member(flow)):
        namespace, _, name = flow.origin.policy.rpartition("/")
        policy = {"name": name, "namespace": namespace, "kind": flow.origin.kind}
        shown[member] = [_without_defaults(policy)]
    found: Json = {"flow": shown}
    if node:
        found["node_name"] = node
    return found | {"time": moment, "meshwall": _ours(flow)}


def _policy_member(flow: Flow) -> str:
    """Which list the deciding policy stands in: never "allowed" for what was dropped or would have been."""
    if flow.verdict in (FlowVerdict.FORWARDED, FlowVerdict.REDIRECTED):
        return f"{flow.direction}_allowed_by"
    return f"{flow.direction}_denied_by" if flow.reason == "policy-deny" else ""


def _l4(flow: Flow) -> Json | None:
    name = _L4.get(flow.proto)  # type: ignore[call-overload]
    if name is None:
        return None
    if flow.proto in (Proto.ICMP, Proto.ICMPV6):
        return {name: _without_defaults({"type": flow.icmp_type, "code": flow.icmp_code})}
    ports = _without_defaults({"source_port": flow.source.port, "destination_port": flow.destination.port})
    if flow.proto == Proto.TCP:
        ports["flags"] = dict.fromkeys(tcp_flag_names(flow.tcp_flags), True)
    return {name: ports}


def _endpoint(side: Endpoint) -> Json:
    found: Json = {"ID": 1} if side.local else {}
    if side.identity:
        found["identity"] = side.identity
    if side.cluster:
        found["cluster_name"] = side.cluster
    if side.namespace:
        found["namespace"] = side.namespace
    if side.labels:
        found["labels"] = side.labels
    if side.pod:
        found["pod_name"] = side.pod
    if side.node:
        found["workloads"] = [{"name": side.node, "kind": "Node"}]
    return found


def _ours(flow: Flow) -> Json:
    found: Json = {
        "number": flow.number,
        "hook": flow.hook,
        "generation": flow.generation,
        "length": flow.length,
    }
    if flow.reason != "forwarded":
        found["reason"] = flow.reason
    if flow.rule is not None:
        found["rule"] = flow.rule
        if flow.rule_name:
            found["rule_name"] = flow.rule_name
    if flow.restricting:
        found["restricted_by"] = flow.restricting
    if flow.origin:
        origin = flow.origin
        found |= _without_defaults(
            {"policy": origin.policy, "file": origin.file, "line": origin.line, "log": origin.log}
        )
    if not flow.family:
        found["ethertype"] = flow.ethertype
    return found


def _without_defaults(members: Mapping[str, object]) -> Json:
    return {name: value for name, value in members.items() if value}


def _uuid(started_ns: int, number: int) -> str:
    """A name of the event that stays the same whoever asks."""
    text = f"{started_ns & 2**64 - 1:016x}{number & 2**64 - 1:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def rfc3339(time_ns: int) -> str:
    """As protobuf's JSON writes it: with 0, 3, 6 or 9 decimals."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    if fraction % 1_000:
        return f"{_second(seconds)}.{fraction:09d}Z"
    if fraction % 1_000_000:
        return f"{_second(seconds)}.{fraction // 1_000:06d}Z"
    return f"{_second(seconds)}.{fraction // 1_000_000:03d}Z" if fraction else f"{_second(seconds)}Z"
