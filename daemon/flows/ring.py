"""The consumer's end of a BPF ring buffer, memory-mapped: no copy by the kernel, no library.

The kernel keeps two positions that only grow. We own the consumer's, in a page of its own that we may write;
the producer's and the data are read-only. The data is mapped twice in a row, so a record never wraps. The
consumer's position stays with the map: a restarted daemon goes on where the last one stopped.
"""

import mmap
import struct
from dataclasses import dataclass

_HEADER = 8
_BUSY = 1 << 31  # reserved, not yet written
_DISCARD = 1 << 30
_LENGTH = _DISCARD - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """`raw` is a run of whole records; `foreign` were not of the expected size and are left out."""

    raw: bytes
    foreign: int


class Ring:
    """Reads records of one size. `fd` must stay open meanwhile; `size` is the map's max_entries."""

    def __init__(self, fd: int, size: int, record: int) -> None:
        page = mmap.PAGESIZE
        self._record = record
        self._size = size
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._shared = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # A position must be read and written as one word: items of a cast view are.
        self._position = memoryview(self._consumer).cast("B")[:8].cast("Q")
        self._producer = memoryview(self._shared)[:8].cast("Q")
        self._data = memoryview(self._shared)[page:]

    def close(self) -> None:
        """Unmap; the descriptor stays the caller's."""
        for view in (self._position, self._producer, self._data):
            view.release()
        self._consumer.close()
        self._shared.close()

    @property
    def fill(self) -> int:
        """Bytes that wait to be read."""
        return self._producer[0] - self._position[0]

    def read(self, limit: int) -> Batch:
        """At most `limit` records, oldest first. Stops before a record that is still being written."""
        at, end = self._position[0], self._producer[0]
        data, mask, record = self._data, self._size - 1, self._record
        found: list[bytes] = []
        foreign = taken = 0
        while at < end and taken < limit:
            start = at & mask
            (header,) = _WORD.unpack_from(data, start)
            if header & _BUSY:
                break
            length = header & _LENGTH
            if header & _DISCARD:
                pass
            elif length == record:
                found.append(bytes(data[start + _HEADER : start + _HEADER + length]))
            else:
                foreign += 1
            at += (length + _HEADER + 7) & ~7
            taken += 1
        raw = b"".join(found)
        self._position[0] = at  # only now may the kernel write over them
        return Batch(raw, foreign)


_WORD = struct.Struct("=I")
