"""IPv4: what ip4_blocks (blocks of an octet each) and ip4_hosts hold, and the operations to the next content.

A host is an entry of the hash until its /24 has many of them; then the /24 gets a block of its own, in which a host
that comes or goes is one aligned store. Four dependent loads find it there; the hash costs some cache misses more.

Each address has its old slot or its new one at every moment: blocks are filled before one store publishes them and free
again only after a grace period; a host that moves to a block leaves the hash after the block is published, one that
moves to the hash is there a grace period before its block goes. The hash is asked first, and only under roots whose
entry says so.
"""

import contextlib
import mmap
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bpf.layout import (
    BLOCK_ENTRIES,
    BLOCK_ROOTS,
    ENTRY_HOSTS,
    ENTRY_MASK,
    ENTRY_POINTER,
    PEER,
    SLOT_HOST,
    SLOT_WORLD4,
)
from daemon.datapath.ops import Drop, Grace, Op, Order, Put, Store, TableFull
from daemon.model.net import Prefix

ROOTS = BLOCK_ROOTS * BLOCK_ENTRIES
NETWORKS = 1 << 24  # /24s
BLOCK_BYTES = 4 * BLOCK_ENTRIES
DENSE = (
    12  # hosts that make a /24 a block: an entry of the hash costs the kernel some 90 bytes, a block 1,024
)
SPARSE = 6  # with fewer it goes back to the hash
OWN = ENTRY_HOSTS  # in entries of the fourth octet, where the data path ignores it: the slot is of that host alone


class BlocksFull(Exception):  # noqa: N818 - read as a fact
    """The prefixes need more blocks than the map has."""


class _Block(NamedTuple):
    number: int
    entries: "array[int]"


@dataclass(slots=True)
class _Wide:
    """Slots of prefixes that are no hosts, by how deep they reach; what a change does not touch is shared."""

    short: dict[Prefix, int] = field(default_factory=dict)  # 1 to 16 bits
    middle: dict[int, dict[Prefix, int]] = field(default_factory=dict)  # root index -> 17 to 24 bits
    deep: dict[int, dict[Prefix, int]] = field(default_factory=dict)  # /24 -> 25 to 31 bits
    bases: "array[int]" = field(default_factory=lambda: array("I", [SLOT_WORLD4]) * ROOTS)

    def get(self, prefix: Prefix) -> int | None:
        """The slot of exactly this prefix."""
        if prefix.length <= 16:
            return self.short.get(prefix)
        inner = (
            self.middle.get(prefix.address >> 16)
            if prefix.length <= 24
            else self.deep.get(prefix.address >> 8)
        )
        return inner.get(prefix) if inner else None

    def items(self) -> Iterator[tuple[Prefix, int]]:
        """Every prefix and its slot."""
        yield from self.short.items()
        for inner in (*self.middle.values(), *self.deep.values()):
            yield from inner.items()

    def octets(self, root: int) -> list[int]:
        """The slot of each /24 of a root, but for longer prefixes."""
        slots = [self.bases[root]] * BLOCK_ENTRIES
        for prefix, slot in _by_length(self.middle.get(root, {})):
            first, count = prefix.address >> 8 & 255, 1 << 24 - prefix.length
            slots[first : first + count] = [slot] * count
        return slots

    def network(self, network: int) -> int:
        """The slot of one /24, but for longer prefixes."""
        root = network >> 8
        inner = self.middle.get(root)
        for length in range(24, 16, -1) if inner else ():
            kept = network << 8 >> 32 - length << 32 - length
            slot = inner.get(Prefix(4, kept, length)) if inner else None
            if slot is not None:
                return slot
        return self.bases[root]

    def addresses(self, network: int) -> "array[int]":
        """The slot of each address of a /24, hosts not regarded."""
        slots = array("I", [self.network(network)]) * BLOCK_ENTRIES
        for prefix, slot in _by_length(self.deep.get(network, {})):
            first, count = prefix.address & 255, 1 << 32 - prefix.length
            slots[first : first + count] = array("I", [slot]) * count
        return slots

    def changed(self, wide: Mapping[Prefix, int | None]) -> "_Wide":
        """With these slots; None removes."""
        after = _Wide(self.short, dict(self.middle), dict(self.deep), self.bases)
        copied: dict[int, dict[Prefix, int]] = {}
        for prefix, slot in wide.items():
            if prefix.length <= 16:
                if after.short is self.short:
                    after.short = dict(self.short)
                inner = after.short
            else:
                table, at = (
                    (after.middle, prefix.address >> 16)
                    if prefix.length <= 24
                    else (after.deep, prefix.address >> 8)
                )
                inner = table.get(at, {})
                if id(inner) not in copied:
                    inner = table[at] = dict(inner)
                    copied[id(inner)] = inner
            if slot is None:
                inner.pop(prefix, None)
            else:
                inner[prefix] = slot
        for prefix in wide:
            if 16 < prefix.length <= 24 and not after.middle.get(prefix.address >> 16, prefix):
                del after.middle[prefix.address >> 16]
            elif prefix.length > 24 and not after.deep.get(prefix.address >> 8, prefix):
                del after.deep[prefix.address >> 8]
        if after.short is not self.short:
            after.bases = _paint(after.short)
        return after


