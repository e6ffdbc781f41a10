"""Hubble's Observer, Peer and Health services over the flow store, for hubble CLI, Relay and UI.

Field numbers are in hubblepb/*.proto, meanings in docs/observability.md. Importing this module loads gRPC (about
20 MiB): daemon/api/hubble.py does so when somebody connects for the first time.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from daemon.api.hubblepb import flow_pb2, observer_pb2, peer_pb2, relay_pb2
from daemon.api.status import program_version
from daemon.flows.filters import FilterError, parse_filters
from daemon.flows.lines import Json, flow_json
from daemon.flows.observe import Request, arrivals
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import Flow, Lost
from daemon.state.tables import HostRow, NodeKey, Tables

PORT = 4244  # where other nodes' Hubble listens, by convention
HEALTH_NAMES = ("", "hubble.server.Observer")  # the second is what `hubble status` asks for
NAMESPACES_SEEN_S = 3_600
RATE_S = 60
LOOK_EVERY_S = 1.0  # at the nodes, for those who follow them
SERVER_NAME = "{node}.{cluster}.hubble-grpc.cilium.io"
_NS = 1_000_000_000
_MOST = 1 << 63  # `--all` sends 2^64 - 1

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
Mask = dict[str, "Mask"]


class Known(NamedTuple):
    """A node as Relay is told of it."""

    name: str
    address: str
    server_name: str


class Observer:
    """The services of one daemon. `tls`: the TCP listener has certificates, which peers are told of."""

    def __init__(
        self, pipeline: FlowPipeline, tables: Tables, *, port: int = PORT, tls: bool = False
    ) -> None:
        self._pipeline = pipeline
        self._tables = tables
        self._port = port
        self._tls = tls

    def handlers(self) -> "list[grpc.GenericRpcHandler[Any, Any]]":
        """What a grpc.aio server has to be given besides health."""
        return [
            grpc.method_handlers_generic_handler(
                "observer.Observer",
                {
                    "GetFlows": _stream(self.get_flows, observer_pb2.GetFlowsRequest),
                    "GetNodes": _unary(self.get_nodes, observer_pb2.GetNodesRequest),
                    "GetNamespaces": _unary(self.get_namespaces, observer_pb2.GetNamespacesRequest),
                    "ServerStatus": _unary(self.server_status, observer_pb2.ServerStatusRequest),
                },
            ),
            grpc.method_handlers_generic_handler(
                "peer.Peer", {"Notify": _stream(self.notify, peer_pb2.NotifyRequest)}
            ),
        ]

    async def get_flows(
        self, request: observer_pb2.GetFlowsRequest, context: "Context"
    ) -> AsyncIterator[observer_pb2.GetFlowsResponse]:
        """Flows and losses; a filter that cannot be meant is INVALID_ARGUMENT."""
        try:
            wanted, mask = parse_request(request)
        except FilterError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        started_ns = self._pipeline.started_ns
        async for answer in self._pipeline.observe(wanted):
            for one in answer:
                yield response(one, started_ns, mask)

    async def server_status(
        self, _: observer_pb2.ServerStatusRequest, __: "Context"
    ) -> observer_pb2.ServerStatusResponse:
        """Fill and rate of the store. Node counts stay unset, as on every single node."""
        store = self._pipeline.store
        uptime_ns = self._uptime_ns()
        recent = arrivals(store, time.time_ns() - RATE_S * _NS)
        return observer_pb2.ServerStatusResponse(
            num_flows=len(store),
            max_flows=store.capacity,
            seen_flows=store.end,
            uptime_ns=uptime_ns,
            version=f"meshwall {program_version()}",
            flows_rate=recent / max(1.0, min(RATE_S, uptime_ns / _NS)),
        )

    async def get_nodes(
        self, _: observer_pb2.GetNodesRequest, __: "Context"
    ) -> observer_pb2.GetNodesResponse:
        """This node with its counts, and every node that the mesh knows, whose state only Relay could tell."""
        store = self._pipeline.store
        nodes = [
            observer_pb2.Node(
                name=one.name,
                address=one.address,
                tls={"enabled": bool(one.server_name), "server_name": one.server_name},
            )
            for one in self._known()
        ]
        own = self._own()
        for node in nodes:
            if own and node.name == _node_name(own.cluster, own.name):
                node.state = relay_pb2.NODE_CONNECTED
                node.version = f"meshwall {program_version()}"
                node.uptime_ns = self._uptime_ns()
                node.num_flows, node.max_flows, node.seen_flows = len(store), store.capacity, store.end
        return observer_pb2.GetNodesResponse(nodes=nodes)

    async def get_namespaces(
        self, _: observer_pb2.GetNamespacesRequest, __: "Context"
    ) -> observer_pb2.GetNamespacesResponse:
        """Those seen in the flows of the last hour, by cluster and name."""
        found: set[tuple[str, str]] = set()
        since = time.time_ns() - NAMESPACES_SEEN_S * _NS
        async for answer in self._pipeline.observe(Request(since_ns=since)):
            for one in answer:
                if isinstance(one, Flow):
                    found |= {
                        (side.cluster, side.namespace)
                        for side in (one.source, one.destination)
                        if side.namespace
                    }
        return observer_pb2.GetNamespacesResponse(
            namespaces=[
                observer_pb2.Namespace(cluster=cluster, namespace=namespace)
                for cluster, namespace in sorted(found)
            ]
        )

    async def notify(
        self, _: peer_pb2.NotifyRequest, __: "Context"
    ) -> AsyncIterator[peer_pb2.ChangeNotification]:
        """Every node known now, then what changes; it never ends, or Relay would take the service for dead."""
        told: dict[str, Known] = {}
        revision = (-1, -1)
        while True:
            if revision != (now := (self._tables.nodes.revision, self._tables.host.revision)):
                revision = now
                known = {one.name: one for one in self._known()}
                for change in changes(told, known):
                    yield change
                told = known
            await asyncio.sleep(LOOK_EVERY_S)

    def _uptime_ns(self) -> int:
        return time.time_ns() - self._pipeline.started_ns

    def _own(self) -> HostRow | None:
        return self._tables.host.get("host")

    def _known(self) -> list[Known]:
        own = self._own()
        found = {}
        if own:
            addresses = sorted((one for one in own.addresses if one.is_host), key=lambda one: one.family)
            first = str(addresses[0]) if addresses else "localhost"
            found[NodeKey(own.cluster, own.name)] = first
        for key, row in self._tables.nodes.rows.items():
            ranked = sorted(row.addresses, key=lambda one: one[0] != "InternalIP")
            if ranked and key not in found:
                found[key] = str(ranked[0][1])
        return [self._peer(key, address) for key, address in sorted(found.items())]

    def _peer(self, key: NodeKey, address: str) -> Known:
        host = f"[{address}]" if ":" in address else address
        own = self._own()
        port = self._port if own and key == (own.cluster, own.name) else PORT
        server_name = (
            SERVER_NAME.format(
                node=key.name.replace(".", "-"), cluster=(key.cluster or "default").replace(".", "-")
            )
            if self._tls
            else ""
        )
        return Known(_node_name(key.cluster, key.name), f"{host}:{port}", server_name)


def _node_name(cluster: str, node: str) -> str:
    """As peers are named; the cluster `default` is left out."""
    return node if cluster in ("", "default") else f"{cluster}/{node}"


def changes(before: dict[str, Known], now: dict[str, Known]) -> Iterator[peer_pb2.ChangeNotification]:
    """What tells one who knows `before` of `now`."""
    for name, one in before.items():
        if name not in now:
            yield _change(one, peer_pb2.PEER_DELETED)
    for name, one in now.items():
        if name not in before:
            yield _change(one, peer_pb2.PEER_ADDED)
        elif before[name] != one:
            yield _change(one, peer_pb2.PEER_UPDATED)


def _change(one: Known, kind: peer_pb2.ChangeNotificationType) -> peer_pb2.ChangeNotification:
    tls = peer_pb2.TLS(server_name=one.server_name) if one.server_name else None
    return peer_pb2.ChangeNotification(name=one.name, address=one.address, type=kind, tls=tls)


# Requests and answers


def parse_request(request: observer_pb2.GetFlowsRequest) -> tuple[Request, Mask]:
    """What is asked for, and the fields of a flow that are wanted (empty: all). Raises FilterError."""
    if request.first and request.follow:
        raise FilterError("first: not together with follow")
    filters = parse_filters(
        [_filter("whitelist", one) for one in request.whitelist],
        [_filter("blacklist", one) for one in request.blacklist],
    )
    number = request.number if 0 < request.number < _MOST else None
    wanted = Request(
        filters=filters,
        number=number,
        first=request.first,
        follow=request.follow,
        since_ns=request.since.ToNanoseconds() if request.HasField("since") else None,
        until_ns=request.until.ToNanoseconds() if request.HasField("until") else None,
    )
    paths = list(request.field_mask.paths) or list(request.experimental.field_mask.paths)
    return wanted, field_mask(paths)


def _filter(where: str, one: flow_pb2.FlowFilter) -> Json:
    """In the form of Hubble's JSON, which `parse_filters` reads."""
    found = MessageToDict(one, preserving_proto_field_name=True)
    if "experimental" in found:
        raise FilterError(f"{where}.experimental: CEL expressions are not supported")
    return found


