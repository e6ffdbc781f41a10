"""What clusters say, as rows: clustermesh changes -> identities, ips, nodes, status; and this host to them.

Rows have the source `mesh:<cluster>`. A cluster that is out of reach keeps its rows; the tables say since
when. The same code serves a shared etcd and the embedded store.
"""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from clustermesh import keep
from clustermesh.follow import Follower
from clustermesh.kv import KV
from clustermesh.remote import (
    SHARED_STORE,
    Change,
    ClusterChanged,
    ExportDeleted,
    ExportUpserted,
    IdentityDeleted,
    IdentityUpserted,
    IpDeleted,
    IpUpserted,
    Mesh,
    NodeDeleted,
    NodeUpserted,
    Remote,
    ServiceDeleted,
    ServiceUpserted,
    State,
    store_of,
)
from clustermesh.trust import Trust, version_warning
from clustermesh.wire import Cidr, Node, parse_cidr
from daemon.model.identity import Identity
from daemon.model.labels import Label, parse_label
from daemon.model.net import Prefix
from daemon.state.table import Followed
from daemon.state.tables import (
    IdentityRow,
    IpKey,
    IpRow,
    NodeKey,
    NodeRow,
    ServiceKey,
    ServiceRow,
    StatusRow,
    Tables,
)

log = logging.getLogger(__name__)

BULK = 100  # changes in one batch that are a listing, not life
SYNC_WAIT_S = 15.0  # how long the tables wait for the first complete listing before they count as synced, and
SYNC_WAITS = 8  # how often at most they do so while more of it is coming
SAVE_AFTER_S = 5.0  # what changed is on disk this much later, and
SAVE_SHARE = 50  # at most this small a part of the time is spent on that
RESOLVE_EVERY_S = 300.0  # names of stores
TOUCH_S = 30.0  # how exactly the disk knows when the store was last seen


Filled = Followed[Identity] | Followed[int] | Followed[NodeKey] | Followed[ServiceKey]


def _filled(tables: Tables) -> tuple[Filled, ...]:
    """The tables that clusters fill."""
    return (tables.identities, tables.ips, tables.nodes, tables.services, tables.exports)


