"""GET /metrics."""

import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from bpf.layout import EVENT, EventKind, Reason
from daemon.api.metrics import Counted, Family, exposition, families, loop_families, routes
from daemon.flows.counters import Hits
from daemon.flows.pipeline import FlowPipeline
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction
from daemon.model.rule import RuleOrigin
from daemon.runtime.loopwatch import Stalls
from daemon.state.tables import HostRow, IdentityRow, NodeKey, NodeRow, StatusRow, Tables


@pytest.fixture
def tables():
    return Tables()


@pytest.fixture
def told(tables, tmp_path):
    """The text, given what the kernel counted."""
    pipeline = FlowPipeline(tables, tmp_path)

    def text(reasons=None, rules=None, answers=None):
        return exposition(families(pipeline, tables, Counted(reasons or {}, rules or {}, answers or {})))

    text.pipeline = pipeline
    return text


def test_events_are_counted_under_hubbles_names(told):
    drop = EVENT.pack(kind=EventKind.DROP, reason=Reason.POLICY_DEFAULT, family=4, proto=6)
    told.pipeline.append(drop * 3 + EVENT.pack(kind=EventKind.ALLOW, family=6, proto=58))
    text = told()
    assert 'hubble_flows_processed_total{protocol="TCP",type="Drop",subtype="",verdict="DROPPED"} 3\n' in text
    assert 'hubble_drop_total{reason="POLICY_DENIED",protocol="TCP"} 3\n' in text
    assert 'protocol="ICMPv6",type="PolicyVerdict",subtype="",verdict="FORWARDED"} 1\n' in text


def test_packets_are_counted_under_ciliums_names_and_under_ours(told):
    text = told(
        {
            (Direction.INGRESS, int(Reason.BAD_IHL)): Hits(2, 100),
            (Direction.INGRESS, int(Reason.BAD_TOTLEN)): Hits(3, 200),
            (Direction.INGRESS, int(Reason.FORWARDED)): Hits(5, 500),
            (Direction.INGRESS, int(Reason.REPLY)): Hits(7, 700),
            (Direction.INGRESS, int(Reason.AUDITED)): Hits(1, 60),
        }
    )
    assert 'cilium_drop_count_total{reason="Invalid packet",direction="INGRESS"} 5\n' in text
    assert 'cilium_drop_bytes_total{reason="Invalid packet",direction="INGRESS"} 300\n' in text
    assert 'cilium_forward_count_total{direction="INGRESS"} 13\n' in text
    assert 'meshwall_packets_total{reason="bad-totlen",direction="INGRESS"} 3\n' in text
    assert 'meshwall_packets_total{reason="audited",direction="INGRESS"} 1\n' in text


def test_rules_are_counted_by_policy_and_place(told, tables):
    origin = RuleOrigin("kubelet", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 2)
    tables.rules.put(16, origin)
    text = told(rules={0: Hits(1, 60), 16: Hits(4, 400)})
    assert 'meshwall_rule_packets_total{policy="kubelet",rule="ingress[2]"} 4\n' in text
    assert 'meshwall_rule_bytes_total{policy="",rule="default-deny-ingress"} 60\n' in text


def test_losses_and_state_are_told(told, tables):
    told.pipeline.counters.lost = 4
    told.pipeline.counters.suppressed[Reason.POLICY_DENY] = 9
    for number in (2, 70_000, 0x0100_0001, 0x0200_0001):
        tables.identities.put(Identity(number), IdentityRow(parse_labels(["k8s:a=b"]), "file"))
    tables.status.put('mesh:"beta"', StatusRow(ok=False, text="lost"))
    text = told()
    assert 'hubble_lost_events_total{source="perf_event_ring_buffer"} 4\n' in text
    assert 'meshwall_events_suppressed_total{reason="policy-deny"} 9\n' in text
    for kind in ("reserved", "cluster_local", "node_local", "remote_node"):
        assert f'cilium_identity{{type="{kind}"}} 1\n' in text
    assert 'meshwall_part_ok{part="mesh:\\"beta\\""} 0\n' in text


