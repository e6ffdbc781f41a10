"""BPF_PROG_TEST_RUN on private maps: packet bytes in, verdict, counters and events out. Attaches nothing.

`Rig` loads the real programs against small maps of its own and fills them from a `model.Policy`, so that
model and kernel can be asked the same question. Needs root; only constructing a Rig compiles.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from bpf import layout
from bpf.layout import (
    BLOCK_ENTRIES,
    BLOCK_ROOTS,
    CELL_BLOCK,
    CELLS,
    CONFIG,
    ENTRY_HOSTS,
    ENTRY_POINTER,
    EVENT,
    PEER,
    PORT_BLOCK,
    PORT_BLOCKS,
    PORTS_END,
    PREFIX6_KEY,
    ROWS,
    SLOT_HOST,
    SLOT_INFO,
    SLOT_WORLD4,
    SLOT_WORLD6,
    ConfigFlag,
    Hook,
    Reason,
)
from bpf.model import Direction, Policy
from bpf.syscall import PinnedMap, RunResult, prog_test_run
from bpf.trace import LOOPBACK, SKB_INGRESS_IFINDEX, SKB_SIZE, TCX_NEXT, XDP_MD, XDP_PASS, Traced, traced

RIG_SIZES = layout.sized(
    slots=1 << 10,
    cells=1 << 18,
    rules=1 << 10,
    ip4_blocks=BLOCK_ROOTS + 512,
    hosts=1 << 14,
    prefixes6=1 << 12,
    conntrack=1 << 16,
    events_bytes=1 << 20,
)
TRACE_COOKIE = 0x7472_6163_6520_6D65
STATE = (
    "ct4",
    "ct6",
    "ct4_new",
    "ct6_new",
    "fragments",
    "fragments_denied",
    "frag_sources",
    "answer_sources",
)
PROGRAM_OF = {Hook.XDP: "xdp", Hook.TCX_INGRESS: "tcx_ingress", Hook.TCX_EGRESS: "tcx_egress"}
XDP_DROP, TCX_DROP, TCX_REDIRECT = 1, 2, 7
SKB_GSO_SEGMENTS = 164  # offsets in struct __sk_buff
SKB_GSO_SIZE = 176
RING_BUSY, RING_DISCARD = 1 << 31, 1 << 30


class Blocks:
    """The IPv4 prefixes as ip4_blocks holds them: root blocks, then blocks for the third and fourth octet."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = [[SLOT_WORLD4] * BLOCK_ENTRIES for _ in range(BLOCK_ROOTS)]

    def put(self, network: bytes, length: int, slot: int) -> None:
        """Add a prefix; call with ascending lengths, so that longer ones paint over shorter ones."""
        low = int.from_bytes(network, "big") >> (32 - length) << (32 - length)
        at = (low >> 24, low >> 16 & 255)
        if length <= 16:
            for entry in range(low >> 16, (low >> 16) + (1 << (16 - length))):
                self.blocks[entry >> 8][entry & 255] = slot
            return
        block = self._child(*at)
        if length > 24:
            block = self._child(block, low >> 8 & 255)
        first, bits = (low >> 8 & 255, 24) if length <= 24 else (low & 255, 32)
        for entry in range(first, first + (1 << (bits - length))):
            self.blocks[block][entry] = slot

    def mark_hosts(self, address: bytes) -> None:
        """This /16 has an address in ip4_hosts."""
        self.blocks[address[0]][address[1]] |= ENTRY_HOSTS

    def _child(self, block: int, entry: int) -> int:
        found = self.blocks[block][entry]
        if not found & ENTRY_POINTER:
            self.blocks.append([found] * BLOCK_ENTRIES)
            self.blocks[block][entry] = found = ENTRY_POINTER | (len(self.blocks) - 1)
        return found & ~(ENTRY_POINTER | ENTRY_HOSTS)

    def packed(self) -> bytes:
        """All blocks, ready for a batch update."""
        return b"".join(struct.pack(f"={BLOCK_ENTRIES}I", *block) for block in self.blocks)


@dataclass(frozen=True)
class Verdict:
    """What one run of a program did.

    marked: XDP told the next hook that it need not judge again. answer: the frame that goes back instead.
    """

    passes: bool
    marked: bool
    duration_ns: int
    answer: bytes = b""


