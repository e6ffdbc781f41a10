"""The Hubble API as its clients use it: a generated client over the real sockets."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import trustme
from google.protobuf.json_format import MessageToDict, ParseDict
from grpc_health.v1 import health_pb2

from bpf.layout import EVENT, FIRST_RULE, EventKind, Reason
from daemon.api.hubble import HubbleApi, HubbleSettings
from daemon.api.hubblepb import flow_pb2, observer_pb2, peer_pb2
from daemon.api.observer import response
from daemon.flows.lines import line
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import Lost, LostSource
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, parse_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import Device, HostRow, IpKey, IpRow, NodeKey, NodeRow, Tables

ROOT = Path(__file__).parents[3]
ALL = 2**64 - 1  # what `hubble observe --all` sends
HOST = HostRow(
    "a1",
    "alpha",
    1,
    parse_labels(("reserved:host", "k8s:rack=r12")),
    frozenset({parse_prefix("10.1.0.4")}),
)
KUBELET = RuleOrigin(
    "kubelet", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 0, "/p/k.yaml", 7, "tag"
)


def packed(**changes):
    fields = {
        "saddr": parse_prefix("203.0.113.9").packed, "daddr": parse_prefix("10.1.0.4").packed,
        "sport_be": b"\xc7\xa7", "dport_be": b"\x28\x0a", "kind": EventKind.DROP,
        "reason": Reason.POLICY_DEFAULT, "family": 4, "proto": 6, "tcp_flags": 2, "identity": 2, "rule": 0,
        "ifindex": 2, "length": 74, "generation": 3, "time_ns": 1_777_886_127_318_204_911,
    } | changes  # fmt: skip
    return EVENT.pack(**fields)


def allowed(**changes):
    return packed(kind=EventKind.ALLOW, reason=Reason.FORWARDED, rule=FIRST_RULE, verdict=1, **changes)


def to_port(number):
    return number.to_bytes(2, "big")


@pytest.fixture
def tables():
    tables = Tables()
    tables.host.put("host", HOST)
    tables.devices.put(2, Device("eth0", 2, True, "", 1500))
    tables.rules.put(FIRST_RULE, KUBELET)
    return tables


@pytest.fixture
def pipeline(tables, tmp_path):
    return FlowPipeline(tables, tmp_path, capacity=256)


@pytest.fixture
async def serving(pipeline, tables, tmp_path):
    """Starts the API; given settings beyond the sockets if wanted."""
    tasks = []

    async def serve(**settings):
        api = HubbleApi(
            HubbleSettings(tmp_path / "hubble.sock", tmp_path / "grpc.sock", "nobody-at-all", **settings),
            pipeline,
            tables,
        )
        tasks.append(asyncio.get_running_loop().create_task(api.run()))
        await eventually((tmp_path / "hubble.sock").exists)

    yield serve
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def client(serving, tmp_path):
    await serving()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'hubble.sock'}") as channel:
        yield Client(channel)


class Client:
    """What protoc would generate."""

    def __init__(self, channel):
        self.channel = channel

    def flows(self, **fields):
        call = self.channel.unary_stream(
            "/observer.Observer/GetFlows",
            observer_pb2.GetFlowsRequest.SerializeToString,
            observer_pb2.GetFlowsResponse.FromString,
        )
        return call(observer_pb2.GetFlowsRequest(**fields), timeout=10)

    async def ports(self, **fields):
        return [one.flow.l4.TCP.destination_port async for one in self.flows(**fields)]

    def notify(self):
        call = self.channel.unary_stream(
            "/peer.Peer/Notify",
            peer_pb2.NotifyRequest.SerializeToString,
            peer_pb2.ChangeNotification.FromString,
        )
        return call(peer_pb2.NotifyRequest(), timeout=10)

    async def ask(self, method, answer, request=b""):
        return await self.channel.unary_unary(method, bytes, answer.FromString)(request, timeout=10)


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [one async for one in call]
    return caught.value


async def test_without_a_number_everything_that_is_there_is_sent_oldest_first(client, pipeline):
    pipeline.append(b"".join(packed(dport_be=to_port(port)) for port in (1, 2, 3)))
    assert await client.ports() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "ports"),
    [
        ({"number": 2}, [3, 4]),
        ({"number": 2, "first": True}, [1, 2]),
        ({"number": ALL}, [1, 2, 3, 4]),
        ({"number": 1, "whitelist": [{"destination_port": ["2", "1"]}]}, [2]),
        ({"blacklist": [{"destination_port": ["2"]}]}, [1, 3, 4]),
        ({"whitelist": [{"source_port": ["7"]}, {"destination_port": ["3"]}]}, [3]),
        ({"whitelist": [{"verdict": ["DROPPED"], "traffic_direction": ["EGRESS"]}]}, []),
        ({"whitelist": [{}]}, [1, 2, 3, 4]),
        ({"whitelist": [{"node_labels": ["rack=r12"]}], "number": 1}, [4]),
        ({"whitelist": [{"node_name": ["alpha/"]}], "number": 1}, [4]),
        ({"whitelist": [{"destination_workload": [{"name": "a1", "kind": "Node"}]}], "number": 1}, [4]),
        ({"whitelist": [{"http_path": ["/"]}]}, []),
        ({"whitelist": [{"reply": [False], "tcp_flags": [{"SYN": True}]}], "number": 1}, [4]),
    ],
)
async def test_numbers_and_filters_mean_what_hubble_means(client, pipeline, fields, ports):
    pipeline.append(b"".join(packed(dport_be=to_port(port)) for port in (1, 2, 3, 4)))
    assert await client.ports(**fields) == ports


async def test_a_follower_sees_what_is_new_and_nothing_older(client, pipeline):
    pipeline.append(packed(dport_be=to_port(1)))
    call = client.flows(follow=True)
    reader = asyncio.ensure_future(call.read())
    await asyncio.sleep(0.3)
    pipeline.append(packed(dport_be=to_port(2)))
    assert (await reader).flow.l4.TCP.destination_port == 2
    call.cancel()


async def test_a_follower_with_a_number_begins_with_what_was(client, pipeline):
    pipeline.append(b"".join(packed(dport_be=to_port(port)) for port in (1, 2)))
    call = client.flows(follow=True, number=1)
    assert (await call.read()).flow.l4.TCP.destination_port == 2
    call.cancel()


async def test_since_and_until_bound_what_is_sent(client, pipeline):
    pipeline.append(packed())
    (one,) = [one async for one in client.flows()]
    before, after = one.time.seconds - 10, one.time.seconds + 10
    assert len(await client.ports(since={"seconds": before}, until={"seconds": after})) == 1
    assert await client.ports(since={"seconds": after}) == []
    assert await client.ports(until={"seconds": before}) == []


async def test_losses_pass_every_filter_and_bear_the_time_that_relay_sorts_by(client, pipeline):
    pipeline.store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, 7, 5))
    pipeline.append(packed())
    found = [one async for one in client.flows(whitelist=[{"source_port": ["1"]}])]
    assert [one.lost_events.num_events_lost for one in found] == [12]
    assert found[0].lost_events.source == flow_pb2.PERF_EVENT_RING_BUFFER
    assert found[0].time.seconds


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"whitelist": [{"source_ip": ["10.0.0.300"]}]}, "whitelist[0].source_ip"),
        ({"blacklist": [{"destination_port": ["http"]}]}, "blacklist[0].destination_port"),
        ({"whitelist": [{"protocol": ["vrrp"]}]}, "unknown protocol 'vrrp'"),
        ({"whitelist": [{"experimental": {"cel_expression": ["true"]}}]}, "CEL"),
        ({"first": True, "follow": True}, "first"),
        ({"field_mask": {"paths": ["source.colour"]}}, "source.colour"),
    ],
)
async def test_what_cannot_be_meant_is_an_invalid_argument_that_names_the_field(client, fields, told):
    error = await refusal(client.flows(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told in error.details()


@pytest.mark.parametrize("place", ["field_mask", "experimental"])
async def test_a_field_mask_leaves_out_everything_else(client, pipeline, place):
    pipeline.append(packed())
    mask = {"paths": ["IP.source", "verdict", "Summary"]}
    fields = {"field_mask": mask} if place == "field_mask" else {"experimental": {"field_mask": mask}}
    (one,) = [one async for one in client.flows(**fields)]
    assert MessageToDict(one.flow, preserving_proto_field_name=True) == {
        "IP": {"source": "203.0.113.9"},
        "verdict": "DROPPED",
        "Summary": "TCP Flags: SYN",
    }
    assert one.node_name == "alpha/a1"


def test_a_message_says_what_the_json_of_the_http_api_says(pipeline):
    pipeline.append(packed() + allowed() + packed(family=0, ethertype_be=b"\x88\xcc"))
    flows = [answer for answer in asyncio.run(_collect(pipeline)) if not isinstance(answer, Lost)]
    assert len(flows) == 3
    for flow in flows:
        shown = json.loads(line(flow, 5))
        del shown["meshwall"]
        assert response(flow, 5, {}) == ParseDict(shown, observer_pb2.GetFlowsResponse())


async def _collect(pipeline):
    from daemon.flows.observe import Request

    return [one async for answer in pipeline.observe(Request()) for one in answer]


async def test_health_is_known_by_the_name_that_hubble_status_asks_for(client):
    for name in ("", "hubble.server.Observer"):
        request = health_pb2.HealthCheckRequest(service=name).SerializeToString()
        answer = await client.ask("/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse, request)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    request = health_pb2.HealthCheckRequest(service="observer.Observer").SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.ask("/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse, request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_status_counts_flows_and_leaves_the_nodes_to_relay(client, pipeline):
    pipeline.append(packed() * 300)
    status = await client.ask("/observer.Observer/ServerStatus", observer_pb2.ServerStatusResponse)
    assert (status.num_flows, status.max_flows, status.seen_flows) == (256, 256, 300)
    assert status.uptime_ns > 0
    assert status.version.startswith("meshwall ")
    assert not status.HasField("num_connected_nodes")


async def test_nodes_are_this_one_with_its_counts_and_those_of_the_mesh(client, pipeline, tables):
    pipeline.append(packed())
    tables.nodes.put(NodeKey("beta", "b1"), node("10.2.0.9"))
    found = await client.ask("/observer.Observer/GetNodes", observer_pb2.GetNodesResponse)
    assert [(one.name, one.address, one.num_flows) for one in found.nodes] == [
        ("alpha/a1", "10.1.0.4:4244", 1),
        ("beta/b1", "10.2.0.9:4244", 0),
    ]


def node(address):
    return NodeRow((("InternalIP", parse_prefix(address)),), frozenset(), Identity(6), "mesh:beta")


async def test_namespaces_are_those_of_recent_flows(client, pipeline, tables):
    tables.ips.put(IpKey(parse_prefix("203.0.113.9"), "mesh:beta"), IpRow(Identity(70_000), "web-0", "prod"))
    tables.identities.put(Identity(70_000), identity("k8s:io.cilium.k8s.policy.cluster=beta"))
    pipeline.append(packed(identity=70_000, time_ns=_monotonic()) + packed(time_ns=_monotonic()))
    found = await client.ask("/observer.Observer/GetNamespaces", observer_pb2.GetNamespacesResponse)
    assert [(one.cluster, one.namespace) for one in found.namespaces] == [("beta", "prod")]


def _monotonic():
    import time

    return time.monotonic_ns()


def identity(*labels):
    from daemon.state.tables import IdentityRow

    return IdentityRow(parse_labels(labels), "mesh:beta")


async def test_peers_are_told_of_all_nodes_and_then_of_changes_without_end(client, tables):
    call = client.notify()
    first = await call.read()
    assert (first.name, first.address, first.type) == ("alpha/a1", "10.1.0.4:4244", peer_pb2.PEER_ADDED)
    assert not first.HasField("tls")
    tables.nodes.put(NodeKey("beta", "b1"), node("10.2.0.9"))
    assert (await call.read()).type == peer_pb2.PEER_ADDED
    tables.nodes.put(NodeKey("beta", "b1"), node("10.2.0.10"))
    changed = await call.read()
    assert (changed.address, changed.type) == ("10.2.0.10:4244", peer_pb2.PEER_UPDATED)
    tables.nodes.delete(NodeKey("beta", "b1"))
    assert (await call.read()).type == peer_pb2.PEER_DELETED
    call.cancel()


async def test_over_tcp_only_a_client_with_a_certificate_sees_flows(serving, pipeline, tmp_path):
    ca, strangers = trustme.CA(), trustme.CA()
    name = "a1.alpha.hubble-grpc.cilium.io"
    own = ca.issue_cert(name)
    (tmp_path / "cert").write_bytes(own.cert_chain_pems[0].bytes())
    (tmp_path / "key").write_bytes(own.private_key_pem.bytes())
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    port = free_port()
    await serving(
        listen=f"127.0.0.1:{port}",
        cert=str(tmp_path / "cert"),
        key=str(tmp_path / "key"),
        client_ca=str(tmp_path / "ca"),
    )
    pipeline.append(packed(dport_be=to_port(9)))

    async def ports(issuer):
        leaf = issuer.issue_cert("client") if issuer else None
        credentials = grpc.ssl_channel_credentials(
            ca.cert_pem.bytes(),
            leaf.private_key_pem.bytes() if leaf else None,
            leaf.cert_chain_pems[0].bytes() if leaf else None,
        )
        options = [("grpc.ssl_target_name_override", name)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            return await Client(channel).ports()

    await eventually(lambda: accepts(port))
    assert await ports(ca) == [9]
    for stranger in (None, strangers):
        with pytest.raises(grpc.aio.AioRpcError):
            await ports(stranger)


async def eventually(holds):
    for _ in range(1_000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def accepts(port):
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_grpc_is_not_loaded_before_somebody_connects():
    code = "import sys, daemon.main; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["flow", "relay", "observer", "peer"])
def test_generated_code_matches_the_proto(tmp_path, name):
    from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
    from grpc_tools import protoc

    out = tmp_path / "set"
    own = f"daemon/api/hubblepb/{name}.proto"
    include = Path(protoc.__file__).parent / "_proto"
    assert protoc.main(["", f"-I{ROOT}", f"-I{include}", f"--descriptor_set_out={out}", str(ROOT / own)]) == 0
    (fresh,) = FileDescriptorSet.FromString(out.read_bytes()).file
    module = __import__(f"daemon.api.hubblepb.{name}_pb2", fromlist=["DESCRIPTOR"])
    committed = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(committed)
    for one in (fresh, committed):
        _forget_json_names(one.message_type)
    assert committed == fresh


def _forget_json_names(messages):
    for message in messages:
        for one in message.field:
            one.ClearField("json_name")
        _forget_json_names(message.nested_type)
