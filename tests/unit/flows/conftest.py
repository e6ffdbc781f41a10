"""Tables of a small host, and events as the data path writes them."""

from collections.abc import Callable

import pytest

from bpf.layout import EVENT, FIRST_RULE, EventKind, Hook, Reason
from daemon.flows.pipeline import FlowPipeline
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, parse_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import (
    Device,
    HostRow,
    IdentityRow,
    IpKey,
    IpRow,
    NodeKey,
    NodeRow,
    Tables,
)

POD = Identity(70_000)

KUBELET = RuleOrigin(
    policy="kubelet",
    kind="CiliumClusterwideNetworkPolicy",
    direction=Direction.INGRESS,
    deny=False,
    spec=0,
    index=0,
    file="/etc/meshwall/policies.d/kubelet.yaml",
    line=7,
    log="kubelet access",
)
BAN = RuleOrigin(
    policy="ban",
    kind="CiliumClusterwideNetworkPolicy",
    direction=Direction.INGRESS,
    deny=True,
    spec=1,
    index=2,
    file="/etc/meshwall/policies.d/ban.yaml",
    line=20,
)


@pytest.fixture
def tables() -> Tables:
    """Host a1 of cluster alpha with two rules, a pod of beta, and a node of beta."""
    found = Tables()
    found.host.put(
        "host",
        HostRow(
            name="a1",
            cluster="alpha",
            cluster_id=1,
            labels=parse_labels(["reserved:host", "k8s:role=worker"]),
            addresses=frozenset({parse_prefix("10.1.0.4"), parse_prefix("2001:db8:1::4")}),
        ),
    )
    found.devices.put(2, Device("eth0", 2, up=True, mac="02:00:5e:10:00:01", mtu=1500))
    labels = parse_labels(
        [
            "k8s:app=metrics-server",
            "k8s:io.cilium.k8s.policy.cluster=beta",
            "k8s:io.kubernetes.pod.namespace=mon",
        ]
    )
    found.identities.put(POD, IdentityRow(labels, "mesh:beta"))
    found.ips.put(
        IpKey(parse_prefix("10.2.1.7"), "mesh:beta"), IpRow(POD, "metrics-server-0", "mon", "10.2.0.5")
    )
    found.nodes.put(
        NodeKey("beta", "b1"),
        NodeRow((("InternalIP", parse_prefix("10.2.0.5")),), parse_labels([]), Identity(6), "mesh:beta"),
    )
    found.rules.put(FIRST_RULE, KUBELET)
    found.rules.put(FIRST_RULE + 1, BAN)
    return found


def packed(address: str) -> bytes:
    """16 bytes as in an event."""
    return parse_prefix(address).packed.ljust(16, b"\0")


def event(**changes: object) -> bytes:
    """A default-denied SYN from the world to the kubelet, with changes; ports and addresses are plain."""
    fields: dict[str, object] = {
        "time_ns": 1_000_000_000,
        "saddr": "203.0.113.9",
        "daddr": "10.1.0.4",
        "sport": 51111,
        "dport": 10250,
        "kind": EventKind.DROP,
        "reason": Reason.POLICY_DEFAULT,
        "direction": 0,
        "hook": Hook.XDP,
        "proto": 6,
        "tcp_flags": 0x02,
        "ethertype_be": b"\x08\x00",
        "identity": 2,
        "rule": 0,
        "ifindex": 2,
        "length": 74,
        "generation": 5,
    } | changes
    source, destination = str(fields.pop("saddr")), str(fields.pop("daddr"))
    fields.setdefault("family", 6 if ":" in source else 4)
    ports = {f"{name}_be": int(str(fields.pop(name))).to_bytes(2, "big") for name in ("sport", "dport")}
    return EVENT.pack(saddr=packed(source), daddr=packed(destination), **ports, **fields)


@pytest.fixture
def pack() -> Callable[..., bytes]:
    """See `event`."""
    return event


@pytest.fixture
def pipeline(tables: Tables, tmp_path) -> FlowPipeline:
    """A pipeline without a kernel: `append` is what the ring would call."""
    return FlowPipeline(tables, tmp_path, capacity=1024)
