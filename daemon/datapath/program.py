"""Program: the loop that makes the kernel equal to the tables.

It collects what changed in an instant, compiles, plans and applies in a worker thread, one pass at a time, and says in
`tables.status` and `tables.rules` what is enforced. What cannot be compiled or does not fit changes nothing.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bpf.layout import ConfigFlag, Sizes
from bpf.syscall import LayoutMismatch
from daemon.datapath.conntrack import Conntrack, sockets
from daemon.datapath.devices import Devices
from daemon.datapath.image import Image
from daemon.datapath.ip4 import BlocksFull
from daemon.datapath.links import LoadFailed, load
from daemon.datapath.maps import KernelMaps
from daemon.datapath.ops import Op, TableFull
from daemon.model.identity import REMOTE_NODE_SCOPE, Identity, Reserved, reserved_labels
from daemon.model.labels import NODE, RESERVED, Label, LabelSet
from daemon.model.net import Direction, Prefix, compact, expand
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.compile import (
    Compiled,
    CompileSettings,
    Subject,
    add_identities,
    compile_policy,
    selected_specs,
)
from daemon.state.ips import winner
from daemon.state.tables import HostRow, IpKey, IpRow, NodeKey, NodeRow, StatusRow, Tables

log = logging.getLogger(__name__)

HOST = Identity(Reserved.HOST)
APISERVER = Identity(Reserved.KUBE_APISERVER)
SETTLE_S = 0.002  # changes that come together are taken together
RETRY_S = 2.0
RESERVED_IDENTITIES = tuple(Identity(one) for one in Reserved if one is not Reserved.UNKNOWN)


@dataclass(frozen=True, slots=True)
class ProgramSettings:
    """What the configuration says about the data path."""

    pins: Path
    compile: CompileSettings
    sizes: Sizes = field(default_factory=Sizes)
    audit: bool = False
    log_allowed: bool = True


@dataclass(slots=True)
class _Work:
    """What one pass has to do, taken from the tables before the first await."""

    policies: tuple[Policy, ...]
    groups: dict[str, CidrGroup]
    subject: Subject
    recompile: bool
    identities: dict[Identity, LabelSet | None]  # changed ones; None: gone
    all_identities: dict[Identity, LabelSet]  # filled only for a compilation
    put: dict[Prefix, Identity | None]
    delete: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    """What a pass changed."""

    switched: bool
    seconds: float
    operations: int


class Program:
    """Owns the data path of this host. `run` is the task; cancelling it leaves everything enforced."""

    def __init__(self, tables: Tables, settings: ProgramSettings, devices: Devices) -> None:
        self.settings = settings
        self._tables = tables
        self._wake = asyncio.Event()
        self._image = Image(settings.sizes)
        self._image_lock = threading.Lock()  # held by whoever plans and applies, never while compiling
        self._maps: KernelMaps | None = None
        self._devices = devices
        self._compiled: Compiled | None = None
        self._claims: dict[Prefix, dict[str, IpRow]] = {}
        self._node_claims: dict[NodeKey, dict[Prefix, IpRow]] = {}
        self._node_numbers: dict[NodeKey, Identity] = {}
        self._own: frozenset[Prefix] = frozenset()
        self._loaded: dict[str, object] = {}
        self._seeded = 0
        self._refused = False
        self.conflicts: set[Prefix] = set()

    # --- the loop

    async def run(self) -> None:
        """For ever. Failures are rows of `tables.status`; what is enforced stays until a pass succeeds."""
        await self._start()
        tables = self._tables
        policies = tables.policies.reader(self._wake)
        groups = tables.cidr_groups.reader(self._wake)
        identities, ips = tables.identities.reader(self._wake), tables.ips.reader(self._wake)
        nodes, host = tables.nodes.reader(self._wake), tables.host.reader(self._wake)
        self._wake.set()
        pending: _Work | None = None
        recompile = True
        while True:
            try:
                async with asyncio.timeout(RETRY_S if pending else None):
                    await self._wake.wait()
                await asyncio.sleep(SETTLE_S)
            except TimeoutError:
                pass
            self._wake.clear()
            host.take()
            row = tables.host.get("host")
            if row is None or not (tables.policies.synced and tables.identities.synced and tables.ips.synced):
                self._waiting(row)
                continue
            recompile |= bool(policies.take()) | bool(groups.take())
            work = self._work(
                row, identities.take(), ips.take(), nodes.take(), recompile=recompile, again=pending
            )
            recompile = False
            if work is None:
                continue
            pending = await self._pass(work)

    async def follow_own(self) -> None:
        """For ever, beside `run`: an own address that appears is known at once, however long a compilation takes.

        Until then its packets would pass as not for this host.
        """
        wake = asyncio.Event()
        host = self._tables.host.reader(wake)
        while True:
            await wake.wait()
            wake.clear()
            host.take()
            row = self._tables.host.get("host")
            if row is not None and self._image.tables is not None:
                await asyncio.to_thread(self._claim_own, row.addresses)

    def _claim_own(self, addresses: frozenset[Prefix]) -> None:
        with self._image_lock:
            if self._maps is None or self._image.tables is None:
                return
            try:
                self._maps.apply(self._image.claim(dict.fromkeys(map(compact, addresses), HOST), ()))
            except (OSError, TableFull, BlocksFull) as error:
                log.warning("own addresses: %s; left to the next pass", error)

    async def _start(self) -> None:
        """Load the programs, open the maps, take over what is there. Tries again until it works."""
        self._devices.loaded.clear()
        while True:
            try:
                self._loaded = await load(self.settings.pins, self.settings.sizes)
                maps = await asyncio.to_thread(KernelMaps, self.settings.pins, self.settings.sizes)
                await asyncio.to_thread(self._adopt, maps)
                await asyncio.to_thread(self._devices.renew)
            except (LoadFailed, LayoutMismatch, OSError) as error:
                self._status(StatusRow(ok=False, text=f"not loaded: {error}", hint=_hint(str(error))))
                log.error("data path: %s", error)  # noqa: TRY400 - one line, no traceback
                await asyncio.sleep(RETRY_S)
            else:
                self._devices.loaded.set()
                return

    def _adopt(self, maps: KernelMaps) -> None:
        with self._image_lock:
            self._maps = maps
            self._image = Image(self.settings.sizes)
            self._image.adopt(maps.leftover())
            maps.apply(self._image.set_flags(self._flags()))

    def _flags(self) -> ConfigFlag:
        flags = ConfigFlag.AUDIT if self.settings.audit else ConfigFlag(0)
        return flags | (ConfigFlag.LOG_ALLOWED if self.settings.log_allowed else ConfigFlag(0))

    # --- one pass

    def _work(
        self,
        host: HostRow,
        identities: Iterable[Identity],
        ips: Iterable[IpKey],
        nodes: Iterable[NodeKey],
        *,
        recompile: bool,
        again: _Work | None,
    ) -> _Work | None:
        """What changed, as values; None when nothing did."""
        changed_nodes = self._take_nodes(nodes)
        dirty = self._take_ips(ips) | changed_nodes | self._take_own(host)
        if again is not None:
            dirty |= again.put.keys() | set(again.delete)
            recompile |= again.recompile
        subject = Subject(HOST, host.labels)
        if self._compiled is None or self._compiled.compiler.subject != subject:
            recompile = True
        labels = {one: self._labels(one, host) for one in identities}
        labels |= (
            {number: self._labels(number, host) for number in self._node_numbers.values()}
            if changed_nodes
            else {}
        )
        if again is not None:
            labels |= {one: self._labels(one, host) for one in again.identities}
        put, delete = self._owners(dirty)
        if not (recompile or labels or put or delete):
            return None
        recompile |= self._refused  # what did not fit may fit now
        everything = self._everything(host) if recompile else {}
        return _Work(
            tuple(self._tables.policies.rows.values()) if recompile else (),
            dict(self._tables.cidr_groups.rows) if recompile else {},
            subject,
            recompile,
            labels,
            everything,
            put,
            delete,
        )

    async def _pass(self, work: _Work) -> _Work | None:
        """Do it; the work itself when it failed and has to be tried again."""
        try:
            done = await asyncio.to_thread(self._do, work)
        except (TableFull, BlocksFull) as error:
            log.error("data path: refused whole, the old tables stay: %s", error)  # noqa: TRY400
            hint = "raise map_sizes (needs `meshwall cleanup` and a restart), or make the policy smaller"
            text = f"refused, the last good policy stays: {error}"
            self._status(StatusRow(ok=False, text=text, hint=hint, details=self._details()))
            self._refused = True
            return None
        except OSError as error:
            log.error("data path: %s; reading the kernel's tables again", error)  # noqa: TRY400
            self._status(StatusRow(ok=False, text=f"out of sync: {error}", hint="tried again by itself"))
            self._compiled = None
            if self._maps is not None:
                await asyncio.to_thread(self._adopt, self._maps)
            return replace(work, recompile=True)
        self._refused = False
        self._publish(done, work)
        return None

    def _do(self, work: _Work) -> _Done:
        """In a worker thread: compile, plan, apply."""
        started = time.monotonic()
        maps = self._maps
        assert maps is not None  # noqa: S101 - _start has returned
        operations = 0

        def apply(ops: list[Op]) -> None:
            nonlocal operations
            maps.apply(ops)
            operations += len(ops)

        compiled = self._compile(work)
        with self._image_lock:
            try:
                switched = compiled is not None and self._policy(work, compiled, apply, maps)
            finally:
                # Addresses change owners also when the policy was refused.
                apply(self._image.claim(*_compacted(work)))
        return _Done(switched, time.monotonic() - started, operations)

    def _compile(self, work: _Work) -> Compiled | None:
        """What the work means for the tables; None when it is about addresses only."""
        if work.recompile:
            return compile_policy(
                work.policies,
                work.groups,
                work.subject,
                work.all_identities,
                self.settings.compile,
                previous=self._compiled,
            )
        if not work.identities or self._compiled is None:
            return None
        added = {one: labels for one, labels in work.identities.items() if labels is not None}
        gone = [one for one, labels in work.identities.items() if labels is None]
        return add_identities(self._compiled, added, gone)

    def _policy(
        self, work: _Work, compiled: Compiled, apply: Callable[[list[Op]], None], maps: KernelMaps
    ) -> bool:
        """True when there was a switch."""
        if not work.recompile and (ops := self._image.identities(compiled, work.identities)) is not None:
            apply(ops)
            self._compiled = compiled
            return False
        if self._compiled is not None and _same(self._compiled, compiled):
            self._compiled = compiled
            return False
        if self._image.tables is None:
            # The first switch of this process: who owns which address must be known with it. Addresses go only
            # after it, because what an earlier process painted around them is not known before.
            apply(self._image.claim(_compacted(work)[0], ()))
        before = set(self._image.numbers.values())
        self._seed(compiled)
        ops = self._image.switch(compiled)
        maps.zero_hits([number for number in self._image.numbers.values() if number not in before])
        apply(ops)
        self._compiled = compiled
        return True

    def _seed(self, compiled: Compiled) -> None:
        """Connections that exist when a direction is first enforced are tracked, so that none is cut."""
        active = self._image.enforced
        if any(compiled.matrix(one).enforced and not active[one] for one in Direction):
            known, listening = sockets()
            with Conntrack(self.settings.pins, self.settings.sizes) as table:
                self._seeded = table.seed(known, listening)
            log.info("data path: %d existing connections imported", self._seeded)

    # --- who owns which address

    def _take_ips(self, keys: Iterable[IpKey]) -> set[Prefix]:
        dirty = set()
        for key in keys:
            row = self._tables.ips.get(key)
            self._claim(key.prefix, key.source, row)
            dirty.add(key.prefix)
        return dirty

    def _claim(self, prefix: Prefix, source: str, row: IpRow | None) -> None:
        claims = self._claims.setdefault(prefix, {})
        if row is not None:
            claims[source] = row
        else:
            claims.pop(source, None)
        if not claims:
            del self._claims[prefix]

    def _take_nodes(self, keys: Iterable[NodeKey]) -> set[Prefix]:
        """Addresses of nodes are claims too, weaker than what the store says of an address itself."""
        dirty = set()
        for key in keys:
            source = f"node:{key.cluster}/{key.name}"
            before = self._node_claims.pop(key, {})
            row = self._tables.nodes.get(key)
            now = (
                {}
                if row is None
                else {one: IpRow(self._node_identity(key, row), key.name) for _, one in row.addresses}
            )
            if row is None:
                self._node_numbers.pop(key, None)
            else:
                self._node_claims[key] = now
            for prefix in before.keys() | now.keys():
                self._claim(prefix, source, now.get(prefix))
                dirty.add(prefix)
        return dirty

    def _node_identity(self, key: NodeKey, row: NodeRow) -> Identity:
        """A number of its own for a node with labels, so that `fromNodes` can tell nodes apart."""
        if not self.settings.compile.node_selector_labels or not row.labels:
            return APISERVER if row.identity == APISERVER else Identity(Reserved.REMOTE_NODE)
        if key not in self._node_numbers:
            busy = set(self._node_numbers.values())
            number = next(
                one for one in range(REMOTE_NODE_SCOPE + 1, REMOTE_NODE_SCOPE << 1) if one not in busy
            )
            self._node_numbers[key] = Identity(number)
        return self._node_numbers[key]

    def _take_own(self, host: HostRow) -> set[Prefix]:
        dirty = set(host.addresses ^ self._own)
        self._own = host.addresses
        return dirty

    def _owners(self, dirty: set[Prefix]) -> tuple[dict[Prefix, Identity | None], tuple[Prefix, ...]]:
        put: dict[Prefix, Identity | None] = {}
        delete = []
        if self._compiled is None:  # the first pass of this process: what an earlier one left is replaced
            dirty = dirty | self._own | self._claims.keys() | {*map(expand, self._image.owned())}
        for prefix in dirty:
            claims = self._claims.get(prefix)
            if prefix in self._own:
                put[prefix] = HOST
            elif claims:
                row = winner(claims, self.settings.compile.cluster_name)
                put[prefix] = row.identity if row is not None else None
                (self.conflicts.discard if row is not None else self.conflicts.add)(prefix)
            else:
                delete.append(prefix)
                self.conflicts.discard(prefix)
        return put, tuple(delete)

    def _labels(self, identity: Identity, host: HostRow) -> LabelSet | None:
        if identity == HOST:
            return host.labels
        row = self._tables.identities.get(identity)
        if row is not None:
            return row.labels
        for key, number in self._node_numbers.items():
            if number == identity:
                return self._node_labels(key)
        return reserved_labels(identity) or None

    def _node_labels(self, key: NodeKey) -> LabelSet:
        row = self._tables.nodes[key]
        labels = {Label(NODE, one.key, one.value) for one in row.labels} | {Label(RESERVED, "remote-node")}
        if row.identity == APISERVER:
            labels.add(Label(RESERVED, "kube-apiserver"))
        return frozenset(labels)

    def _everything(self, host: HostRow) -> dict[Identity, LabelSet]:
        known = {one: reserved_labels(one) for one in RESERVED_IDENTITIES}
        known |= {one: row.labels for one, row in self._tables.identities.rows.items()}
        known |= {number: self._node_labels(key) for key, number in self._node_numbers.items()}
        return known | {HOST: host.labels}

    # --- status

    def _waiting(self, host: HostRow | None) -> None:
        missing = [
            one.name
            for one in (self._tables.policies, self._tables.identities, self._tables.ips)
            if not one.synced
        ]
        what = ", ".join((["labels of this host"] if host is None else []) + missing)
        kept = "the last good policy stays" if self._image.generation else "nothing is enforced yet"
        self._status(StatusRow(ok=False, text=f"waiting for {what}; {kept}", details=self._details()))

    def _publish(self, done: _Done, work: _Work) -> None:
        compiled = self._compiled
        if compiled is None:
            return
        numbers = self._image.numbers
        if done.switched:
            log.info(
                "generation %d: %d rules, %d operations in %.1f ms",
                self._image.generation, len(compiled.rules), done.operations, 1000 * done.seconds,
            )  # fmt: skip
            self._policies(compiled, work)
        details = self._details() | {
            "last_pass_ms": round(1000 * done.seconds, 2),
            "conflicts": len(self.conflicts),
        }
        text = "audit: everything passes, verdicts are reported" if self.settings.audit else "enforcing"
        if not any(self._image.enforced):
            text = "no policy selects this host: everything passes"
        # The status row first: whoever reads the rules looks there which generation they belong to.
        self._status(StatusRow(ok=True, text=text, details=details))
        self._tables.rules.replace({numbers[origin.key]: origin for origin in compiled.rules.values()})

    def _details(self) -> dict[str, object]:
        compiled, image = self._compiled, self._image
        sides = {}
        for one in Direction:
            matrix = compiled.matrix(one) if compiled else None
            sides[str(one)] = {
                "enforced": image.enforced[one],
                "default_deny": bool(matrix and matrix.default_deny),
            }
        return {
            "generation": image.generation,
            "audit": self.settings.audit,
            "pressure": image.pressure,
            "programs": self._loaded.get("programs", {}),
            "seeded": self._seeded,
            **sides,
        }

    def _policies(self, compiled: Compiled, work: _Work) -> None:
        """One status row per policy: enforced, audit, or why it does nothing here."""
        chosen_here = {id(policy) for policy, _ in selected_specs(work.policies, compiled.compiler.subject)}
        seen = set()
        for policy in work.policies:
            key = f"policy:{policy.title}"
            seen.add(key)
            if id(policy) not in chosen_here:
                state, hint = "selects nothing", "its nodeSelector does not match this host's labels"
            elif self.settings.audit or policy.title in self.settings.compile.audit_policies:
                state, hint = "audit", ""
            elif self.settings.compile.mode == "never":
                state, hint = "not enforced: enforcement is `never`", ""
            else:
                state, hint = "enforced", ""
            details = {"generation": self._image.generation, "file": policy.file, "line": policy.line}
            self._put(key, StatusRow(ok=True, text=state, hint=hint, details=details))
        for key in [one for one in self._tables.status if one.startswith("policy:") and one not in seen]:
            self._tables.status.delete(key)

    def _status(self, row: StatusRow) -> None:
        self._put("datapath", row)

    def _put(self, key: str, row: StatusRow) -> None:
        old = self._tables.status.get(key)
        since = old.since if old is not None and (old.ok, old.text) == (row.ok, row.text) else time.time()
        self._tables.status.put(key, replace(row, since=since))


def _compacted(work: _Work) -> tuple[dict[int, Identity | None], list[int]]:
    return {compact(one): who for one, who in work.put.items()}, list(map(compact, work.delete))


def _same(old: Compiled, new: Compiled) -> bool:
    """Whether the kernel need not be touched: the same tables by the same rules."""
    return old == new and {one.key for one in old.rules.values()} == {one.key for one in new.rules.values()}


def _hint(text: str) -> str:
    if "max_entries" in text or "expected" in text:
        return "map sizes changed: `meshwall cleanup`, then start again"
    if "not permitted" in text or "privile" in text:
        return "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    return ""
