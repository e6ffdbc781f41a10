"""The identities file: what a host without etcd knows of its peers, put into the embedded store.

    clusters: {beta: 2}                # further clusters and their ids; our own is known
    identities:
      - id: 131073                     # within its cluster's range
        labels: ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod"]
        addresses: [10.1.0.5, fd00:1::5, 10.1.2.0/24]

A file with an error changes nothing: what it said before stays.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.kv import KV
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents
from daemon.policy.reader import Reader
from daemon.state.tables import Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Static:
    """Keys and values to put, and what was wrong; with problems there are no keys."""

    keys: Mapping[str, bytes]
    problems: tuple[Problem, ...]


def parse_static(text: str, file: str, clusters: Mapping[str, int], max_clusters: int = 255) -> Static:
    """The keys of an identities file. clusters: name -> id of those known already, our own among them."""
    reader = Reader(file)
    keys: dict[str, bytes] = {}
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            reader.problems.append(document)
        elif document.kind != "null":
            keys |= _document(reader, document, clusters, max_clusters)
    return Static({} if reader.failed else keys, tuple(reader.problems))


def _document(reader: Reader, root: Node, known: Mapping[str, int], max_clusters: int) -> dict[str, bytes]:
    fields = reader.mapping(root, "", ("clusters", "identities"))
    clusters = dict(known) | _clusters(reader, fields.get("clusters"), max_clusters)
    keys = {
        wire.config_key(name): wire.encode_config(wire.ClusterConfig(number, max_clusters=max_clusters))
        for name, number in clusters.items()
    }
    names = {number: name for name, number in clusters.items()}
    for node, path in reader.items(fields.get("identities"), "identities"):
        keys |= _identity(reader, node, path, names, max_clusters)
    return keys


def _clusters(reader: Reader, node: Node | None, max_clusters: int) -> dict[str, int]:
    if node is None or not reader.expect(node, "clusters", "mapping"):
        return {}
    found = {}
    for name, value in node.fields.items():
        if not wire.valid_cluster_name(name):
            reader.fail(
                node.keys[name],
                f"clusters.{name}",
                "not a cluster name: lower case, digits and -, 32 at most",
            )
        elif value.kind != "number" or not value.text.isdigit() or not 1 <= int(value.text) <= max_clusters:
            reader.fail(
                value, f"clusters.{name}", f"expected an id of 1..{max_clusters}, found {value.shown()}"
            )
        else:
            found[name] = int(value.text)
    return found


def _identity(
    reader: Reader, node: Node, path: str, names: Mapping[int, str], max_clusters: int
) -> dict[str, bytes]:
    fields = reader.mapping(node, path, ("id", "labels", "addresses"), ("id",))
    if "id" not in fields:
        return {}
    written = fields["id"]
    if written.kind != "number" or not written.text.isdigit():
        reader.fail(written, f"{path}.id", f"expected a number, found {written.shown()}")
        return {}
    number = int(written.text)
    cluster = names.get(wire.identity_cluster(number, max_clusters))
    if number < wire.RESERVED_BELOW or wire.identity_scope(number) or cluster is None:
        reader.fail(
            written,
            f"{path}.id",
            f"{number} is in the range of no cluster named here ({_ranges(names, max_clusters)})",
        )
        return {}
    labels = [reader.text(one, where) for one, where in reader.items(fields.get("labels"), f"{path}.labels")]
    keys = {wire.identity_key(number): wire.encode_identity(labels, cluster)}
    for one, where in reader.items(fields.get("addresses"), f"{path}.addresses"):
        try:
            entry = wire.ip_entry(reader.text(one, where), number)
            keys[wire.ip_key(entry.prefix)] = wire.encode_ip(entry)
        except Malformed as error:
            reader.fail(one, where, str(error))
    return keys


def _ranges(names: Mapping[int, str], max_clusters: int) -> str:
    shown = []
    for number, name in sorted(names.items()):
        first, last = wire.identity_range(number, max_clusters)
        shown.append(f"{name}: {first}..{last}")
    return ", ".join(shown)


class IdentitiesFile:
    """Keeps a store equal to an identities file. `run` is the task; a missing file is an empty one."""

    def __init__(
        self,
        path: Path,
        kv: KV,
        tables: Tables,
        *,
        cluster_name: str,
        cluster_id: int,
        clusters: Mapping[str, int] | None = None,
        max_clusters: int = 255,
    ) -> None:
        self._path = path
        self._kv = kv
        self._tables = tables
        self._clusters = {cluster_name: cluster_id, **(clusters or {})}
        self._max_clusters = max_clusters
        self._written: Mapping[str, bytes] = {}
        self._stamp: tuple[int, int, int] | None = (0, 0, 0)  # of the file as it was last read

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Read the file if it has changed, and put the difference."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        gone = stamp is None and bool(self._written)
        self._stamp = stamp
        if gone:
            log.warning(
                "%s is gone: what it said stays in force until it is back or we start anew", self._path
            )
            return
        static = await asyncio.to_thread(self._read)
        self._tables.problems.put(str(self._path), static.problems)
        for problem in static.problems:
            log.warning("%s", problem)
        if not static.problems:
            await feed(self._kv, self._written, static.keys)
            self._written = static.keys

    def _read(self) -> Static:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            return Static({}, (Problem(str(self._path), 0, 0, "", str(error)),))
        return parse_static(text or "{}", str(self._path), self._clusters, self._max_clusters)


async def feed(kv: KV, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
    """Put what is new or different, then delete what is no longer wanted."""
    for key, value in after.items():
        if before.get(key) != value:
            await kv.put(key, value)
    for key in before.keys() - after.keys():
        await kv.delete(key)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
