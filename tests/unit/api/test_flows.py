"""GET /v1/flows: a stream of JSON lines."""

import asyncio
import json
import time

import pytest
from aiohttp import ClientSession, UnixConnector, web

from bpf.layout import EVENT, FIRST_RULE, EventKind, Reason
from daemon.api.flows import routes
from daemon.flows.decode import Brief, briefs, events
from daemon.flows.lines import flow_json
from daemon.flows.pipeline import FlowPipeline
from daemon.flows.record import Recorder, RecordSettings
from daemon.model.flow import Lost, LostSource
from daemon.model.net import Direction, parse_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import Device, HostRow, Tables

HOST = HostRow("a1", "alpha", 1, frozenset(), frozenset())
KUBELET = RuleOrigin(
    "kubelet", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 0, "/p/k.yaml", 7, "tag"
)
BAN = RuleOrigin("prod/ban", "CiliumNetworkPolicy", Direction.INGRESS, True, 0, 1, "/p/b.yaml", 9)


def pack(**changes):
    fields = {
        "saddr": parse_prefix("203.0.113.9").packed, "daddr": parse_prefix("10.1.0.4").packed,
        "sport_be": b"\xc7\xa7", "dport_be": b"\x28\x0a", "kind": EventKind.DROP,
        "reason": Reason.POLICY_DEFAULT, "family": 4, "proto": 6, "tcp_flags": 2, "identity": 2, "rule": 0,
        "ifindex": 2, "length": 74, "generation": 3, "time_ns": 1_777_886_127_318_204_911,
    } | changes  # fmt: skip
    return EVENT.pack(**fields)


@pytest.fixture
def pipeline(tmp_path):
    tables = Tables()
    tables.host.put("host", HOST)
    tables.devices.put(2, Device("eth0", 2, True, "", 1500))
    tables.rules.put(FIRST_RULE, KUBELET)
    tables.rules.put(FIRST_RULE + 1, BAN)
    return FlowPipeline(tables, tmp_path, capacity=256)


@pytest.fixture
async def client(pipeline, tmp_path):
    app = web.Application()
    app.add_routes(routes(pipeline))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    async with ClientSession("http://x", connector=UnixConnector(str(tmp_path / "s"))) as session:
        yield session
    await runner.cleanup()


@pytest.fixture
def shown(pipeline):
    def build(**changes):
        raw = pack(**changes)
        pipeline.directory.note(map(Brief._make, briefs(raw)))
        pipeline.directory.refresh()
        return flow_json(pipeline.directory.flow(7, next(events(raw)), 0), 1)

    return build


def test_a_dropped_connection_has_hubbles_members_and_ours_apart(shown):
    found = shown()
    assert found.pop("meshwall") == {
        "number": 7,
        "hook": "xdp",
        "generation": 3,
        "length": 74,
        "reason": "policy-default",
        "rule": 0,
        "rule_name": "default-deny-ingress",
        "restricted_by": ("kubelet", "prod/ban"),
    }
    assert found == {
        "flow": {
            "time": "2026-05-04T09:15:27.318204911Z",
            "uuid": "00000000-0000-0001-0000-000000000007",
            "verdict": "DROPPED",
            "drop_reason": 133,
            "IP": {"source": "203.0.113.9", "destination": "10.1.0.4", "ipVersion": "IPv4"},
            "l4": {"TCP": {"source_port": 51111, "destination_port": 10250, "flags": {"SYN": True}}},
            "source": {"identity": 2, "labels": ("reserved:world",)},
            "destination": {
                "ID": 1,
                "identity": 1,
                "cluster_name": "alpha",
                "workloads": [{"name": "a1", "kind": "Node"}],
            },
            "Type": "L3_L4",
            "node_name": "alpha/a1",
            "event_type": {"type": 1, "sub_type": 133},
            "traffic_direction": "INGRESS",
            "drop_reason_desc": "POLICY_DENIED",
            "interface": {"index": 2, "name": "eth0"},
            "Summary": "TCP Flags: SYN",
        },
        "time": "2026-05-04T09:15:27.318204911Z",
        "node_name": "alpha/a1",
    }


def test_policies_stand_under_what_they_did_and_never_as_allowing_a_drop(shown):
    allowed = shown(kind=EventKind.ALLOW, reason=0, verdict=1, rule=FIRST_RULE)
    denied = shown(reason=Reason.POLICY_DENY, rule=FIRST_RULE + 1)
    audited = shown(kind=EventKind.AUDIT)
    kind = "CiliumClusterwideNetworkPolicy"
    assert allowed["flow"]["ingress_allowed_by"] == [{"name": "kubelet", "kind": kind}]
    assert allowed["flow"]["is_reply"] is False
    assert allowed["meshwall"] | {"file": "/p/k.yaml", "line": 7, "log": "tag"} == allowed["meshwall"]
    assert denied["flow"]["ingress_denied_by"] == [
        {"name": "ban", "namespace": "prod", "kind": "CiliumNetworkPolicy"}
    ]
    for found in (denied, audited, shown()):
        assert not [name for name in found["flow"] if "allowed" in name]
    assert (audited["flow"]["verdict"], audited["flow"]["event_type"]) == ("AUDIT", {"type": 5})
    assert "is_reply" not in denied["flow"]


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "00:00:00Z"),
        (1_050_000_000, "01.050Z"),
        (1_000_020_000, "01.000020Z"),
        (1_000_000_003, "01.000000003Z"),
    ],
)
def test_times_have_as_many_decimals_as_protobuf_gives_them(shown, time_ns, text):
    assert shown(time_ns=time_ns)["time"].endswith(text)


