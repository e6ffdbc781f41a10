"""Recorded traffic against policies, and policies drafted from it."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.cli.replay import seen_of
from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import Label, parse_labels
from daemon.model.net import Direction, Proto, parse_prefix
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import CompileSettings, Subject, compile_policy
from daemon.policy.explain import Peer, Query
from daemon.policy.replay import Seen, replay, totals
from daemon.policy.suggest import suggest
from daemon.policy.tables import PORTLESS

HOST = parse_labels(("reserved:host", "k8s:kubernetes.io/hostname=a1", "k8s:rack=r12"))
SUBJECT = Subject(Identity(Reserved.HOST), HOST)
METRICS = Peer(
    Identity(70_000),
    parse_labels(
        (
            "k8s:app=metrics",
            "k8s:pod-template-hash=77",
            "k8s:io.kubernetes.pod.namespace=mon",
            "k8s:io.cilium.k8s.policy.cluster=default",
        )
    ),
)
KUBELET = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: kubelet}
spec:
  nodeSelector: {}
  ingress:
  - fromEndpoints: [{matchLabels: {app: metrics, k8s:io.kubernetes.pod.namespace: mon}}]
    toPorts: [{ports: [{port: "10250", protocol: TCP}]}]
"""


def compiled(text):
    parsed = parse_documents(text, "p.yaml")
    assert not [one for one in parsed.problems if one.severity == "error"], parsed.problems
    return compile_policy(parsed.policies, {}, SUBJECT, {}, CompileSettings())


def seen(peer, port, verdict="allow", proto=Proto.TCP, *, direction=Direction.INGRESS, flows=3):
    return Seen(Query(direction, peer, proto, port), verdict, "", "someone", flows, "2026", "2027")


def world(text):
    return Peer(Identity(Reserved.WORLD), None, parse_prefix(text))


def test_traffic_that_the_new_policy_would_drop_comes_first_with_its_reason():
    found = replay(
        compiled(KUBELET),
        [
            seen(METRICS, 10_250, "deny", flows=7),
            seen(world("203.0.113.9"), 10_250, "allow", flows=5),
            seen(METRICS, 10_250),
            seen(world("203.0.113.9"), 10_250, "deny"),
            seen(METRICS, 22, "audit", flows=11),
        ],
    )
    assert [(one.seen.flows, one.opens) for one in found.changed] == [(11, False), (5, False), (7, True)]
    assert found.changed[0].now.reason == "default deny: no rule allows it"
    assert totals(found.changed) == (16, 7)
    assert (found.flows, found.groups) == (29, 5)


def test_the_same_policy_changes_nothing():
    assert replay(compiled(KUBELET), [seen(METRICS, 10_250), seen(METRICS, 1, "deny")]).changed == ()


def test_a_draft_selects_the_host_and_names_workloads_nodes_and_addresses_as_people_do():
    node = Peer(Identity(Reserved.REMOTE_NODE), reserved_labels(Identity(Reserved.REMOTE_NODE)))
    draft = suggest(
        [
            seen(METRICS, 10_250),
            seen(node, 9_100),
            seen(world("203.0.113.9"), 443, flows=9),
            seen(world("203.0.113.9"), 8, proto=Proto.ICMP),
            seen(METRICS, 53, proto=Proto.UDP, direction=Direction.EGRESS),
        ],
        name="draft",
        node_labels=HOST,
    )
    document = yaml.safe_load(draft.text)
    assert document["metadata"]["name"] == "draft"
    assert document["spec"]["nodeSelector"] == {"matchLabels": {"kubernetes.io/hostname": "a1"}}
    assert document["spec"]["ingress"] == [
        {
            "fromCIDRSet": [{"cidr": "203.0.113.9/32"}],
            "toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}]}],
        },
        {"fromCIDRSet": [{"cidr": "203.0.113.9/32"}], "icmps": [{"fields": [{"family": "IPv4", "type": 8}]}]},
        {
            "fromEndpoints": [
                {
                    "matchLabels": {
                        "app": "metrics",
                        "io.cilium.k8s.policy.cluster": "default",
                        "io.kubernetes.pod.namespace": "mon",
                    }
                }
            ],
            "toPorts": [{"ports": [{"port": "10250", "protocol": "TCP"}]}],
        },
        {"fromEntities": ["remote-node"], "toPorts": [{"ports": [{"port": "9100", "protocol": "TCP"}]}]},
    ]
    assert "# someone: 443/TCP, 9 times, 2026 to 2027" in draft.text


