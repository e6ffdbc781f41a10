"""What clusters say, as rows: clustermesh changes -> identities, ips, nodes, status; and this host to them.

Rows have the source `mesh:<cluster>`. A cluster that is out of reach keeps its rows; the tables say since
when. The same code serves a shared etcd and the embedded store.
"""

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from clustermesh.follow import Follower
from clustermesh.kv import KV
from clustermesh.publish import Host, Publisher, publishable
from clustermesh.remote import (
    SHARED_STORE,
    Change,
    ClusterChanged,
    IdentityDeleted,
    IdentityUpserted,
    IpDeleted,
    IpUpserted,
    Mesh,
    NodeDeleted,
    NodeUpserted,
    Part,
    Remote,
    State,
)
from clustermesh.trust import Trust
from clustermesh.wire import Cidr, Node, parse_cidr
from daemon.model.identity import Identity
from daemon.model.labels import Label, parse_label
from daemon.model.net import Prefix, ip_text
from daemon.state.tables import HostRow, IdentityRow, IpKey, IpRow, NodeKey, NodeRow, StatusRow, Tables

log = logging.getLogger(__name__)

BULK = 100  # changes in one batch that are a listing, not life
SYNC_WAIT_S = 15.0  # how long the tables wait for the first complete listing before they count as synced


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
        allowed: Mapping[str, Sequence[str]] | None = None,
        trust: Trust | None = None,
        parts: Sequence[Part] = SHARED_STORE,
        name: str = "etcd",
        sync_wait_s: float = SYNC_WAIT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """clusters: expected remote clusters, name -> id; without them every well-formed one is read.

        allowed: per cluster the prefixes it may speak for; absent: any that is not ours.
        """
        self._tables = tables
        self._trust = trust or Trust(
            cluster_name,
            cluster_id,
            max_clusters=max_clusters,
            clusters=dict(clusters or {}),
            allowed={one: tuple(map(parse_cidr, texts)) for one, texts in (allowed or {}).items()},
        )
        self.mesh = Mesh(self._trust, parts, cidr=_prefix)
        self.follower = Follower(kv, self.mesh, self._apply, name=name, clock=clock)
        self.follower.on_connection(self._connection)
        self._name = name
        self._sync_wait_s = sync_wait_s
        self._clock = clock
        self._synced = asyncio.Event()  # every cluster has told everything, or was refused
        self._since: dict[str, tuple[bool, float]] = {}  # status key -> ok and since when

    async def run(self) -> None:
        """For ever: keep the tables equal to the store, as far as it can be reached and believed."""
        await self._protect_host()
        self._status_rows()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._mark_synced())
            await self._host_changes()

    async def _mark_synced(self) -> None:
        """The tables count as complete when all clusters have told everything, or when waiting any longer
        would leave this host without a policy for want of a store."""
        try:
            async with asyncio.timeout(self._sync_wait_s):
                await self._synced.wait()
        except TimeoutError:
            log.warning(
                "%s: not synced after %g s, going on with what is known", self._name, self._sync_wait_s
            )
        for table in (self._tables.identities, self._tables.ips, self._tables.nodes):
            table.mark_synced()

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
        if host is not None:
            await self.follower.take(self.mesh.protect(host.name, host.addresses))

    # -- rows

    def _apply(self, changes: Sequence[Change]) -> None:
        if len(changes) >= BULK:
            # Rows live long and are in no cycles: without this the collector walks all of them again and
            # again, 0.2 s at a time for 100,000 of them.
            gc.freeze()
        for change in changes:
            source = sys.intern(f"mesh:{change.cluster}")  # one text for all the rows of a cluster
            match change:
                case IdentityUpserted():
                    labels = frozenset(map(_label, change.labels))
                    self._identity(Identity(change.identity), IdentityRow(labels, source))
                case IdentityDeleted():
                    self._identity_gone(Identity(change.identity), source)
                case IpUpserted():
                    row = IpRow(Identity(change.identity), change.name, change.namespace, change.node)
                    self._tables.ips.put(IpKey(_prefix(change.cidr), source), row)
                case IpDeleted():
                    self._tables.ips.delete(IpKey(_prefix(change.cidr), source))
                case NodeUpserted():
                    self._tables.nodes.put(
                        NodeKey(change.cluster, change.node.name), _node_row(change.node, source)
                    )
                case NodeDeleted():
                    self._tables.nodes.delete(NodeKey(change.cluster, change.name))
                case ClusterChanged():
                    self._cluster_changed(change.cluster)

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
            for table in (self._tables.identities, self._tables.ips, self._tables.nodes):
                if lost_since:
                    table.stale_since[source] = lost_since
                else:
                    table.stale_since.pop(source, None)
        self._status_rows()
        self._look_whether_synced()

    def _status_rows(self) -> None:
        follower = self.follower
        if follower.connected:
            text, hint = f"{self._name} connected, revision {follower.revision}", ""
        elif follower.error:
            text = f"unreachable: {follower.error}"
            hint = "what is known stays in force; check the endpoints, the certificates and the network"
        else:
            text, hint = "connecting", ""
        details = {
            "revision": follower.revision,
            "reconnects": follower.reconnects,
            "waiting": self.mesh.waiting,
            "strays": dict(self.mesh.strays),
            "denied": dict(follower.denied),
            "lost_since": follower.lost_since,
        }
        self._put_status("mesh", StatusRow(follower.connected, text, hint, details=details))
        for remote in self.mesh.remotes.values():
            self._status_row(remote)

    def _status_row(self, remote: Remote) -> None:
        counts = self.mesh.counts(remote)
        state = remote.state
        lost = not self.follower.connected
        text = state.value
        hint = ""
        if remote.fault:
            text, hint = f"refused: {remote.fault}", "fix cilium/cluster-config, or the clusters of this host"
        elif remote.held_since:
            text, hint = (
                f"{counts['held']} deletions held",
                "too much vanished at once; believed after 5 minutes",
            )
        if lost and self.follower.complete:
            text = f"{text}, stale: the store is out of reach"
        details: dict[str, object] = {
            "id": remote.config.id if remote.config else self._trust.clusters.get(remote.name, 0),
            "state": state.name.lower(),
            "connected": not lost,
            "stale_since": self.follower.lost_since,
            "revision": remote.revision,
            "cached": remote.cached,
            "own": remote.name == self._trust.own_cluster,
            **counts,
            "refused_by_reason": dict(remote.refused),
            "refusals": dict(list(remote.refusals.items())[:20]),
        }
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


