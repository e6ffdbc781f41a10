"""Operations on kernel maps, as values: the plan of a change, made one after the other."""

from typing import NamedTuple


class Store(NamedTuple):
    """Bytes at an offset of an array map's memory. Aligned words are stored whole."""

    table: str
    offset: int
    data: bytes


class Put(NamedTuple):
    """Insert or replace an entry of a hash or trie."""

    table: str
    key: bytes
    value: bytes


class Drop(NamedTuple):
    """Remove an entry of a hash or trie; one that is not there is no error."""

    table: str
    key: bytes


class Grace(NamedTuple):
    """Wait until no packet is processed any more that could have read the tables before this point."""


Op = Store | Put | Drop | Grace


class TableFull(Exception):  # noqa: N818 - read as a fact
    """A change does not fit; nothing of it was planned. The old state stays in force."""

    def __init__(self, table: str, needed: int, available: int) -> None:
        super().__init__(f"{table}: {needed} entries needed, {available} available")
        self.table = table
        self.needed = needed
        self.available = available