def field_mask(paths: Iterable[str]) -> Mask:
    """`a.b` and `c` as `{a: {b: {}}, c: {}}`; an empty inner mask is the whole field. Raises FilterError."""
    mask: Mask = {}
    for path in paths:
        _check_path(path)
        at = mask
        for name in path.split("."):
            at = at.setdefault(name, {})
        at.clear()  # the whole field, whatever parts were named before
    return mask


def _check_path(path: str) -> None:
    at: Any = flow_pb2.Flow.DESCRIPTOR
    for name in path.split("."):
        field = at.fields_by_name.get(name) if at else None
        if field is None:
            raise FilterError(f"field_mask: a flow has no field {path!r}")
        at = field.message_type


def _masked(found: Json, mask: Mask) -> Json:
    """Only the fields of the mask."""
    kept: Json = {}
    for name, inner in mask.items():
        value = found.get(name)
        if value is not None:
            kept[name] = _masked(value, inner) if inner and isinstance(value, dict) else value
    return kept


def response(one: Flow | Lost, started_ns: int, mask: Mask) -> observer_pb2.GetFlowsResponse:
    """One message of the stream."""
    if isinstance(one, Lost):
        lost = flow_pb2.LostEvent(source=int(one.source), num_events_lost=one.count + one.suppressed)  # type: ignore[arg-type]
        return observer_pb2.GetFlowsResponse(lost_events=lost, time=_timestamp(time.time_ns()))
    shape = flow_json(one, started_ns)
    fields: Any = shape["flow"]
    moment = _timestamp(one.time_ns)
    fields["time"] = moment
    if "is_reply" in fields:
        fields["is_reply"] = {"value": fields["is_reply"]}
    shown = _masked(fields, mask) if mask else fields
    return observer_pb2.GetFlowsResponse(flow=shown, node_name=str(shape.get("node_name", "")), time=moment)


def _timestamp(time_ns: int) -> Timestamp:
    seconds, nanos = divmod(time_ns, _NS)
    return Timestamp(seconds=seconds, nanos=nanos)


# gRPC


def _stream(call: Callable[..., Any], request: type[Message]) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_stream_rpc_method_handler(call, request.FromString, _bytes)


def _unary(call: Callable[..., Any], request: type[Message]) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_unary_rpc_method_handler(call, request.FromString, _bytes)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()


async def serve(observer: Observer, listen: Callable[[grpc.aio.Server], None]) -> grpc.aio.Server:
    """A running server; `listen` adds its ports."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),), maximum_concurrent_rpcs=64)
    server.add_generic_rpc_handlers(observer.handlers())
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in HEALTH_NAMES:
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    listen(server)
    await server.start()
    return server
