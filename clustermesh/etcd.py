"""The store over etcd v3: fail-over between endpoints, TLS, users, paging, watches with a watchdog, leases.

One connection at a time goes to one endpoint. Whatever breaks it becomes `ConnectionLost`; the next call
connects again, to the next endpoint. Nothing is retried here: who watches must list again.
"""

import asyncio
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc

from clustermesh.etcdpb import etcd_pb2 as pb
from clustermesh.kv import (
    Committed,
    Compacted,
    Compare,
    ConnectionLost,
    Denied,
    Entry,
    Event,
    KVError,
    LeaseLost,
    Listing,
    Put,
)
from clustermesh.settings import EtcdSettings, split_endpoint

log = logging.getLogger(__name__)

ANSWER_S = 1.5  # that a question about progress may take
OWED_S = 5.0  # how long a watch may take to show a revision that the others have
_EOF = grpc.aio.EOF  # type: ignore[attr-defined]
_HAS_LEADER = ("hasleader", "true")  # a member that has lost its cluster ends the watch
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a batch of events can be larger than the default 4 MB
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
)

# Message and call types are generated at run time: `Any` ends in this module.
Message = Any
T = TypeVar("T")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with this prefix; a zero byte means the end of the store."""
    for index in range(len(prefix) - 1, -1, -1):
        if prefix[index] < 0xFF:
            return prefix[:index] + bytes([prefix[index] + 1])
    return b"\0"


class _Session:
    """One connection to one endpoint."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.dead = ""  # why it was given up
        self.cluster_id = 0
        self.version = ""
        self.metadata: tuple[tuple[str, str], ...] = ()

        def unary(service: str, method: str, reply: Message) -> Callable[..., Awaitable[Message]]:
            return channel.unary_unary(
                f"/etcdserverpb.{service}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=reply.FromString,
            )

        def stream(service: str, method: str, reply: Message) -> Callable[..., Message]:
            return channel.stream_stream(
                f"/etcdserverpb.{service}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=reply.FromString,
            )

        self.range = unary("KV", "Range", pb.RangeResponse)
        self.put = unary("KV", "Put", pb.PutResponse)
        self.delete = unary("KV", "DeleteRange", pb.DeleteRangeResponse)
        self.txn = unary("KV", "Txn", pb.TxnResponse)
        self.compact = unary("KV", "Compact", pb.CompactionResponse)
        self.grant = unary("Lease", "LeaseGrant", pb.LeaseGrantResponse)
        self.revoke = unary("Lease", "LeaseRevoke", pb.LeaseRevokeResponse)
        self.authenticate = unary("Auth", "Authenticate", pb.AuthenticateResponse)
        self.status = unary("Maintenance", "Status", pb.StatusResponse)
        self.unary = unary
        self.keep_alive = stream("Lease", "LeaseKeepAlive", pb.LeaseKeepAliveResponse)
        self.watch = stream("Watch", "Watch", pb.WatchResponse)


