"""This host: devices and addresses by netlink, labels from the settings and the node file.

Writes the one row of `host`, `identities[1]` and `status["host"]`. Without complete labels there is no row.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.iproute.linux import IPRoute

from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import K8S, Label, LabelSet
from daemon.model.net import Prefix, packed_prefix
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents
from daemon.policy.reader import Reader
from daemon.sources.safefiles import UnsafeError, opened_directory, read_file
from daemon.state.tables import LOCAL, Device, HostRow, IdentityRow, StatusRow, Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # also without an event: a lost message, a node file that was edited
SETTLE_S = 0.01  # a new device brings some events in a row
MAX_FILE_BYTES = 1 << 20
_RTMGRP = 0x1 | 0x10 | 0x100  # links, IPv4 addresses, IPv6 addresses
_IFF_UP = 1
_LOOPBACK4 = Prefix(4, 127 << 24, 8)
_LOOPBACK6 = Prefix(6, 1, 128)


@dataclass(frozen=True, slots=True)
class Links:
    """What netlink says: devices in index order, and every address that is the host's own."""

    devices: tuple[Device, ...]
    addresses: frozenset[Prefix]


def own_addresses(prefixes: Iterator[Prefix]) -> frozenset[Prefix]:
    """Without loopback ranges, which never come over a wire."""
    return frozenset(
        one for one in prefixes if one != _LOOPBACK6 and not (one.family == 4 and _LOOPBACK4.contains(one))
    )


def parse_node_file(text: str, file: str) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """`labels: {key: value}`; with a problem there are no labels."""
    reader = Reader(file)
    labels: dict[str, str] = {}
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            reader.problems.append(document)
        else:
            labels |= _labels(reader, document)
    return ({} if reader.failed else labels), tuple(reader.problems)


def _labels(reader: Reader, root: Node) -> dict[str, str]:
    node = reader.mapping(root, "", ("labels",), ("labels",)).get("labels")
    if node is None or not reader.expect(node, "labels", "mapping"):
        return {}
    return {key: reader.text(value, f"labels.{key}") for key, value in node.fields.items()}


class HostSource:
    """Keeps the host row true. `run` is the task."""

    def __init__(
        self,
        tables: Tables,
        *,
        name: str,
        cluster: str,
        cluster_id: int,
        labels: Mapping[str, str],
        node_file: Path | None = None,
        owner_check: bool = True,
    ) -> None:
        self._tables = tables
        self._name = name
        self._cluster = cluster
        self._cluster_id = cluster_id
        self._labels = dict(labels)
        self._node_file = node_file
        self._owner_check = owner_check
        self._node_labels: dict[str, str] | None = {} if node_file is None else None
        self._since: tuple[bool, float] = (True, time.time())

    async def run(self) -> None:
        """For ever; OSError when netlink fails."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        with _notifications() as channel:
            loop.add_reader(channel, _drain, channel, changed)
            try:
                while True:
                    changed.clear()
                    await self._look()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await changed.wait()
                    await asyncio.sleep(SETTLE_S)
            finally:
                loop.remove_reader(channel)

    def reread(self) -> None:
        """Read the node file again; a change takes effect at once."""
        self._read_node_file()
        row = self._tables.host.get("host")
        if row is not None:
            self._put(Links(row.devices, row.addresses))

    async def _look(self) -> None:
        links = await asyncio.to_thread(_dump)
        self._read_node_file()
        self._put(links)

    def _read_node_file(self) -> None:
        """A file that is missing or broken leaves the labels as they were."""
        if self._node_file is None:
            return
        path = self._node_file
        try:
            with opened_directory(path.parent, owner_check=self._owner_check) as handle:
                _, text = read_file(
                    handle, path.name, most_bytes=MAX_FILE_BYTES, owner_check=self._owner_check
                )
            labels, problems = parse_node_file(text, str(path))
        except (OSError, UnsafeError) as error:
            problems = (Problem(str(path), 0, 0, "", getattr(error, "strerror", None) or str(error)),)
        if not problems:
            self._node_labels = labels
        if problems != self._tables.problems.get(str(path)):
            for one in problems:
                log.warning("%s", one)
        if problems:
            self._tables.problems.put(str(path), problems)
        else:
            self._tables.problems.delete(str(path))

    def _label_set(self) -> LabelSet | None:
        if self._node_labels is None:
            return None
        both = self._node_labels | self._labels
        return reserved_labels(Identity(Reserved.HOST)) | {
            Label(K8S, key, text) for key, text in both.items()
        }

    def _put(self, links: Links) -> None:
        labels = self._label_set()
        if labels is None:
            self._status(
                ok=False,
                text="the labels of this host are not known yet: policy stays as it was",
                hint=f"{self._node_file} must exist and be readable; see `meshwall status --verbose`",
            )
            return
        tables = self._tables
        row = HostRow(self._name, self._cluster, self._cluster_id, labels, links.addresses, links.devices)
        before = tables.host.get("host")
        if tables.host.put("host", row):
            _log(before, row)
        tables.identities.put(Identity(Reserved.HOST), IdentityRow(labels, LOCAL))
        tables.host.mark_synced()
        self._status(
            ok=True, text=f"{self._name}: {len(links.devices)} devices, {len(links.addresses)} addresses"
        )

    def _status(self, *, ok: bool, text: str, hint: str = "") -> None:
        if self._since[0] != ok:
            self._since = (ok, time.time())
        self._tables.status.put("host", StatusRow(ok, text, hint, self._since[1]))


def _log(before: HostRow | None, now: HostRow) -> None:
    old = before.addresses if before else frozenset()
    if came := now.addresses - old:
        log.info("own addresses: %s", ", ".join(map(str, sorted(came))))
    if went := old - now.addresses:
        log.info("own addresses no more: %s", ", ".join(map(str, sorted(went))))


@contextlib.contextmanager
def _notifications() -> Iterator[socket.socket]:
    """A netlink socket that hears of every change.

    pyroute2's asyncio classes need a datagram endpoint, which uvloop refuses for AF_NETLINK; and all we want
    to know is that something changed, since a dump costs a few milliseconds and cannot be out of step.
    """
    flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE) as channel:
        channel.bind((0, _RTMGRP))
        yield channel


def _drain(channel: socket.socket, changed: asyncio.Event) -> None:
    changed.set()
    with contextlib.suppress(BlockingIOError, OSError):  # ENOBUFS: something was lost, and we look anyway
        while channel.recv(65_536):
            pass


def _dump() -> Links:
    """In a thread, where pyroute2 makes an event loop of its own: under uvloop it cannot work."""
    with IPRoute() as route:
        devices = sorted((_device(one) for one in route.get_links()), key=lambda one: one.index)
        return Links(tuple(devices), own_addresses(_addresses(route)))


def _device(message: Any) -> Device:
    return Device(
        str(message.get("ifname") or ""),
        int(message["index"]),
        bool(message["flags"] & _IFF_UP),
        str(message.get("address") or ""),
        int(message.get("mtu") or 0),
    )


def _addresses(route: IPRoute) -> Iterator[Prefix]:
    for message in route.get_addr():
        text = message.get("local") or message.get("address")  # point to point: `address` is the other end
        if text:
            family = socket.AF_INET6 if ":" in text else socket.AF_INET
            yield packed_prefix(socket.inet_pton(family, text))
