"""Tables: keys that changed, per reader."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from daemon.state.table import Table

CHANGES = st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 3)), max_size=30)


def test_a_new_reader_sees_what_is_there_and_then_what_changes() -> None:
    table: Table[str, int] = Table("t")
    table.put("a", 1)
    wake = asyncio.Event()
    reader = table.reader(wake)
    assert wake.is_set()
    assert reader.take() == {"a"}
    wake.clear()
    assert not table.put("a", 1)
    assert not wake.is_set()
    table.put("b", 2)
    table.delete("a")
    assert wake.is_set()
    assert reader.take() == {"a", "b"}
    assert not reader


def test_synced_wakes_readers_once() -> None:
    table: Table[str, int] = Table("t")
    wake = asyncio.Event()
    table.reader(wake)
    table.mark_synced()
    assert wake.is_set()
    wake.clear()
    table.mark_synced()
    assert not wake.is_set()


def test_replacing_within_leaves_the_rows_of_others() -> None:
    table: Table[str, int] = Table("t")
    table.replace({"mine": 1, "gone": 2, "theirs": 3})
    table.replace({"mine": 4, "new": 5}, within={"mine", "gone"})
    assert dict(table.rows) == {"mine": 4, "new": 5, "theirs": 3}


@given(CHANGES)
def test_a_reader_that_follows_the_keys_has_the_whole_table(changes: list[tuple[int, int | None]]) -> None:
    table: Table[int, int] = Table("t")
    reader = table.reader(asyncio.Event())
    copy: dict[int, int] = {}
    for at, (key, value) in enumerate(changes):
        if value is None:
            table.delete(key)
        else:
            table.put(key, value)
        if at % 3 == 0:
            _follow(copy, table, reader.take())
    _follow(copy, table, reader.take())
    assert copy == dict(table.rows)


def _follow(copy: dict[int, int], table: Table[int, int], keys: set[int]) -> None:
    for key in keys:
        row = table.get(key)
        if row is None:
            copy.pop(key, None)
        else:
            copy[key] = row
