"""The pinned maps of the data path: operations are made here, and read back here after a restart."""

import ctypes
import mmap
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bpf.layout import (
    BLOCK_ENTRIES,
    CONFIG,
    FIRST_FREE_SLOT,
    LAYOUT_VERSION,
    PORT_BLOCK,
    PORT_BLOCKS,
    ROWS,
    SLOT_INFO,
    BufferFlag,
    ConfigFlag,
    MapKind,
    Sizes,
    maps,
)
from bpf.syscall import PinnedMap
from daemon.datapath.addresses import HOSTS6
from daemon.datapath.image import INFO_GROUP, Leftover
from daemon.datapath.ip4 import slots_in
from daemon.datapath.ops import Grace, Op, Order, Put, Store
from daemon.datapath.render import RULE_MASK
from daemon.model.identity import Identity
from daemon.model.net import Prefix

MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine, 324)
MEMBARRIER_CMD_GLOBAL = 1
MEMBARRIER_CMD_GLOBAL_EXPEDITED = 2
STORES_ARE_ORDERED = os.uname().machine == "x86_64"  # every CPU sees the stores of another in their order
_libc = ctypes.CDLL(None, use_errno=True)


def grace() -> None:
    """Wait until no CPU runs a program that began before this call: about 10 ms."""
    _membarrier(MEMBARRIER_CMD_GLOBAL)


def order() -> None:
    """Stores before this call are seen before those after it. The packet's side needs nothing: it reads what is
    published through the index that it read first."""
    if not STORES_ARE_ORDERED:
        _membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED)


def _membarrier(command: int) -> None:
    if _libc.syscall(MEMBARRIER, command, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"membarrier: {os.strerror(code)}")


