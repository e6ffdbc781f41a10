"""GET /metrics: Prometheus text. Hubble's and Cilium's names where the meaning is the same, else `meshwall_`.

Written here rather than with a library: all is read when it is asked for, and the format is three lines.
"""

import asyncio
import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from bpf.layout import EventKind, Reason
from daemon.flows.counters import Hits, read_answers, read_reasons, read_rules
from daemon.flows.decode import drop_reason, meaning, reason_name
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import DROP_TEXT, FIXED_RULES, FlowType, LostSource, rule_name
from daemon.model.identity import LOCAL_SCOPE, REMOTE_NODE_SCOPE, Reserved
from daemon.model.net import Direction, Proto
from daemon.model.rule import MatchType, RuleOrigin
from daemon.runtime.loopwatch import Stalls
from daemon.state.tables import Tables

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float]

_PROTOCOLS = {
    int(Proto.TCP): "TCP",
    int(Proto.UDP): "UDP",
    int(Proto.SCTP): "SCTP",
    int(Proto.ICMP): "ICMPv4",
    int(Proto.ICMPV6): "ICMPv6",
}
MATCH_TEXT = {one: one.name.lower().replace("_", "-") for one in MatchType}
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Counted(NamedTuple):
    """What the data path counted."""

    reasons: Mapping[tuple[Direction, int], Hits]
    rules: Mapping[int, Hits]
    answers: Mapping[Direction, Hits]


class Family(NamedTuple):
    """One metric with all its samples."""

    name: str
    kind: str  # counter or gauge
    help: str
    samples: Sequence[Sample]


def routes(pipeline: FlowPipeline, tables: Tables, stalls: Stalls) -> list[web.RouteDef]:
    """The handler, to be added to the application."""

    async def metrics(_: web.Request) -> web.StreamResponse:
        rules = [*FIXED_RULES, *tables.rules]
        counted = await asyncio.to_thread(_counted, pipeline.pins, rules)
        text = exposition([*families(pipeline, tables, counted), *loop_families(stalls)])
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    return [web.get("/metrics", metrics)]


def _counted(pins: Path, rules: Iterable[int]) -> Counted:
    return Counted(read_reasons(pins), read_rules(pins, rules), read_answers(pins))


