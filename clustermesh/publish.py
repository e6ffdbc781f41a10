"""Writes this host into the store: node, addresses, heartbeat; its cluster's configuration if there is none.

All keys hang on one lease, so that they go away by themselves when this host does. A clean stop leaves them:
the data outlives a restart. Nothing is ever written under another cluster's name.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from clustermesh import wire
from clustermesh.follow import Backoff, stop_if_cancelled
from clustermesh.gojson import Malformed
from clustermesh.kv import KV, KVError, LeaseLost
from clustermesh.trust import HOST
from clustermesh.wire import CILIUM, ClusterConfig, IpEntry, Node, NodeAddress

log = logging.getLogger(__name__)

LEASE_S = 900
HEARTBEAT_S = 60.0
RECHECK_S = 300.0  # between two looks at whether what we wrote is still there
_CANARIES = (wire.IDENTITIES, wire.IPS, wire.NODES, wire.SERVICES, wire.SERVICE_EXPORTS)


@dataclass(frozen=True, slots=True)
class Host:
    """What is told of this host. `addresses` in order: the first of each family is the node's own."""

    cluster: str
    cluster_id: int
    name: str
    addresses: tuple[NodeAddress, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    boot_id: str = ""
    max_clusters: int = 255


def host_keys(host: Host) -> dict[str, bytes]:
    """The keys of a host: its node, and each of its addresses as a host's."""
    node = Node(
        host.name,
        host.cluster,
        host.addresses,
        cluster_id=host.cluster_id,
        source="local",
        labels=dict(host.labels),
        boot_id=host.boot_id,
    )
    own = node.address(4) or node.address(6) or ""
    keys = {wire.node_key(host.cluster, host.name): wire.encode_node(node)}
    for address in host.addresses:
        entry = IpEntry(address.ip, host_ip=own, identity=HOST)
        keys[wire.ip_key(entry.prefix)] = wire.encode_ip(entry)
    return keys


class Publisher:
    """Keeps a host's keys in the store. `publish` says what they are; `run` is the task."""

    def __init__(
        self,
        kv: KV,
        *,
        backoff: Backoff | None = None,
        recheck_s: float = RECHECK_S,
        heartbeat_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.ok = False
        self.text = "nothing to publish yet"
        self.conflicts: dict[str, str] = {}  # key -> who has it; not ours to overwrite
        self.written: dict[str, bytes] = {}
        self._host: Host | None = None
        self._kv = kv
        self._lease = 0
        self._changed = asyncio.Event()
        self._backoff = backoff or Backoff()
        self._recheck_s = recheck_s
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._on_change = on_change

    def publish(self, host: Host) -> None:
        """From now on the store has this."""
        if host != self._host:
            self._host = host
            self._changed.set()

    async def run(self) -> None:
        """For ever; an unreachable store or a lost lease leads to another try."""
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    await self._begin()
                    group.create_task(self._kv.keep_alive(self._lease, LEASE_S))
                    group.create_task(self._heartbeat())
                    await self._follow_changes()  # see follow.py on why not a task
            except* LeaseLost as errors:
                log.warning("publishing anew: %s", errors.exceptions[0])
                self._lease = 0
                self._tell(ok=False, text="the lease was lost, writing everything again")
            except* KVError as errors:
                self._tell(ok=False, text=f"not published: {_message(errors)}")
            stop_if_cancelled()
            await self._backoff.wait()

    async def _begin(self) -> None:
        while self._host is None:
            self._changed.clear()
            await self._changed.wait()
        if not self._lease:
            self._lease = await self._kv.grant(LEASE_S)
        self.written.clear()
        self._changed.set()

    async def _follow_changes(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._recheck_s):
                    await self._changed.wait()
            except TimeoutError:
                self.written.clear()  # somebody may have removed them: write again what is not there
            self._changed.clear()
            await self._write()
            self._backoff.reset()

    async def _write(self) -> None:
        """Configuration first, then the keys, then the markers that say the keys are there."""
        host = self._host
        if host is None or not await self._config(host):
            return
        desired = host_keys(host)
        for key in self.written.keys() - desired.keys():
            await self._kv.delete(key)
            del self.written[key]
        for key, value in desired.items():
            if self.written.get(key) != value and await self._free(key, host):
                await self._put(key, value)
        stamp = self._stamp()
        for resource in _CANARIES:
            await self._kv.create(wire.canary_key(host.cluster, resource), stamp, self._lease)
        text = f"{len(self.written)} keys"
        if self.conflicts:
            text += f", {len(self.conflicts)} are held by others: {', '.join(sorted(self.conflicts))}"
        self._tell(ok=not self.conflicts, text=text)

    async def _config(self, host: Host) -> bool:
        """Whether the cluster is what we think it is; says who we are if nobody did."""
        key = wire.config_key(host.cluster)
        ours = ClusterConfig(host.cluster_id, True, False, host.max_clusters, False)
        if await self._kv.create(key, wire.encode_config(ours), self._lease):
            return True
        found = await self._kv.get(key)
        try:
            theirs = wire.decode_config(found.value) if found else ours
        except Malformed as error:
            self._tell(ok=False, text=f"{key} is not readable: {error}")
            return False
        if (theirs.id, theirs.max_clusters or 255) != (ours.id, ours.max_clusters):
            said = f"id {theirs.id}, {theirs.max_clusters or 255} clusters"
            self._tell(
                ok=False, text=f"{key} says {said}; this host is set to id {ours.id}, {ours.max_clusters}"
            )
            return False
        return True

    async def _put(self, key: str, value: bytes) -> None:
        found = await self._kv.get(key)
        if found is None or found.value != value or found.lease != self._lease:
            await self._kv.put(key, value, self._lease)
        self.written[key] = value

    async def _free(self, key: str, host: Host) -> bool:
        """Whether nobody else uses an address; keys of addresses do not name their cluster."""
        if not key.startswith(wire.IPS):
            return True
        found = await self._kv.get(key)
        self.conflicts.pop(key, None)
        if found is None:
            return True
        try:
            entry = wire.decode_ip(key.rpartition("/default/")[2], found.value, CILIUM)
        except Malformed:
            return True
        ours = {address.ip for address in host.addresses}
        if entry.host_ip in ours or (entry.identity == HOST and not entry.host_ip):
            return True
        self.conflicts[key] = entry.host_ip or f"identity {entry.identity}"
        log.warning("%s is taken by %s: not published", key, self.conflicts[key])
        return False

    async def _heartbeat(self) -> None:
        """Readers reconnect when nobody has written for two minutes; one writer is enough."""
        while True:
            found = await self._kv.get(wire.HEARTBEAT)
            if found is None or self._age_s(found.value) > 0.8 * self._heartbeat_s:
                await self._kv.put(wire.HEARTBEAT, self._stamp(), self._lease)
            await asyncio.sleep(self._heartbeat_s / 2)

    def _age_s(self, stamp: bytes) -> float:
        try:
            return abs(self._clock() - datetime.fromisoformat(stamp.decode()).timestamp())
        except ValueError:
            return float("inf")

    def _stamp(self) -> bytes:
        return datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()

    def _tell(self, *, ok: bool, text: str) -> None:
        if (ok, text) != (self.ok, self.text):
            self.ok, self.text = ok, text
            self._on_change()


def _message(errors: BaseExceptionGroup[KVError]) -> str:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def publishable(addresses: Sequence[str]) -> tuple[NodeAddress, ...]:
    """The addresses that others can reach, as a node's: no loopback, no link-local; IPv4 first, in order."""
    chosen = []
    for text in addresses:
        family, number = wire.parse_ip(text)
        if not any(_inside(number, one) for one in _PRIVATE[family]):
            chosen.append((family, number))
    return tuple(NodeAddress("InternalIP", wire.ip_text(*one)) for one in sorted(set(chosen)))


def _inside(number: int, cidr: wire.Cidr) -> bool:
    family, network, length = cidr
    shift = (32 if family == 4 else 128) - length
    return number >> shift == network >> shift


_PRIVATE = {
    4: [wire.parse_cidr(one) for one in ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "224.0.0.0/4")],
    6: [wire.parse_cidr(one) for one in ("::/127", "fe80::/10", "ff00::/8")],
}
