"""Image: what the kernel maps hold, and the stores that bring them from one policy or address set to the next.

Pure: every change is a list of operations in the order in which they must be made. Whatever operation was the last
one made, a packet that reads `config.generation` once sees the whole old policy or the whole new one:

1. Rows, port columns and `class_of` of the idle generation are written; nobody reads them.
2. The address tables are shared by both generations. Where the old and the new policy tell different prefixes
   apart, every piece gets a slot whose `class_of` row is right in *both* generations, before an address points to it.
3. One store flips `config.generation`.
4. After a grace period (no packet still works with the old number) pieces that the new policy does not tell apart are
   merged and what only the old policy needed is dropped. Slots and blocks are used again only after another one.

Addresses that somebody owns (a pod, a node, this host) have a slot per identity, whatever the policy: an identity or an
address that comes or goes is a few stores.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from bpf.layout import (
    CONFIG,
    FIRST_FREE_SLOT,
    FIRST_RULE,
    PORT_BLOCK,
    PORT_BLOCKS,
    SLOT_HOST,
    SLOT_INFO,
    SLOT_UNKNOWN,
    SLOT_WORLD4,
    SLOT_WORLD6,
    BufferFlag,
    ConfigFlag,
    Sizes,
)
from daemon.datapath.addresses import WORLDS, Addresses
from daemon.datapath.ip4 import BlocksFull
from daemon.datapath.ops import Grace, Op, Order, Store, TableFull
from daemon.datapath.render import CellImage, cell_image, cells_needed, port_columns
from daemon.model.identity import LOCAL_SCOPE, Identity, Reserved
from daemon.model.net import WORLD4, WORLD6, Prefix, compact, expand
from daemon.model.rule import RuleOrigin
from daemon.policy.tables import PolicyTables, Rows

CONFIG_AT = CONFIG.offsets()
NO_FLAGS = ConfigFlag(0)
INFO_GROUP = 1  # slot_info.flags: the slot stands for prefixes that policy names, not for an identity
_WORLD_SLOTS = {4: SLOT_WORLD4, 6: SLOT_WORLD6}
_FIXED = {Identity(Reserved.HOST): SLOT_HOST}
MANY = 64  # slots or blocks that wait for a grace period until one is worth its time


@dataclass(slots=True)
class Slots:
    """Slot numbers: handed out, and taken back only when `settle` says that a grace period has passed."""

    size: int
    _next: int = FIRST_FREE_SLOT
    _free: list[int] = field(default_factory=list)
    _leaving: list[int] = field(default_factory=list)

    @property
    def leaving(self) -> int:
        """Slots that wait for a grace period."""
        return len(self._leaving)

    def copy(self) -> "Slots":
        """The same numbers, for a change that may turn out not to fit."""
        return Slots(self.size, self._next, list(self._free), list(self._leaving))

    def take(self) -> int:
        """A slot that no packet can be using."""
        if self._free:
            return self._free.pop()
        if self._next >= self.size:
            raise TableFull("class_of", 1, 0)
        self._next += 1
        return self._next - 1

    def leave(self, slot: int) -> None:
        """Not needed any more."""
        if slot >= FIRST_FREE_SLOT:
            self._leaving.append(slot)

    def settle(self) -> None:
        """A grace period has passed."""
        self._free += self._leaving
        self._leaving = []

    def reserve(self, slots: Iterable[int]) -> None:
        """Slots that an earlier life handed out; those between them are free, or each restart would lose some."""
        busy = set(slots)
        self._next = max([self._next, *(slot + 1 for slot in busy)])
        self._free = [slot for slot in range(self._next - 1, FIRST_FREE_SLOT - 1, -1) if slot not in busy]

    @property
    def used(self) -> int:
        return self._next - len(self._free)


class Image:
    """The maps as this process knows them. Methods plan a change, remember it as made, and return its operations."""

    def __init__(self, sizes: Sizes, *, generation: int = 0) -> None:
        self.sizes = sizes
        self.generation = generation
        self.flags = ConfigFlag(0)  # that the operator chose
        self.tables: PolicyTables | None = None
        self.numbers: dict[tuple[object, ...], int] = {}  # RuleOrigin.key -> kernel rule number
        self.addresses = Addresses(sizes)
        self._named: dict[Prefix, int] = {}
        self._slots = Slots(sizes.slots)
        self._slot_of: dict[Identity, int] = {}
        # Slots of owned prefixes; None: a conflict, treated as unknown. All other slots are groups of the policy.
        self._owner_of: dict[int, Identity | None] = {SLOT_HOST: Identity(Reserved.HOST), SLOT_UNKNOWN: None}
        self._references: Counter[int] = Counter()  # slot of an identity -> prefixes
        self._rows: dict[int, tuple[int, int]] = {}  # slot -> cell indexes in the active generation
        self._region = (0, 0)  # cells of the active generation
        self._offsets: tuple[list[int], list[int]] = ([], [])
        self._config = ConfigFlag(0)
        self._enforced = (False, False)
        self.audit = False  # of the active generation, once this process has made one

    @property
    def enforced(self) -> tuple[bool, bool]:
        """Which directions the active generation closes: ingress, egress."""
        return self._enforced

    @property
    def pressure(self) -> dict[str, float]:
        """How full each table is, 0 to 1."""
        sizes = self.sizes
        limits = {"ip4_blocks": sizes.ip4_blocks, "ip4_hosts": sizes.hosts, "ip6_hosts": sizes.hosts,
                  "ip6_nets": sizes.prefixes6, "ip6_prefixes": sizes.prefixes6}  # fmt: skip
        found = {name: self.addresses.used.get(name, 0) / limit for name, limit in limits.items()}
        first, end = self._region
        found |= {"cells": (end - first) / sizes.cells, "slots": self._slots.used / sizes.slots}
        return {name: round(share, 4) for name, share in found.items()}

    # --- policy

    def switch(self, tables: PolicyTables, *, audit: bool = False) -> list[Op]:
        """From the active policy to `tables`, in one flip; `audit`: it drops nothing.

        Raises TableFull or BlocksFull with nothing changed.
        """
        try:
            return self._switch(tables, [], audit=audit)
        except (TableFull, BlocksFull):
            if not self._waiting:
                raise
            return self._switch(tables, self._settled_first(1), audit=audit)

    def _switch(self, tables: PolicyTables, ops: list[Op], *, audit: bool) -> list[Op]:
        slots = self._slots.copy()
        try:
            return [*ops, *self._planned(tables, audit=audit)]
        except (TableFull, BlocksFull):
            self._slots = slots
            raise

    def _planned(self, tables: PolicyTables, *, audit: bool) -> list[Op]:
        buffer = self.generation + 1 & 1
        numbers = self._number(tables.rules)
        image = self._cells(tables, {rule: numbers[origin.key] for rule, origin in tables.rules.items()})
        pairs = self._pairs(tables)
        rows = self._all_rows(tables, pairs.target_of, image)
        ops: list[Op] = [Store("cells", 4 * image.base, image.cells)]
        ops += self._port_ops(tables, buffer)
        ops.append(Store("class_of", 8 * self.sizes.slots * buffer, _dense(rows)))
        ops += [
            self._class_op(1 - buffer, slot, self._rows.get(old, (0, 0))) for slot, old in pairs.fresh.items()
        ]
        ops += [self._info_op(slot, LOCAL_SCOPE | slot, INFO_GROUP) for slot in pairs.fresh]
        ops.append(Order())
        ops += self._address_ops(pairs.slots, ())
        ops.append(_config_op(f"buffer_flags{buffer}", _switches(tables, audit=audit)))
        self.generation += 1
        ops += [Order(), _config_op("generation", self.generation), Grace()]
        self.tables, self.numbers, self._rows = tables, numbers, rows
        self._region, self._offsets = (image.base, image.end), (list(image.ingress), list(image.egress))
        self._enforced, self.audit = (tables.ingress.enforced, tables.egress.enforced), audit
        self._named = pairs.slots
        return ops + self._merge(tables, pairs.target_of)

    def _merge(self, tables: PolicyTables, target_of: Mapping[int, int | Rows]) -> list[Op]:
        """One slot per group again, and no prefix that the active policy does not name."""
        canonical: dict[tuple[int, int | Rows], int] = {
            (4, tables.prefixes[WORLD4]): SLOT_WORLD4,
            (6, tables.prefixes[WORLD6]): SLOT_WORLD6,
        }
        named = {}
        for prefix in tables.prefixes:
            slot = self._named[prefix]
            named[prefix] = canonical.setdefault((prefix.family, target_of[slot]), slot)
        dropped = [one for one in self._named if one not in named]
        unused = set(self._named.values()) - set(named.values())
        self._named = named
        ops = self._address_ops(named, dropped)
        for slot in unused:
            self._slots.leave(slot)
            self._rows.pop(slot, None)
        return self._settled(ops)

    def _settled(self, ops: list[Op]) -> list[Op]:
        self._slots.settle()
        self.addresses.settle()
        return [*ops, Grace()] if ops else ops

    def _pairs(self, tables: PolicyTables) -> "_Pairs":
        """A slot for each (slot now, target then) of every prefix that the old or the new policy names.

        A target is a group of the new policy, or the rows of the identity that owns the prefix around: a policy may
        name a part of an owned prefix, and stop to.
        """
        found = _Pairs({}, {}, {})
        taken: dict[tuple[int, int, int | Rows], int] = {}
        lengths = {
            family: sorted({one.length for one in tables.prefixes if one.family == family}, reverse=True)
            for family in (4, 6)
        }
        heirs = set(self._owner_of)  # a slot of an identity stays that
        for prefix in sorted({*self._named, *tables.prefixes, WORLD4, WORLD6}, key=lambda one: one.length):
            old = self._slot_now(prefix)
            named = tables.prefixes.get(prefix)
            target = self._target(prefix, tables, lengths[prefix.family]) if named is None else named
            key = (prefix.family, old, target)
            slot = taken.get(key)
            if slot is None:
                if old in heirs:
                    slot = self._slots.take()
                    found.fresh[slot] = old
                else:
                    slot = old
                    heirs.add(old)
                taken[key] = slot
                found.target_of[slot] = target
            found.slots[prefix] = slot
        return found

    def _slot_now(self, prefix: Prefix) -> int:
        return next((slot for _, slot in self.addresses.around(prefix)), _WORLD_SLOTS[prefix.family])

    def _target(self, prefix: Prefix, tables: PolicyTables, lengths: Iterable[int]) -> "int | Rows":
        """What a prefix that the new policy does not name will be a part of. lengths: of its prefixes, descending."""
        owner = next((one for one in self.addresses.around(prefix) if one[1] in self._owner_of), None)
        for length in lengths:
            shift = prefix.width - length
            if owner is not None and length <= owner[0].length:
                break
            wider = Prefix(prefix.family, prefix.address >> shift << shift, length)
            if length < prefix.length and wider in tables.prefixes:
                return tables.prefixes[wider]
        assert owner is not None  # noqa: S101 - a policy names both worlds
        who = self._owner_of[owner[1]]
        return tables.unknown if who is None else tables.rows_of(who)

    def _all_rows(
        self, tables: PolicyTables, target_of: Mapping[int, "int | Rows"], image: CellImage
    ) -> dict[int, tuple[int, int]]:
        def at(rows: Rows) -> tuple[int, int]:
            return image.ingress[rows.ingress], image.egress[rows.egress]

        found = {
            slot: at(target if isinstance(target, tuple) else tables.groups[target])
            for slot, target in target_of.items()
        }
        for slot, identity in self._owner_of.items():
            found[slot] = at(tables.unknown if identity is None else tables.rows_of(identity))
        return found

    def _cells(self, tables: PolicyTables, numbers: Mapping[int, int]) -> CellImage:
        needed = cells_needed(tables.ingress, tables.egress)
        first, end = self._region
        room = self.sizes.cells - end
        if needed <= first:
            base = 0
        elif needed <= room:
            base = end
        else:
            raise TableFull("cells", needed, max(first, room))
        return cell_image(tables.ingress, tables.egress, numbers, base)

    def _port_ops(self, tables: PolicyTables, buffer: int) -> list[Op]:
        size = 2 * PORT_BLOCK * PORT_BLOCKS
        return [
            Store("port_class", (buffer * 2 + direction) * size, port_columns(matrix.columns))
            for direction, matrix in enumerate((tables.ingress, tables.egress))
        ]

    def _number(self, rules: Mapping[int, RuleOrigin]) -> dict[tuple[object, ...], int]:
        """Kernel numbers: a rule that stays keeps its own; numbers of the active policy are not given to others."""
        kept: dict[tuple[object, ...], int] = {
            one.key: self.numbers[one.key] for one in rules.values() if one.key in self.numbers
        }
        busy = set(self.numbers.values())
        free = (number for number in range(FIRST_RULE, self.sizes.rules) if number not in busy)
        for one in rules.values():
            if one.key not in kept:
                number = next(free, None)
                if number is None:
                    raise TableFull("rule_hits", len(rules), self.sizes.rules - FIRST_RULE)
                kept[one.key] = number
        return kept

    # --- identities and addresses

    def identities(self, tables: PolicyTables, changed: Iterable[Identity]) -> list[Op] | None:
        """Rows of identities that came, changed or went, within the active policy; None when that needs a switch."""
        before = self.tables
        if before is None or not _extends(before, tables):
            return None
        skip = len(before.ingress.rows), len(before.egress.rows)
        numbers = {rule: self.numbers[origin.key] for rule, origin in tables.rules.items()}
        first, end = self._region
        if cells_needed(tables.ingress, tables.egress, skip) > self.sizes.cells - end:
            return None
        image = cell_image(tables.ingress, tables.egress, numbers, end, skip)
        ops: list[Op] = [Store("cells", 4 * end, image.cells), Order()] if image.cells else []
        self._region = (first, image.end)
        self._offsets[0].extend(image.ingress)
        self._offsets[1].extend(image.egress)
        self.tables = tables
        for identity in changed:
            slot = self._slot_of.get(identity, _FIXED.get(identity))
            if slot is not None:
                ops += self._row_ops(slot, tables.rows_of(identity))
        return ops

    def claim(self, put: Mapping[int, Identity | None], delete: Iterable[int]) -> list[Op]:
        """Prefixes (as `compact` numbers) that belong to an identity (None: claimed by two), and those of nobody now.

        Raises TableFull or BlocksFull with nothing changed.
        """
        gone = [one for one in delete if one not in put]
        try:
            return self._claim(put, gone, self._settled_first(MANY))
        except (TableFull, BlocksFull):
            if not self._waiting:
                raise
            return self._claim(put, gone, self._settled_first(1))

    def _claim(self, put: Mapping[int, Identity | None], delete: Collection[int], ops: list[Op]) -> list[Op]:
        slots, created = self._slots_for(set(put.values()))
        for slot in created:
            ops += self._first_ops(slot)
        if created:
            ops.append(Order())
        fresh, left = self._moved(put, slots)
        come = Counter(fresh.values())
        gone = self._fallen(delete, fresh, left)
        try:
            ops += self._flagged(self.addresses.change(fresh, gone))
        except (TableFull, BlocksFull):
            for slot in created:
                self._release(slot)
            raise
        self._references.update(come)
        for slot, count in left.items():
            self._references[slot] -= count
            if not self._references[slot] and slot in self._owner_of and slot >= FIRST_FREE_SLOT:
                self._release(slot)
        return ops

    def _moved(
        self, put: Mapping[int, Identity | None], slots: Mapping[Identity | None, int]
    ) -> tuple[dict[int, int], Counter[int]]:
        """Prefixes that get another slot; and how many leave each slot."""
        fresh = dict(zip(put, map(slots.__getitem__, put.values()), strict=True))
        left: Counter[int] = Counter()
        known = self.addresses.slots(put.keys())
        if known.count(None) != len(known):
            for key, before in zip(put, known, strict=True):
                if before == fresh[key]:
                    del fresh[key]
                elif before is not None:
                    left[before] += 1
        for world in WORLDS & fresh.keys():
            del fresh[world]
        return fresh, left

    def _fallen(self, delete: Collection[int], fresh: dict[int, int], left: Counter[int]) -> list[int]:
        """Prefixes that go; those that policy names stay, in `fresh`, with the slot that it wants."""
        gone = []
        for key, before in zip(delete, self.addresses.slots(delete), strict=True):
            if before in self._owner_of:
                left[before] += 1
                named = self._named.get(expand(key)) if self._named else None
                if named is None:
                    gone.append(key)
                else:
                    fresh[key] = named
        return gone

    def _slots_for(
        self, identities: Iterable[Identity | None]
    ) -> tuple[dict[Identity | None, int], list[int]]:
        """The slot of each identity, and those of them that are new."""
        found: dict[Identity | None, int] = {}
        created: list[int] = []
        for identity in identities:
            slot = SLOT_UNKNOWN if identity is None else self._slot_of.get(identity, _FIXED.get(identity))
            if slot is None and identity is not None:
                try:
                    slot = self._slots.take()
                except TableFull:
                    for one in created:
                        self._release(one)
                    raise
                self._slot_of[identity] = slot
                self._owner_of[slot] = identity
                created.append(slot)
            assert slot is not None  # noqa: S101 - taken above
            found[identity] = slot
        return found, created

    def _release(self, slot: int) -> None:
        identity = self._owner_of.pop(slot)
        if identity is not None and self._slot_of.get(identity) == slot:
            del self._slot_of[identity]
        self._references.pop(slot, None)
        self._rows.pop(slot, None)
        self._slots.leave(slot)

    @property
    def _waiting(self) -> int:
        """Slots and blocks that a grace period would make free."""
        return self._slots.leaving + self.addresses.retired

    def _settled_first(self, enough: int) -> list[Op]:
        """A grace period before a change, when enough waits for one."""
        if self._waiting < enough:
            return []
        self._slots.settle()
        self.addresses.settle()
        return [Grace()]

    def owned(self) -> Iterator[int]:
        """The prefixes that an identity has, or two claim, as `compact` numbers."""
        return (key for key, slot in self.addresses.items() if slot in self._owner_of)

    def _first_ops(self, slot: int) -> list[Op]:
        """Who a new slot is, and its rows."""
        identity = self._owner_of[slot]
        assert identity is not None  # noqa: S101 - the slot of conflicts is not new
        ops: list[Op] = [self._info_op(slot, identity, 0)]
        if self.tables is not None:
            return ops + self._row_ops(slot, self.tables.rows_of(identity))
        # Between a restart and the first switch: as strict as an address that nobody knows.
        self._rows[slot] = self._rows.get(SLOT_UNKNOWN, (0, 0))
        return [*ops, self._class_op(self.generation & 1, slot, self._rows[slot])]

    def _row_ops(self, slot: int, rows: Rows) -> list[Op]:
        at = self._offsets[0][rows.ingress], self._offsets[1][rows.egress]
        if self._rows.get(slot) == at:
            return []
        self._rows[slot] = at
        return [self._class_op(self.generation & 1, slot, at)]

    def _address_ops(self, named: Mapping[Prefix, int], dropped: Iterable[Prefix]) -> list[Op]:
        """Slots of prefixes that policy names, where nobody owns them."""
        get, owned = self.addresses.get, self._owner_of
        put = {}
        for one, slot in named.items():
            before = get(one)
            if before != slot and before not in owned:
                put[compact(one)] = slot
        gone = []
        for one in dropped:
            before = get(one)
            if before is not None and before not in owned:
                gone.append(compact(one))
        return self._flagged(self.addresses.change(put, gone))

    def _flagged(self, ops: list[Op]) -> list[Op]:
        """A table is asked from before its first entry is put until after its last one is dropped."""
        return [*self._flag_ops(self._config), *ops, *self._flag_ops()]

    # --- config

    def set_flags(self, flags: ConfigFlag) -> list[Op]:
        """Host-wide switches that hold for every generation."""
        self.flags = flags
        return self._flag_ops()

    def _flag_ops(self, kept: ConfigFlag = NO_FLAGS) -> list[Op]:
        wanted = self.flags | self.addresses.flags | kept
        if wanted == self._config:
            return []
        self._config = wanted
        return [_config_op("flags", wanted)]

    def _class_op(self, buffer: int, slot: int, rows: tuple[int, int]) -> Op:
        return Store("class_of", 8 * (self.sizes.slots * buffer + slot), array("I", rows).tobytes())

    def _info_op(self, slot: int, identity: int, flags: int) -> Op:
        return Store("slot_info", SLOT_INFO.size * slot, SLOT_INFO.pack(identity=identity, flags=flags))

    # --- a former life

    def adopt(self, left: "Leftover") -> None:
        """Take over what an earlier process wrote, before anything is changed."""
        self.generation = left.generation
        self._config = left.flags
        self._enforced = left.enforced
        self._rows = dict(left.rows)
        self._region = left.region
        self.numbers = {("left", number): number for number in left.rules}
        self.addresses.adopt(left.blocks, left.hosts, left.wide)
        for slot, identity in left.identities.items():
            self._slot_of.setdefault(identity, slot)
            self._owner_of[slot] = identity
        used: Counter[int] = Counter()
        for key, slot in self.addresses.items():
            used[slot] += 1
            if slot not in self._owner_of:
                self._named[expand(key)] = slot
        self._slots.reserve(used)
        self._references = Counter({slot: used[slot] for slot in self._owner_of})


@dataclass(frozen=True, slots=True)
class Leftover:
    """What was found in the maps of an earlier process. `identities` has the slots that stand for one."""

    generation: int
    flags: ConfigFlag
    enforced: tuple[bool, bool]
    blocks: "array[int]"  # all of ip4_blocks
    hosts: Mapping[str, Mapping[int, int]]  # ip4_hosts, ip6_hosts -> prefix as `compact` number -> slot
    wide: Mapping[str, Mapping[Prefix, int]]  # ip6_nets, ip6_prefixes -> prefix -> slot
    identities: Mapping[int, Identity]
    rows: Mapping[int, tuple[int, int]]
    region: tuple[int, int]
    rules: frozenset[int]


@dataclass(slots=True)
class _Pairs:
    slots: dict[Prefix, int]  # prefix -> its slot during the switch
    fresh: dict[int, int]  # new slot -> the slot whose old verdicts it keeps
    target_of: dict[int, int | Rows]  # slot -> group of the new policy, or rows of an owner


def _extends(before: PolicyTables, after: PolicyTables) -> bool:
    """Whether `after` is `before` with other identities: the same rules, ports and prefixes, rows only appended."""
    return (
        before.rules == after.rules
        and before.prefixes == after.prefixes
        and all(
            old.columns == new.columns
            and new.rows[: len(old.rows)] == old.rows
            and old.enforced == new.enforced
            for old, new in ((before.ingress, after.ingress), (before.egress, after.egress))
        )
        and before.groups == after.groups
    )


def _dense(rows: Mapping[int, tuple[int, int]]) -> bytes:
    """`class_of` from slot 0 to the last one used."""
    flat = array("I", bytes(8 * (max(rows, default=0) + 1)))
    for slot, (ingress, egress) in rows.items():
        flat[2 * slot] = ingress
        flat[2 * slot + 1] = egress
    return flat.tobytes()


def _config_op(name: str, value: int) -> Op:
    return Store("config", CONFIG_AT[name], array("I", [value]).tobytes())


def _switches(tables: PolicyTables, *, audit: bool) -> BufferFlag:
    ingress = BufferFlag.ENFORCE_INGRESS if tables.ingress.enforced else BufferFlag(0)
    egress = BufferFlag.ENFORCE_EGRESS if tables.egress.enforced else BufferFlag(0)
    return ingress | egress | (BufferFlag.AUDIT if audit else BufferFlag(0))
