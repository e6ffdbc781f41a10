"""Numbers that user space and the kernel share are written twice and have to be equal."""

from bpf import layout
from daemon.model.verdict import FIRST_RULE, RULE_BITS, CellFlag, FixedRule, Verdict, pack_cell, unpack_cell


def test_fixed_rules_have_the_numbers_of_the_data_path():
    ours = {f"RULE_{one.name}": int(one) for one in FixedRule}
    theirs = {name: value for name, value in vars(layout).items() if name.startswith("RULE_")}
    assert ours == theirs
    assert FIRST_RULE == layout.FIRST_RULE


def test_verdicts_and_flags_have_the_numbers_of_the_data_path():
    assert {one.name: int(one) for one in Verdict} == {one.name: int(one) for one in layout.CellVerdict}
    assert {one.name: int(one) for one in CellFlag if one} == {one.name: int(one) for one in layout.CellFlag}


def test_a_cell_comes_back_as_it_was_packed():
    for verdict in Verdict:
        cell = pack_cell(verdict, (1 << RULE_BITS) - 1, CellFlag.AUDIT | CellFlag.AUTH)
        assert unpack_cell(cell) == (verdict, (1 << RULE_BITS) - 1, CellFlag.AUDIT | CellFlag.AUTH)