class Rig:
    """The three programs on maps of their own. Use as a context manager."""

    def __init__(self, sizes: layout.Sizes = RIG_SIZES) -> None:
        from bpf.features import probe  # noqa: PLC0415 - the loader pulls in LLVM
        from bpf.loader import load_programs, prepare_config  # noqa: PLC0415

        self.sizes = sizes
        self.maps = {name: PinnedMap.create(spec) for name, spec in layout.maps(sizes).items()}
        self.features = probe()
        self.hz = self.features.hz
        prepare_config(self.maps["config"], self.hz)
        self.loaded = load_programs(self.maps, sizes, self.features)
        self._generation = 0
        self._ring = _Ring(self.maps["events"])

    def __enter__(self) -> "Rig":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload everything."""
        self._ring.close()
        for fd in self.loaded.fds.values():
            os.close(fd)
        for one in self.maps.values():
            one.close()

    def install(self, policy: Policy, *, event_budget: int = 1_000_000, reject_budget: int = 100) -> None:
        """Make the maps say what the policy says, as the next generation; connections and fragments stay."""
        self._generation += 1
        flags = policy.flags | self._write_addresses(policy)
        self._write_cells(policy, self._generation & 1)
        enforced = {f"buffer_flags{self._generation & 1}": int(policy.enforced)}
        config = CONFIG.pack(
            generation=self._generation,
            flags=int(flags),
            event_budget=event_budget,
            reject_budget=reject_budget,
            panic=int(policy.panic),
            hz=self.hz,
            trace_cookie=TRACE_COOKIE,
            **enforced,
        )
        self.maps["config"].update(0, config)

    def _write_addresses(self, policy: Policy) -> ConfigFlag:
        blocks, flags = Blocks(), ConfigFlag(0)
        for name in ("ip4_hosts", "ip6_hosts", "ip6_nets", "ip6_prefixes"):
            self._empty(name)
        for (network, length), slot in sorted(policy.prefixes.items(), key=lambda item: item[0][1]):
            if len(network) == 4:
                blocks.put(network, length, slot)
            elif length == 64 and not _has_longer(policy, network):
                self.maps["ip6_nets"].update(network[:8], PEER.pack(slot=slot))
                flags |= ConfigFlag.V6_NETS
            else:
                self.maps["ip6_prefixes"].update(
                    PREFIX6_KEY.pack(length=length, address=network), PEER.pack(slot=slot)
                )
                flags |= ConfigFlag.V6_TRIE
        for address, slot in policy.addresses.items():
            if len(address) == 4 and slot == SLOT_HOST:  # asked for whenever a packet is about to be dropped
                blocks.put(address, 32, slot)
                continue
            self.maps["ip4_hosts" if len(address) == 4 else "ip6_hosts"].update(address, PEER.pack(slot=slot))
            if len(address) == 4:
                blocks.mark_hosts(address)
        keys = struct.pack(f"={len(blocks.blocks)}I", *range(len(blocks.blocks)))
        self.maps["ip4_blocks"].update_batch(keys, blocks.packed(), len(blocks.blocks))
        return flags

    def _write_cells(self, policy: Policy, buffer: int) -> None:
        slots = sorted(
            {SLOT_WORLD4, SLOT_HOST, SLOT_WORLD6, *policy.addresses.values(), *policy.prefixes.values()}
        )
        cells: list[int] = [0] * (buffer * self.sizes.cells // 2)
        at: dict[tuple[Direction, int], int] = {}
        known: dict[tuple[Direction, tuple[int, ...]], int] = {}  # equal rows are one, as the compiler has it
        for direction in Direction:
            edges = {0} | {
                edge
                for (found, _), paints in policy.rows.items()
                if found is direction
                for first, last, _ in paints
                for edge in (first, last + 1)
            }
            cuts = sorted(edge for edge in edges if edge < PORTS_END)
            columns = [0] * (PORT_BLOCKS * PORT_BLOCK)
            for number, (first, end) in enumerate(zip(cuts, [*cuts[1:], PORTS_END], strict=True)):
                columns[first:end] = [number] * (end - first)
            base = (buffer * 2 + direction) * PORT_BLOCKS
            raw = struct.pack(f"={len(columns)}H", *columns)
            keys = struct.pack(f"={PORT_BLOCKS}I", *range(base, base + PORT_BLOCKS))
            self.maps["port_class"].update_batch(keys, raw, PORT_BLOCKS)
            for slot in slots:
                row = tuple(policy.painted(direction, slot, cut) for cut in cuts)
                at[direction, slot] = known.setdefault((direction, row), len(cells))
                if at[direction, slot] == len(cells):
                    cells += row
        self._write_rows(slots, at, buffer)
        self._write_cell_blocks(cells, buffer)

    def _write_rows(self, slots: list[int], at: dict[tuple[Direction, int], int], buffer: int) -> None:
        for slot in slots:
            row = ROWS.pack(ingress_at=at[Direction.INGRESS, slot], egress_at=at[Direction.EGRESS, slot])
            self.maps["class_of"].update(buffer * self.sizes.slots + slot, row)
            self.maps["slot_info"].update(slot, SLOT_INFO.pack(identity=1_000 + slot))

    def _write_cell_blocks(self, cells: list[int], buffer: int) -> None:
        if len(cells) > (buffer + 1) * self.sizes.cells // 2:
            raise ValueError(f"{len(cells)} cells do not fit into {self.sizes.cells}")
        first = buffer * self.sizes.cells // 2 // CELL_BLOCK
        padded = cells + [0] * (-len(cells) % CELL_BLOCK)
        raw = struct.pack(f"={len(padded)}I", *padded)[first * CELLS.size :]
        count = len(raw) // CELLS.size
        self.maps["cells"].update_batch(struct.pack(f"={count}I", *range(first, first + count)), raw, count)

    def _empty(self, name: str) -> None:
        keys = b"".join(key for key, _ in self.maps[name].items())
        self.maps[name].delete_batch(keys, len(keys) // self.maps[name].spec.key_size)

    def forget(self) -> None:
        """Empty connections and fragments."""
        for name in STATE:
            self._empty(name)

    def run(
        self, hook: Hook, frame: bytes, *, forwarded: bool = False, segments: int = 0, repeat: int = 1
    ) -> Verdict:
        """Run one frame of at least 14 bytes.

        At TCX: forwarded, it came from another device; segments, it stands for so many packets (offload).
        """
        program = self.loaded.fds[PROGRAM_OF[hook]]
        if hook is Hook.XDP:
            result = prog_test_run(
                program, frame, repeat=repeat, context=XDP_MD.pack(0, len(frame), 0, 0, 0, 0)
            )
            data, _, meta, *_ = XDP_MD.unpack(result.context)
            marked = result.value == XDP_PASS and data > meta
            return Verdict(result.value == XDP_PASS, marked, result.duration_ns)
        context = bytearray(SKB_SIZE)
        if forwarded:
            struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, LOOPBACK)
        if segments:
            struct.pack_into("=I", context, SKB_GSO_SEGMENTS, segments)
            struct.pack_into("=I", context, SKB_GSO_SIZE, 1_000)
        result = self._run_skb(program, frame, bytes(context), repeat)
        answer = result.data if result.value == TCX_REDIRECT else b""
        return Verdict(result.value == TCX_NEXT, marked=False, duration_ns=result.duration_ns, answer=answer)

    def trace(self, hook: Hook, frame: bytes, *, forwarded: bool = False) -> Traced:
        """Run one frame and leave nothing behind."""
        program = self.loaded.fds[PROGRAM_OF[hook]]
        return traced(program, self.maps["config"], self.maps["trace"], hook, frame, forwarded=forwarded)

    @staticmethod
    def _run_skb(program: int, frame: bytes, context: bytes, repeat: int) -> RunResult:
        return prog_test_run(program, frame, repeat=repeat, context=context)

    def events(self) -> list[dict[str, object]]:
        """Events since the last call, by field name."""
        return [EVENT.unpack(raw) for raw in self._ring.drain()]

    def reasons(self, direction: Direction) -> dict[Reason, int]:
        """Packets counted so far for each reason that occurred."""
        base = direction * layout.REASONS
        counted = {reason: self._packets("reasons", base + reason) for reason in Reason}
        return {reason: packets for reason, packets in counted.items() if packets}

    def rule_packets(self, rule: int) -> int:
        """Packets that this rule decided."""
        return self._packets("rule_hits", rule)

    def _packets(self, name: str, index: int) -> int:
        return sum(struct.unpack_from("=Q", raw)[0] for raw in self.maps[name].lookup_percpu(index))


def _has_longer(policy: Policy, network: bytes) -> bool:
    return any(
        length > 64 and len(other) == 16 and other[:8] == network[:8] for other, length in policy.prefixes
    )


class _Ring:
    """Reads the ring buffer: the producer's pages read-only, the consumer's page to write."""

    def __init__(self, events: PinnedMap) -> None:
        self._size = events.spec.max_entries
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(events.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            events.fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )

    def drain(self) -> Iterator[bytes]:
        (at,) = struct.unpack_from("=Q", self._consumer, 0)
        (end,) = struct.unpack_from("=Q", self._producer, 0)
        while at < end:
            where = mmap.PAGESIZE + at % self._size
            (header,) = struct.unpack_from("=I", self._producer, where)
            if header & RING_BUSY:
                break
            length = header & (RING_DISCARD - 1)
            if not header & RING_DISCARD:
                yield self._producer[where + 8 : where + 8 + length]
            at += -(-(length + 8) // 8) * 8
            struct.pack_into("=Q", self._consumer, 0, at)

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()
