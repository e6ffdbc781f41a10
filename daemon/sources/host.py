"""This host: devices and addresses by netlink, labels from the settings and the node file.

Writes `devices`, `own`, the one row of `host`, `identities[1]` and `status["host"]`. Without complete labels there is
no row of `host`; devices and addresses are told all the same: a policy that was enforced before has to cover them.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import K8S, Label, LabelSet
from daemon.model.net import Prefix
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents
from daemon.policy.reader import Reader
from daemon.sources import rtnetlink
from daemon.sources.safefiles import UnsafeError, opened_directory, read_file
from daemon.state.tables import LOCAL, HostRow, IdentityRow, StatusRow, Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0  # also without an event: a lost message, a node file that was edited
SETTLE_S = 0.002  # a new device brings some events in a row
SHARE = 4  # of the time at most one part in so many goes into dumps, when devices come and go all the time
LONGEST_SETTLE_S = 0.03
MAX_FILE_BYTES = 1 << 20
_LOOPBACK4 = Prefix(4, 127 << 24, 8)
_LOOPBACK6 = Prefix(6, 1, 128)


def own_addresses(prefixes: Iterable[Prefix]) -> frozenset[Prefix]:
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
        with rtnetlink.notifications() as channel:
            loop.add_reader(channel, _drain, channel, changed)
            try:
                while True:
                    changed.clear()
                    started = time.monotonic()
                    await self._look()
                    settle = SHARE * (time.monotonic() - started)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await changed.wait()
                    await asyncio.sleep(min(max(SETTLE_S, settle), LONGEST_SETTLE_S))
            finally:
                loop.remove_reader(channel)

    def reread(self) -> None:
        """Read the node file again; a change takes effect at once."""
        self._read_node_file()
        addresses = self._tables.own.get("own")
        if addresses is not None:
            self._put(addresses)

    async def _look(self) -> None:
        devices, addresses = await asyncio.to_thread(rtnetlink.dump)
        self._tables.devices.replace(devices)
        self._tables.devices.mark_synced()
        self._tables.own.put("own", own_addresses(addresses))
        self._read_node_file()
        self._put(self._tables.own["own"])

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

    def _put(self, addresses: frozenset[Prefix]) -> None:
        labels = self._label_set()
        if labels is None:
            self._status(
                ok=False,
                text="the labels of this host are not known yet: policy stays as it was",
                hint=f"{self._node_file} must exist and be readable; see `meshwall status --verbose`",
            )
            return
        tables = self._tables
        row = HostRow(self._name, self._cluster, self._cluster_id, labels, addresses)
        before = tables.host.get("host")
        if tables.host.put("host", row):
            _log(before, row)
        tables.identities.put(Identity(Reserved.HOST), IdentityRow(labels, LOCAL))
        tables.host.mark_synced()
        self._status(ok=True, text=f"{self._name}: {len(tables.devices)} devices, {len(addresses)} addresses")

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


def _drain(channel: socket.socket, changed: asyncio.Event) -> None:
    changed.set()
    with contextlib.suppress(BlockingIOError, OSError):  # ENOBUFS: something was lost, and we look anyway
        while channel.recv(65_536):
            pass
