"""Run golden mesh vectors: `mesh_vectors.py FILE...` prints each wrong answer and a last line, exit 1 on any.

Answers are those of the decoders in their CILIUM mode. What STRICT, the default of the product, refuses on
top is listed after them as deliberate: it does not count as wrong.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clustermesh import services, wire
from clustermesh.gojson import Malformed
from clustermesh.wire import CILIUM, STRICT, Compat

Case = dict[str, Any]
Answer = dict[str, Any]
OWN_CLUSTER_ID = 1


def identity_encode(case: Case, _compat: Compat) -> Answer:
    if "map" in case:
        labels = [f"{key}={value}" for key, value in case["map"].items()]
        return {"value": wire.encode_identity(labels).decode()}
    value = wire.encode_identity(case["labels"]).decode()
    return {"value": value, "sorted_list": value}


def identity_decode(case: Case, compat: Compat) -> Answer:
    labels = wire.decode_identity(case["value"].encode(), compat)
    return {
        "labels": [{"key": one.key, "source": one.source, "value": one.value} for one in labels],
        "reencoded": wire.join_labels(labels),
    }


def identity_range(case: Case, _compat: Compat) -> Answer:
    mode = case["max_connected_clusters"]
    first, last = wire.identity_range(case["cluster_id"], mode)
    return {"min": first, "max": last, "shift": wire.SHIFTS[mode]}


def identity_class(case: Case, _compat: Compat) -> Answer:
    number = case["num"]
    name = wire.reserved_name(number)
    return {
        "cluster_id": wire.identity_cluster(number, case["max_connected_clusters"]),
        "reserved": name is not None,
        "local_scope": wire.identity_scope(number) == wire.LOCAL_SCOPE,
        "remote_node_scope": wire.identity_scope(number) == wire.REMOTE_NODE_SCOPE,
        "world": name in {"world", "world-ipv4", "world-ipv6"},
        "string": name or str(number),
    }


def ip(case: Case, compat: Compat) -> Answer:
    mode = case["max_connected_clusters"]
    entry = wire.decode_ip(case["key"], case["value"].encode(), compat)
    if compat is STRICT:
        _ = entry.cidr
    first, last = wire.identity_range(case["cluster_id"], mode)
    ports = [
        {"Name": one.name, "Port": one.port, "Protocol": one.protocol} for one in entry.named_ports or ()
    ]
    answer = {
        "ok": True,
        "encrypt_key": entry.key,
        "id": entry.identity,
        "identity_accepted": first <= entry.identity <= last or entry.identity < wire.RESERVED_BELOW,
        "is_host": entry.mask is None,
        "named_ports": ports or None,
        "namespace": entry.namespace,
        "pod": entry.pod,
        "prefix": entry.prefix,
        "remarshal": wire.encode_ip(entry).decode(),
    }
    return answer | ({"host_ip": entry.host_ip} if entry.host_ip else {})


def node(case: Case, compat: Compat) -> Answer:
    found = wire.decode_node(case["key"], case["value"].encode(), compat)
    wire.check_owner(found.cluster, found.cluster_id, case["cluster"], case["cluster_id"], mode_of(case))
    return {
        "ok": True,
        "addresses": [f"{one.type}={one.ip}" for one in found.addresses or ()],
        "alloc_cidrs": [str(one) for one in found.cidrs],
        "fullname": f"{found.cluster}/{found.name}",
        "labels": found.labels,
        "node_identity": found.identity,
        "node_ip4": found.address(4),
        "node_ip6": found.address(6),
        "remarshal": wire.encode_node(found).decode(),
    }


def service(case: Case, compat: Compat) -> Answer:
    found = services.decode_service(case["key"], case["value"].encode(), compat)
    wire.check_owner(found.cluster, found.cluster_id, case["cluster"], case["cluster_id"], mode_of(case))
    return {"ok": True, "remarshal": services.encode_service(found).decode()}


def serviceexport(case: Case, compat: Compat) -> Answer:
    found = services.decode_service_export(case["key"], case["value"].encode(), compat)
    if found.cluster != case["cluster"]:
        raise Malformed("cluster_name_mismatch", found.cluster)
    return {"ok": True, "remarshal": services.encode_service_export(found).decode()}


def cluster_config(case: Case, compat: Compat) -> Answer:
    config = wire.decode_config(case["value"].encode(), compat)
    return {
        "ok": True,
        "remarshal": wire.encode_config(config).decode(),
        "agent_validation": wire.config_fault(config, mode_of(case), compat),
        "reserve": wire.reservation_fault(config.id, OWN_CLUSTER_ID, ()),
    }


def cluster_name(case: Case, _compat: Compat) -> Answer:
    return {"ok": True} if wire.valid_cluster_name(case["value"]) else {"ok": False, "reason": "name_rule"}


def addrcluster(case: Case, _compat: Compat) -> Answer:
    found = wire.parse_addr_cluster(case["value"])
    return {"ok": True, "string": str(found), "cluster_id": found.cluster_id}


def source_overwrite(case: Case, _compat: Compat) -> Answer:
    return {"allowed": wire.may_overwrite(case["existing"], case["new"])}


def merge(case: Case, compat: Compat) -> Answer:
    """Replay the events; what counts is the state after the last one."""
    svc = case["svc"]
    if svc.get("no_local_svc"):
        return {"service_event": None, "rejected": [], "backends": []}
    remote: dict[str, services.Service] = {}
    for event in case["remote"]:
        value = event["value"]
        found = services.decode_service(
            f"{value['namespace']}/{value['name']}", json.dumps(value).encode(), compat
        )
        if f"{found.namespace}/{found.name}" != case["service"]:
            continue
        if event["op"] == "delete":
            remote.pop(found.cluster, None)
        else:
            remote[found.cluster] = found
    if svc.get("no_local_slice") and not any(one.shared for one in remote.values()):
        return {"service_event": None, "rejected": [], "backends": []}  # nothing has told of any backend yet
    local = [
        services.LocalBackend(one["ip"], {"http": services.Port("TCP", 8080)}, one.get("terminating", False))
        for one in svc["local_eps"]
        if one["ready"] or (one.get("terminating") and one.get("serving"))
    ]
    wanted = services.read_annotations(svc["annotations"])
    return {
        "affinity": wanted.affinity,
        "include_external": wanted.is_global,
        "shared": wanted.shared,
        "rejected": [],
        "service_event": "service-updated",
        "backends": [
            {
                "addr": one.address,
                "ports": [
                    f"{name}:{port.number}/{port.protocol}" for name, port in one.ports.items() if port
                ],
                "preferred": one.preferred,
                "terminating": one.terminating,
            }
            for one in services.merge(svc["annotations"], local, remote.values(), case["local_cluster"])
        ],
    }


def rewrite(key: str, value: bytes) -> bytes | None:
    """What our encoder makes of a value that the original wrote; None for values that are only times."""
    name = key.rpartition("/v1/")[2]
    if key.startswith(wire.CLUSTER_CONFIG):
        return wire.encode_config(wire.decode_config(value))
    if key.startswith((f"{wire.IDENTITIES}/id/", f"{wire.CACHE_IDENTITIES}/")):
        return wire.join_labels(wire.decode_identity(value)).encode()
    rest = name.partition("/")[2]
    if key.startswith((wire.IPS, wire.CACHE_IPS)):
        return wire.encode_ip(wire.decode_ip(rest, value))
    if key.startswith((wire.NODES, wire.CACHE_NODES)):
        return wire.encode_node(wire.decode_node(rest, value))
    if key.startswith((wire.SERVICES, wire.CACHE_SERVICES)):
        return services.encode_service(services.decode_service(rest, value))
    return None


KINDS: dict[str, Callable[[Case, Compat], Answer]] = {
    one.__name__: one
    for one in (identity_encode, identity_decode, identity_range, identity_class, ip, node, service,
                serviceexport, cluster_config, cluster_name, addrcluster, source_overwrite, merge)
}  # fmt: skip


def mode_of(case: Case) -> int:
    mode: int = case["max_connected_clusters"]
    return mode


def answer(case: Case, compat: Compat) -> Answer:
    """What our code says to a case; a refusal is `ok: false` with its reason."""
    try:
        return KINDS[case["kind"]](case, compat)
    except Malformed as error:
        return {"ok": False, "reason": error.reason}


INFORMATIONAL = {"events"}  # how often the original told its listeners


def differences(case: Case, got: Answer) -> list[str]:
    """The expected fields that are different. Of a refusal only that it is one: reasons are coarse."""
    want = case["expect"]
    if want.get("ok", True) is False or got.get("ok", True) is False:
        return [] if got.get("ok", True) == want.get("ok", True) else [f"ok: {got} instead of {want}"]
    wrong = [
        name for name in want if name not in INFORMATIONAL and (got.get(name) or None) != (want[name] or None)
    ]
    return [f"{name}: {got.get(name)!r} instead of {want[name]!r}" for name in wrong]


def pipeline(case: Case) -> list[str]:
    """A key and value that the original wrote must come back unchanged from our decoder and encoder."""
    key, value = case["key"], case["value"].encode()
    rewritten = rewrite(key, value)
    return [] if rewritten in (None, value) else [f"{key}: {rewritten!r} instead of {value!r}"]


def run(path: Path, counts: Counter[str], deliberate: list[str]) -> None:
    if path.suffix == ".json":  # the input of the pipeline files, not cases
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        case = json.loads(line)
        where = f"{path.name}:{number}"
        counts["cases"] += 1
        if "kind" not in case:
            wrong = pipeline(case)
        elif case["kind"] not in KINDS:
            counts["skipped"] += 1
            continue
        else:
            wrong = differences(case, answer(case, CILIUM))
            strict = answer(case, STRICT)
            if strict.get("ok") is False and case["expect"].get("ok", True):
                deliberate.append(f"{where} {case['name']}: strict refuses it ({strict['reason']})")
        if wrong:
            counts["wrong"] += 1
            print(f"{where} {case.get('name', case.get('key'))}: {'; '.join(wrong)}")


def main(arguments: list[str]) -> int:
    counts: Counter[str] = Counter()
    deliberate: list[str] = []
    for name in arguments:
        run(Path(name), counts, deliberate)
    if deliberate:
        print("deliberately stricter than the original (off with compat: cilium):")
        print("\n".join(f"  {line}" for line in deliberate))
    print(f"clustermesh: {counts['cases']} cases, {counts['wrong']} wrong, {counts['skipped']} skipped, "
          f"{len(deliberate)} deliberately refused")  # fmt: skip
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
