"""Hubble's gRPC API: a unix socket that costs nothing until somebody connects, and TCP with certificates if configured.

gRPC takes about 20 MiB, which most hosts never need: the socket is ours, and its first connection starts the server
behind it. Every connection is then handed through; what is said on it is daemon/api/observer.py.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.api.app import listening
from daemon.flows.pipeline import FlowPipeline
from daemon.state.tables import Tables

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

log = logging.getLogger(__name__)

CONNECTIONS = 64  # at a time on the unix socket; more are closed at once
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class HubbleSettings:
    """`path` and `behind` are unix sockets: ours and gRPC's. `listen` is host:port or empty; the rest are PEM files."""

    path: Path
    behind: Path
    group: str
    listen: str = ""
    cert: str = ""
    key: str = ""
    client_ca: str = ""


class HubbleApi:
    """The sockets of the Hubble API. `run` is the task."""

    def __init__(self, settings: HubbleSettings, pipeline: FlowPipeline, tables: Tables) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._tables = tables
        self._server: grpc.aio.Server | None = None
        self._starting = asyncio.Lock()
        self._open = 0

    async def run(self) -> None:
        """Serve until cancelled. OSError when a socket cannot be made or a certificate cannot be read."""
        channel = listening(self._settings.path, self._settings.group)
        front = await asyncio.start_unix_server(self._connected, sock=channel, limit=CHUNK)
        try:
            if self._settings.listen:
                await self._start()
            await front.serve_forever()
        finally:
            front.close()
            if self._server:
                await self._server.stop(grace=0.5)
                self._server = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS:
            log.warning("hubble: more than %d connections, one was refused", CONNECTIONS)
            writer.close()
            return
        self._open += 1
        try:
            await self._start()
            inner_reader, inner_writer = await asyncio.open_unix_connection(self._settings.behind)
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        except OSError as error:
            log.warning("hubble: %s", error)
        finally:
            self._open -= 1
            writer.close()

    async def _start(self) -> None:
        async with self._starting:
            if self._server is None:
                self._server = await self._serve()

    def _serve(self) -> "Awaitable[grpc.aio.Server]":
        from daemon.api import observer  # noqa: PLC0415 - 20 MiB of gRPC that not everyone needs

        settings = self._settings
        port = int(settings.listen.rpartition(":")[2]) if settings.listen else observer.PORT
        services = observer.Observer(self._pipeline, self._tables, port=port, tls=bool(settings.listen))
        return observer.serve(services, _listener(settings))


def _listener(settings: HubbleSettings) -> "Callable[[grpc.aio.Server], None]":
    import grpc  # noqa: PLC0415

    def listen(server: "grpc.aio.Server") -> None:
        with suppress(FileNotFoundError):
            settings.behind.unlink()
        server.add_insecure_port(f"unix:{settings.behind}")
        if settings.listen:
            server.add_secure_port(settings.listen, _credentials(settings))
            log.info("hubble: listening on %s, for clients with a certificate", settings.listen)

    def _credentials(settings: HubbleSettings) -> "grpc.ServerCredentials":
        """Read again at every handshake, so that renewed certificates need no restart."""

        def fetch() -> "grpc.ServerCertificateConfiguration":
            pair = (Path(settings.key).read_bytes(), Path(settings.cert).read_bytes())
            return grpc.ssl_server_certificate_configuration([pair], Path(settings.client_ca).read_bytes())

        return grpc.dynamic_ssl_server_credentials(fetch(), fetch, require_client_authentication=True)

    return listen


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one side ends; a slow reader slows the sender."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()