class EtcdKV:
    """`KV` over etcd. Build it anywhere; it connects at the first call."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self._endpoints = list(settings.endpoints)
        random.shuffle(self._endpoints)
        self._session: _Session | None = None
        self._connecting = asyncio.Lock()
        self._seen = (0, 0)  # the store's id, and the highest revision it has told us
        self._closed = False

    @property
    def endpoint(self) -> str:
        """Where we are connected; empty if nowhere."""
        return self._session.endpoint if self._session else ""

    @property
    def version(self) -> str:
        """The server's version; empty if not connected."""
        return self._session.version if self._session else ""

    # -- KV

    async def get(self, key: str) -> Entry | None:
        reply = await self._unary(lambda one: one.range, pb.RangeRequest(key=key.encode()))
        return _entry(reply.kvs[0]) if reply.kvs else None

    async def list(self, prefix: str, *, linear: bool = False) -> Listing:
        entries: list[Entry] = []
        revision = store = 0
        async with aclosing(self._pages(prefix, serializable=not linear)) as pages:
            async for page in pages:
                entries.extend(page.entries)
                revision, store = page.revision, page.store
        return Listing(tuple(entries), revision, store)

    def pages(self, prefix: str) -> AsyncGenerator[Listing, None]:
        return self._pages(prefix, serializable=True)

    async def _pages(self, prefix: str, *, serializable: bool) -> AsyncGenerator[Listing, None]:
        start, end = prefix.encode(), prefix_end(prefix.encode())
        revision = 0
        while True:
            request = pb.RangeRequest(
                key=start,
                range_end=end,
                limit=self.settings.page,
                revision=revision,
                serializable=serializable,
            )
            store, seen = self._seen
            reply = await self._unary(lambda one: one.range, request)
            if not revision:
                revision = reply.header.revision
                if serializable and store == reply.header.cluster_id and revision < seen:
                    # This member lags behind what another has told us: ask for what the cluster agrees on.
                    revision, serializable = 0, False
                    continue
            yield Listing(tuple(map(_entry, reply.kvs)), revision, reply.header.cluster_id)
            if not reply.more or not reply.kvs:
                return
            start = reply.kvs[-1].key + b"\0"

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[Sequence[Event], None]:
        session = await self._connected()
        create = pb.WatchCreateRequest(
            key=prefix.encode(), range_end=prefix_end(prefix.encode()), start_revision=revision, fragment=True
        )
        dog = _Watchdog(self.settings)
        call = session.watch(dog.requests(create), metadata=(*session.metadata, _HAS_LEADER))
        dog.call = call
        lag = _Lag(self.settings.stall_s)
        batch: list[Event] = []
        try:
            while True:
                reply = await self._next(session, call, dog)
                self._pin(session, reply.header)
                self._watch_ended(prefix, reply)
                if lag.stalled(reply.header.revision):
                    lag.owe(await self._agreed(session, prefix))
                if lag.hopeless():
                    raise await self._give_up(session, f"{prefix}: its watch stands still at {lag.seen}")
                batch.extend(map(_event, reply.events))
                if batch and not reply.fragment:
                    self._saw(session, batch[-1].revision)
                    yield batch
                    batch = []
        finally:
            call.cancel()

    async def _agreed(self, session: _Session, prefix: str) -> int:
        """The revision on which the members agree; asked with the rights that the watch has."""
        request = pb.RangeRequest(key=prefix.encode())
        return int((await self._ask(session, lambda one: one.range, request)).header.revision)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease)
        reply = await self._unary(lambda one: one.put, request)
        return int(reply.header.revision)

    async def delete(self, key: str) -> bool:
        reply = await self._unary(lambda one: one.delete, pb.DeleteRangeRequest(key=key.encode()))
        return bool(reply.deleted)

    async def create(self, key: str, value: bytes, lease: int = 0) -> bool:
        return (await self.commit((Compare(key, "version", 0),), (Put(key, value, lease),))).done

    async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
        request = pb.TxnRequest(compare=map(_compare, compares), success=map(_operation, puts))
        reply = await self._unary(lambda one: one.txn, request)
        return Committed(bool(reply.succeeded), int(reply.header.revision))

    async def grant(self, ttl_s: int) -> int:
        reply = await self._unary(lambda one: one.grant, pb.LeaseGrantRequest(TTL=ttl_s))
        return int(reply.ID)

    async def keep_alive(self, lease: int, ttl_s: int) -> None:
        while True:
            session = await self._connected()
            call = session.keep_alive(_once(pb.LeaseKeepAliveRequest(ID=lease)), metadata=session.metadata)
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    reply = await self._guarded(session, call.read())
            except TimeoutError:
                raise await self._give_up(session, "no answer to a lease renewal") from None
            finally:
                call.cancel()
            if reply is _EOF or reply.TTL <= 0:
                raise LeaseLost(f"lease {lease:x} has expired")
            await asyncio.sleep(ttl_s / 3)

    async def revoke(self, lease: int) -> None:
        await self._unary(lambda one: one.revoke, pb.LeaseRevokeRequest(ID=lease))

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            session, self._session = self._session, None
            session.dead = "closed"
            await session.channel.close(None)

    async def compact(self, revision: int) -> None:
        """Have the store forget events before `revision`."""
        await self._unary(lambda one: one.compact, pb.CompactionRequest(revision=revision))

    async def auth(self, method: str, request: Message) -> Message:
        """A call of the administrator, such as `RoleAdd`. Raises KVError."""
        reply = pb.AuthRoleResponse if method.startswith("Role") else pb.AuthUserResponse
        return await self._unary(lambda one: one.unary("Auth", method, reply), request)

    async def alarms(self) -> Sequence[str]:
        """What the member that we are connected to complains of. Raises KVError."""
        reply = await self._unary(lambda one: one.status, pb.StatusRequest())
        return tuple(reply.errors)

    # -- connecting

    async def _connected(self) -> _Session:
        async with self._connecting:
            if self._closed:
                raise ConnectionLost("closed")
            if self._session is None:
                self._session = await self._connect()
            return self._session

    async def _connect(self) -> _Session:
        """A session with the first endpoint that answers; they take turns in being the first."""
        problems: list[KVError] = []
        for _ in self._endpoints:
            endpoint = self._endpoints[0]
            self._endpoints.append(self._endpoints.pop(0))
            try:
                return await self._try(endpoint)
            except KVError as error:
                problems.append(error)
        if all(isinstance(one, Denied) for one in problems):
            raise problems[0]
        raise ConnectionLost("; ".join(map(str, problems)))

    async def _try(self, endpoint: str) -> _Session:
        session = _Session(endpoint, self._channel(endpoint))
        timeout_s = min(self.settings.timeout_s, 4.0 / len(self._endpoints) + 0.5)
        try:
            if self.settings.username:
                login = pb.AuthenticateRequest(name=self.settings.username, password=self.settings.password)
                reply = await self._guarded(session, session.authenticate(login, timeout=timeout_s))
                session.metadata = (("token", reply.token),)
            status = pb.StatusRequest()
            reply = await self._guarded(
                session, session.status(status, timeout=timeout_s, metadata=session.metadata)
            )
        except BaseException:
            await session.channel.close(None)
            raise
        session.version = reply.version
        self._pin(session, reply.header)
        return session

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        tls, host, port = split_endpoint(endpoint)
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not tls:
            return grpc.aio.insecure_channel(target, options=_OPTIONS)
        settings = self.settings
        _check_tls(settings)
        credentials = grpc.ssl_channel_credentials(
            _read("ca", settings.ca), _read("key", settings.key), _read("cert", settings.cert)
        )
        options: tuple[tuple[str, Any], ...] = _OPTIONS
        if settings.server_name:
            options = (*options, ("grpc.ssl_target_name_override", settings.server_name))
        return grpc.aio.secure_channel(target, credentials, options=options)

    # -- calling

    async def _unary(
        self, method: Callable[[_Session], Callable[..., Awaitable[Message]]], request: Message
    ) -> Message:
        session = await self._connected()
        try:
            reply = await self._ask(session, method, request)
        except _TokenExpired:
            # Tokens of users expire when they are not used for a while.
            await self._give_up(session, "token expired")
            session = await self._connected()
            reply = await self._ask(session, method, request)
        self._pin(session, reply.header)
        self._saw(session, reply.header.revision)
        return reply

    async def _ask(
        self,
        session: _Session,
        method: Callable[[_Session], Callable[..., Awaitable[Message]]],
        request: Message,
    ) -> Message:
        call = method(session)(request, timeout=self.settings.timeout_s, metadata=session.metadata)
        return await self._guarded(session, call)

    async def _guarded(self, session: _Session, call: Awaitable[T]) -> T:
        """Await a call; its errors become ours, and those that end the connection end it."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            problem = _problem(session.endpoint, error)
            if isinstance(problem, ConnectionLost):
                await self._give_up(session, str(problem))
            raise problem from None
        except asyncio.CancelledError:
            # Closing a channel cancels its calls, which is not us being cancelled.
            task = asyncio.current_task()
            if session.dead and not (task and task.cancelling()):
                raise ConnectionLost(session.dead) from None
            raise

    async def _give_up(self, session: _Session, reason: str) -> ConnectionLost:
        if not session.dead:
            session.dead = reason if reason.startswith(session.endpoint) else f"{session.endpoint}: {reason}"
        if self._session is session:
            self._session = None
        await session.channel.close(None)
        return ConnectionLost(session.dead)

    async def _next(self, session: _Session, call: Message, dog: "_Watchdog") -> Message:
        try:
            reply = await self._guarded(session, call.read())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if dog.bit and not (task and task.cancelling()):
                raise await self._give_up(session, dog.bit) from None
            raise
        if reply is _EOF:
            raise await self._give_up(session, "the server ended the watch")
        dog.heard()
        return reply

    def _watch_ended(self, prefix: str, reply: Message) -> None:
        if not reply.canceled:
            return
        if reply.compact_revision:
            raise Compacted(f"{prefix}: revisions before {reply.compact_revision} are gone")
        if "permission denied" in reply.cancel_reason:
            raise Denied(f"{prefix}: permission denied")
        raise ConnectionLost(
            f"{prefix}: the server cancelled the watch: {reply.cancel_reason or 'no reason given'}"
        )

    def _pin(self, session: _Session, header: Message) -> None:
        """A connection talks to one cluster; another id behind the same address is another store."""
        if not session.cluster_id:
            session.cluster_id = header.cluster_id
        elif header.cluster_id != session.cluster_id:
            session.dead = f"{session.endpoint}: now answers for another etcd cluster"
            if self._session is session:
                self._session = None
            raise ConnectionLost(session.dead)

    def _saw(self, session: _Session, revision: int) -> None:
        store, seen = self._seen
        self._seen = (session.cluster_id, max(revision, seen) if store == session.cluster_id else revision)


class _TokenExpired(KVError):  # noqa: N818 - control flow inside this module
    """The server does not know our token any more."""


class _Watchdog:
    """The request side of a watch: asks for progress, and ends the call when nothing comes back."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._every_s = settings.progress_s
        self._patience_s = min(settings.timeout_s, settings.progress_s + ANSWER_S)
        self._last = time.monotonic()
        self.bit = ""
        self.call: Message = None

    def heard(self) -> None:
        self._last = time.monotonic()

    async def requests(self, create: Message) -> AsyncGenerator[Message, None]:
        yield pb.WatchRequest(create_request=create)
        while True:
            await asyncio.sleep(self._every_s)
            silent_s = time.monotonic() - self._last
            if silent_s > self._patience_s:
                self.bit = f"no answer for {silent_s:.1f} s, although asked"
                self.call.cancel()
                return
            yield pb.WatchRequest(progress_request=pb.WatchProgressRequest())


