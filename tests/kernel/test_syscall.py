"""The bpf(2) wrapper against real maps."""

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from subprocess import run

import pytest

from bpf.layout import (
    BLOCK,
    CT4_KEY,
    CT_ENTRY,
    HITS,
    IP4_KEY,
    MMAPABLE,
    NO_PREALLOC,
    PEER,
    PREFIX6_KEY,
    Map,
    MapKind,
)
from bpf.syscall import LayoutMismatch, PinnedMap, map_info, possible_cpus

pytestmark = pytest.mark.kernel

HASH = Map("hosts", MapKind.HASH, IP4_KEY, PEER, 20_000, NO_PREALLOC)


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    yield tmp_path
    run(["umount", "-l", tmp_path], check=True)


def test_a_hash_gives_back_what_was_written_one_by_one_and_in_batches() -> None:
    keys = [struct.pack(">I", n) for n in range(10_000)]
    with PinnedMap.create(HASH) as peers:
        peers.update_batch(b"".join(keys), b"".join(PEER.pack(slot=n) for n in range(10_000)), 10_000)
        assert peers.lookup(keys[77]) == PEER.pack(slot=77)
        assert dict(peers.items()) == {key: PEER.pack(slot=n) for n, key in enumerate(keys)}
        assert peers.delete(keys[0])
        assert not peers.delete(keys[0])
        peers.delete_batch(b"".join(keys[:5_000]), 5_000)  # the first is gone already
        assert len(list(peers.items())) == 5_000


def test_a_full_hash_says_which_map_is_full_and_how_far_it_got() -> None:
    small = Map("small", MapKind.HASH, IP4_KEY, PEER, 4, NO_PREALLOC)
    with (
        PinnedMap.create(small) as peers,
        pytest.raises(OSError, match=r"MAP_UPDATE_BATCH small: .* after 4 of 6") as caught,
    ):
        peers.update_batch(b"".join(struct.pack(">I", n) for n in range(6)), PEER.pack() * 6, 6)
    assert caught.value.errno == errno.E2BIG


def test_tries_and_lru_maps_list_their_entries() -> None:
    trie = Map("trie", MapKind.LPM_TRIE, PREFIX6_KEY, PEER, 100, NO_PREALLOC)
    with PinnedMap.create(trie) as prefixes:
        wanted = {PREFIX6_KEY.pack(length=n, address=bytes(16)): PEER.pack(slot=n) for n in range(20, 40)}
        for key, value in wanted.items():
            prefixes.update(key, value)
        assert dict(prefixes.items()) == wanted
    with PinnedMap.create(Map("ct", MapKind.LRU_HASH, CT4_KEY, CT_ENTRY, 1_000)) as entries:
        key = CT4_KEY.pack(local_be=b"\1\2\3\4", proto=6)
        entries.update(key, CT_ENTRY.pack(expires=9))
        assert list(entries.items()) == [(key, CT_ENTRY.pack(expires=9))]


def test_an_array_is_written_through_its_memory() -> None:
    with PinnedMap.create(Map("blocks", MapKind.ARRAY, None, BLOCK, 8, MMAPABLE)) as blocks:
        with blocks.mmap(writable=True) as memory:
            struct.pack_into("=I", memory, 3 * blocks.stride + 4, 0xABCD)
        value = blocks.lookup(3)
        assert value is not None
        assert struct.unpack_from("=2I", value) == (0, 0xABCD)


def test_a_per_cpu_array_has_one_value_for_each_cpu() -> None:
    with PinnedMap.create(Map("hits", MapKind.PERCPU_ARRAY, None, HITS, 4)) as hits:
        hits.update(2, b"".join(HITS.pack(packets=cpu) for cpu in range(possible_cpus())))
        assert [HITS.unpack(raw)["packets"] for raw in hits.lookup_percpu(2)] == list(range(possible_cpus()))


def test_a_pinned_map_of_another_shape_is_refused_by_name(bpffs: Path) -> None:
    PinnedMap.create(HASH, bpffs / "hosts").close()
    with PinnedMap.open(bpffs / "hosts", HASH) as found:
        assert map_info(found.fd).name == "hosts"
    other = Map("hosts", MapKind.HASH, IP4_KEY, PEER, 5, NO_PREALLOC)
    with pytest.raises(LayoutMismatch, match="max_entries 20000, expected 5"):
        PinnedMap.open(bpffs / "hosts", other)


def test_a_missing_pin_is_an_error_with_its_path(bpffs: Path) -> None:
    with pytest.raises(OSError, match=r"BPF_OBJ_GET .*/nothing"):
        PinnedMap.open(bpffs / "nothing", HASH)
