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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
from daemon.datapath.addresses import Addresses
from daemon.datapath.ops import Grace, Op, Store, TableFull
from daemon.datapath.render import CellImage, cell_image, cells_needed, port_columns
from daemon.model.identity import LOCAL_SCOPE, Identity, Reserved
from daemon.model.net import WORLD4, WORLD6, Prefix
from daemon.model.rule import RuleOrigin
from daemon.policy.tables import PolicyTables, Rows

T = TypeVar("T")
CONFIG_AT = CONFIG.offsets()
NO_FLAGS = ConfigFlag(0)
INFO_GROUP = 1  # slot_info.flags: the slot stands for prefixes that policy names, not for an identity
_WORLD_SLOTS = {WORLD4: SLOT_WORLD4, WORLD6: SLOT_WORLD6}
_FIXED = {Identity(Reserved.HOST): SLOT_HOST}


@dataclass(slots=True)
class Slots:
    """Slot numbers: handed out, and taken back only when `settle` says that a grace period has passed."""

    size: int
    _next: int = FIRST_FREE_SLOT
    _free: list[int] = field(default_factory=list)
    _leaving: list[int] = field(default_factory=list)

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
        self.managed: dict[Prefix, Identity | None] = {}  # None: a conflict, treated as unknown
        self.addresses = Addresses(sizes)
        self._named: dict[Prefix, int] = {}
        self._slots = Slots(sizes.slots)
        self._slot_of: dict[Identity, int] = {}
        self._references: Counter[Identity] = Counter()
        self._rows: dict[int, tuple[int, int]] = {}  # slot -> cell indexes in the active generation
        self._region = (0, 0)  # cells of the active generation
        self._offsets: tuple[list[int], list[int]] = ([], [])
        self._config = ConfigFlag(0)
        self._enforced = (False, False)

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

    def switch(self, tables: PolicyTables) -> list[Op]:
        """From the active policy to `tables`, in one flip. Raises TableFull or BlocksFull with nothing changed."""
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
        ops += self._address_ops(pairs.slots, ())
        ops.append(_config_op(f"buffer_flags{buffer}", _enforcement(tables)))
        self.generation += 1
        ops += [_config_op("generation", self.generation), Grace()]
        self.tables, self.numbers, self._rows = tables, numbers, rows
        self._region, self._offsets = (image.base, image.end), (list(image.ingress), list(image.egress))
        self._enforced = (tables.ingress.enforced, tables.egress.enforced)
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
        owners = {
            one: tables.unknown if who is None else tables.rows_of(who) for one, who in self.managed.items()
        }
        now = _Longest({**_WORLD_SLOTS, **self._named, **self.addresses.slots})
        then: _Longest[int | Rows] = _Longest({**tables.prefixes, **owners})
        found = _Pairs({}, {}, {})
        taken: dict[tuple[int, int, int | Rows], int] = {}
        heirs = {SLOT_HOST, SLOT_UNKNOWN, *self._slot_of.values()}  # a slot of an identity stays that
        for prefix in sorted({*self._named, *tables.prefixes, WORLD4, WORLD6}, key=lambda one: one.length):
            old = now.of(prefix)
            named = tables.prefixes.get(prefix)
            target = then.of(prefix) if named is None else named
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

    def _all_rows(
        self, tables: PolicyTables, target_of: Mapping[int, "int | Rows"], image: CellImage
    ) -> dict[int, tuple[int, int]]:
        def at(rows: Rows) -> tuple[int, int]:
            return image.ingress[rows.ingress], image.egress[rows.egress]

        found = {
            slot: at(target if isinstance(target, tuple) else tables.groups[target])
            for slot, target in target_of.items()
        }
        found |= {slot: at(tables.rows_of(identity)) for identity, slot in self._slot_of.items()}
        found[SLOT_HOST] = at(tables.rows_of(Identity(Reserved.HOST)))
        found[SLOT_UNKNOWN] = at(tables.unknown)
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
        ops: list[Op] = [Store("cells", 4 * end, image.cells)] if image.cells else []
        self._region = (first, image.end)
        self._offsets[0].extend(image.ingress)
        self._offsets[1].extend(image.egress)
        self.tables = tables
        for identity in changed:
            slot = self._slot_of.get(identity, _FIXED.get(identity))
            if slot is not None:
                ops += self._row_ops(slot, tables.rows_of(identity))
        return ops

    def claim(self, put: Mapping[Prefix, Identity | None], delete: Iterable[Prefix]) -> list[Op]:
        """Addresses that belong to an identity (None: claimed by two), and addresses that nobody owns any more."""
        fresh = {one: who for one, who in put.items() if one not in self.managed or self.managed[one] != who}
        gone = [one for one in delete if one in self.managed and one not in put]
        ops: list[Op] = []
        targets: dict[Prefix, int] = {}
        for prefix, identity in fresh.items():
            slot, first = self._slot_for(identity)
            ops += first
            targets[prefix] = slot
        fall = {one: self._named[one] for one in gone if one in self._named}
        ops += self._flagged(self.addresses.change(targets | fall, [one for one in gone if one not in fall]))
        left = [self.managed.pop(one) for one in gone] + [
            self.managed[one] for one in fresh if one in self.managed
        ]
        self.managed.update(fresh)
        self._references.update(one for one in fresh.values() if one is not None)
        self._release(left)
        return self._settled(ops) if left else ops

    def _release(self, identities: Iterable[Identity | None]) -> None:
        for identity in identities:
            if identity is None:
                continue
            self._references[identity] -= 1
            if not self._references[identity]:
                del self._references[identity]
                slot = self._slot_of.pop(identity, None)
                if slot is not None:
                    self._slots.leave(slot)
                    self._rows.pop(slot, None)

    def _slot_for(self, identity: Identity | None) -> tuple[int, list[Op]]:
        if identity is None:
            return SLOT_UNKNOWN, []
        slot = self._slot_of.get(identity, _FIXED.get(identity))
        if slot is not None:
            return slot, []
        slot = self._slot_of[identity] = self._slots.take()
        ops: list[Op] = [self._info_op(slot, identity, 0)]
        if self.tables is not None:
            return slot, ops + self._row_ops(slot, self.tables.rows_of(identity))
        # Between a restart and the first switch: as strict as an address that nobody knows.
        self._rows[slot] = self._rows.get(SLOT_UNKNOWN, (0, 0))
        return slot, [*ops, self._class_op(self.generation & 1, slot, self._rows[slot])]

    def _row_ops(self, slot: int, rows: Rows) -> list[Op]:
        at = self._offsets[0][rows.ingress], self._offsets[1][rows.egress]
        if self._rows.get(slot) == at:
            return []
        self._rows[slot] = at
        return [self._class_op(self.generation & 1, slot, at)]

    def _address_ops(self, named: Mapping[Prefix, int], dropped: Iterable[Prefix]) -> list[Op]:
        put = {one: slot for one, slot in named.items() if one not in self.managed}
        return self._flagged(self.addresses.change(put, [one for one in dropped if one not in self.managed]))

    def _flagged(self, ops: list[Op]) -> list[Op]:
        """A table is asked from before its first entry is put until after its last one is dropped."""
        return [*self._flag_ops(self._config), *ops, *self._flag_ops()]

    # --- config

    def set_flags(self, flags: ConfigFlag) -> list[Op]:
        """Host-wide switches: audit and the like."""
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
        addresses = self.addresses.adopt(left.blocks, left.entries)
        self._slots.reserve(addresses.values())
        for slot, identity in left.identities.items():
            self._slot_of.setdefault(identity, slot)
        for prefix, slot in addresses.items():
            if slot == SLOT_UNKNOWN:
                self.managed[prefix] = None
            elif slot == SLOT_HOST:
                self.managed[prefix] = Identity(Reserved.HOST)
            elif slot in left.identities:
                self.managed[prefix] = left.identities[slot]
            else:
                self._named[prefix] = slot
        self._references.update(one for one in self.managed.values() if one is not None)


