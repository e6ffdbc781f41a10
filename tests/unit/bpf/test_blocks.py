"""The rig's IPv4 blocks say of each address what the longest prefix says."""

from hypothesis import given
from hypothesis import strategies as st

from bpf.layout import ENTRY_HOSTS, ENTRY_MASK, ENTRY_POINTER
from bpf.model import Policy
from bpf.run import Blocks

NEAR = st.sampled_from([0x0A000000, 0x0A010000, 0x0A010200, 0x0A010280, 0xC0000200])
PREFIXES = st.dictionaries(st.tuples(NEAR, st.integers(1, 32)), st.integers(4, 30), max_size=8)


def walk(blocks: Blocks, address: bytes) -> int:
    entry = blocks.blocks[address[0]][address[1]]
    for octet in address[2:]:
        if entry & ENTRY_POINTER:
            entry = blocks.blocks[entry & ENTRY_MASK][octet]
    return entry & ~ENTRY_HOSTS


@given(PREFIXES, NEAR, st.integers(0, 0x3FF))
def test_a_walk_finds_the_slot_of_the_longest_prefix(
    prefixes: dict[tuple[int, int], int], base: int, low: int
) -> None:
    wanted = {
        ((number >> 32 - length << 32 - length).to_bytes(4, "big"), length): slot
        for (number, length), slot in prefixes.items()
    }
    blocks = Blocks()
    for (network, length), slot in sorted(wanted.items(), key=lambda item: item[0][1]):
        blocks.put(network, length, slot)
    address = (base | low).to_bytes(4, "big")
    assert walk(blocks, address) == Policy(prefixes=wanted).slot(address)
