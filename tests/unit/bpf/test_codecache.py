"""Programs that were compiled before are used again, and nobody else's."""

import os
import struct

import pytest

from bpf.codecache import MOST_FILES, Compiled, directory, keep, key_of, maps_of, recall, relocate, tags

INSTRUCTION = struct.Struct("=BBhi")
WIDE = 0x18
COMPILED = Compiled(77, {"xdp": bytes(range(16))})


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "programs"


def test_what_was_kept_is_recalled_by_its_source_only(cache):
    keep(cache, key_of("a"), COMPILED)
    assert recall(cache, key_of("a")) == COMPILED
    assert recall(cache, key_of("b")) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_believed(cache, mode):
    keep(cache, "k", COMPILED)
    (cache / "k.json").chmod(mode)
    assert recall(cache, "k") is None


def test_a_directory_that_others_may_write_is_not_believed(cache):
    keep(cache, "k", COMPILED)
    cache.chmod(0o770)
    assert recall(cache, "k") is None


def test_a_link_to_elsewhere_is_not_followed(cache, tmp_path):
    keep(cache, "k", COMPILED)
    (cache / "k.json").rename(tmp_path / "elsewhere")
    (cache / "k.json").symlink_to(tmp_path / "elsewhere")
    assert recall(cache, "k") is None


def test_a_damaged_file_is_compiled_anew(cache):
    keep(cache, "k", COMPILED)
    path = cache / "k.json"
    whole = path.read_bytes()
    for cut in (0, 10, 70, len(whole) - 3):
        path.write_bytes(whole[:cut])
        assert recall(cache, "k") is None
    path.write_bytes(whole.replace(b'"cookie": 77', b'"cookie": 78'))
    assert recall(cache, "k") is None


def test_only_so_many_are_kept(cache):
    for number in range(MOST_FILES + 3):
        keep(cache, f"k{number}", COMPILED)
        os.utime(cache / f"k{number}.json", (number, number))
    assert len(list(cache.iterdir())) <= MOST_FILES + 1
    assert recall(cache, f"k{MOST_FILES + 2}") == COMPILED


def test_a_disk_that_fails_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file" / "programs", "k", COMPILED)


def test_placeholders_become_descriptors_and_numbers_stay_numbers():
    code = b"".join(
        [
            INSTRUCTION.pack(WIDE, 1 << 4 | 3, 0, 0x4D57),  # r3 = map
            INSTRUCTION.pack(0, 0, 0, 0),
            INSTRUCTION.pack(WIDE, 4, 0, 0x4D57),  # r4 = the number
            INSTRUCTION.pack(0, 0, 0, 0x18),
            INSTRUCTION.pack(WIDE, 2 << 4 | 5, 0, 0x4D57),  # r5 = the memory of map
            INSTRUCTION.pack(0, 0, 0, 8),
            INSTRUCTION.pack(0x95, 0, 0, 0),
        ]
    )
    found = relocate(code, {0x4D57: 9})
    immediates = [INSTRUCTION.unpack_from(found, at)[3] for at in range(0, len(found), 8)]
    assert immediates == [9, 0, 0x4D57, 0x18, 9, 8, 0]


def test_the_kernels_name_for_instructions_is_that_of_any_maps():
    def code(one: int, constant: int) -> bytes:
        wide = [
            (WIDE, 1 << 4 | 3, 0, one),
            (0, 0, 0, 0),
            (WIDE, 4, 0, constant),
            (0, 0, 0, 0),
            (0x95, 0, 0, 0),
        ]
        return b"".join(INSTRUCTION.pack(*each) for each in wide)

    assert tags(code(1, 7)) == tags(code(2, 7))
    assert set(tags(code(1, 7))).isdisjoint(tags(code(1, 8)))
    assert maps_of(code(1, 7)) == {1}


def test_a_map_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="0x4d57"):
        relocate(INSTRUCTION.pack(WIDE, 1 << 4, 0, 0x4D57) + bytes(8), {})


def test_the_service_manager_says_where(monkeypatch):
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert directory() is None
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/a:/var/cache/b")
    assert str(directory()) == "/var/cache/a/programs"
