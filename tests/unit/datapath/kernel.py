"""A small working model of the pinned maps, and of how a packet reads them: the oracle for every plan of stores."""

import struct
from collections.abc import Sequence

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
from daemon.datapath.ops import Drop, Op, Put, Store
from daemon.model.net import Direction, Prefix, Proto
from daemon.model.verdict import Verdict, unpack_cell

BASES = {
    Proto.TCP: PORTS_TCP,
    Proto.UDP: PORTS_UDP,
    Proto.SCTP: PORTS_SCTP,
    Proto.ICMP: PORTS_ICMP4,
    Proto.ICMPV6: PORTS_ICMP6,
}


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

    def make(self, op: Op) -> None:
        if isinstance(op, Store):
            assert op.offset + len(op.data) <= len(self.memory[op.table]), op.table
            self.memory[op.table][op.offset : op.offset + len(op.data)] = op.data
        elif isinstance(op, Put):
            self.tables[op.table][op.key] = op.value
        elif isinstance(op, Drop):
            self.tables[op.table].pop(op.key, None)

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


def leftover(kernel: Kernel) -> object:
    """What daemon.datapath.maps reads back of a former life, from the model."""
    from array import array

    from bpf.layout import CONFIG as CONFIG_STRUCT
    from bpf.layout import FIRST_FREE_SLOT, SLOT_INFO, BufferFlag
    from daemon.datapath.image import INFO_GROUP, Leftover
    from daemon.datapath.ip4 import read_back
    from daemon.model.identity import Identity

    config = CONFIG_STRUCT.unpack(bytes(kernel.memory["config"][: CONFIG_STRUCT.size]))
    generation = int(str(config["generation"]))
    blocks = array("I", bytes(kernel.memory["ip4_blocks"]))
    entries: dict[str, dict[Prefix, int]] = {
        "ip4_hosts": {},
        "ip6_hosts": {},
        "ip6_nets": {},
        "ip6_prefixes": {},
    }
    for name, rows_ in entries.items():
        for key, value in kernel.tables[name].items():
            prefix = {
                "ip4_hosts": lambda k: Prefix(4, int.from_bytes(k, "big"), 32),
                "ip6_hosts": lambda k: Prefix(6, int.from_bytes(k, "big"), 128),
                "ip6_nets": lambda k: Prefix(6, int.from_bytes(k, "big") << 64, 64),
                "ip6_prefixes": lambda k: Prefix(6, int.from_bytes(k[4:], "big"), k[0]),
            }[name](key)
            rows_[prefix] = struct.unpack_from("<I", value)[0]
    held = [*read_back(blocks).values(), *(slot for rows_ in entries.values() for slot in rows_.values())]
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
    active = BufferFlag(int(str(config[f"buffer_flags{generation & 1}"])))
    enforced = (BufferFlag.ENFORCE_INGRESS in active, BufferFlag.ENFORCE_EGRESS in active)
    flags = ConfigFlag(int(str(config["flags"])))
    return Leftover(
        generation,
        flags,
        enforced,
        blocks,
        entries,
        identities,
        rows,
        (0, kernel.sizes.cells // 2),
        frozenset(),
    )