@dataclass(slots=True)
class _Plan:
    """What a change does, before any of it is done."""

    wide: _Wide
    dirty: set[int] = field(default_factory=set)  # root indexes to paint anew
    edits: dict[int, dict[int, int]] = field(
        default_factory=dict
    )  # /24 -> octet -> entry, in the block it has
    leaves: dict[int, "array[int] | None"] = field(
        default_factory=dict
    )  # /24 -> block it gets; None: has no more
    puts: dict[int, int] = field(default_factory=dict)  # into ip4_hosts
    drops: list[int] = field(default_factory=list)
    crowd: dict[int, int] = field(default_factory=dict)  # /24 -> hosts in it, if it has or had a block
    come: list[int] = field(default_factory=list)  # /24s that have one host more, in the hash
    gone: list[int] = field(default_factory=list)
    demoted: bool = False  # hosts go from a block to the hash
    middles: dict[int, list[int]] = field(default_factory=dict)  # root index -> content of the block it gets
    plain: dict[int, int] = field(default_factory=dict)  # root index -> the slot that needs no block


class Ip4:
    """The slot of every IPv4 prefix. `change` plans and remembers; the caller makes the operations."""

    def __init__(self, blocks: int, hosts: int) -> None:
        """blocks, hosts: capacity of ip4_blocks and ip4_hosts."""
        self._capacity = blocks
        self._room = hosts
        self._free = list(range(blocks - 1, BLOCK_ROOTS - 1, -1))
        self._retired: list[int] = []
        self._roots = array("I", [SLOT_WORLD4]) * ROOTS
        self._middles: dict[int, _Block] = {}  # root index -> block of the third octet
        self._leaves: dict[int, _Block] = {}  # /24 -> block of the fourth octet
        self._wide = _Wide()
        self._hashed: dict[int, int] = {}  # address -> slot
        self._under = array("I", [0]) * ROOTS  # root index -> entries of ip4_hosts below it
        self._crowd = _untouched(2 * NETWORKS).cast("H")  # hosts of each /24
        self._repairs: list[Op] = []  # of what an earlier process did not finish

    @property
    def used(self) -> tuple[int, int]:
        """Blocks in use, the roots included, and entries of ip4_hosts."""
        return self._capacity - len(self._free), len(self._hashed)

    @property
    def retired(self) -> int:
        """Blocks that wait for a grace period."""
        return len(self._retired)

    def settle(self) -> None:
        """A grace period has passed: what was retired may be used again."""
        self._free += self._retired
        self._retired = []

    def get(self, prefix: Prefix) -> int | None:
        """The slot of exactly this prefix, not of one around it."""
        return self.slots([prefix.address])[0] if prefix.length == 32 else self._wide.get(prefix)

    def slots(self, addresses: Iterable[int]) -> list[int | None]:
        """The slots of hosts, None where only a wider prefix may have one."""
        leaves, hashed = self._leaves, self._hashed
        found = []
        for address in addresses:
            leaf = leaves.get(address >> 8)
            if leaf is None:
                found.append(hashed.get(address))
            else:
                entry = leaf.entries[address & 255]
                found.append(entry & ENTRY_MASK if entry & OWN else None)
        return found

    def hosts(self) -> Iterator[tuple[int, int]]:
        """Every host and its slot."""
        yield from self._hashed.items()
        for network, leaf in self._leaves.items():
            for octet, entry in enumerate(leaf.entries):
                if entry & OWN:
                    yield network << 8 | octet, entry & ENTRY_MASK

    def prefixes(self) -> Iterator[tuple[Prefix, int]]:
        """Every prefix that is no host, and its slot."""
        return self._wide.items()

    # --- changes

    def change(self, wide: Mapping[Prefix, int | None], hosts: Mapping[int, int | None]) -> list[Op]:
        """Operations after which prefixes and hosts have these slots; None: that of the next wider prefix.

        Raises BlocksFull or TableFull with nothing changed.
        """
        plan = self._widened(wide)
        groups = self._grouped(plan, hosts)
        # Half of the blocks stay free of hosts, so that all can be painted anew beside the old ones.
        spare = len(self._free) - (self._capacity - BLOCK_ROOTS) // 2
        roots = set(self._middles)
        for network, group in groups.items():
            if self._leaves.get(network) and network not in plan.leaves:
                self._edit(plan, network, group)
            elif self._build(plan, network, group, spare):
                spare -= 1 + (network >> 8 not in roots)
                roots.add(network >> 8)
        for network in [one for one in plan.leaves if one not in groups]:
            self._build(plan, network, {}, 0)
        self._plan_roots(plan)
        self._check_room(plan)
        return self._commit(plan)

    def _grouped(self, plan: _Plan, hosts: Mapping[int, int | None]) -> dict[int, dict[int, int | None]]:
        """/24 -> octet -> slot, of those that have or may need a block. What only touches the hash is planned here."""
        networks = [address >> 8 for address in hosts]
        grouped: dict[int, dict[int, int | None]] = {one: {} for one in self._crowded(plan, networks)}
        if SLOT_HOST in hosts.values():
            grouped |= {address >> 8: {} for address, slot in hosts.items() if slot == SLOT_HOST}
        if not grouped:
            self._plan_few(plan, hosts)
            return grouped
        few: dict[int, int | None] = {}
        at, group = -1, None
        for network, (address, slot) in zip(networks, hosts.items(), strict=True):
            if network != at:
                at, group = network, grouped.get(network)
            if group is None:
                few[address] = slot
            else:
                group[address & 255] = slot
        self._plan_few(plan, few)
        return grouped

    def _crowded(self, plan: _Plan, networks: list[int]) -> list[int]:
        """Those of the /24s, one for each host that changes, that have a block or may need one."""
        crowd, leaves, deep = self._crowd, self._leaves, plan.wide.deep
        for network in networks:
            crowd[network] += 1
        found = [one for one in set(networks) if crowd[one] >= DENSE or one in leaves or one in deep]
        for network in networks:
            crowd[network] -= 1
        return found

    def _plan_few(self, plan: _Plan, hosts: Mapping[int, int | None]) -> None:
        """Hosts of /24s that have no block and need none come and go in the hash."""
        known = hosts.keys() & self._hashed.keys() if self._hashed else set[int]()
        plan.puts = {address: slot for address, slot in hosts.items() if slot is not None}
        plan.come = [address >> 8 for address in (plan.puts.keys() - known if known else plan.puts)]
        plan.drops += [address for address in known if hosts[address] is None]
        plan.gone = [address >> 8 for address in plan.drops]

    def _widened(self, wide: Mapping[Prefix, int | None]) -> _Plan:
        """A plan that knows which roots and which /24 have to be painted anew for these prefixes."""
        plan = _Plan(self._wide.changed(wide) if wide else self._wide)
        if plan.wide.bases is not self._wide.bases:
            before, after = self._wide.bases, plan.wide.bases
            if before != after:
                plan.dirty = {root for root in range(ROOTS) if before[root] != after[root]}
        for prefix in wide:
            if 16 < prefix.length <= 24:
                plan.dirty.add(prefix.address >> 16)
            elif prefix.length > 24:
                plan.leaves[prefix.address >> 8] = None
        if plan.dirty:
            for network in (*self._leaves, *plan.wide.deep):
                if network >> 8 in plan.dirty:
                    plan.leaves[network] = None
        return plan

    def _edit(self, plan: _Plan, network: int, group: Mapping[int, int | None]) -> None:
        """Hosts come and go in a block that stays; it goes when it is needed no more."""
        entries = self._leaves[network].entries
        crowd = self._crowd[network]
        cover: array[int] | None = None
        found = {}
        for octet, slot in group.items():
            had = entries[octet] & OWN
            if slot is not None:
                found[octet] = slot | OWN
                crowd += not had
            elif had:
                cover = cover or plan.wide.addresses(network)
                found[octet] = cover[octet]
                crowd -= 1
        if crowd < SPARSE and not self._must_stay(network, found, cover or plan.wide.addresses(network)):
            self._build(plan, network, group, 0)
        else:
            plan.edits[network] = found
            plan.crowd[network] = crowd

    def _must_stay(self, network: int, edits: Mapping[int, int], cover: "array[int]") -> bool:
        """Whether a /24 needs a block although it has few hosts: prefixes inside, or an address of this host."""
        own = SLOT_HOST | OWN
        return (
            _mixed(cover)
            or own in edits.values()
            or any(
                entry == own and octet not in edits
                for octet, entry in enumerate(self._leaves[network].entries)
            )
        )

    def _build(self, plan: _Plan, network: int, group: Mapping[int, int | None], spare: int) -> bool:
        """A /24 whose block comes, goes or is painted anew, or that has none. Whether it comes."""
        leaf = self._leaves.get(network)
        before = self._hosts_in(network)
        after = before | {octet: slot for octet, slot in group.items() if slot is not None}
        for octet in [one for one, slot in group.items() if slot is None]:
            after.pop(octet, None)
        plan.crowd[network] = len(after)
        first = network << 8
        entries = plan.wide.addresses(network)
        crowded = len(after) >= SPARSE if leaf else len(after) >= DENSE and spare >= 2
        if crowded or _mixed(entries) or SLOT_HOST in after.values():
            for octet, slot in after.items():
                entries[octet] = slot | OWN
            plan.leaves[network] = entries
            if leaf:
                return False
            plan.drops += [first | octet for octet in before]
            return True
        if leaf:
            plan.leaves[network] = None
            plan.puts |= {first | octet: slot for octet, slot in after.items()}
            plan.demoted |= bool(after)
        else:
            plan.leaves.pop(network, None)
            plan.puts |= {first | octet: slot for octet, slot in group.items() if slot is not None}
            plan.drops += [first | octet for octet in before.keys() - after.keys()]
        return False

    def _hosts_in(self, network: int) -> dict[int, int]:
        """Octet and slot of each host of a /24."""
        leaf = self._leaves.get(network)
        if leaf:
            return {octet: entry & ENTRY_MASK for octet, entry in enumerate(leaf.entries) if entry & OWN}
        if not self._crowd[network]:
            return {}
        hashed, first = self._hashed, network << 8
        return {octet: hashed[first | octet] for octet in range(BLOCK_ENTRIES) if first | octet in hashed}

    def _plan_roots(self, plan: _Plan) -> None:
        """Which roots get a block of the third octet, another one, or none."""
        roots = set(plan.dirty)
        for network, entries in plan.leaves.items():
            if entries is None or network >> 8 not in self._middles:
                roots.add(network >> 8)
        below: dict[int, list[int]] = {root: [] for root in roots}
        for network, entries in plan.leaves.items():
            if entries is not None and network >> 8 in below:
                below[network >> 8].append(network)
        for root in roots:
            if root not in self._middles and root not in plan.wide.middle and not below[root]:
                plan.plain[root] = plan.wide.bases[root]
                continue
            octets = plan.wide.octets(root)
            pointers = [
                octet
                for octet in self._pointers(root)
                if plan.leaves.get(root << 8 | octet, octets) is not None
            ]
            if not pointers and not below[root] and octets.count(octets[0]) == BLOCK_ENTRIES:
                plan.plain[root] = octets[0]
                continue
            for octet in pointers:
                octets[octet] = ENTRY_POINTER | self._leaves[root << 8 | octet].number
            plan.middles[root] = octets  # pointers to new blocks are filled in when these have numbers

    def _pointers(self, root: int) -> list[int]:
        """Third octets of a root with a block of their own."""
        middle = self._middles.get(root)
        if middle is None:
            return []
        return [octet for octet, entry in enumerate(middle.entries) if entry & ENTRY_POINTER]

    def _check_room(self, plan: _Plan) -> None:
        leaves = sum(
            entries is not None and not self._same(network, entries)
            for network, entries in plan.leaves.items()
        )
        needed = leaves + len(plan.middles)
        if needed > len(self._free):
            raise BlocksFull(
                f"ip4_blocks: {needed} blocks needed, {len(self._free)} of {self._capacity} free"
            )
        new = sum(one not in self._hashed for one in plan.puts)
        if len(self._hashed) + new > self._room:
            raise TableFull("ip4_hosts", new, self._room - len(self._hashed))

    def _same(self, network: int, entries: "array[int]") -> bool:
        leaf = self._leaves.get(network)
        return leaf is not None and leaf.entries == entries

    # --- making it so

    def _commit(self, plan: _Plan) -> list[Op]:
        """Remember the plan as made; its operations in the order that the module's text promises."""
        under = self._count_hashed(plan)
        ops, self._repairs = self._repairs, []
        if plan.puts:
            ops.append(_put(plan.puts))
        flagged = [root for root, count in under.items() if count and not self._under[root]]
        ops += [self._root(root, self._roots[root] | ENTRY_HOSTS) for root in flagged]
        if plan.demoted:
            ops.append(Grace())
        fills, stores = self._publish(plan)
        if fills:
            ops += [*fills, Order()]
        ops += stores
        if plan.drops:
            ops.append(Drop("ip4_hosts", _keys(plan.drops)))
        for root, count in under.items():
            if self._under[root] and not count:
                ops.append(self._root(root, self._roots[root] & ~ENTRY_HOSTS))
            self._under[root] = count
        crowd = self._crowd
        for network, count in plan.crowd.items():
            crowd[network] = count
        for network in plan.come:
            crowd[network] += 1
        for network in plan.gone:
            crowd[network] -= 1
        self._hashed.update(plan.puts)
        for address in plan.drops:
            del self._hashed[address]
        self._wide = plan.wide
        return ops

    def _count_hashed(self, plan: _Plan) -> dict[int, int]:
        """Entries of ip4_hosts below each root that loses or gains some."""
        hashed, before = self._hashed, self._under
        changes = Counter([address >> 16 for address in plan.puts if address not in hashed])
        changes.subtract([address >> 16 for address in plan.drops])
        return {root: before[root] + change for root, change in changes.items()}

    def _publish(self, plan: _Plan) -> tuple[list[Op], list[Op]]:
        """Stores that fill blocks which nobody points to, and those that publish them or change one entry."""
        fills: list[Op] = []
        stores: list[Op] = []
        for network, entries in plan.leaves.items():
            self._place_leaf(plan, network, entries, fills, stores)
        for root, octets in plan.middles.items():
            old = self._middles.get(root)
            if old is not None and old.entries.tolist() == octets:
                continue
            block = self._middles[root] = _Block(self._free.pop(), array("I", octets))
            fills.append(_fill(block))
            self._repoint(root, ENTRY_POINTER | block.number, old, stores)
        for root, slot in plan.plain.items():
            self._repoint(root, slot, self._middles.pop(root, None), stores)
        for network, edits in plan.edits.items():
            block = self._leaves[network]
            for octet, entry in edits.items():
                if block.entries[octet] != entry:
                    stores.append(_store_entry(block, octet, entry))
        return fills, stores

    def _place_leaf(
        self,
        plan: _Plan,
        network: int,
        entries: "array[int] | None",
        fills: list[Op],
        stores: list[Op],
    ) -> None:
        """A block for the /24, if it is to have one and has none with that content, and the pointer to it."""
        old = self._leaves.get(network)
        if entries is None:
            if old is not None:
                self._retired.append(self._leaves.pop(network).number)
            return
        if old is not None and old.entries == entries:
            block = old
        else:
            block = self._leaves[network] = _Block(self._free.pop(), entries)
            fills.append(_fill(block))
            if old is not None:
                self._retired.append(old.number)
        root, octet = network >> 8, network & 255
        octets = plan.middles.get(root)
        if octets is not None:
            octets[octet] = ENTRY_POINTER | block.number
        elif block is not old:
            stores.append(_store_entry(self._middles[root], octet, ENTRY_POINTER | block.number))

    def _repoint(self, root: int, entry: int, old: _Block | None, stores: list[Op]) -> None:
        """A root says something else; whether it has hosts in the hash is not changed here."""
        if old is not None:
            self._retired.append(old.number)
        entry |= self._roots[root] & ENTRY_HOSTS
        if entry != self._roots[root]:
            stores.append(self._root(root, entry))

    def _root(self, root: int, entry: int) -> Op:
        self._roots[root] = entry
        return Store("ip4_blocks", 4 * root, _WORD.pack(entry))

    # --- a former life

    def adopt(self, entries: "array[int]", hashed: Mapping[int, int]) -> None:
        """Take over filled maps. Painted prefixes become what they look like: /16, /24 and hosts."""
        self._roots = entries[:ROOTS]
        busy = set()
        short: dict[Prefix, int] = {}
        for root, entry in enumerate(self._roots):
            if entry & ENTRY_POINTER:
                busy |= self._adopt_root(root, entry & ENTRY_MASK, entries)
            elif entry & ENTRY_MASK != SLOT_WORLD4:
                short[Prefix(4, root << 16, 16)] = entry & ENTRY_MASK
        self._wide.short, self._wide.bases = short, _paint(short)
        self._free = [block for block in range(self._capacity - 1, BLOCK_ROOTS - 1, -1) if block not in busy]
        for address, slot in hashed.items():
            self._adopt_hashed(address, slot)
        for root, entry in enumerate(self._roots):
            if bool(entry & ENTRY_HOSTS) != bool(self._under[root]):
                self._repairs.append(self._root(root, entry ^ ENTRY_HOSTS))

    def _adopt_root(self, root: int, number: int, entries: "array[int]") -> set[int]:
        """One root with a block; the blocks that it needs."""
        middle = _Block(number, entries[number * BLOCK_ENTRIES : (number + 1) * BLOCK_ENTRIES])
        self._middles[root] = middle
        busy = {number}
        found: dict[Prefix, int] = {}
        for octet, entry in enumerate(middle.entries):
            network = root << 8 | octet
            if entry & ENTRY_POINTER:
                leaf = entry & ENTRY_MASK
                content = entries[leaf * BLOCK_ENTRIES : (leaf + 1) * BLOCK_ENTRIES]
                for at, one in enumerate(content):
                    if one:
                        content[at] = one | OWN
                self._leaves[network] = _Block(leaf, content)
                self._crowd[network] = BLOCK_ENTRIES - content.count(0)
                busy.add(leaf)
            elif entry & ENTRY_MASK != SLOT_WORLD4:
                found[Prefix(4, network << 8, 24)] = entry & ENTRY_MASK
        if found:
            self._wide.middle[root] = found
        return busy

    def _adopt_hashed(self, address: int, slot: int) -> None:
        """An entry of the hash. One that has a block too was on its way into it or out of it, and goes back to it."""
        leaf = self._leaves.get(address >> 8)
        if leaf is None:
            self._hashed[address] = slot
            self._under[address >> 16] += 1
            self._crowd[address >> 8] += 1
            return
        octet = address & 255
        if self._roots[address >> 16] & ENTRY_HOSTS:  # packets got this slot, not that of the block
            self._crowd[address >> 8] += not leaf.entries[octet] & OWN
            self._repairs.append(_store_entry(leaf, octet, slot | OWN))
        self._repairs.append(Drop("ip4_hosts", _keys([address])))