class _Lag:
    """Judges a watch by revisions and not by silence: a member can answer and yet be cut off from the others."""

    def __init__(self, stall_s: float) -> None:
        self.seen = 0
        self._stall_s = stall_s
        self._moved = time.monotonic()
        self._owed = (0, 0.0)  # a revision that must be seen, and since when

    def stalled(self, revision: int) -> bool:
        """Whether it is time to ask what the members agree on."""
        now = time.monotonic()
        if revision > self.seen:
            self.seen, self._moved = revision, now
        elif now - self._moved > self._stall_s:
            self._moved = now
            return True
        return False

    def owe(self, revision: int) -> None:
        """The others are at this revision."""
        if revision > self.seen >= self._owed[0]:
            self._owed = revision, time.monotonic()

    def hopeless(self) -> bool:
        """Whether it had its chance to come up with them."""
        revision, since = self._owed
        return self.seen < revision and time.monotonic() - since > min(self._stall_s, OWED_S)


async def _once(message: Message) -> AsyncGenerator[Message, None]:
    yield message


_TARGETS = {
    "version": pb.Compare.VERSION,
    "create_revision": pb.Compare.CREATE,
    "mod_revision": pb.Compare.MOD,
}


def _compare(one: Compare) -> Message:
    key = one.key.encode()
    number: Message = {one.field: one.number}
    return pb.Compare(
        result=pb.Compare.EQUAL,
        target=_TARGETS[one.field],
        key=key,
        range_end=prefix_end(key) if one.prefix else b"",
        **number,
    )


