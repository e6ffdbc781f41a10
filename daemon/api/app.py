"""The HTTP API on the unix socket: who may ask, who may change, and errors as JSON."""

import asyncio
import grp
import json
import logging
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Middleware

from daemon.runtime.auditlog import AuditLog

log = logging.getLogger(__name__)

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 4 << 20
ROWS_AT_ONCE = 500  # written between two turns of the loop
_READS = ("GET", "HEAD")
_UCRED = struct.Struct("iII")


class Peer(NamedTuple):
    """Who is at the other end of the unix socket."""

    pid: int
    uid: int
    gid: int


class ApiError(Exception):
    """An answer that is not 200; `text` is for a person."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Api:
    """The application and its socket. `run` is the task."""

    def __init__(
        self, path: Path, group: str, routes: Iterable[web.RouteDef], audit: AuditLog | None = None
    ) -> None:
        self._path = path
        self._group = group
        self._routes = list(routes)
        self._audit = audit
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled. OSError when the socket cannot be made."""
        app = web.Application(middlewares=[_guard(self._audit)], client_max_size=MAX_BODY_BYTES)
        app.add_routes(self._routes)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        channel = listening(self._path, self._group)
        try:
            await web.SockSite(runner, channel).start()
            self.listening.set()
            await asyncio.Event().wait()
        finally:
            self.listening.clear()
            await runner.cleanup()


def prepare_directory(path: Path, group: str) -> None:
    """A directory for the socket that only root and the group can enter."""
    path.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):
        os.chown(path, -1, _gid(group))
        path.chmod(0o750)


def listening(path: Path, group: str) -> socket.socket:
    """A unix socket that root and the group may use. OSError when it cannot be made."""
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()  # of a daemon that is gone: the lock says that we are the only one
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _umask(0o177):
        channel.bind(str(path))
    with suppress(PermissionError):
        os.chown(path, -1, _gid(group))
    path.chmod(0o660)
    return channel


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def _gid(group: str) -> int:
    """Our own group where there is none of that name: then only root may ask."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return os.getegid()


def peer_of(request: web.Request) -> Peer | None:
    """From the kernel, not from the request."""
    shown = request.get_extra_info("socket")
    if shown is None:
        return None
    with socket.socket(fileno=os.dup(shown.fileno())) as channel:  # uvloop's object lacks getsockopt
        if channel.family != socket.AF_UNIX:
            return None
        return Peer(*_UCRED.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def user_name(uid: int) -> str:
    """The name of a user, or `uid 1234` for one without."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _guard(audit: AuditLog | None) -> Middleware:
    """Reading is for those who can open the socket, changing for root (or the user that we run as).

    Every request to change something is recorded, refused ones too.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method in _READS:
            return await _answered(request, handler)
        peer = peer_of(request)
        if peer is None or peer.uid not in (0, os.geteuid()):
            log.warning("refused %s %s to %s", request.method, request.path, peer)
            answer: web.StreamResponse = _error(403, "only root may change something")
        else:
            log.info("%s %s by uid %d, pid %d", request.method, request.path, peer.uid, peer.pid)
            answer = await _answered(request, handler)
        if audit is not None:
            await asyncio.to_thread(
                audit.write,
                "api",
                user_name(peer.uid) if peer else "unknown",
                pid=peer.pid if peer else 0,
                request=f"{request.method} {request.path_qs}",
                status=answer.status,
            )
        return answer

    return guard


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path}: {error.reason}")
    except ApiError as error:
        return _error(error.status, str(error))
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _error(500, "internal error; the journal of meshwalld has the details")


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def stream_rows(
    request: web.Request, head: Json, name: str, rows: Iterable[Json]
) -> web.StreamResponse:
    """`{**head, name: [rows]}`, written as it is made: a million rows are never in memory at once."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    opening = json.dumps(head)[:-1]
    pending = [f"{opening}, {json.dumps(name)}: [" if head else f"{{{json.dumps(name)}: ["]
    separator = "\n"
    for row in rows:
        pending.append(f"{separator}{json.dumps(row)}")
        separator = ",\n"
        if len(pending) >= ROWS_AT_ONCE:
            await response.write("".join(pending).encode())
            await asyncio.sleep(0)  # a write that fits into the buffer does not wait
            pending.clear()
    await response.write(("".join(pending) + "\n]}\n").encode())
    return response
