"""Layouts: sizes, packing, and what the C gets from them."""

import re
from pathlib import Path

import pytest

from bpf import layout
from bpf.layout import CT4_KEY, EVENT, MMAPABLE, STRUCTS, MapKind, Reason

SOURCES = Path(layout.__file__).parent / "src"


def test_a_struct_unpacks_to_what_was_packed_and_names_unknown_fields() -> None:
    raw = CT4_KEY.pack(local_be=b"\1\2\3\4", proto=6)
    assert CT4_KEY.unpack(raw)["local_be"] == b"\1\2\3\4"
    assert CT4_KEY.unpack(raw)["remote_be"] == bytes(4)
    with pytest.raises(TypeError, match="struct ct4_key has no field protocol"):
        CT4_KEY.pack(protocol=6)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda one: one.name)
def test_fields_lie_on_their_natural_boundaries_so_that_c_adds_no_padding(struct: layout.Struct) -> None:
    widths = {"B": 1, "H": 2, "I": 4, "Q": 8}
    offsets = struct.offsets()
    for name, code in struct.fields:
        assert offsets[name] % widths.get(code, 1) == 0, name
    largest = max(widths.get(code, 1) for _, code in struct.fields)
    assert struct.size % largest == 0


def test_arrays_that_are_mapped_into_memory_have_values_of_whole_words() -> None:
    for spec in layout.maps().values():
        if spec.flags & MMAPABLE:
            assert spec.kind is MapKind.ARRAY
            assert spec.value_size % 8 == 0, f"{spec.name}: the kernel would space its values wider"


def test_drop_reasons_fit_the_counters_and_an_event_has_no_gaps() -> None:
    assert max(Reason) < layout.REASONS
    assert sum(
        1 for line in layout.static_asserts().splitlines() if " event." in line.replace('"', " ")
    ) == len(EVENT.fields)


def test_the_c_names_only_reasons_and_constants_that_exist() -> None:
    known = layout.constants()
    text = "".join(path.read_text(encoding="ascii") for path in SOURCES.iterdir())
    used = set(
        re.findall(
            r"\b(?:REASON|CLASS|SLOT|RULE|CONFIG|BUFFER|CELL|CELLFLAG|HOOK|EVENT|PORTS)_[A-Z0-9_]+\b", text
        )
    )
    assert used <= known.keys() | {"CELL_BLOCK", "BLOCK_ENTRIES"}


def test_every_drop_reason_of_the_parser_is_reachable_in_the_c() -> None:
    text = "".join(path.read_text(encoding="ascii") for path in SOURCES.iterdir())
    unused = {reason.name for reason in Reason if f"REASON_{reason.name}" not in text}
    assert unused == set()


def test_the_documentation_explains_every_reason_under_its_number() -> None:
    text = (Path(layout.__file__).parents[1] / "docs" / "datapath.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| ([A-Z0-9_]+) \|", text, re.MULTILINE))
    assert {int(number): name for number, name in rows.items()} == {
        int(reason): reason.name for reason in Reason
    }


def test_sizes_can_be_changed_by_name() -> None:
    assert layout.maps(layout.sized(hosts=10))["ip4_hosts"].max_entries == 10
