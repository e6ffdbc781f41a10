"""Who gets in when the address tables are full: what is believed most. Pure, but for `apply`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from daemon.datapath.ip4 import BlocksFull
from daemon.datapath.ops import Op, TableFull
from daemon.model.identity import Identity

FULL = (TableFull, BlocksFull)


class Tables(Protocol):
    """The part of Image that is used here."""

    def claim(self, put: Mapping[int, Identity | None], delete: Iterable[int]) -> list[Op]:
        """See Image."""
        ...

    def owned(self) -> Iterable[int]:
        """See Image."""
        ...


def squeeze(
    tables: Tables,
    put: Mapping[int, Identity | None],
    trust: Callable[[int], int],
    apply: Callable[[list[Op]], None],
) -> list[int]:
    """Enter as much of `put` (by `compact` prefix) as fits: the lowest `trust` first, even in a higher one's place.

    Returns the prefixes that are not in the tables afterwards: they count as the world around them.
    """
    left: list[int] = []
    ranked = sorted(put, key=lambda key: (_table(key), trust(key), key))
    for table, group in groupby(ranked, _table):
        rest = _enter(tables, list(group), put, apply)
        if rest:
            out = _less_trusted(tables, rest, table, trust, put)
            apply(tables.claim({}, out))
            rest = _enter(tables, rest, put, apply) + out if out else rest
        left += rest
    return left


def _table(key: int) -> int:
    """Prefixes that compete for the same room: IPv4 hosts and networks, IPv6 hosts and networks."""
    code = key >> 128
    return 0 if code == 0 else 1 if code <= 32 else 2 if code == 64 else 3


def _enter(
    tables: Tables,
    keys: Sequence[int],
    put: Mapping[int, Identity | None],
    apply: Callable[[list[Op]], None],
) -> list[int]:
    """In order, until the next one does not fit; those that are left."""
    at, step = 0, len(keys)
    while step and at < len(keys):
        some = keys[at : at + step]
        try:
            apply(tables.claim({key: put[key] for key in some}, ()))
            at += len(some)
        except FULL:
            step //= 2
    return list(keys[at:])


def _less_trusted(
    tables: Tables,
    rest: Sequence[int],
    table: int,
    trust: Callable[[int], int],
    put: Mapping[int, Identity | None],
) -> list[int]:
    """Entries that have to go for those that are left, one for each."""
    held = [key for key in tables.owned() if key not in put and _table(key) == table]
    held.sort(key=lambda key: (-trust(key), key))
    return [old for old, new in zip(held, rest, strict=False) if trust(new) < trust(old)]