class KernelMaps:
    """Every pinned map of one layout, opened. Array maps are written through memory that is mapped while it is used:
    pages of a mapped array count as this process's resident memory.
    """

    def __init__(self, pins: Path, sizes: Sizes) -> None:
        """OSError or LayoutMismatch when they are not there or of another shape."""
        self.sizes = sizes
        home = pins / f"v{LAYOUT_VERSION}" / "maps"
        self._maps: dict[str, PinnedMap] = {}
        try:
            for name, spec in maps(sizes).items():
                if spec.kind is not MapKind.RINGBUF:
                    self._maps[name] = PinnedMap.open(home / name, spec)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the descriptors; the pins stay."""
        for one in self._maps.values():
            one.close()

    def apply(self, ops: Sequence[Op]) -> None:
        """Make the operations in order."""
        with _Memory(self._maps) as memory:
            for op in ops:
                if isinstance(op, Store):
                    _store(memory[op.table], op.offset, op.data)
                elif isinstance(op, Grace):
                    grace()
                elif isinstance(op, Order):
                    order()
                else:
                    target = self._maps[op.table]
                    count = len(op.keys) // target.spec.key_size
                    if isinstance(op, Put):
                        target.update_batch(op.keys, op.values, count)
                    else:
                        target.delete_batch(op.keys, count)

    def zero_hits(self, rules: Sequence[int]) -> None:
        """Counters of rule numbers that get a new meaning."""
        spec = self._maps["rule_hits"]
        for rule in rules:
            spec.update(rule, bytes(len(spec.lookup(rule) or b"")))

    def generation(self) -> int:
        """What the data path enforces now; 0 before the first policy."""
        return int.from_bytes((self._maps["config"].lookup(0) or b"")[:4], sys.byteorder)

    def leftover(self) -> Leftover:
        """What an earlier process left, for Image.adopt."""
        with _Memory(self._maps) as memory:
            config = CONFIG.unpack(memory["config"][: CONFIG.size])
            generation = int(str(config["generation"]))
            active = BufferFlag(int(str(config[f"buffer_flags{generation & 1}"])))
            blocks = array("I", memory["ip4_blocks"][: 4 * BLOCK_ENTRIES * self.sizes.ip4_blocks])
            hosts = {name: self._hosts(name) for name in ("ip4_hosts", "ip6_hosts")}
            wide = {name: dict(self._wide(name)) for name in ("ip6_nets", "ip6_prefixes")}
            held = slots_in(blocks).union(*(one.values() for one in hosts.values()))
            held = held.union(*(one.values() for one in wide.values()))
            used = {slot for slot in held if slot >= FIRST_FREE_SLOT}
            rows = _rows(memory["class_of"], self.sizes.slots * (generation & 1), used)
            region, rules = _region(
                memory["port_class"], memory["cells"], generation & 1, rows, self.sizes.cells
            )
            return Leftover(
                generation=generation,
                flags=ConfigFlag(int(str(config["flags"]))),
                enforced=(BufferFlag.ENFORCE_INGRESS in active, BufferFlag.ENFORCE_EGRESS in active),
                blocks=blocks,
                hosts=hosts,
                wide=wide,
                identities=dict(_identities(memory["slot_info"], used)),
                rows=rows,
                region=region,
                rules=rules,
            )

    def _hosts(self, table: str) -> dict[int, int]:
        """Address, as `compact` number, and slot of each entry."""
        first = HOSTS6.start if table == "ip6_hosts" else 0
        return {
            first + int.from_bytes(key, "big"): int.from_bytes(value[:4], sys.byteorder)
            for key, value in self._maps[table].items()
        }

    def _wide(self, table: str) -> Iterator[tuple[Prefix, int]]:
        for key, value in self._maps[table].items():
            slot = int.from_bytes(value[:4], sys.byteorder)
            if table == "ip6_prefixes":
                length = int.from_bytes(key[:4], sys.byteorder)
                yield Prefix(6, int.from_bytes(key[4:], "big"), length), slot
            else:
                yield Prefix(6, int.from_bytes(key, "big") << 64, 64), slot


class _Memory:
    """Array maps by name, mapped when first asked for and unmapped at the end."""

    def __init__(self, opened: Mapping[str, PinnedMap]) -> None:
        self._opened = opened
        self._mapped: dict[str, mmap.mmap] = {}

    def __enter__(self) -> "_Memory":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._mapped.values():
            one.close()

    def __getitem__(self, table: str) -> mmap.mmap:
        if table not in self._mapped:
            self._mapped[table] = self._opened[table].mmap(writable=True)
        return self._mapped[table]


def _rows(class_of: mmap.mmap, base: int, used: set[int]) -> dict[int, tuple[int, int]]:
    """The rows of each slot in the buffer that begins with slot `base`."""
    found = {}
    for slot in [*range(FIRST_FREE_SLOT), *used]:
        row = ROWS.unpack(class_of[8 * (base + slot) : 8 * (base + slot + 1)])
        found[slot] = (int(str(row["ingress_at"])), int(str(row["egress_at"])))
    return found


def _identities(slot_info: mmap.mmap, used: set[int]) -> Iterator[tuple[int, Identity]]:
    """The slots that stand for an identity, not for prefixes of a policy."""
    for slot in used:
        info = SLOT_INFO.unpack(slot_info[8 * slot : 8 * (slot + 1)])
        if not int(str(info["flags"])) & INFO_GROUP:
            yield slot, Identity(int(str(info["identity"])))


def _region(
    port_class: mmap.mmap, memory: mmap.mmap, buffer: int, rows: Mapping[int, tuple[int, int]], capacity: int
) -> tuple[tuple[int, int], frozenset[int]]:
    """Cells that the active generation may read, and the rule numbers in them."""
    size = 2 * PORT_BLOCK * PORT_BLOCKS
    columns = array("H", port_class[2 * size * buffer : 2 * size * (buffer + 1)])
    at = [one for both in rows.values() for one in both]
    first, end = min(at), min(max(at) + max(columns) + 1, capacity)
    cells = array("I", memory[4 * first : 4 * end])
    return (first, end), frozenset(cell & RULE_MASK for cell in set(cells))


def _store(memory: mmap.mmap, offset: int, data: bytes) -> None:
    """Aligned 4 and 8 byte values are stored as one word, so that no packet sees half of one."""
    if len(data) == 8 and offset % 8 == 0:
        ctypes.c_uint64.from_buffer(memory, offset).value = int.from_bytes(data, sys.byteorder)
    elif len(data) == 4 and offset % 4 == 0:
        ctypes.c_uint32.from_buffer(memory, offset).value = int.from_bytes(data, sys.byteorder)
    else:
        memory[offset : offset + len(data)] = data
