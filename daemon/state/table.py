"""Table: immutable rows by key, and for each reader the keys that changed since it last looked."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Reader(Generic[K]):
    """The keys that changed since the last `take`; a burst costs memory for keys, never for updates."""

    def __init__(self, keys: set[K], wake: asyncio.Event) -> None:
        self._keys = keys
        self._wake = wake

    def take(self) -> set[K]:
        """The changed keys, forgotten here."""
        taken, self._keys = self._keys, set()
        return taken

    def __bool__(self) -> bool:
        return bool(self._keys)

    def mark(self, key: K) -> None:
        """Called by the table only."""
        self._keys.add(key)
        self._wake.set()


class Followed(Generic[K]):
    """What all tables have: `revision` rises with every change; `synced` says that its sources have told everything."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.revision = 0
        self.synced = False
        self.stale_since: dict[str, float] = {}  # source -> wall-clock seconds since it is out of reach
        self._readers: list[Reader[K]] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def _keys(self) -> Iterable[K]:
        """What a new reader has marked."""
        raise NotImplementedError

    def mark_synced(self) -> None:
        """The source has told everything it has; wakes readers once."""
        if not self.synced:
            self.synced = True
            for reader in self._readers:
                reader._wake.set()

    def reader(self, wake: asyncio.Event) -> Reader[K]:
        """A new reader that has every present key marked; `wake` is set on each later change."""
        reader: Reader[K] = Reader(set(self._keys()), wake)
        self._readers.append(reader)
        if len(self):
            wake.set()
        return reader

    def _changed(self, key: K) -> None:
        self.revision += 1
        for reader in self._readers:
            reader.mark(key)


class Table(Followed[K], Generic[K, V]):
    """Rows by key."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._rows: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def _keys(self) -> Iterable[K]:
        return self._rows

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, key: K) -> V:
        return self._rows[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._rows)

    def get(self, key: K) -> V | None:
        """The row, or None."""
        return self._rows.get(key)

    @property
    def rows(self) -> Mapping[K, V]:
        """A live view; copy it before the first `await`."""
        return self._rows

    def put(self, key: K, row: V) -> bool:
        """Insert or replace one row; False when it was there already and equal."""
        if self._rows.get(key) == row:
            return False
        self._rows[key] = row
        self._changed(key)
        return True

    def delete(self, key: K) -> bool:
        """Remove one row; False when there was none."""
        if self._rows.pop(key, None) is None:
            return False
        self._changed(key)
        return True

    def replace(self, rows: Mapping[K, V], *, within: set[K] | None = None) -> None:
        """Make the table (or the keys `within`, which one source owns) equal to `rows`."""
        for key in (set(self._rows) if within is None else within) - rows.keys():
            self.delete(key)
        for key, row in rows.items():
            self.put(key, row)