@dataclass(frozen=True, slots=True)
class Leftover:
    """What was found in the maps of an earlier process. `identities` has the slots that stand for one."""

    generation: int
    flags: ConfigFlag
    enforced: tuple[bool, bool]
    blocks: "array[int]"  # all of ip4_blocks
    entries: Mapping[str, Mapping[Prefix, int]]  # hash or trie -> prefix -> slot
    identities: Mapping[int, Identity]
    rows: Mapping[int, tuple[int, int]]
    region: tuple[int, int]
    rules: frozenset[int]


@dataclass(slots=True)
class _Pairs:
    slots: dict[Prefix, int]  # prefix -> its slot during the switch
    fresh: dict[int, int]  # new slot -> the slot whose old verdicts it keeps
    target_of: dict[int, int | Rows]  # slot -> group of the new policy, or rows of an owner


class _Longest(Generic[T]):
    """Longest match over a mapping, for prefixes that are mostly in it."""

    def __init__(self, known: Mapping[Prefix, T]) -> None:
        self._known = known
        self._lengths = {
            family: sorted({one.length for one in known if one.family == family}, reverse=True)
            for family in (4, 6)
        }

    def of(self, prefix: Prefix) -> T:
        """What the prefix itself or the narrowest one around it maps to."""
        found = self._known.get(prefix)
        if found is not None:
            return found
        for length in self._lengths[prefix.family]:
            if length < prefix.length:
                shift = prefix.width - length
                found = self._known.get(Prefix(prefix.family, prefix.address >> shift << shift, length))
                if found is not None:
                    return found
        raise KeyError(prefix)


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


def _enforcement(tables: PolicyTables) -> BufferFlag:
    ingress = BufferFlag.ENFORCE_INGRESS if tables.ingress.enforced else BufferFlag(0)
    return ingress | (BufferFlag.ENFORCE_EGRESS if tables.egress.enforced else BufferFlag(0))
