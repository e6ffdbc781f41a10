"""A small working model of the pinned maps, and of how a packet reads them: the oracle for every plan of stores."""

import struct
from collections.abc import Callable, Iterator, Sequence

from bpf.layout import (
    BLOCK_ENTRIES,
    CONFIG,
    ENTRY_HOSTS,
    ENTRY_MASK,
    ENTRY_POINTER,
    PORT_BLOCK,
    PORT_BLOCKS,
    PORTS_ICMP4,
    PORTS_ICMP6,
    PORTS_PROTOCOL,
    PORTS_SCTP,
    PORTS_TCP,
    PORTS_UDP,
    SLOT_WORLD4,
    SLOT_WORLD6,
    ConfigFlag,
    MapKind,
    Sizes,
    maps,
)
from daemon.datapath.ops import Drop, Grace, Op, Order, Put, Store
from daemon.model.net import Direction, Prefix, Proto, compact
from daemon.model.verdict import Verdict, unpack_cell

BASES = {
    Proto.TCP: PORTS_TCP,
    Proto.UDP: PORTS_UDP,
    Proto.SCTP: PORTS_SCTP,
    Proto.ICMP: PORTS_ICMP4,
    Proto.ICMPV6: PORTS_ICMP6,
}


SPECS = maps(Sizes())


def keys_of(op: Put | Drop) -> list[bytes]:
    size = SPECS[op.table].key_size
    return [op.keys[at : at + size] for at in range(0, len(op.keys), size)]


def entries_of(op: Put) -> list[tuple[bytes, bytes]]:
    size = SPECS[op.table].value_size
    return [(key, op.values[at * size : (at + 1) * size]) for at, key in enumerate(keys_of(op))]


def singles(ops: Sequence[Op]) -> Iterator[Op]:
    """The same operations, each entry of a hash one by one: the kernel makes a batch that way."""
    for op in ops:
        if isinstance(op, Put):
            yield from (Put(op.table, key, value) for key, value in entries_of(op))
        elif isinstance(op, Drop):
            yield from (Drop(op.table, key) for key in keys_of(op))
        else:
            yield op