class Arrival:
    """When the mesh's tables count as complete: everybody who is expected has told everything, or given up waiting."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._expected: set[str] = set()

    def expect(self, name: str) -> None:
        """Wait for this one too."""
        self._expected.add(name)

    def arrived(self, name: str) -> None:
        """This one has told what it has."""
        self._expected.discard(name)
        if not self._expected:
            for table in _filled(self._tables):
                table.mark_synced()


@dataclass(frozen=True, slots=True)
class Shared:
    """What all stores of a host have in common. `elsewhere`: clusters that have a store of their own."""

    arrival: Arrival
    ids: dict[int, str] = field(default_factory=dict)  # id -> cluster
    elsewhere: set[str] = field(default_factory=set)
    stores: tuple[str, ...] = ()  # hosts of the shared etcd: nobody speaks for them
    resolved: dict[str, frozenset[Cidr]] = field(default_factory=dict)  # their addresses


class MeshSource:
    """Follows every cluster of one store. `run` is the task; cancelling it leaves the rows as they are."""

    def __init__(
        self,
        tables: Tables,
        kv: KV,
        *,
        cluster_name: str,
        cluster_id: int,
        clusters: Mapping[str, int] | None = None,
        max_clusters: int = 255,
        prefixes: Mapping[str, Sequence[str]] | None = None,
        protected: Sequence[str] = (),
        only: str = "",
        name: str = "etcd",
        shared: Shared | None = None,
        keep: Path | None = None,
        stale_after_s: float = 0.0,
        sync_wait_s: float = SYNC_WAIT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """clusters: expected remote clusters, name -> id; without them every well-formed one is read.

        prefixes: per cluster the ranges it may speak for; absent: any that is not ours. protected: ranges of
        ours besides this host's addresses. only: the store is read for this cluster alone. keep: file for what
        the store says. stale_after_s: how long what others said outlives the connection; 0: for ever.
        """
        self._tables = tables
        self._kv = kv
        self._trust = Trust(
            cluster_name,
            cluster_id,
            max_clusters=max_clusters,
            clusters={one: number for one, number in (clusters or {}).items() if only in {"", one}},
            allowed={one: tuple(map(parse_cidr, texts)) for one, texts in (prefixes or {}).items()},
        )
        self._protected = tuple(map(parse_cidr, protected))
        self._shared = shared or Shared(Arrival(tables))
        self._shared.arrival.expect(only or name)
        parts = store_of(only) if only else SHARED_STORE
        self.mesh = Mesh(
            self._trust,
            parts,
            ids=self._shared.ids,
            elsewhere=set() if only else self._shared.elsewhere,
        )
        self.follower = Follower(kv, self.mesh, self._apply, name=name, clock=clock)
        self.follower.on_connection(self._connection)
        self._only = only
        self._name = name
        self._keep = keep
        self._kept = ""  # what is wrong with the file
        self._changed = False  # since it was written
        self._stale_after_s = stale_after_s
        self._expired = False
        self._sync_wait_s = sync_wait_s
        self._clock = clock
        self._synced = asyncio.Event()  # every cluster has told everything, or was refused
        self._since: dict[str, tuple[bool, float]] = {}  # status key -> ok and since when

    async def run(self) -> None:
        """For ever: keep the tables equal to the store, as far as it can be reached and believed."""
        await self._protect_host()
        if not self._synced.is_set():
            await self._restore()
        self._status_rows()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._mark_synced())
            if self._keep is not None:
                group.create_task(self._save_changes(self._keep))
            if self._stale_after_s:
                group.create_task(self._expire())
            if self._shared.stores:
                group.create_task(self._protect_stores())
            await self._host_changes()

    def reconnect(self, kv: KV, *, another: bool) -> None:
        """Follow this store instead, from the next `run` on; `another`: it is meant to hold other things."""
        self._kv = kv
        self.follower.use(kv, another=another)

    async def leave(self, name: str) -> None:
        """Forget a cluster, and what was kept of it if it has this store for itself."""
        await self.follower.take(self.mesh.leave(name))
        self._tables.status.delete(f"mesh:{name}")
        if self._only:
            self._shared.arrival.arrived(self._only)
            if self._keep is not None:
                self._keep.unlink(missing_ok=True)

    async def accept(self, name: str) -> int:
        """Believe the deletions of a cluster that are held; how many they were."""
        remote = self.mesh.remotes.get(name)
        held = self.mesh.counts(remote)["held"] if remote is not None else 0
        await self.follower.take(self.mesh.release([name]))
        return held

    async def _mark_synced(self) -> None:
        """The tables count as complete when all clusters have told everything, or when waiting any longer
        would leave this host without a policy for want of a store."""
        pages, waits = -1, 0
        while not self._synced.is_set() and self.follower.pages > pages and waits < SYNC_WAITS:
            pages, waits = self.follower.pages, waits + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._sync_wait_s):
                    await self._synced.wait()
        if not self._synced.is_set():
            waited_s = waits * self._sync_wait_s
            log.warning("%s: not synced after %g s, going on with what is known", self._name, waited_s)
        self._shared.arrival.arrived(self._only or self._name)

    def _look_whether_synced(self) -> None:
        states = {one.state for one in self.mesh.remotes.values()}
        if self.follower.complete and states <= {State.SYNCED, State.REFUSED}:
            self._synced.set()

    async def _host_changes(self) -> None:
        """No cluster may speak for this host's addresses, whenever they change."""
        wake = asyncio.Event()
        reader = self._tables.host.reader(wake)
        while True:
            await wake.wait()
            wake.clear()
            reader.take()
            await self._protect_host()

    async def _protect_host(self) -> None:
        host = self._tables.host.get("host")
        name, addresses = (host.name, host.addresses) if host is not None else ("", frozenset())
        stores = [one for found in self._shared.resolved.values() for one in found]
        await self.follower.take(self.mesh.protect(name, addresses, (*self._protected, *sorted(stores))))

    async def _protect_stores(self) -> None:
        """Nor for our store's addresses, which may change with its name."""
        loop = asyncio.get_running_loop()
        while True:
            for host in self._shared.stores:
                with contextlib.suppress(OSError):  # what was known stays
                    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                    self._shared.resolved[host] = frozenset(
                        parse_cidr(str(one[4][0]).partition("%")[0]) for one in found
                    )
            await self._protect_host()
            await asyncio.sleep(RESOLVE_EVERY_S)

    # -- on disk

    async def _restore(self) -> None:
        """Take in what the store said when it was last seen; it counts until the store says something else."""
        if self._keep is None:
            return
        try:
            header, seen_at = await asyncio.to_thread(self._kept_header, self._keep)
            self.follower.remember(header.store, header.revision, seen_at)
            await self.follower.take(self.mesh.restore(keep.pieces(self._keep)))
        except FileNotFoundError:
            return
        except (OSError, ValueError, keep.Unusable) as error:
            self._kept = f"{self._keep} {getattr(error, 'strerror', None) or error}"
            log.warning("%s; going on without what it says", self._kept)
            return
        log.info("%s: %d addresses as they were last known", self._name, len(self._tables.ips))
        self._connection()
        self._synced.set()
        self._shared.arrival.arrived(self._only or self._name)

    def _kept_header(self, path: Path) -> tuple[keep.Header, float]:
        """What was kept, if it may be used, and when the store was last seen. Raises OSError or keep.Unusable."""
        header, seen_at = keep.check(path), path.stat().st_mtime
        if header.own_cluster != self._trust.own_cluster:
            raise keep.Unusable(f"was written by a host of cluster {header.own_cluster}")
        if self._stale_after_s and self._clock() - seen_at > self._stale_after_s:
            raise keep.Unusable("is older than remote_stale_after")
        return header, seen_at

    async def _save_changes(self, path: Path) -> None:
        """Keep the file like the tables, without ever costing much."""
        while True:
            await asyncio.sleep(SAVE_AFTER_S)
            follower = self.follower
            if not follower.connected or not follower.store or not self._synced.is_set():
                continue
            took_s = 0.0
            try:
                if self._changed:
                    self._changed = False
                    began = time.process_time()
                    header = keep.Header(follower.store, follower.revision, self._trust.own_cluster)
                    await keep.save(path, header, self.mesh.dump())
                    took_s = time.process_time() - began
                else:
                    await asyncio.to_thread(_touch, path)
                self._kept = ""
            except OSError as error:
                self._changed = True
                if not self._kept:
                    log.warning("%s cannot be written: %s", path, error.strerror)
                self._kept = f"{path} cannot be written: {error.strerror}"
            await asyncio.sleep(took_s * SAVE_SHARE)

    async def _expire(self) -> None:
        """What others said does not outlive their store for longer than is set."""
        lost_at = time.monotonic() - max(0.0, self._clock() - (self.follower.lost_since or self._clock()))
        while True:
            await asyncio.sleep(min(5.0, self._stale_after_s / 4))
            if self.follower.connected:
                lost_at, self._expired = time.monotonic(), False
            elif not self._expired and time.monotonic() - lost_at > self._stale_after_s:
                log.warning(
                    "%s: out of reach for %g s, what it said expires", self._name, self._stale_after_s
                )
                self._expired = True
                await self.follower.take(self.mesh.expire())
                self._status_rows()

    # -- rows

    def _apply(self, changes: Sequence[Change]) -> None:
        if len(changes) >= BULK:
            # Rows live long and are in no cycles: without this the collector walks all of them again and
            # again, 0.2 s at a time for 100,000 of them.
            gc.freeze()
        self._changed = True
        for change in changes:
            source = sys.intern(f"mesh:{change.cluster}")  # one text for all the rows of a cluster
            match change:
                case IdentityUpserted():
                    labels = frozenset(map(_label, change.labels))
                    self._identity(Identity(change.identity), IdentityRow(labels, source))
                case IdentityDeleted():
                    self._identity_gone(Identity(change.identity), source)
                case IpUpserted():
                    row = IpRow(Identity(change.identity), change.name, change.namespace, change.node, source)
                    self._tables.ips.put(IpKey(Prefix(*change.cidr), source), row)
                case IpDeleted():
                    self._tables.ips.delete(IpKey(Prefix(*change.cidr), source))
                case NodeUpserted():
                    self._tables.nodes.put(
                        NodeKey(change.cluster, change.node.name), _node_row(change.node, source)
                    )
                case NodeDeleted():
                    self._tables.nodes.delete(NodeKey(change.cluster, change.name))
                case ClusterChanged():
                    self._cluster_changed(change.cluster)
                case _:
                    self._apply_service(change, source)

    def _apply_service(
        self, change: ServiceUpserted | ServiceDeleted | ExportUpserted | ExportDeleted, source: str
    ) -> None:
        services, exports = self._tables.services, self._tables.exports
        match change:
            case ServiceUpserted():
                one = change.service
                services.put(
                    ServiceKey(one.namespace, one.name, source), ServiceRow(one, is_global=one.shared)
                )
            case ServiceDeleted():
                services.delete(_service_key(change.name, source))
            case ExportUpserted():
                export = change.export
                exports.put(ServiceKey(export.namespace, export.name, source), export)
            case ExportDeleted():
                exports.delete(_service_key(change.name, source))

    def _cluster_changed(self, name: str) -> None:
        remote = self.mesh.remotes.get(name)
        if remote is not None:
            self._status_row(remote)
        else:
            self._tables.status.delete(f"mesh:{name}")
        self._look_whether_synced()

    def _identity(self, number: Identity, row: IdentityRow) -> None:
        """What this host itself defines is not overwritten by others."""
        old = self._tables.identities.get(number)
        if old is None or old.source.startswith("mesh:"):
            self._tables.identities.put(number, row)

    def _identity_gone(self, number: Identity, source: str) -> None:
        old = self._tables.identities.get(number)
        if old is not None and old.source == source:
            self._tables.identities.delete(number)

    # -- status

    def _connection(self) -> None:
        """The store was lost or found: the age of what we know is part of the tables."""
        lost_since = self.follower.lost_since
        for remote in self.mesh.remotes.values():
            source = f"mesh:{remote.name}"
            for table in _filled(self._tables):
                if lost_since:
                    table.stale_since[source] = lost_since
                else:
                    table.stale_since.pop(source, None)
        self._status_rows()
        self._look_whether_synced()

    def _status_rows(self) -> None:
        if not self._only:
            self._store_row()
        for remote in self.mesh.remotes.values():
            self._status_row(remote)

    def _store_row(self) -> None:
        """How the shared store is."""
        follower = self.follower
        text, hint = self._connection_text()
        details = {
            **self._connection_details(),
            "waiting": self.mesh.waiting,
            "strays": dict(self.mesh.strays),
            "lost_since": follower.lost_since,
        }
        self._put_status("mesh", StatusRow(follower.connected, text, hint, details=details))

    def _connection_text(self) -> tuple[str, str]:
        """The connection in words, and what to do about it."""
        follower = self.follower
        if follower.connected:
            return f"{self._name} connected, revision {follower.revision}", ""
        if follower.error:
            known = "what is known stays in force" if not self._expired else "what was known has expired"
            return (
                f"unreachable: {follower.error}",
                f"{known}; check the endpoints, the certificates and the network",
            )
        return "connecting", ""

    def _connection_details(self) -> dict[str, object]:
        follower = self.follower
        return {
            "revision": follower.revision,
            "reconnects": follower.reconnects,
            "denied": dict(follower.denied),
            "version": self._kv.version,
            "warnings": [one for one in (version_warning(self._kv.version), self._kept) if one],
        }

    def _status_row(self, remote: Remote) -> None:
        counts = self.mesh.counts(remote)
        state = remote.state
        lost = not self.follower.connected
        text = state.value
        hint = ""
        if remote.fault:
            text, hint = f"refused: {remote.fault}", "fix cilium/cluster-config, or the clusters of this host"
        elif remote.held_since:
            text = f"{counts['held']} deletions held: too much vanished at once"
            hint = f"believed after 5 minutes, or by: meshwall mesh accept {remote.name}"
        if lost and self._only:
            text, hint = self._connection_text()
        elif lost and self.follower.lost_since:
            text = f"{text}, stale: the store is out of reach"
        details: dict[str, object] = {
            "id": remote.config.id if remote.config else self._trust.clusters.get(remote.name, 0),
            "state": state.name.lower(),
            "connected": not lost,
            "stale_since": self.follower.lost_since,
            "cached": remote.cached,
            "own": remote.name == self._trust.own_cluster,
            "own_store": bool(self._only),
            **counts,
            "slowed": self.follower.slowed[remote.name],
            "refused_by_reason": dict(remote.refused),
            "refusals": dict(list(remote.refusals.items())[:20]),
            **(self._connection_details() if self._only else {}),
        }
        details["revision"] = max(remote.revision, self.follower.revision if self._only else 0)
        ok = state is State.SYNCED and not lost and not remote.held_since and not remote.fault
        self._put_status(f"mesh:{remote.name}", StatusRow(ok, text, hint, details=details))

    def _put_status(self, key: str, row: StatusRow) -> None:
        ok, since = self._since.get(key, (not row.ok, 0.0))
        if ok != row.ok:
            since = self._clock()
            self._since[key] = (row.ok, since)
        self._tables.status.put(key, replace(row, since=since))


@lru_cache(maxsize=4096)
def _label(text: str) -> Label:
    """Most labels belong to many identities: one object for all of them."""
    return parse_label(text)


def _service_key(name: str, source: str) -> ServiceKey:
    namespace, _, service = name.partition("/")
    return ServiceKey(namespace, service, source)


def _touch(path: Path) -> None:
    """The file's time says when the store was last seen."""
    if time.time() - path.stat().st_mtime > TOUCH_S:
        os.utime(path)


def _node_row(node: Node, source: str) -> NodeRow:
    addresses = tuple((one.type, Prefix(*parse_cidr(one.ip))) for one in node.addresses or () if one.ip)
    labels = frozenset(Label("k8s", key, value) for key, value in (node.labels or {}).items())
    return NodeRow(addresses, labels, Identity(node.identity), source)
