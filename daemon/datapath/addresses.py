"""Addresses: which prefix has which slot, over all address tables, as operations."""

from array import array  # noqa: TC003 - beside its users
from collections import Counter
from collections.abc import Iterable, Mapping

from bpf.layout import (
    BLOCK_ENTRIES,
    IP4_KEY,
    IP6_KEY,
    NET6_KEY,
    PEER,
    PREFIX6_KEY,
    SLOT_HOST,
    ConfigFlag,
    Sizes,
)
from daemon.datapath.ip4 import Ip4Blocks, Painted
from daemon.datapath.ops import Drop, Op, Put, Store, TableFull
from daemon.model.net import WORLD4, WORLD6, Prefix

BLOCK_BYTES = 4 * BLOCK_ENTRIES


class Addresses:
    """The slot of every prefix in the kernel. The two worlds are slots of their own and have no entry."""

    def __init__(self, sizes: Sizes) -> None:
        self.slots: dict[Prefix, int] = {}
        self._sizes = sizes
        self._blocks = Ip4Blocks(sizes.ip4_blocks)
        self._hosts4: Counter[int] = Counter()  # root index -> entries in ip4_hosts
        self._tables: dict[Prefix, str] = {}  # IPv6 prefix shorter than 128 -> the table that holds it
        self._deep: Counter[int] = Counter()  # /64 network -> prefixes of 65 to 127 bits in it
        self._retired: list[int] = []
        self._strays: list[
            Prefix
        ] = []  # in ip6_nets and in the trie: an earlier process died while it moved them
        self._count: Counter[str] = Counter()
        self._pieces: set[Prefix] = (
            set()
        )  # IPv4 hosts that are entries of blocks, as an earlier process painted them

    def adopt(self, blocks: "array[int]", tables: Mapping[str, Mapping[Prefix, int]]) -> dict[Prefix, int]:
        """Take over what an earlier process wrote: the blocks, and by table the entries of hashes and the trie."""
        self.slots = self._blocks.adopt(blocks)
        self._pieces = {one for one in self.slots if one.is_host}
        for table, rows in tables.items():
            self.slots.update(rows)
            self._count[table] = len(rows)
            for one in rows:
                if table == "ip4_hosts":
                    self._hosts4[one.address >> 16] += 1
                    self._pieces.discard(one)
                elif not one.is_host:
                    self._tables[one] = table
                    self._deep[one.address >> 64] += one.length > 64
        self._strays = [one for one in tables["ip6_nets"] if one in tables["ip6_prefixes"]]
        self._tables.update(dict.fromkeys(self._strays, "ip6_prefixes"))
        return dict(self.slots)

    @property
    def flags(self) -> ConfigFlag:
        """Which IPv6 tables the data path must ask."""
        nets = ConfigFlag.V6_NETS if self._count["ip6_nets"] else ConfigFlag(0)
        return nets | (ConfigFlag.V6_TRIE if self._count["ip6_prefixes"] else ConfigFlag(0))

    @property
    def used(self) -> dict[str, int]:
        """Entries in use, by map."""
        return {"ip4_blocks": self._blocks.used} | dict(self._count)

    def change(self, put: Mapping[Prefix, int], delete: Iterable[Prefix] = ()) -> list[Op]:
        """Operations after which `put` has these slots and `delete` falls back to the next wider prefix.

        Raises TableFull or BlocksFull with nothing changed.
        """
        fresh = {
            one: slot
            for one, slot in put.items()
            if self.slots.get(one) != slot and one not in (WORLD4, WORLD6)
        }
        gone = [one for one in delete if one in self.slots and one not in put]
        own = {one for one, slot in fresh.items() if slot == SLOT_HOST and one.width == 32 and one.is_host}
        self._pieces |= own - self.slots.keys()
        self._check_room(fresh)
        painted = self._blocks.change(
            {one: slot for one, slot in fresh.items() if self._in_blocks(one)}, filter(self._in_blocks, gone)
        )
        ops = self._block_ops(painted)
        ops += [Drop("ip6_nets", _key6("ip6_nets", one)) for one in self._strays]
        self._count["ip6_nets"] -= len(self._strays)
        self._strays = []
        for one, slot in fresh.items():
            if not self._in_blocks(one):
                ops += self._put(one, slot)
                self.slots[one] = slot  # at once: a longer prefix of the same change may move this one
        for one in gone:
            if not self._in_blocks(one):
                ops += self._drop(one)
        self._pieces.difference_update(gone)
        ops += self._block_ops(self._blocks.hosts({root for root, count in self._hosts4.items() if count}))
        self.slots.update(fresh)
        for one in gone:
            del self.slots[one]
        return ops

    def _in_blocks(self, prefix: Prefix) -> bool:
        return prefix.family == 4 and (not prefix.is_host or prefix in self._pieces)

    def settle(self) -> None:
        """A grace period has passed: what was retired may be used again."""
        self._blocks.give_back(self._retired)
        self._retired = []

    def _check_room(self, fresh: Mapping[Prefix, int]) -> None:
        new = [one for one in fresh if one not in self.slots]
        hosts4 = sum(1 for one in new if one.family == 4 and not self._in_blocks(one))
        hosts6 = sum(1 for one in new if one.family == 6 and one.is_host)
        other6 = sum(1 for one in new if one.family == 6 and not one.is_host)
        for table, needed, size in (
            ("ip4_hosts", hosts4, self._sizes.hosts),
            ("ip6_hosts", hosts6, self._sizes.hosts),
            ("ip6_prefixes", other6, self._sizes.prefixes6),
        ):
            free = size - self._count[table] - (self._count["ip6_nets"] if table == "ip6_prefixes" else 0)
            if needed > free:
                raise TableFull(table, needed, free)

    def _block_ops(self, painted: Painted) -> list[Op]:
        self._retired += painted.retired
        ops: list[Op] = [Store("ip4_blocks", block * BLOCK_BYTES, data) for block, data in painted.blocks]
        ops += [Store("ip4_blocks", 4 * root, entry.to_bytes(4, "little")) for root, entry in painted.roots]
        return ops

    def _put(self, prefix: Prefix, slot: int) -> list[Op]:
        value = PEER.pack(slot=slot)
        if prefix.family == 4:
            if prefix not in self.slots:
                self._hosts4[prefix.address >> 16] += 1
                self._count["ip4_hosts"] += 1
            return [Put("ip4_hosts", IP4_KEY.pack(address_be=prefix.packed), value)]
        if prefix.is_host:
            self._count["ip6_hosts"] += prefix not in self.slots
            return [Put("ip6_hosts", IP6_KEY.pack(address=prefix.packed), value)]
        ops: list[Op] = []
        if prefix.length > 64 and prefix not in self.slots:
            ops += self._deepen(prefix.address >> 64)
        return ops + self._put_wide6(prefix, value)

    def _deepen(self, network: int) -> list[Op]:
        """The first prefix longer than /64 in a /64: that /64 must not answer before the trie."""
        self._deep[network] += 1
        around = Prefix(6, network << 64, 64)
        if self._tables.get(around) != "ip6_nets":
            return []
        moved = self._put_wide6(around, PEER.pack(slot=self.slots[around]))
        self._count["ip6_nets"] -= 1
        return [*moved, Drop("ip6_nets", NET6_KEY.pack(network=around.packed[:8]))]

    def _put_wide6(self, prefix: Prefix, value: bytes) -> list[Op]:
        plain = prefix.length == 64 and not self._deep[prefix.address >> 64]
        table = "ip6_nets" if plain and self._tables.get(prefix) != "ip6_prefixes" else "ip6_prefixes"
        if self._tables.get(prefix) != table:
            self._tables[prefix] = table
            self._count[table] += 1
        return [Put(table, _key6(table, prefix), value)]

    def _drop(self, prefix: Prefix) -> list[Op]:
        if prefix.family == 4:
            self._hosts4[prefix.address >> 16] -= 1
            self._count["ip4_hosts"] -= 1
            return [Drop("ip4_hosts", IP4_KEY.pack(address_be=prefix.packed))]
        if prefix.is_host:
            self._count["ip6_hosts"] -= 1
            return [Drop("ip6_hosts", IP6_KEY.pack(address=prefix.packed))]
        if prefix.length > 64:
            self._deep[prefix.address >> 64] -= 1
        table = self._tables.pop(prefix)
        self._count[table] -= 1
        return [Drop(table, _key6(table, prefix))]


def _key6(table: str, prefix: Prefix) -> bytes:
    if table == "ip6_nets":
        return NET6_KEY.pack(network=prefix.packed[:8])
    return PREFIX6_KEY.pack(length=prefix.length, address=prefix.packed)
