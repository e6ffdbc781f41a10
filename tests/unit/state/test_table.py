"""Tables: keys that changed, per reader."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from daemon.model.identity import Identity
from daemon.model.net import compact, expand, parse_prefix
from daemon.state.table import Table
from daemon.state.tables import IpKey, IpRow, IpTable

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


def claim(source: str, identity: int = 70001, prefix: str = "10.0.0.1") -> tuple[IpKey, IpRow]:
    return IpKey(parse_prefix(prefix), source), IpRow(Identity(identity), "web", source=source)


def test_each_source_has_its_own_claim_to_an_address():
    table = IpTable("ips")
    one, two = claim("mesh:beta"), claim("mesh:gamma", 70002)
    assert table.put(*one)
    assert table.put(*two)
    assert not table.put(*one)
    assert (len(table), set(table), table[one[0]]) == (2, {one[0], two[0]}, one[1])
    assert table.shared() == [compact(one[0].prefix)]
    assert table.delete(one[0])
    assert not table.delete(one[0])
    assert (list(table), table.get(one[0]), table.shared()) == ([two[0]], None, [])
    assert table.delete(two[0])
    assert (len(table), table.prefixes(), table.counts) == (0, [], {})


def test_a_claim_is_kept_with_its_source_whoever_forgot_to_say_it():
    table = IpTable("ips")
    key, row = claim("mesh:beta")
    table.put(key, IpRow(row.identity, "web"))
    assert [one.source for one in table.claims(compact(key.prefix))] == ["mesh:beta"]


def test_readers_of_claims_see_prefixes_once_however_many_claim_them():
    table = IpTable("ips")
    wake = asyncio.Event()
    table.put(*claim("mesh:beta"))
    reader = table.reader(wake)
    assert reader.take() == {compact(parse_prefix("10.0.0.1"))}
    table.put(*claim("mesh:beta", 70003))
    table.put(*claim("mesh:gamma"))
    table.put(*claim("mesh:gamma", prefix="2001:db8::/64"))
    assert {expand(one) for one in reader.take()} == {parse_prefix("10.0.0.1"), parse_prefix("2001:db8::/64")}
    assert not reader