def _untouched(size: int) -> memoryview:
    """Zeros that cost nothing where nobody wrote to them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # else one host would cost two megabytes
    return memoryview(memory)


_WORD = struct.Struct("=I")


def _store_entry(block: _Block, octet: int, entry: int) -> Op:
    """One entry of a block that packets read."""
    block.entries[octet] = entry
    return Store("ip4_blocks", BLOCK_BYTES * block.number + 4 * octet, _WORD.pack(entry))


def _fill(block: _Block) -> Op:
    return Store("ip4_blocks", BLOCK_BYTES * block.number, block.entries.tobytes())


def _keys(addresses: Iterable[int]) -> bytes:
    """Keys of ip4_hosts, joined: addresses in network order."""
    keys = array("I", addresses)
    if sys.byteorder == "little":
        keys.byteswap()
    return keys.tobytes()


def _put(hosts: Mapping[int, int]) -> Op:
    values = array("I", bytes(PEER.size * len(hosts)))
    values[::2] = array("I", hosts.values())  # struct peer: slot, flags
    return Put("ip4_hosts", _keys(hosts), values.tobytes())


def _mixed(entries: "array[int]") -> bool:
    return entries.count(entries[0]) != BLOCK_ENTRIES


def _by_length(prefixes: Mapping[Prefix, int]) -> list[tuple[Prefix, int]]:
    """Wide ones first, so that narrow ones are painted over them."""
    return sorted(prefixes.items(), key=lambda one: one[0].length)


def _paint(short: Mapping[Prefix, int]) -> "array[int]":
    """The covering slot of each /16."""
    bases = array("I", [SLOT_WORLD4]) * ROOTS
    for prefix, slot in _by_length(short):
        first, count = prefix.address >> 16, 1 << 16 - prefix.length
        bases[first : first + count] = array("I", [slot]) * count
    return bases


def slots_in(entries: "array[int]") -> set[int]:
    """The slots that a whole ip4_blocks map leads to."""
    found: set[int] = set()
    seen = set(entries[:ROOTS])
    for _ in range(3):  # octets: the roots hold two
        found |= {entry & ENTRY_MASK for entry in seen if not entry & ENTRY_POINTER}
        blocks = [entry & ENTRY_MASK for entry in seen if entry & ENTRY_POINTER]
        seen = set()
        for block in blocks:
            seen.update(entries[block * BLOCK_ENTRIES : (block + 1) * BLOCK_ENTRIES])
    return found
