"""Program: the loop that makes the kernel equal to the tables.

It collects what changed in an instant, compiles, plans and applies in a worker thread, one pass at a time, and says in
`tables.status` and `tables.rules` what is enforced. What cannot be compiled or does not fit changes nothing.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bpf.attach import older
from bpf.layout import ConfigFlag, Sizes
from bpf.syscall import LayoutMismatch
from daemon.datapath.conntrack import Conntrack, existing
from daemon.datapath.devices import Devices
from daemon.datapath.image import Image
from daemon.datapath.ip4 import BlocksFull
from daemon.datapath.links import LoadFailed, load
from daemon.datapath.maps import KernelMaps
from daemon.datapath.ops import Op, TableFull
from daemon.datapath.room import FULL, squeeze
from daemon.datapath.snapshot import AttachedDevice, packed, store
from daemon.model.identity import REMOTE_NODE_SCOPE, Identity, Reserved, reserved_labels
from daemon.model.labels import NODE, RESERVED, Label, LabelSet
from daemon.model.net import Direction, Prefix, compact
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.compile import (
    Compiled,
    CompileSettings,
    Subject,
    add_identities,
    compile_policy,
    selected_specs,
)
from daemon.state.audit import Audited, audited
from daemon.state.ips import rank, winner
from daemon.state.tables import HostRow, IpRow, NodeKey, NodeRow, StatusRow, Tables

log = logging.getLogger(__name__)

HOST = Identity(Reserved.HOST)
APISERVER = Identity(Reserved.KUBE_APISERVER)
SETTLE_S = 0.002  # changes that come together are taken together
RETRY_S = 2.0
UNFIT_S = 10.0
LEAST = 99  # trust of an address that nobody claims any more
PIECE = 20_000  # addresses that change owners in one go, some 20 ms
RESERVED_IDENTITIES = tuple(Identity(one) for one in Reserved if one is not Reserved.UNKNOWN)


@dataclass(frozen=True, slots=True)
class ProgramSettings:
    """What the configuration says about the data path."""

    pins: Path
    compile: CompileSettings
    sizes: Sizes = field(default_factory=Sizes)
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
    # Prefixes whose owner may be another one, as `compact` numbers; None: all there are.
    dirty: set[int] | None
    own: frozenset[int]
    audited: Audited


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
        self.passed = asyncio.Event()  # set after each pass; whoever waits for it clears it
        self._image = Image(settings.sizes)
        self._image_lock = threading.Lock()  # held by whoever plans and applies, never while compiling
        self._maps: KernelMaps | None = None
        self._devices = devices
        self._compiled: Compiled | None = None
        self._node_claims: dict[NodeKey, dict[int, IpRow]] = {}
        self._nodes_at: dict[int, dict[str, IpRow]] = {}  # prefix -> source -> what its node lists
        self._node_numbers: dict[NodeKey, Identity] = {}
        self._own: frozenset[int] = frozenset()
        self._loaded: dict[str, object] = {}
        self._seeded = 0
        self._refused = False
        self._held = False  # at the failsafe list, until the labels of this host are known
        self.conflicts: set[int] = set()  # prefixes as `compact` numbers
        self._unfit: set[int] = set()  # prefixes that did not fit into the maps
        self._unfit_due = 0.0  # when the next pass tries them again

    # --- the loop

    async def run(self) -> None:
        """For ever. Failures are rows of `tables.status`; what is enforced stays until a pass succeeds."""
        await self._start()
        tables = self._tables
        policies = tables.policies.reader(self._wake)
        groups = tables.cidr_groups.reader(self._wake)
        identities, ips = tables.identities.reader(self._wake), tables.ips.reader(self._wake)
        nodes, host = tables.nodes.reader(self._wake), tables.host.reader(self._wake)
        audit = tables.audit.reader(self._wake)
        self._wake.set()
        pending: _Work | None = None
        recompile = True
        while True:
            try:
                upgrading = self._compiled is not None and not self._devices.loaded.is_set()
                async with asyncio.timeout(RETRY_S if pending or upgrading else None):
                    await self._wake.wait()
                await asyncio.sleep(SETTLE_S)
            except TimeoutError:
                pass
            self._wake.clear()
            host.take()
            row = tables.host.get("host")
            if row is None or not (tables.policies.synced and tables.identities.synced and tables.ips.synced):
                if row is None:
                    await self._hold()
                self._waiting(row)
                continue
            recompile |= bool(policies.take()) | bool(groups.take()) | bool(audit.take())
            work = self._work(
                row, identities.take(), ips.take(), nodes.take(), recompile=recompile, again=pending
            )
            recompile = False
            if work is None:
                await self._take_over()
                continue
            pending = await self._pass(work)

    async def _hold(self) -> None:
        """On the first start ever, without the labels of this host: only the failsafe list passes until they are known.

        Later starts keep the last good policy.
        """
        told, own = self._tables.status.get("host"), self._tables.own.get("own")
        unknown = told is not None and not told.ok and own is not None
        if not unknown or self._image.generation or self.settings.compile.mode == "never":
            return
        log.warning("data path: the labels of this host are not known: only the failsafe list passes")
        try:
            await asyncio.to_thread(self._failsafe_only, own or frozenset())
        except OSError as error:
            log.error("data path: %s", error)  # noqa: TRY400 - one line

    def _failsafe_only(self, own: frozenset[Prefix]) -> None:
        compiled = failsafe_policy(self.settings.compile)
        with self._image_lock:
            if self._maps is None:
                return
            self._maps.apply(self._image.claim(dict.fromkeys(map(compact, own), HOST), ()))
            self._seed(compiled)
            self._maps.apply(self._image.switch(compiled, audit=audited(self._tables).host))
            self._held = True

    async def follow_own(self) -> None:
        """For ever, beside `run`: an own address that appears is known at once, however long a compilation takes.

        Until then its packets would pass as not for this host.
        """
        wake = asyncio.Event()
        own = self._tables.own.reader(wake)
        while True:
            await wake.wait()
            wake.clear()
            own.take()
            if self._image.tables is not None:
                await asyncio.to_thread(self._claim_own, self._tables.own["own"])

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
                if not older(self.settings.pins):
                    self._devices.loaded.set()  # else an earlier layout enforces until the first pass is done
                return

    def _adopt(self, maps: KernelMaps) -> None:
        with self._image_lock:
            self._maps = maps
            self._image = Image(self.settings.sizes)
            left = maps.leftover()
            self._image.adopt(left)
            # What a boot has restored takes every packet for this host's until the first pass knows better.
            maps.apply(self._image.set_flags(self._flags() | left.flags & ConfigFlag.ALL_OURS))

    def _flags(self) -> ConfigFlag:
        return ConfigFlag.LOG_ALLOWED if self.settings.log_allowed else ConfigFlag(0)

    # --- one pass

    def _work(
        self,
        host: HostRow,
        identities: Iterable[Identity],
        ips: set[int],
        nodes: Iterable[NodeKey],
        *,
        recompile: bool,
        again: _Work | None,
    ) -> _Work | None:
        """What changed, as values; None when nothing did."""
        changed_nodes = self._take_nodes(nodes)
        # The first pass of this process replaces whatever an earlier one left.
        dirty = None if self._compiled is None else ips | changed_nodes | self._take_own(host)
        self._own = frozenset(map(compact, host.addresses))
        if again is not None:
            dirty = None
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
        if not (recompile or labels or dirty):
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
            dirty,
            self._own,
            audited(self._tables),
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
            self._tell_unfit()
            return None
        except OSError as error:
            log.error("data path: %s; reading the kernel's tables again", error)  # noqa: TRY400
            self._status(StatusRow(ok=False, text=f"out of sync: {error}", hint="tried again by itself"))
            self._compiled = None
            if self._maps is not None:
                await asyncio.to_thread(self._adopt, self._maps)
            return replace(work, recompile=True)
        self._refused = self._held = False
        if ConfigFlag.ALL_OURS in self._image.flags:
            await asyncio.to_thread(self._know_ours)
        await self._take_over()
        self.passed.set()
        self._publish(done, work)
        self._tell_unfit()
        return None

    def _know_ours(self) -> None:
        with self._image_lock:
            assert self._maps is not None  # noqa: S101 - a pass is done
            self._maps.apply(self._image.set_flags(self._flags()))

    def save(self, path: Path) -> int:
        """In a worker thread: write what is enforced for the next boot; returns bytes. Raises OSError.

        Only reading keeps others waiting, not the disk.
        """
        rows = self._tables.status.rows
        devices = [
            AttachedDevice(name.removeprefix("device:"), str(row.details.get("xdp", "")))
            for name, row in rows.items()
            if name.startswith("device:") and row.ok
        ]
        with self._image_lock:
            state = packed(self.settings.pins, self.settings.sizes, devices)
        return store(state, path)

    async def _take_over(self) -> None:
        """The first pass over an earlier layout is done: its programs can go."""
        if self._devices.loaded.is_set() or self._compiled is None:
            return
        try:
            await asyncio.to_thread(self._devices.take_over)
        except OSError as error:
            log.error("data path: an earlier layout still filters, tried again: %s", error)  # noqa: TRY400
        else:
            self._devices.loaded.set()

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
        first = self._image.tables is None
        if compiled is not None and first:
            # With the first switch of this process it must be known who owns which address. Addresses go only after
            # it, because what an earlier process painted around them is not known before.
            self._claim_all(work, apply, delete=False)
        try:
            with self._image_lock:
                switched = compiled is not None and self._policy(work, compiled, apply, maps)
        finally:
            # Addresses change owners also when the policy was refused.
            self._claim_all(work, apply)
        return _Done(switched, time.monotonic() - started, operations)

    def _compile(self, work: _Work) -> Compiled | None:
        """What the work means for the tables; None when it is about addresses only."""
        if work.recompile:
            return compile_policy(
                work.policies,
                work.groups,
                work.subject,
                work.all_identities,
                replace(self.settings.compile, audit_policies=work.audited.policies),
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
        kept = self._compiled is not None and self._image.audit == work.audited.host
        if kept and self._compiled is not None and _same(self._compiled, compiled):
            self._compiled = compiled
            return False
        before = set(self._image.numbers.values())
        self._seed(compiled)
        ops = self._image.switch(compiled, audit=work.audited.host)
        maps.zero_hits([number for number in self._image.numbers.values() if number not in before])
        apply(ops)
        self._compiled = compiled
        return True

    def _seed(self, compiled: Compiled) -> None:
        """Connections that exist when a direction is first enforced are tracked, so that none is cut."""
        active = self._image.enforced
        if any(compiled.matrix(one).enforced and not active[one] for one in Direction):
            known, listening = existing()
            with Conntrack(self.settings.pins) as table:
                self._seeded = table.seed(known, listening)
            log.info("data path: %d existing connections imported", self._seeded)

    # --- who owns which address

    def _claim_all(self, work: _Work, apply: Callable[[list[Op]], None], *, delete: bool = True) -> None:
        """Give every prefix of the work its owner, in pieces: others may use the image in between.

        When some do not fit, the most trusted come in and old entries stay; `_unfit` has the others.
        """
        crowded: set[int] = set()
        for keys in _pieces(self._prefixes(work)):
            with self._image_lock:
                put, gone = self._owners(keys, work.own)
                try:
                    apply(self._image.claim(put, gone if delete else ()))
                    self._unfit.difference_update(keys)
                except FULL:
                    crowded.update(keys)
        if not crowded:
            return
        with self._image_lock:
            put, gone = self._owners(crowded, work.own)
            apply(self._image.claim({}, gone if delete else ()))
            left = squeeze(self._image, put, lambda key: self._trust(key, work.own), apply)
        self._unfit -= crowded
        self._unfit |= set(left)
        self._unfit_due = time.monotonic() + UNFIT_S

    def _trust(self, key: int, own: frozenset[int]) -> int:
        """The lower, the more an address is believed: own, local, this cluster, others."""
        if key in own:
            return -1
        sources = [one.source for one in self._tables.ips.claims(key)] + list(self._nodes_at.get(key, ()))
        cluster = self.settings.compile.cluster_name
        return min((rank(one, cluster) for one in sources), default=LEAST)

    def _prefixes(self, work: _Work) -> list[int]:
        """What the work is about, own addresses first, and what did not fit the last time."""
        own, claims, nodes = work.own, self._tables.ips.claims, self._nodes_at
        if work.dirty is None:
            found = self._tables.ips.prefixes()
            found += [key for key in nodes if not claims(key)]
            found += [key for key in self._image.owned() if not claims(key) and key not in nodes]
            first = list(own)
        else:
            found = list(work.dirty)
            if time.monotonic() >= self._unfit_due:
                found += self._unfit - work.dirty
            first = [key for key in found if key in own]
        return first + [key for key in found if key not in own]

    def _owners(
        self, keys: Iterable[int], own: frozenset[int]
    ) -> tuple[dict[int, Identity | None], list[int]]:
        """Who owns which prefix, None where two claim it; and those that nobody owns. In the worker thread."""
        put: dict[int, Identity | None] = {}
        gone = []
        claims, nodes = self._tables.ips.claims, self._nodes_at
        for key in keys:
            rows = claims(key)
            if key in own:
                put[key] = HOST
            elif len(rows) == 1 and key not in nodes:
                put[key] = rows[0].identity
            elif rows or key in nodes:
                row = winner(
                    {one.source: one for one in rows} | nodes.get(key, {}), self.settings.compile.cluster_name
                )
                put[key] = row.identity if row is not None else None
                if row is None:
                    self.conflicts.add(key)
                    continue
            else:
                gone.append(key)
            self.conflicts.discard(key)
        return put, gone

    def _take_nodes(self, keys: Iterable[NodeKey]) -> set[int]:
        """Addresses of nodes are claims too, weaker than what the store says of an address itself."""
        dirty = set[int]()
        for key in keys:
            source = f"node:{key.cluster}/{key.name}"
            before = self._node_claims.pop(key, {})
            row = self._tables.nodes.get(key)
            now: dict[int, IpRow] = {}
            if row is None:
                self._node_numbers.pop(key, None)
            else:
                claim = IpRow(self._node_identity(key, row), key.name)
                now = self._node_claims[key] = {compact(one): claim for _, one in row.addresses}
            for prefix in before.keys() - now.keys():
                self._node_claim(prefix, source, None)
            for prefix, claim in now.items():
                self._node_claim(prefix, source, claim)
            dirty |= before.keys() | now.keys()
        return dirty

    def _node_claim(self, prefix: int, source: str, row: IpRow | None) -> None:
        claims = {one: what for one, what in self._nodes_at.get(prefix, {}).items() if one != source}
        if row is not None:
            claims[source] = row
        if claims:
            self._nodes_at[prefix] = claims
        else:
            del self._nodes_at[prefix]

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

    def _take_own(self, host: HostRow) -> set[int]:
        return set(self._own ^ frozenset(map(compact, host.addresses)))

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

    def pressure(self) -> dict[str, float]:
        """How full the tables are that the daemon fills, 0 to 1."""
        return self._image.pressure if self._image.tables is not None else {}

    def _tell_unfit(self) -> None:
        """A row for addresses that do not fit; none when all do."""
        if not self._unfit:
            self._tables.status.delete("addresses")
            return
        by_source = Counter(
            min((one.source for one in self._tables.ips.claims(key)), default="nodes") for key in self._unfit
        )
        sources = ", ".join(f"{count} of {source}" for source, count in sorted(by_source.items()))
        text = f"the tables are full: {len(self._unfit)} addresses count as world ({sources})"
        hint = "raise map_sizes (needs `meshwall cleanup` and a restart)"
        self._put("addresses", StatusRow(False, text, hint, details={"missing": dict(by_source)}))

    def _waiting(self, host: HostRow | None) -> None:
        missing = [
            one.name
            for one in (self._tables.policies, self._tables.identities, self._tables.ips)
            if not one.synced
        ]
        what = ", ".join((["labels of this host"] if host is None else []) + missing)
        kept = "the last good policy stays" if self._image.generation else "nothing is enforced yet"
        if self._held:
            kept = "only the failsafe list passes"
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
        text = "audit: everything passes, verdicts are reported" if self._image.audit else "enforcing"
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
            "audit": image.audit,
            "audit_policies": sorted(compiled.compiler.settings.audit_policies) if compiled else [],
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
            elif work.audited.covers(policy.title):
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


def _pieces(keys: list[int]) -> Iterator[list[int]]:
    return (keys[at : at + PIECE] for at in range(0, len(keys), PIECE))


def failsafe_policy(settings: CompileSettings) -> Compiled:
    """Default deny both ways, and the failsafe list."""
    known = {one: reserved_labels(one) for one in RESERVED_IDENTITIES}
    subject = Subject(HOST, reserved_labels(HOST))
    return compile_policy((), {}, subject, known, replace(settings, mode="always"))


def _same(old: Compiled, new: Compiled) -> bool:
    """Whether the kernel need not be touched: the same tables by the same rules."""
    return old == new and {one.key for one in old.rules.values()} == {one.key for one in new.rules.values()}


def _hint(text: str) -> str:
    if "max_entries" in text or "expected" in text:
        return "map sizes changed: `meshwall cleanup`, then start again"
    if "not permitted" in text or "privile" in text:
        return "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    return ""