def test_the_data_path_tells_its_mode_and_how_full_it_is(told, tables):
    side = {"enforced": True, "default_deny": True}
    details = {"generation": 7, "audit": True, "ingress": side, "egress": side}
    tables.status.put("datapath", StatusRow(ok=True, text="audit", details=details))
    tables.status.put("maps", StatusRow(ok=True, text="", details={"pressure": {"cells": 0.25}}))
    text = told()
    assert 'cilium_bpf_map_pressure{map_name="cells"} 0.25\n' in text
    assert "meshwall_generation 7\n" in text
    status = "cilium_policy_endpoint_enforcement_status"
    assert f'{status}{{enforcement="audit-both"}} 1\n' in text
    assert f'{status}{{enforcement="both"}} 0\n' in text


def test_remote_clusters_are_told_one_by_one(told, tables):
    tables.host.put("host", HostRow("a1", "alpha", 1, frozenset(), frozenset()))
    tables.status.put("mesh", StatusRow(ok=True, text="connected"))
    tables.status.put("mesh:alpha", StatusRow(ok=True, text="synced", details={"own": True}))
    tables.status.put("mesh:beta", StatusRow(ok=True, text="synced"))
    tables.status.put("mesh:gamma", StatusRow(ok=False, text="lost"))
    tables.nodes.put(NodeKey("beta", "b1"), NodeRow((), frozenset(), Identity(6), "mesh:beta"))
    text, here = told(), 'source_cluster="alpha",source_node_name="a1"'
    assert f"cilium_clustermesh_remote_clusters{{{here}}} 2\n" in text
    ready = "cilium_clustermesh_remote_cluster_readiness_status"
    assert f'{ready}{{{here},target_cluster="beta"}} 1\n{ready}{{{here},target_cluster="gamma"}} 0\n' in text
    assert f'cilium_clustermesh_remote_cluster_nodes{{{here},target_cluster="beta"}} 1\n' in text


def test_stalls_of_the_loop_are_told():
    text = exposition(loop_families(Stalls(count=2, worst_s=0.5, total_s=0.75)))
    assert "meshwall_loop_stalls_total 2\n" in text
    assert "meshwall_loop_stall_seconds_total 0.75\n" in text


async def test_the_text_is_served(tables, tmp_path):
    app = web.Application()
    app.add_routes(routes(FlowPipeline(tables, tmp_path), tables, Stalls()))
    async with TestServer(app) as server, TestClient(server) as client, client.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "meshwall_loop_stalls_total 0" in await response.text()


def test_every_line_is_a_comment_or_a_sample(told):
    sample = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+')
    for row in told().splitlines():
        assert row.startswith("# ") or sample.fullmatch(row), row


def test_values_and_labels_are_written_as_the_format_wants():
    text = exposition([Family("x", "gauge", "a\nb", [({"l": 'q"\\\n'}, 0.25), ({}, 3.0)])])
    assert text == '# HELP x a\\nb\n# TYPE x gauge\nx{l="q\\"\\\\\\n"} 0.25\nx 3\n'


def test_answers_to_denied_packets_are_counted_by_direction(told):
    text = told(answers={Direction.INGRESS: Hits(3, 180)})
    assert 'meshwall_rejected_packets_total{direction="INGRESS"} 3' in text
    assert 'meshwall_rejected_bytes_total{direction="INGRESS"} 180' in text


def test_verdicts_of_policy_are_counted_by_what_matched(told, tables):
    origin = RuleOrigin("a", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 0, match=2)
    tables.rules.put(16, origin)
    told.pipeline.directory.generation_now = lambda: 3
    allowed = EVENT.pack(kind=EventKind.ALLOW, family=4, proto=6, rule=16, generation=3)
    dropped = EVENT.pack(kind=EventKind.DROP, reason=Reason.POLICY_DEFAULT, family=4, proto=6, generation=3)
    malformed = EVENT.pack(kind=EventKind.DROP, reason=Reason.BAD_IHL, family=4, generation=3)
    told.pipeline.append(allowed * 3 + dropped * 2 + malformed)
    text = told()
    assert 'hubble_policy_verdicts_total{direction="ingress",match="l3-l4",action="forwarded"} 3\n' in text
    assert 'hubble_policy_verdicts_total{direction="ingress",match="none",action="dropped"} 2\n' in text
    assert text.count("hubble_policy_verdicts_total{") == 2
