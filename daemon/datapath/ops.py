"""Operations on kernel maps, as values: the plan of a change, made one after the other."""

from typing import NamedTuple


class Store(NamedTuple):
    """Bytes at an offset of an array map's memory. Aligned words are stored whole."""

    table: str
    offset: int
    data: bytes


class Put(NamedTuple):
    """Insert or replace entries of a hash or trie, one after the other: keys and values joined."""

    table: str
    keys: bytes
    values: bytes


class Drop(NamedTuple):
    """Remove entries of a hash or trie, one after the other: keys joined. One that is not there is no error."""

    table: str
    keys: bytes


class Order(NamedTuple):
    """Whoever sees a store after this point sees all before it: stands between filling a table and publishing it."""


class Grace(NamedTuple):
    """Wait until no packet is processed any more that could have read the tables before this point."""


Op = Store | Put | Drop | Order | Grace


class TableFull(Exception):  # noqa: N818 - read as a fact
    """A change does not fit; nothing of it was planned. The old state stays in force."""

    def __init__(self, table: str, needed: int, available: int) -> None:
        super().__init__(f"{table}: {needed} entries needed, {available} available")
        self.table = table
        self.needed = needed
        self.available = available