def exposition(found: Iterable[Family]) -> str:
    """The text format, version 0.0.4."""
    lines = []
    for name, kind, help_, samples in found:
        lines += [f"# HELP {name} {_escaped(help_)}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            inner = ",".join(f'{key}="{_escaped(text, quotes=True)}"' for key, text in labels.items())
            lines.append(f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str, *, quotes: bool = False) -> str:
    found = text.replace("\\", r"\\").replace("\n", r"\n")
    return found.replace('"', r"\"") if quotes else found


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def families(pipeline: FlowPipeline, tables: Tables, counted: Counted) -> Iterator[Family]:
    """Everything that is told, as of now; `counted` by the data path."""
    yield from _flows(pipeline)
    yield from _packets(counted.reasons)
    yield from _rules(counted.rules, tables.rules.rows)
    answers = [({"direction": direction.name}, hits) for direction, hits in sorted(counted.answers.items())]
    yield from _pair("meshwall_rejected_{}_total", "Denied {} whose sender was told", answers, "packets")
    yield from _state(tables)
    yield from _datapath(tables)
    yield from _mesh(tables)
    yield from _process(pipeline.started_ns)


def _flows(pipeline: FlowPipeline) -> Iterator[Family]:
    counters = pipeline.counters
    flows: Counter[tuple[str, str, str]] = Counter()
    drops: Counter[tuple[str, str]] = Counter()
    for one, count in counters.events.items():
        means = meaning(one.kind, one.reason, 0)
        protocol = _PROTOCOLS.get(one.proto, "Unknown L4") if one.family else "Unknown flow"
        shown = "Drop" if means.type is FlowType.DROP else "PolicyVerdict"
        flows[protocol, shown, means.verdict.name] += count
        if one.kind == EventKind.DROP:
            drops[means.drop.name, protocol] += count
    yield Family(
        "hubble_flows_processed_total",
        "counter",
        "Flow events read from the data path",
        [
            ({"protocol": protocol, "type": shown, "subtype": "", "verdict": verdict}, count)
            for (protocol, shown, verdict), count in sorted(flows.items())
        ],
    )
    yield Family(
        "hubble_drop_total",
        "counter",
        "Drop events; packets are counted by cilium_drop_count_total",
        [
            ({"reason": reason, "protocol": protocol}, count)
            for (reason, protocol), count in sorted(drops.items())
        ],
    )
    yield Family(
        "hubble_policy_verdicts_total",
        "counter",
        "Events that policy decided: drops, what audit mode would have dropped, and new connections",
        [
            (
                {
                    "direction": str(direction),
                    "match": MATCH_TEXT[match],
                    "action": verdict.name.lower(),
                },
                count,
            )
            for (direction, match, verdict), count in sorted(counters.verdicts.items())
        ],
    )
    yield Family(
        "hubble_lost_events_total",
        "counter",
        "Flow events that were lost on the way to the store",
        [
            ({"source": LostSource.PERF_EVENT_RING_BUFFER.name.lower()}, counters.lost),
            ({"source": LostSource.OBSERVER_EVENTS_QUEUE.name.lower()}, counters.foreign),
        ],
    )
    yield Family(
        "meshwall_events_suppressed_total",
        "counter",
        "Events that the data path did not send because a reason had used up its budget for the second",
        [({"reason": reason_name(reason)}, count) for reason, count in sorted(counters.suppressed.items())],
    )
    yield Family("meshwall_flows", "gauge", "Flows remembered now", [({}, len(pipeline.store))])
    yield Family(
        "meshwall_flows_capacity", "gauge", "Flows remembered at most", [({}, pipeline.store.capacity)]
    )


def _packets(reasons: Mapping[tuple[Direction, int], Hits]) -> Iterator[Family]:
    drops: dict[tuple[str, str], Hits] = {}
    passed: dict[str, Hits] = {}
    for (direction, reason), hits in reasons.items():
        if reason < Reason.POLICY_DEFAULT:
            passed[direction.name] = _sum(passed.get(direction.name), hits)
        else:
            key = (DROP_TEXT[drop_reason(reason)], direction.name)
            drops[key] = _sum(drops.get(key), hits)
    dropped = [
        ({"reason": reason, "direction": direction}, hits)
        for (reason, direction), hits in sorted(drops.items())
    ]
    forwarded = [({"direction": direction}, hits) for direction, hits in sorted(passed.items())]
    ours = [
        ({"reason": reason_name(reason), "direction": direction.name}, hits)
        for (direction, reason), hits in sorted(reasons.items())
    ]
    yield from _pair("cilium_drop_{}_total", "Dropped {}", dropped, "count")
    yield from _pair("cilium_forward_{}_total", "Passed {}", forwarded, "count")
    yield from _pair(
        "meshwall_{}_total", "{} by meshwall's own reason; what audit let pass is `audited`", ours, "packets"
    )


def _rules(hits: Mapping[int, Hits], known: Mapping[int, RuleOrigin]) -> Iterator[Family]:
    told = []
    for number, one in sorted(hits.items()):
        origin = known.get(number)
        policy = origin.policy if origin else ""
        told.append(({"policy": policy, "rule": rule_name(number, origin)}, one))
    help_ = "{} that a rule decided; fixed rules have no policy"
    yield from _pair("meshwall_rule_{}_total", help_, told, "packets")


def _sum(one: Hits | None, other: Hits) -> Hits:
    return Hits(one.packets + other.packets, one.bytes + other.bytes) if one else other


def _pair(
    name: str, help_: str, hits: Sequence[tuple[Mapping[str, str], Hits]], packets: str
) -> Iterator[Family]:
    """Packets and bytes of the same things."""
    counts = [(labels, one.packets) for labels, one in hits]
    yield Family(name.format(packets), "counter", help_.format("packets"), counts)
    volumes = [(labels, one.bytes) for labels, one in hits]
    yield Family(name.format("bytes"), "counter", help_.format("bytes"), volumes)


def _state(tables: Tables) -> Iterator[Family]:
    kinds = Counter(_identity_kind(identity) for identity in tables.identities)
    yield Family("cilium_policy", "gauge", "Policies loaded", [({}, len(tables.policies))])
    yield Family(
        "cilium_policy_max_revision",
        "gauge",
        "Revision of the policy table",
        [({}, tables.policies.revision)],
    )
    yield Family(
        "cilium_identity",
        "gauge",
        "Identities known",
        [({"type": kind}, count) for kind, count in sorted(kinds.items())],
    )
    yield Family("cilium_nodes_all_num", "gauge", "Nodes known", [({}, len(tables.nodes))])
    listed = (
        tables.policies,
        tables.cidr_groups,
        tables.identities,
        tables.ips,
        tables.nodes,
        tables.rules,
        tables.problems,
    )
    yield Family(
        "meshwall_table_rows",
        "gauge",
        "Rows of each table",
        [({"table": one.name}, len(one)) for one in listed],
    )
    yield Family(
        "meshwall_part_ok",
        "gauge",
        "1 if a part of the daemon is well; `meshwall status` says what is wrong",
        [({"part": name}, row.ok) for name, row in sorted(tables.status.rows.items())],
    )
    now = time.time()
    stale = [
        ({"table": table.name, "source": source}, now - since)
        for table in listed
        for source, since in sorted(table.stale_since.items())
    ]
    yield Family("meshwall_stale_seconds", "gauge", "Since when a source of a table is out of reach", stale)


def _datapath(tables: Tables) -> Iterator[Family]:
    """What the status row of the data path tells."""
    row = tables.status.get("datapath")
    details = row.details if row else {}
    maps = tables.status.get("maps")
    pressure = maps.details.get("pressure") if maps else None
    shares = (
        [({"map_name": str(name)}, float(share)) for name, share in sorted(pressure.items())]
        if isinstance(pressure, dict)
        else []
    )
    yield Family("cilium_bpf_map_pressure", "gauge", "Share of a map that is in use; 1 is full", shares)
    panic = tables.status.get("panic")
    yield Family(
        "meshwall_panic",
        "gauge",
        "1 while somebody has called a panic: policy does not decide",
        [({"mode": mode}, bool(panic and panic.details["panic"] == mode)) for mode in ("open", "failsafe")],
    )
    crowded = tables.status.get("addresses")
    missing = crowded.details.get("missing") if crowded else {}
    yield Family(
        "meshwall_addresses_missing",
        "gauge",
        "Addresses that did not fit into the tables and count as world",
        [({"source": source}, count) for source, count in sorted(missing.items())]
        if isinstance(missing, dict)
        else [],
    )
    tampering = tables.status.get("tampering")
    counts = tampering.details.get("counts") if tampering else None
    yield Family(
        "meshwall_tampering_total",
        "counter",
        "Programs and pins of ours that somebody else took away, and that were put back",
        [({"what": what}, count) for what, count in sorted(counts.items())]
        if isinstance(counts, dict)
        else [],
    )
    generation = details.get("generation")
    if isinstance(generation, int):
        yield Family("meshwall_generation", "gauge", "Policy tables that are enforced", [({}, generation)])
    sides = [name for name in ("ingress", "egress") if _enforced(details.get(name))]
    mode = "both" if len(sides) == 2 else "".join(sides) or "none"
    if details.get("audit") and sides:
        mode = f"audit-{mode}"
    modes = ("none", "ingress", "egress", "both", "audit-ingress", "audit-egress", "audit-both")
    yield Family(
        "cilium_policy_endpoint_enforcement_status",
        "gauge",
        "1 for what this host enforces",
        [({"enforcement": one}, one == mode) for one in modes] if details else [],
    )


def _enforced(side: object) -> bool:
    return isinstance(side, Mapping) and bool(side.get("enforced"))


def _mesh(tables: Tables) -> Iterator[Family]:
    """Remote clusters, one by one; `..._readiness_status` is the main alert."""
    host = next(iter(tables.host.rows.values()), None)
    here = {"source_cluster": host.cluster, "source_node_name": host.name} if host else {}
    status = {
        name.removeprefix("mesh:"): row
        for name, row in sorted(tables.status.rows.items())
        if name.startswith("mesh:") and not row.details.get("own")
    }
    nodes = Counter(key.cluster for key in tables.nodes)
    yield Family(
        "cilium_clustermesh_remote_clusters", "gauge", "Remote clusters in the store", [(here, len(status))]
    )
    yield Family(
        "cilium_clustermesh_remote_cluster_readiness_status",
        "gauge",
        "1 if everything of a remote cluster is known and followed",
        [(here | {"target_cluster": name}, row.ok) for name, row in status.items()],
    )
    yield Family(
        "cilium_clustermesh_remote_cluster_nodes",
        "gauge",
        "Nodes known of a remote cluster",
        [(here | {"target_cluster": name}, nodes[name]) for name in status],
    )
    yield from _mesh_trust(tables)


def _mesh_trust(tables: Tables) -> Iterator[Family]:
    """What there is of each cluster, our own included, and what of it is not believed."""
    rows = {
        name.removeprefix("mesh:"): row.details
        for name, row in sorted(tables.status.rows.items())
        if name.startswith("mesh:")
    }
    kinds = ("nodes", "identities", "addresses", "refused", "held")
    entries = [
        ({"cluster": name, "kind": kind}, _count(details.get(kind)))
        for name, details in rows.items()
        for kind in kinds
    ]
    yield Family("meshwall_mesh_entries", "gauge", "Entries of a cluster; `held` are deletions", entries)
    refused = [
        ({"cluster": name, "reason": str(reason)}, _count(count))
        for name, details in rows.items()
        for reason, count in _items(details.get("refused_by_reason"))
    ]
    yield Family("meshwall_mesh_refused_total", "counter", "What a cluster said and nobody believed", refused)
    slowed = [({"cluster": name}, _count(details.get("slowed"))) for name, details in rows.items()]
    yield Family("meshwall_mesh_slowed_total", "counter", "Changes of a cluster that had to wait", slowed)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _items(value: object) -> list[tuple[object, object]]:
    return list(value.items()) if isinstance(value, dict) else []


def _identity_kind(identity: int) -> str:
    if identity <= max(Reserved):
        return "reserved"
    if identity >= REMOTE_NODE_SCOPE:
        return "remote_node"
    return "node_local" if identity >= LOCAL_SCOPE else "cluster_local"


def loop_families(stalls: Stalls) -> Iterator[Family]:
    """How long the event loop stood still: the daemon was deaf for so long, the data path was not."""
    yield Family("meshwall_loop_stalls_total", "counter", "Stalls of 0.1 s and more", [({}, stalls.count)])
    yield Family("meshwall_loop_stall_seconds_total", "counter", "Their sum", [({}, stalls.total_s)])
    yield Family(
        "meshwall_loop_worst_stall_seconds", "gauge", "The worst since start", [({}, stalls.worst_s)]
    )


def _process(started_ns: int) -> Iterator[Family]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    yield Family(
        "process_cpu_seconds_total", "counter", "Processor time", [({}, used.ru_utime + used.ru_stime)]
    )
    yield Family("process_resident_memory_bytes", "gauge", "Resident memory", [({}, resident)])
    yield Family("process_start_time_seconds", "gauge", "Start, since 1970", [({}, started_ns / 1e9)])
    try:
        ours = version("meshwall")
    except PackageNotFoundError:
        ours = "unknown"
    labels = {"version": ours, "revision": "", "arch": platform.machine()}
    yield Family("cilium_version", "gauge", "Always 1", [(labels, 1)])