class Kernel:
    """Array maps as memory, hash maps as dicts."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.memory: dict[str, bytearray] = {}
        self.tables: dict[str, dict[bytes, bytes]] = {}
        for name, spec in maps(sizes).items():
            if spec.kind is MapKind.ARRAY:
                self.memory[name] = bytearray(-(-spec.value_size // 8) * 8 * spec.max_entries)
            else:
                self.tables[name] = {}
        self._filled = False  # a block, since the last Order
        self._switches = False  # of a generation were stored since then
        self._cells: list[range] = []  # indexes stored since the last Order
        self._rows: set[int] = set()  # slots whose rows were
        self._left: set[int] = set()  # slots that some address lost since the last Grace
        self._unlinked: set[int] = set()  # blocks that lost their pointer since then

    def make(self, op: Op) -> None:
        self._publishes_only_what_is_ordered(op)
        self._reuses_only_after_a_grace_period(op)
        if isinstance(op, Store):
            assert op.offset + len(op.data) <= len(self.memory[op.table]), op.table
            self.memory[op.table][op.offset : op.offset + len(op.data)] = op.data
        elif isinstance(op, Put):
            for key, value in entries_of(op):
                self.tables[op.table][key] = value
        elif isinstance(op, Drop):
            for key in keys_of(op):
                self.tables[op.table].pop(key, None)

    def _publishes_only_what_is_ordered(self, op: Op) -> None:
        """On a CPU that reorders stores, a packet must not follow a store to something that was not filled yet."""
        if isinstance(op, Order | Grace):
            self._filled, self._switches, self._cells, self._rows = False, False, [], set()
        elif isinstance(op, Put):
            assert not self._rows & {struct.unpack_from("<I", value)[0] for _, value in entries_of(op)}
        elif isinstance(op, Store) and op.table == "cells":
            self._cells.append(range(op.offset // 4, (op.offset + len(op.data)) // 4))
        elif isinstance(op, Store) and op.table == "class_of":
            buffer = op.offset // 8 // self.sizes.slots
            idle = buffer != self.config("generation") & 1 or not self.config(f"buffer_flags{buffer}")
            for row in struct.iter_unpack("<I", op.data):
                assert idle or not any(row[0] in cells for cells in self._cells)
            first = op.offset // 8 % self.sizes.slots
            self._rows.update(range(first, first + len(op.data) // 8))
        elif isinstance(op, Store) and op.table == "ip4_blocks" and len(op.data) > 4:
            self._filled = True
        elif isinstance(op, Store) and op.table == "ip4_blocks":
            entry = int.from_bytes(op.data, "little")
            same = not (entry ^ self.word("ip4_blocks", op.offset // 4)) & ~ENTRY_HOSTS
            assert same or not (entry & ENTRY_POINTER and self._filled)
            assert entry & ENTRY_POINTER or entry & ENTRY_MASK not in self._rows
        elif isinstance(op, Store) and op.table == "config" and op.offset == CONFIG.offsets()["generation"]:
            assert (self._filled, self._switches, self._cells, self._rows) == (False, False, [], set())
        elif isinstance(op, Store) and op.table == "config":
            self._switches = True

    def _reuses_only_after_a_grace_period(self, op: Op) -> None:
        """A packet that read an address before it changed must find what the slot and the block meant then."""
        if isinstance(op, Grace):
            self._left, self._unlinked = set(), set()
        elif isinstance(op, Put | Drop):
            values = [self.tables[op.table].get(key) for key in keys_of(op)]
            self._left.update(struct.unpack_from("<I", one)[0] for one in values if one)
        elif isinstance(op, Store) and op.table == "slot_info":
            assert op.offset // 8 not in self._left
        elif isinstance(op, Store) and op.table == "ip4_blocks" and len(op.data) > 4:
            assert op.offset // (4 * BLOCK_ENTRIES) not in self._unlinked
        elif isinstance(op, Store) and op.table == "ip4_blocks":
            blocks, slots = self._below(self.word("ip4_blocks", op.offset // 4))
            kept, still = self._below(int.from_bytes(op.data, "little"))
            self._unlinked |= blocks - kept
            self._left |= slots - still

    def _below(self, entry: int) -> tuple[set[int], set[int]]:
        """The blocks and the slots that an entry leads to."""
        if not entry & ENTRY_POINTER:
            return set(), {entry & ENTRY_MASK}
        block = entry & ENTRY_MASK
        found = struct.unpack_from(f"<{BLOCK_ENTRIES}I", self.memory["ip4_blocks"], 4 * BLOCK_ENTRIES * block)
        parts = [self._below(one) for one in set(found)]
        return {block}.union(*(one for one, _ in parts)), set().union(*(one for _, one in parts))

    def run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self.make(op)

    def word(self, table: str, index: int) -> int:
        return struct.unpack_from("<I", self.memory[table], 4 * index)[0]

    def config(self, name: str) -> int:
        return struct.unpack_from("<I", self.memory["config"], CONFIG.offsets()[name])[0]

    def slot(self, address: Prefix) -> int:
        if address.family == 4:
            return self._slot4(address.address)
        flags = ConfigFlag(self.config("flags"))
        found = self.tables["ip6_hosts"].get(address.packed)
        if found is None and flags & ConfigFlag.V6_NETS:
            found = self.tables["ip6_nets"].get(address.packed[:8])
        if found is None and flags & ConfigFlag.V6_TRIE:
            for length in sorted({key[0] for key in self.tables["ip6_prefixes"]}, reverse=True):
                kept = address.address >> 128 - length << 128 - length
                found = self.tables["ip6_prefixes"].get(struct.pack("<I", length) + kept.to_bytes(16, "big"))
                if found is not None:
                    break
        return SLOT_WORLD6 if found is None else struct.unpack_from("<I", found)[0]

    def _slot4(self, address: int) -> int:
        entry = self.word("ip4_blocks", address >> 16)
        if entry & ENTRY_HOSTS:
            found = self.tables["ip4_hosts"].get(address.to_bytes(4, "big"))
            if found is not None:
                return int(struct.unpack_from("<I", found)[0])
        for shift in (8, 0):
            if entry & ENTRY_POINTER:
                entry = self.word(
                    "ip4_blocks", (entry & ENTRY_MASK) * BLOCK_ENTRIES + (address >> shift & 255)
                )
        assert not entry & ENTRY_POINTER
        return entry & ENTRY_MASK or SLOT_WORLD4

    def verdict(
        self, generation: int, direction: Direction, peer: Prefix, proto: int, port: int
    ) -> Verdict | None:
        """What a packet gets that has read this generation; None: the direction is not enforced."""
        buffer = generation & 1
        if not self.config(f"buffer_flags{buffer}") >> direction & 1:
            return None
        at = self.word("class_of", 2 * (self.sizes.slots * buffer + self.slot(peer)) + direction)
        index = BASES[Proto(proto)] + port if proto in BASES and port >= 0 else PORTS_PROTOCOL + proto
        base = (buffer * 2 + direction) * PORT_BLOCK * PORT_BLOCKS
        (column,) = struct.unpack_from("<H", self.memory["port_class"], 2 * (base + index))
        return unpack_cell(self.word("cells", at + column))[0]


ADDRESS_TABLES: dict[str, Callable[[bytes], Prefix]] = {
    "ip4_hosts": lambda key: Prefix(4, int.from_bytes(key, "big"), 32),
    "ip6_hosts": lambda key: Prefix(6, int.from_bytes(key, "big"), 128),
    "ip6_nets": lambda key: Prefix(6, int.from_bytes(key, "big") << 64, 64),
    "ip6_prefixes": lambda key: Prefix(6, int.from_bytes(key[4:], "big"), key[0]),
}


def entries(kernel: Kernel, table: str) -> dict[Prefix, int]:
    """Prefix and slot of each entry of one of the address tables."""
    prefix = ADDRESS_TABLES[table]
    return {prefix(key): struct.unpack_from("<I", value)[0] for key, value in kernel.tables[table].items()}


def leftover(kernel: Kernel) -> object:
    """What daemon.datapath.maps reads back of a former life, from the model."""
    from array import array

    from bpf.layout import CONFIG as CONFIG_STRUCT
    from bpf.layout import FIRST_FREE_SLOT, SLOT_INFO, BufferFlag
    from daemon.datapath.image import INFO_GROUP, Leftover
    from daemon.datapath.ip4 import slots_in
    from daemon.datapath.maps import _region
    from daemon.model.identity import Identity

    kernel.make(Grace())  # a process takes longer to start than a packet to pass
    config = CONFIG_STRUCT.unpack(bytes(kernel.memory["config"][: CONFIG_STRUCT.size]))
    generation = int(str(config["generation"]))
    blocks = array("I", bytes(kernel.memory["ip4_blocks"]))
    found = {name: entries(kernel, name) for name in ADDRESS_TABLES}
    hosts = {
        name: {compact(one): slot for one, slot in found[name].items()} for name in ("ip4_hosts", "ip6_hosts")
    }
    wide = {name: found[name] for name in ("ip6_nets", "ip6_prefixes")}
    held = slots_in(blocks).union(*(rows_.values() for rows_ in found.values()))
    used = {slot for slot in held if slot >= FIRST_FREE_SLOT}
    base = kernel.sizes.slots * (generation & 1)
    rows = {
        slot: (kernel.word("class_of", 2 * (base + slot)), kernel.word("class_of", 2 * (base + slot) + 1))
        for slot in [*range(FIRST_FREE_SLOT), *used]
    }
    identities = {}
    for slot in used:
        info = SLOT_INFO.unpack(bytes(kernel.memory["slot_info"][8 * slot : 8 * slot + 8]))
        if not int(str(info["flags"])) & INFO_GROUP:
            identities[slot] = Identity(int(str(info["identity"])))
    region, numbers = _region(
        kernel.memory["port_class"], kernel.memory["cells"], generation & 1, rows, kernel.sizes.cells
    )
    active = BufferFlag(int(str(config[f"buffer_flags{generation & 1}"])))
    enforced = (BufferFlag.ENFORCE_INGRESS in active, BufferFlag.ENFORCE_EGRESS in active)
    flags = ConfigFlag(int(str(config["flags"])))
    return Leftover(
        generation,
        flags,
        enforced,
        blocks,
        hosts,
        wide,
        identities,
        rows,
        region,
        numbers,
    )