def _prefix(cidr: Cidr) -> Prefix:
    """The same range as the tables have it; the mesh keeps this object too."""
    return cidr if isinstance(cidr, Prefix) else Prefix(*cidr)


def _node_row(node: Node, source: str) -> NodeRow:
    addresses = tuple((one.type, Prefix(*parse_cidr(one.ip))) for one in node.addresses or () if one.ip)
    labels = frozenset(Label("k8s", key, value) for key, value in (node.labels or {}).items())
    return NodeRow(addresses, labels, Identity(node.identity), source)


class MeshPublisher:
    """Tells the store about this host, whenever its addresses or labels change. `run` is the task."""

    def __init__(self, tables: Tables, kv: KV, *, max_clusters: int = 255, boot_id: str = "") -> None:
        self._tables = tables
        self._max_clusters = max_clusters
        self._boot_id = boot_id
        self.publisher = Publisher(kv, on_change=self._status)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.publisher.run())
            await self._follow_host()

    async def _follow_host(self) -> None:
        wake = asyncio.Event()
        reader = self._tables.host.reader(wake)
        while True:
            await wake.wait()
            wake.clear()
            reader.take()
            host = self._tables.host.get("host")
            if host is not None and host.cluster_id:
                self.publisher.publish(self._host(host))

    def _host(self, row: HostRow) -> Host:
        labels = {label.key: label.value for label in row.labels if label.source == "k8s"}
        addresses = publishable([ip_text(one.family, one.address) for one in row.addresses])
        return Host(
            row.cluster, row.cluster_id, row.name, addresses, labels, self._boot_id, self._max_clusters
        )

    def _status(self) -> None:
        publisher = self.publisher
        details = {"keys": sorted(publisher.written), "conflicts": dict(publisher.conflicts)}
        self._tables.status.put("mesh publish", StatusRow(publisher.ok, publisher.text, details=details))