def _operation(one: Put) -> Message:
    key = one.key.encode()
    if one.value is None:
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=one.value, lease=one.lease))


def _entry(kv: Message) -> Entry:
    return Entry(
        kv.key.decode(errors="replace"), kv.value, kv.mod_revision, kv.create_revision, kv.version, kv.lease
    )


def _event(event: Message) -> Event:
    kv = event.kv
    value = None if event.type == pb.Event.DELETE else kv.value
    return Event(kv.key.decode(errors="replace"), value, kv.mod_revision)


# What gRPC says of TLS -> what to do about it.
_TLS_TROUBLE = (
    ("Hostname Verification", "the server's certificate is for another name: set etcd.server_name"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by etcd.ca"),
    ("Unwrap failed", "the server refused us: it wants a client certificate it knows (etcd.cert, etcd.key)"),
    ("Handshake read failed", "the server does not speak TLS: if that is meant, the endpoint is http://"),
)
_PEER = re.compile(r"^ipv[46]:[^ ]+: ")
_NOISE = ("failed to connect to all addresses; last error: ", "UNKNOWN: ", "UNAVAILABLE: ", "etcdserver: ")


def _details(endpoint: str, error: grpc.aio.AioRpcError) -> str:
    """What went wrong, without gRPC's wrapping, and the cure where the words would not tell."""
    details = " ".join((error.details() or error.code().name).split())
    for noise in _NOISE:
        details = details.replace(noise, "")
    details = next((cure for sign, cure in _TLS_TROUBLE if sign in details), _PEER.sub("", details))
    if details == "Socket closed" and endpoint.startswith("http:"):
        return "the server hung up: if it speaks TLS, the endpoint is https://"
    return details


def _problem(endpoint: str, error: grpc.aio.AioRpcError) -> KVError:  # noqa: PLR0911 - a table
    """A gRPC error in our terms, in one line that names the endpoint."""
    details = _details(endpoint, error)
    text = f"{endpoint}: {details}"
    match error.code():
        case grpc.StatusCode.PERMISSION_DENIED:
            return Denied(text)
        case grpc.StatusCode.OUT_OF_RANGE:
            return Compacted(text)
        case grpc.StatusCode.NOT_FOUND if "lease" in details:
            return LeaseLost(text)
        case grpc.StatusCode.UNAUTHENTICATED if "token" in details:
            return _TokenExpired(text)
        case grpc.StatusCode.UNAUTHENTICATED:
            return Denied(text)
        case grpc.StatusCode.INVALID_ARGUMENT if "authentication failed" in details:
            return Denied(f"{text}: check etcd.username and etcd.password")
        case grpc.StatusCode.INVALID_ARGUMENT if "user name is empty" in details:
            return Denied(f"{text}: this store wants a user, set etcd.username or etcd.cert")
        case grpc.StatusCode.FAILED_PRECONDITION if "not enabled" in details:
            return Denied(f"{text}: this store has no users, remove etcd.username")
        case (
            grpc.StatusCode.RESOURCE_EXHAUSTED
            | grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
        ):
            return KVError(text)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ConnectionLost(f"{endpoint}: no answer in time")
        case _:
            return ConnectionLost(text)


def _read(option: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConnectionLost(f"etcd.{option}: {path}: {error.strerror}") from error


def _check_tls(settings: EtcdSettings) -> None:
    """gRPC says nothing useful about a bad file; Python's own TLS names it."""
    for option, path in (("ca", settings.ca), ("cert", settings.cert), ("key", settings.key)):
        _read(option, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.ca:
        try:
            context.load_verify_locations(settings.ca)
        except ssl.SSLError as error:
            raise ConnectionLost(f"etcd.ca: {settings.ca}: not a PEM certificate ({error.reason})") from error
    if settings.cert:
        try:
            context.load_cert_chain(settings.cert, settings.key)
        except ssl.SSLError as error:
            what = f"{settings.cert} and {settings.key}"
            raise ConnectionLost(f"etcd.cert, etcd.key: {what}: not a PEM pair ({error.reason})") from error
