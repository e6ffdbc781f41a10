"""One etcd for each remote cluster, set up by the files of a directory, in the format of Cilium's own.

The name of a file is the name of the cluster; files named like our own cluster, and files without `endpoints:`,
mean nothing. Links are followed, for secrets are projected by links. A cluster comes, reconnects and goes with its
file; a file with a mistake leaves its cluster as it is, and the others too.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from asyncinotify import Inotify, Mask

from clustermesh import wire
from clustermesh.kv import KV
from clustermesh.settings import EtcdSettings, EtcdSettingsError
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents
from daemon.policy.reader import Reader
from daemon.runtime.tasks import Tasks
from daemon.sources.mesh import MeshSource, Shared
from daemon.sources.safefiles import UnsafeError, opened_directory, read_file
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 16
MAX_FILES = 511
LOOK_EVERY_S = 60.0  # for changes behind links that point elsewhere
SETTLE_S = 0.05
_EVENTS = (
    Mask.CLOSE_WRITE | Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.ATTRIB
    | Mask.DELETE_SELF | Mask.MOVE_SELF
)  # fmt: skip
_TEXTS = {
    "trusted-ca-file": "ca", "ca-file": "ca", "cert-file": "cert", "key-file": "key", "username": "username",
    "password": "password",
}  # fmt: skip
_SWITCHES = ("insecure-transport", "insecure-skip-tls-verify")
_TUNING = (
    "auto-sync-interval", "dial-timeout", "dial-keep-alive-time", "dial-keep-alive-timeout", "permit-without-stream",
    "max-call-send-msg-size", "max-call-recv-msg-size", "reject-old-cluster",
)  # fmt: skip


def parse_remote(text: str, file: str) -> EtcdSettings | tuple[Problem, ...]:
    """The settings in a file of the original format, or what is wrong with it."""
    reader = Reader(file)
    roots = []
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            reader.problems.append(document)
        elif document.kind != "null":
            roots.append(document)
    if len(roots) > 1:
        reader.fail(roots[1], "", "expected one document")
    if roots and not reader.failed:
        return _settings(reader, roots[0])
    return tuple(reader.problems) or (Problem(file, 0, 0, "", "is empty, expected `endpoints:`"),)


def _settings(reader: Reader, root: Node) -> EtcdSettings | tuple[Problem, ...]:
    fields = reader.mapping(root, "", ("endpoints", *_TEXTS, *_SWITCHES, *_TUNING), ("endpoints",))
    endpoints = [reader.text(one, where) for one, where in reader.items(fields.get("endpoints"), "endpoints")]
    texts = {_TEXTS[name]: reader.text(fields[name], name) for name in _TEXTS if name in fields}
    switches = {name: fields[name].text in {"true", "yes", "on"} for name in _SWITCHES if name in fields}
    if switches.get("insecure-skip-tls-verify"):
        message = "is not supported: a server whose name is not checked could be anybody"
        reader.fail(fields["insecure-skip-tls-verify"], "insecure-skip-tls-verify", message)
    if not reader.failed:
        try:
            return EtcdSettings(
                tuple(endpoints),
                ca=texts.get("ca", ""),
                cert=texts.get("cert", ""),
                key=texts.get("key", ""),
                username=texts.get("username", ""),
                password=texts.get("password", ""),
                insecure_transport=switches.get("insecure-transport", False),
            )
        except EtcdSettingsError as error:
            reader.fail(root, "", str(error))
    return tuple(reader.problems)


@dataclass(frozen=True, slots=True)
class _Found:
    """A file as it was read."""

    digest: bytes
    settings: EtcdSettings | None
    problem: str = ""


def _understood(text: str, path: Path, digest: bytes) -> _Found:
    if not wire.valid_cluster_name(path.name):
        return _Found(digest, None, f"{path}: the file's name is not a cluster name")
    settings = parse_remote(text, str(path))
    if isinstance(settings, EtcdSettings):
        return _Found(digest, settings)
    return _Found(digest, None, str(settings[0]))


class _Cluster:
    """A cluster that is followed: its source, its store, and the task that keeps both alive."""

    def __init__(self, found: _Found, kv: KV, source: MeshSource, tasks: Tasks) -> None:
        self.found = found
        self.kv = kv
        self.source = source
        self.tasks = tasks


class MeshDirectory:
    """Follows each cluster that has a file. `run` is the task; cancelling it leaves the rows as they are.

    build: makes the source of a cluster over a store. connect: makes a store of settings.
    """

    def __init__(
        self,
        tables: Tables,
        directory: Path,
        *,
        own_cluster: str,
        shared: Shared,
        build: Callable[[str, KV], MeshSource],
        connect: Callable[[EtcdSettings], KV],
        took_over: Callable[[str], Awaitable[None]],
        gave_back: Callable[[], None],
        owner_check: bool = True,
    ) -> None:
        """took_over, gave_back: called when a cluster gets a store of its own, and when it has none any more."""
        self._tables = tables
        self._directory = directory
        self._own = own_cluster
        self._shared = shared
        self._build = build
        self._connect = connect
        self._took_over = took_over
        self._gave_back = gave_back
        self._owner_check = owner_check
        self._clusters: dict[str, _Cluster] = {}
        self._bad: dict[str, str] = {}  # what is wrong, by file
        self._fault = ""
        shared.arrival.expect(str(directory))

    async def run(self) -> None:
        """For ever. A directory that is missing is waited for."""
        try:
            while True:
                try:
                    await self._watch()
                except OSError:
                    await self._look()
                    await asyncio.sleep(1.0)
        finally:
            for one in self._clusters.values():
                await one.tasks.stop()
                await one.kv.close()

    async def accept(self, name: str) -> int:
        """Believe the deletions of a cluster that are held; how many they were."""
        one = self._clusters.get(name)
        return await one.source.accept(name) if one is not None else 0

    async def _watch(self) -> None:
        """Until something changes, then once more. Raises OSError when there is no directory."""
        with Inotify(sync_timeout=0) as inotify:
            inotify.add_watch(self._directory, _EVENTS)
            for name in _names(self._directory):
                with contextlib.suppress(OSError):
                    inotify.add_watch(
                        self._directory / name, Mask.CLOSE_WRITE | Mask.DELETE_SELF | Mask.ATTRIB
                    )
            await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await inotify.get()
                    await asyncio.sleep(SETTLE_S)

    async def _look(self) -> None:
        """Make the clusters that are followed those that have a file."""
        try:
            found = await asyncio.to_thread(self._scan)
            self._fault = ""
        except FileNotFoundError:
            found, self._fault = {}, ""  # nobody wants remote clusters yet, or any more
        except (OSError, UnsafeError) as error:
            self._fault = f"{self._directory} {getattr(error, 'strerror', None) or error}"
            log.warning("%s", self._fault)
            self._status()
            return
        self._bad = {}
        for name in self._clusters.keys() - found.keys():
            await self._remove(name)
        for name, one in found.items():
            await self._take(name, one)
        self._shared.arrival.arrived(str(self._directory))
        self._status()

    def _scan(self) -> dict[str, _Found]:
        """In a thread. Raises OSError or UnsafeError."""
        with opened_directory(self._directory, owner_check=self._owner_check) as handle:
            names = [one for one in _names(self._directory) if one != self._own]
            if len(names) > MAX_FILES:
                raise UnsafeError(f"holds {len(names)} files, the limit is {MAX_FILES}")
            found = {name: self._read(handle, name) for name in names}
        return {name: one for name, one in found.items() if one is not None}

    def _read(self, handle: int, name: str) -> _Found | None:
        """What a file says; None if it is none of ours."""
        path = self._directory / name
        if not path.is_file():
            return None
        try:
            _, text = read_file(
                handle, name, most_bytes=MAX_FILE_BYTES, owner_check=self._owner_check, follow=True
            )
        except (OSError, UnsafeError) as error:
            return _Found(b"", None, f"{path} {getattr(error, 'strerror', None) or error}")
        digest = hashlib.sha256(text.encode()).digest()
        before = self._clusters.get(name)
        if before is not None and before.found.digest == digest:
            return before.found
        return _understood(text, path, digest) if "endpoints:" in text else None

    async def _take(self, name: str, found: _Found) -> None:
        one = self._clusters.get(name)
        if found.settings is None:
            self._bad[name] = found.problem
            log.warning("%s", found.problem)
        elif one is None:
            self._shared.elsewhere.add(name)
            await self._took_over(name)
            kv = self._connect(found.settings)
            source = self._build(name, kv)
            self._clusters[name] = _Cluster(found, kv, source, self._started(name, source))
        elif one.found is not found:
            log.info("%s: its file changed, connecting anew", name)
            await one.tasks.stop()
            await one.kv.close()
            before = one.found.settings
            another = before is not None and not set(before.endpoints) & set(found.settings.endpoints)
            one.found, one.kv = found, self._connect(found.settings)
            one.source.reconnect(one.kv, another=another)
            one.tasks = self._started(name, one.source)

    def _started(self, name: str, source: MeshSource) -> Tasks:
        def failed(task: str, reason: str | None) -> None:
            key = f"task:{task}"
            if reason is None:
                self._tables.status.delete(key)
            else:
                hint = "it is started again by itself; the journal of meshwalld has the details"
                self._tables.status.put(key, StatusRow(ok=False, text=reason, hint=hint))

        tasks = Tasks(failed)
        tasks.start(f"mesh {name}", source.run)
        return tasks

    async def _remove(self, name: str) -> None:
        log.info("%s: its file is gone, and with it what it said", name)
        one = self._clusters.pop(name)
        await one.tasks.stop()
        await one.source.leave(name)
        await one.kv.close()
        self._shared.elsewhere.discard(name)
        self._gave_back()

    def _status(self) -> None:
        problems = [*([self._fault] if self._fault else []), *(self._bad[one] for one in sorted(self._bad))]
        text = f"{len(self._clusters)} clusters with a store of their own in {self._directory}"
        hint = ""
        if problems:
            text, hint = (
                "; ".join(problems[:3]),
                "what its cluster said before stays; the other clusters go on",
            )
        details: Mapping[str, object] = {"clusters": sorted(self._clusters), "problems": problems}
        self._tables.status.put("mesh files", StatusRow(not problems, text, hint, details=details))


def _names(directory: Path) -> list[str]:
    """The files that can mean something. Raises OSError."""
    return sorted(one.name for one in directory.iterdir() if not one.name.startswith("."))


def ports(directory: Path) -> Iterator[int]:
    """The ports of all stores of a directory: the way to them must stay open. Blocks; reads what it can."""
    for _, settings in read_directory(directory):
        if isinstance(settings, EtcdSettings):
            yield from settings.ports


def read_directory(directory: Path) -> Iterator[tuple[str, EtcdSettings | str]]:
    """Cluster -> how its store is reached, or what is wrong with its file. Blocks; reads what it can."""
    with contextlib.suppress(OSError, UnsafeError), opened_directory(directory, owner_check=False) as handle:
        for name in _names(directory):
            with contextlib.suppress(OSError, UnsafeError):
                text = read_file(handle, name, most_bytes=MAX_FILE_BYTES, owner_check=False, follow=True)[1]
                if "endpoints:" in text:
                    found = _understood(text, directory / name, b"")
                    yield name, found.settings or found.problem
