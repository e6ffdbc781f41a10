"""IPv4 prefixes as 8-bit stride blocks: which stores bring ip4_blocks from one set of prefixes to another.

A root entry and everything below it is painted anew when a prefix in its /16 changes: fresh child blocks are filled
first, one store of the root entry publishes them, and the old blocks are free after a grace period. So a reader sees
the old or the new content of a /16, never a mix.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from bpf.layout import BLOCK_ENTRIES, BLOCK_ROOTS, ENTRY_HOSTS, ENTRY_MASK, ENTRY_POINTER, SLOT_WORLD4
from daemon.model.net import Prefix

ROOTS = BLOCK_ROOTS * BLOCK_ENTRIES


class BlocksFull(Exception):  # noqa: N818 - read as a fact
    """The prefixes need more blocks than the map has."""


@dataclass(slots=True)
class Painted:
    """Stores in order: whole child blocks that nobody points to yet, then root entries (index, value)."""

    blocks: list[tuple[int, bytes]] = field(default_factory=list)
    roots: list[tuple[int, int]] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)  # block numbers that are free after a grace period


class Ip4Blocks:
    """What ip4_blocks holds. `change` plans stores; the caller makes them and gives retired blocks back."""

    def __init__(self, blocks: int) -> None:
        self._capacity = blocks
        self._free = list(range(blocks - 1, BLOCK_ROOTS - 1, -1))
        self._roots = array("I", bytes(4 * ROOTS))
        self._short: dict[Prefix, int] = {}  # length 1..16 -> slot
        self._long: dict[int, dict[Prefix, int]] = {}  # root index -> prefixes longer than 16
        self._owned: dict[int, list[int]] = {}  # root index -> its child blocks
        self._hosts: set[int] = set()  # root indexes with entries in ip4_hosts

    @property
    def used(self) -> int:
        """Blocks in use, the roots included."""
        return self._capacity - len(self._free)

    def adopt(self, entries: "array[int]") -> dict[Prefix, int]:
        """Take over a filled map: its blocks, and its content as prefixes of 16, 24 and 32 bits."""
        self._roots = entries[:ROOTS]
        self._hosts = {root for root in range(ROOTS) if self._roots[root] & ENTRY_HOSTS}
        found = read_back(entries)
        self._short = {prefix: slot for prefix, slot in found.items() if prefix.length == 16}
        for prefix, slot in found.items():
            if prefix.length > 16:
                self._long.setdefault(prefix.address >> 16, {})[prefix] = slot
        self._owned = {}
        for root in range(ROOTS):
            if self._roots[root] & ENTRY_POINTER:
                self._owned[root] = list(_blocks_below(self._roots[root], entries))
        busy = {block for owned in self._owned.values() for block in owned}
        self._free = [block for block in range(self._capacity - 1, BLOCK_ROOTS - 1, -1) if block not in busy]
        return found

    def change(self, put: Mapping[Prefix, int], delete: Iterable[Prefix]) -> Painted:
        """Prefixes come, move and go; hosts only if `adopt` found them. Raises BlocksFull with nothing changed."""
        short, dirty = dict(self._short), set[int]()
        long: dict[int, dict[Prefix, int]] = {}
        for prefix in delete:
            self._touch(prefix, None, short, long, dirty)
        for prefix, slot in put.items():
            self._touch(prefix, slot, short, long, dirty)
        base = _paint_roots(short) if short != self._short else None
        if base is not None:
            dirty |= self._differing(base)
        return self._repaint(dirty, short, long, base)

    def hosts(self, roots: set[int]) -> Painted:
        """The /16s with entries in ip4_hosts are now `roots`; only the flag of the entries changes."""
        painted = Painted()
        for root in roots ^ self._hosts:
            entry = self._roots[root] ^ ENTRY_HOSTS
            self._roots[root] = entry
            painted.roots.append((root, entry))
        self._hosts = set(roots)
        return painted

    def give_back(self, blocks: Iterable[int]) -> None:
        """Blocks that no packet can be reading any more."""
        self._free.extend(blocks)

    def prefixes(self) -> Iterator[tuple[Prefix, int]]:
        """Every prefix and its slot."""
        yield from self._short.items()
        for inner in self._long.values():
            yield from inner.items()

    def _touch(
        self,
        prefix: Prefix,
        slot: int | None,
        short: dict[Prefix, int],
        long: dict[int, dict[Prefix, int]],
        dirty: set[int],
    ) -> None:
        if prefix.length <= 16:
            inner = short
        else:
            root = prefix.address >> 16
            dirty.add(root)
            inner = long.setdefault(root, dict(self._long.get(root, {})))
        if slot is None:
            inner.pop(prefix, None)
        else:
            inner[prefix] = slot

    def _differing(self, base: "array[int]") -> set[int]:
        """Root indexes whose covering slot is another one than what was painted from."""
        before = _paint_roots(self._short)
        if before == base:
            return set()
        return {root for root in range(ROOTS) if before[root] != base[root]}

    def _repaint(
        self,
        dirty: set[int],
        short: dict[Prefix, int],
        long: dict[int, dict[Prefix, int]],
        base: "array[int] | None",
    ) -> Painted:
        covering = base if base is not None else _paint_roots(short)
        trees = {root: _tree(long.get(root, self._long.get(root, {})), covering[root]) for root in dirty}
        needed = sum(tree.blocks for tree in trees.values())
        if needed > len(self._free):
            raise BlocksFull(
                f"ip4_blocks: {needed} blocks needed, {len(self._free)} of {self._capacity} free"
            )
        painted = Painted()
        for root, tree in trees.items():
            owned: list[int] = []
            entry = self._place(tree, painted, owned) | (ENTRY_HOSTS if root in self._hosts else 0)
            painted.retired += self._owned.pop(root, [])
            if owned:
                self._owned[root] = owned
            if entry != self._roots[root]:
                self._roots[root] = entry
                painted.roots.append((root, entry))
        self._short = short
        for root, inner in long.items():
            if inner:
                self._long[root] = inner
            else:
                self._long.pop(root, None)
        return painted

    def _place(self, tree: "_Tree", painted: Painted, owned: list[int]) -> int:
        """The entry that stands for a tree; its blocks are appended children first."""
        if tree.children is None:
            return tree.slot
        entries = array("I", (self._place(child, painted, owned) for child in tree.children))
        block = self._free.pop()
        owned.append(block)
        painted.blocks.append((block, entries.tobytes()))
        return ENTRY_POINTER | block


@dataclass(slots=True)
class _Tree:
    """A slot, or 256 trees of the next octet."""

    slot: int
    children: "list[_Tree] | None" = None

    @property
    def blocks(self) -> int:
        return 0 if self.children is None else 1 + sum(child.blocks for child in self.children)


def _paint_roots(short: Mapping[Prefix, int]) -> "array[int]":
    """The covering slot of each /16."""
    roots = array("I", bytes(4 * ROOTS)) if SLOT_WORLD4 == 0 else array("I", [SLOT_WORLD4]) * ROOTS
    for prefix in sorted(short, key=lambda one: one.length):
        first, count = prefix.address >> 16, 1 << 16 - prefix.length
        roots[first : first + count] = array("I", [short[prefix]]) * count
    return roots


def _tree(prefixes: Mapping[Prefix, int], covering: int, level: int = 16) -> _Tree:
    """The tree below an entry of `level` bits; `prefixes` are all longer than that and inside it."""
    if not prefixes:
        return _Tree(covering)
    slots = [covering] * BLOCK_ENTRIES
    deeper: dict[int, dict[Prefix, int]] = {}
    shift = 32 - level - 8
    for prefix in sorted(prefixes, key=lambda one: one.length):
        first = prefix.address >> shift & 255
        if prefix.length <= level + 8:
            count = 1 << level + 8 - prefix.length
            slots[first : first + count] = [prefixes[prefix]] * count
        else:
            deeper.setdefault(first, {})[prefix] = prefixes[prefix]
    children = [_tree(deeper.get(at, {}), slot, level + 8) for at, slot in enumerate(slots)]
    if all(child.children is None and child.slot == children[0].slot for child in children):
        return children[0]
    return _Tree(covering, children)


def _blocks_below(entry: int, entries: "array[int]") -> Iterator[int]:
    """The blocks that a pointer leads to."""
    block = entry & ENTRY_MASK
    yield block
    for octet in range(BLOCK_ENTRIES):
        inner = entries[block * BLOCK_ENTRIES + octet]
        if inner & ENTRY_POINTER:
            yield from _blocks_below(inner, entries)


def read_back(entries: "array[int]") -> dict[Prefix, int]:
    """The slots in a whole ip4_blocks map as prefixes of 16, 24 and 32 bits; entries of the world are left out."""
    found: dict[Prefix, int] = {}

    def walk(entry: int, address: int, length: int) -> None:
        if entry & ENTRY_POINTER:
            at = (entry & ENTRY_MASK) * BLOCK_ENTRIES
            for octet in range(BLOCK_ENTRIES):
                walk(entries[at + octet], address | octet << 32 - length - 8, length + 8)
        elif entry & ENTRY_MASK != SLOT_WORLD4:
            found[Prefix(4, address, length)] = entry & ENTRY_MASK

    for root in range(ROOTS):
        if entries[root]:
            walk(entries[root], root << 16, 16)
    return found
