"""The pinned maps of the data path: operations are made here, and read back here after a restart."""

import ctypes
import mmap
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from bpf.layout import (
    BLOCK_ENTRIES,
    CONFIG,
    FIRST_FREE_SLOT,
    HITS,
    LAYOUT_VERSION,
    PORT_BLOCK,
    PORT_BLOCKS,
    SLOT_INFO,
    BufferFlag,
    ConfigFlag,
    MapKind,
    Sizes,
    maps,
)
from bpf.syscall import PinnedMap
from daemon.datapath.image import INFO_GROUP, Leftover
from daemon.datapath.ip4 import read_back
from daemon.datapath.ops import Drop, Grace, Op, Put, Store
from daemon.datapath.render import RULE_MASK
from daemon.model.identity import Identity
from daemon.model.net import Prefix

MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine, 324)
MEMBARRIER_CMD_GLOBAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def grace() -> None:
    """Wait until no CPU runs a program that began before this call: about 10 ms."""
    if _libc.syscall(MEMBARRIER, MEMBARRIER_CMD_GLOBAL, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"membarrier: {os.strerror(code)}")


class KernelMaps:
    """Every pinned map of one layout, opened; array maps are written through memory."""

    def __init__(self, pins: Path, sizes: Sizes) -> None:
        """OSError or LayoutMismatch when they are not there or of another shape."""
        self.sizes = sizes
        home = pins / f"v{LAYOUT_VERSION}" / "maps"
        self._maps: dict[str, PinnedMap] = {}
        self._memory: dict[str, mmap.mmap] = {}
        try:
            for name, spec in maps(sizes).items():
                if spec.kind is MapKind.RINGBUF:
                    continue
                self._maps[name] = PinnedMap.open(home / name, spec)
                if spec.kind is MapKind.ARRAY:
                    self._memory[name] = self._maps[name].mmap(writable=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up descriptors and memory; the pins stay."""
        for memory in self._memory.values():
            memory.close()
        for one in self._maps.values():
            one.close()

    def apply(self, ops: Sequence[Op]) -> None:
        """Make the operations in order; runs of the same kind on one hash map go as one batch."""
        for (kind, table), run in groupby(ops, key=lambda op: (type(op), getattr(op, "table", ""))):
            if kind is Grace:
                grace()
            elif kind is Store:
                memory = self._memory[table]
                for op in run:
                    assert isinstance(op, Store)  # noqa: S101 - groupby by type
                    _store(memory, op.offset, op.data)
            elif kind is Put:
                puts = [op for op in run if isinstance(op, Put)]
                keys, values = b"".join(op.key for op in puts), b"".join(op.value for op in puts)
                self._maps[table].update_batch(keys, values, len(puts))
            else:
                drops = [op for op in run if isinstance(op, Drop)]
                for op in drops:
                    self._maps[table].delete(op.key)

    def zero_hits(self, rules: Sequence[int]) -> None:
        """Counters of rule numbers that get a new meaning."""
        spec = self._maps["rule_hits"]
        for rule in rules:
            spec.update(rule, bytes(len(spec.lookup(rule) or b"")))

    def hits(self, rule: int) -> tuple[int, int]:
        """Packets and bytes that a rule decided, over all CPUs."""
        return _summed(self._maps["rule_hits"].lookup_percpu(rule))

    def reason(self, index: int) -> tuple[int, int]:
        """Packets and bytes of direction * REASONS + reason, over all CPUs."""
        return _summed(self._maps["reasons"].lookup_percpu(index))

    def generation(self) -> int:
        """What the data path enforces now."""
        return int.from_bytes(self._memory["config"][0:4], sys.byteorder)

    def leftover(self) -> Leftover:
        """What an earlier process left, for Image.adopt."""
        config = CONFIG.unpack(self._memory["config"][: CONFIG.size])
        generation, flags = config["generation"], config["flags"]
        assert isinstance(generation, int)  # noqa: S101 - struct formats give ints
        assert isinstance(flags, int)  # noqa: S101
        blocks = array("I", self._memory["ip4_blocks"][: 4 * BLOCK_ENTRIES * self.sizes.ip4_blocks])
        entries = {
            name: dict(self._entries(name)) for name in ("ip4_hosts", "ip6_hosts", "ip6_nets", "ip6_prefixes")
        }
        held = [*read_back(blocks).values(), *(slot for rows in entries.values() for slot in rows.values())]
        used = {slot for slot in held if slot >= FIRST_FREE_SLOT}
        rows, identities = self._rows(generation & 1, used), {}
        for slot in used:
            info = SLOT_INFO.unpack(self._memory["slot_info"][8 * slot : 8 * slot + 8])
            if not int(str(info["flags"])) & INFO_GROUP:
                identities[slot] = Identity(int(str(info["identity"])))
        region, rules = self._region(generation & 1, rows)
        active = BufferFlag(int(str(config[f"buffer_flags{generation & 1}"])))
        enforced = (BufferFlag.ENFORCE_INGRESS in active, BufferFlag.ENFORCE_EGRESS in active)
        return Leftover(
            generation, ConfigFlag(flags), enforced, blocks, entries, identities, rows, region, rules
        )

    def _rows(self, buffer: int, used: set[int]) -> dict[int, tuple[int, int]]:
        flat = array("I", self._memory["class_of"][8 * self.sizes.slots * buffer :][: 8 * self.sizes.slots])
        return {slot: (flat[2 * slot], flat[2 * slot + 1]) for slot in [*range(FIRST_FREE_SLOT), *used]}

    def _region(
        self, buffer: int, rows: dict[int, tuple[int, int]]
    ) -> tuple[tuple[int, int], frozenset[int]]:
        """Cells that the active generation may read, and the rule numbers in them."""
        size = 2 * PORT_BLOCK * PORT_BLOCKS
        columns = array("H", self._memory["port_class"][2 * size * buffer : 2 * size * (buffer + 1)])
        at = [one for both in rows.values() for one in both]
        first, end = min(at), min(max(at) + max(columns) + 1, self.sizes.cells)
        cells = array("I", self._memory["cells"][4 * first : 4 * end])
        return (first, end), frozenset(cell & RULE_MASK for cell in set(cells))

    def _entries(self, table: str) -> Iterator[tuple[Prefix, int]]:
        for key, value in self._maps[table].items():
            if table == "ip6_prefixes":
                length = int.from_bytes(key[:4], sys.byteorder)
                yield Prefix(6, int.from_bytes(key[4:], "big"), length), _slot(value)
            else:
                width = 32 if table == "ip4_hosts" else 128
                address = int.from_bytes(key, "big") << (64 if table == "ip6_nets" else 0)
                yield (
                    Prefix(4 if width == 32 else 6, address, 64 if table == "ip6_nets" else width),
                    _slot(value),
                )


def _store(memory: mmap.mmap, offset: int, data: bytes) -> None:
    """Aligned 4 and 8 byte values are stored as one word, so that no packet sees half of one."""
    if len(data) == 8 and offset % 8 == 0:
        ctypes.c_uint64.from_buffer(memory, offset).value = int.from_bytes(data, sys.byteorder)
    elif len(data) == 4 and offset % 4 == 0:
        ctypes.c_uint32.from_buffer(memory, offset).value = int.from_bytes(data, sys.byteorder)
    else:
        memory[offset : offset + len(data)] = data


def _slot(value: bytes) -> int:
    return int.from_bytes(value[:4], sys.byteorder)


def _summed(values: Sequence[bytes]) -> tuple[int, int]:
    packets = sum(int(str(HITS.unpack(one)["packets"])) for one in values)
    return packets, sum(int(str(HITS.unpack(one)["bytes"])) for one in values)