def test_too_many_single_addresses_on_a_port_become_the_world():
    crowd = [seen(world(f"198.51.100.{number}"), 443) for number in range(80)]
    document = yaml.safe_load(suggest(crowd, name="x", node_labels=HOST).text)
    assert document["spec"]["ingress"] == [
        {"fromEntities": ["world"], "toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}]}]}
    ]


def test_many_ports_are_ranges_and_lists_of_forty():
    flows = [seen(METRICS, port) for port in (*range(1_000, 1_100), *range(2_000, 2_200, 2))]
    document = yaml.safe_load(suggest(flows, name="x", node_labels=HOST).text)
    (rule,) = document["spec"]["ingress"]
    assert [len(one["ports"]) for one in rule["toPorts"]] == [40, 40, 21]
    assert rule["toPorts"][0]["ports"][0] == {"port": "1000", "endPort": 1_099, "protocol": "TCP"}


def test_what_cannot_be_written_is_said_and_not_guessed():
    draft = suggest(
        [seen(Peer(Identity(99_999)), 80), seen(METRICS, PORTLESS, proto=47), seen(METRICS, 0)],
        name="x",
        node_labels=HOST,
    )
    assert len(draft.omitted) == 3
    assert "3 flows of" in draft.omitted[0]
    assert draft.rules == 0


def test_hostile_names_stay_in_their_comment_and_their_scalar():
    evil = 'x"}]\n  - fromEntities: [all] #'
    peer = Peer(Identity(70_001), frozenset({Label("k8s", "app", evil)}))
    one = seen(peer, 80)._replace(name=evil)
    document = yaml.safe_load(suggest([one], name=evil, node_labels=HOST).text)
    (rule,) = document["spec"]["ingress"]
    assert rule["fromEndpoints"][0]["matchLabels"] == {"app": evil}


LABELS = st.sampled_from(
    [
        METRICS.labels,
        parse_labels(("k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod")),
        parse_labels(("k8s:tier=db", "k8s:zone=b")),
        parse_labels(("reserved:remote-node", "node:role=worker")),
    ]
)
PEERS = st.one_of(
    st.builds(lambda labels: Peer(Identity(70_000), labels), LABELS),
    st.sampled_from([6, 7, 1, 4]).map(
        lambda number: Peer(Identity(number), reserved_labels(Identity(number)))
    ),
    st.integers(0, 300).map(lambda number: world(f"198.51.{number // 100}.{number % 100}")),
    st.integers(0, 20).map(lambda number: world(f"2001:db8::{number:x}")),
)
FLOWS = st.builds(
    lambda peer, proto, port, direction, verdict: seen(
        peer, port % 256 if proto in (1, 58) else port, verdict, proto, direction=direction
    ),
    PEERS,
    st.sampled_from(list(Proto)),
    st.one_of(st.sampled_from([0, 1, 2, 8, 22, 53, 443, 65_534, 65_535]), st.integers(1_000, 1_200)),
    st.sampled_from(list(Direction)),
    st.sampled_from(["allow", "audit"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOWS, min_size=1, max_size=120))
def test_replaying_a_record_through_its_own_draft_drops_nothing(flows):
    flows = [
        one
        for one in flows
        if (one.query.port or one.query.proto in (1, 58))
        and (
            one.query.proto not in (1, 58)
            or one.query.peer.address is None
            or (one.query.proto == 1) == (one.query.peer.address.family == 4)
        )
    ]
    draft = suggest(flows, name="draft", node_labels=HOST)
    if flows:
        assert replay(compiled(draft.text), flows).changed == ()
    assert draft.omitted == ()


def group(**changes):
    flow = {
        "traffic_direction": "INGRESS",
        "verdict": "DROPPED",
        "IP": {"source": "203.0.113.9", "destination": "10.1.0.4"},
        "l4": {"TCP": {"source_port": 5, "destination_port": 10_250}},
        "source": {"identity": 2, "labels": ["reserved:world"]},
        "destination": {"identity": 1},
    } | changes.pop("flow", {})
    return {
        "flow": flow,
        "meshwall": {"reason": "policy-default"},
        "count": 4,
        "first": "a",
        "last": "b",
    } | changes


def test_groups_become_what_policy_is_asked():
    (one,) = seen_of([group()])
    assert one.query == Query(Direction.INGRESS, world("203.0.113.9"), 6, 10_250)
    assert (one.verdict, one.flows) == ("deny", 4)
    (ping,) = seen_of([group(flow={"l4": {"ICMPv4": {"type": 8}}})])
    assert (ping.query.proto, ping.query.port) == (1, 8)
    (pod,) = seen_of(
        [group(flow={"source": {"identity": 70_000, "labels": sorted(map(str, METRICS.labels))}})]
    )
    assert pod.query.peer == METRICS


@pytest.mark.parametrize("reason", ["bad-ihl", "frag-no-first", "spoofed-local"])
def test_what_policy_had_no_say_in_is_left_out(reason):
    assert list(seen_of([json.loads(json.dumps(group(meshwall={"reason": reason})))])) == []