def test_members_stand_in_the_order_of_hubbles_fields(shown):
    found = shown()
    assert list(found) == ["flow", "node_name", "time", "meshwall"]
    order = [
        "time", "uuid", "verdict", "drop_reason", "IP", "l4", "source", "destination", "Type", "node_name",
        "event_type", "traffic_direction", "drop_reason_desc", "interface", "Summary",
    ]  # fmt: skip
    assert list(found["flow"]) == order


async def test_a_query_streams_one_object_a_line(client, pipeline):
    pipeline.append(pack() + pack(dport_be=b"\0\x16"))
    pipeline.store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, 4, 2))
    async with client.get("/v1/flows") as response:
        rows = [json.loads(raw) async for raw in response.content]
    assert [row["flow"]["l4"]["TCP"]["destination_port"] for row in rows[:2]] == [10250, 22]
    assert rows[2] == {
        "lost_events": {"source": "PERF_EVENT_RING_BUFFER", "num_events_lost": "4"},
        "meshwall": {"suppressed": 2},
    }


async def test_filters_and_limits_come_as_parameters(client, pipeline):
    pipeline.append(pack() * 3 + pack(dport_be=b"\0\x16"))
    query = {"number": "2", "whitelist": json.dumps([{"destination_port": ["10250"]}])}
    async with client.get("/v1/flows", params=query) as response:
        assert len([1 async for _ in response.content]) == 2


async def test_a_follower_gets_a_flow_as_it_happens(client, pipeline):
    async with client.get("/v1/flows", params={"follow": "true"}) as response:
        pipeline.append(pack())
        row = json.loads(await asyncio.wait_for(response.content.readline(), 5))
        assert row["flow"]["verdict"] == "DROPPED"


async def test_a_follower_who_does_not_read_loses_its_own_flows_and_is_told(client, pipeline):
    async with client.get("/v1/flows", params={"follow": "true"}) as slow:
        for _ in range(200):  # far more than socket buffers and the store hold
            pipeline.append(pack() * 256)
            await asyncio.sleep(0)
        assert pipeline.store.end == 200 * 256
        pipeline.store.close()
        rows = [json.loads(raw) async for raw in slow.content]
    lost = sum(int(row["lost_events"]["num_events_lost"]) for row in rows if "lost_events" in row)
    assert lost > 0
    assert lost + sum("flow" in row for row in rows) == pipeline.store.end


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ({"number": "-1"}, "number"),
        ({"follow": "yes"}, "follow: expected true or false"),
        ({"follow": "true", "first": "true"}, "first"),
        ({"since": "yesterday"}, "since: expected RFC 3339"),
        ({"since": "2026-05-04T09:15:27"}, "offset"),
        ({"whitelist": "{"}, "whitelist: not JSON"),
        ({"whitelist": '[{"source_ip": ["x"]}]'}, r"whitelist[0].source_ip"),
        ({"wihtelist": "[]"}, "unknown parameter 'wihtelist'"),
    ],
)
async def test_what_cannot_be_meant_is_refused_with_a_reason(client, query, complaint):
    async with client.get("/v1/flows", params=query) as response:
        assert response.status == 400
        assert complaint in (await response.json())["error"]


async def test_status_tells_the_fill_and_what_was_lost(client, pipeline):
    pipeline.append(pack() * 300)
    pipeline.counters.lost = 4
    pipeline.counters.suppressed[Reason.POLICY_DEFAULT] = 9
    async with client.get("/v1/flows/status") as response:
        found = await response.json()
    assert (found["num_flows"], found["max_flows"], found["seen_flows"]) == (256, 256, 300)
    assert found["lost"] == {"perf_event_ring_buffer": 4, "foreign": 0}
    assert found["suppressed"] == {"policy-default": 9}


async def test_what_memory_has_forgotten_is_read_from_disk(pipeline, tmp_path):
    """Each flow once, in order, the newest from memory; a number counts over both."""
    recorder = Recorder(
        RecordSettings(tmp_path / "flows", 1 << 24, 86_400, 100_000), pipeline, pipeline._tables
    )
    at = time.monotonic_ns() - 10**9
    for number in range(0, 600, 100):
        pipeline.append(b"".join(pack(time_ns=at + one) for one in range(number, number + 100)))
        await recorder._write()
    assert pipeline.store.first == 600 - 256
    app = web.Application()
    app.add_routes(routes(pipeline, tmp_path / "flows"))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "r")).start()
    async with ClientSession("http://x", connector=UnixConnector(str(tmp_path / "r"))) as session:

        async def numbers(**query):
            async with session.get("/v1/flows", params=query) as answer:
                return [json.loads(one)["meshwall"]["number"] async for one in answer.content]

        since = str(time.time_ns() - 60 * 10**9)
        assert await numbers(since=since) == list(range(600))
        assert await numbers(since=since, number="10") == list(range(10))
        assert await numbers(since=since, number="400") == list(range(400))
        assert await numbers() == list(range(344, 600))
    recorder._file.close()
    await runner.cleanup()
