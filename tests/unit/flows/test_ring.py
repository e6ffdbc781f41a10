"""The ring buffer protocol, on a file laid out like the kernel's pages."""

import mmap
import os
import struct

import pytest

from daemon.flows.ring import Ring

PAGE = mmap.PAGESIZE
SIZE = PAGE
RECORD = 24
BUSY, DISCARD = 1 << 31, 1 << 30


class Kernel:
    """The producer: writes records as the kernel does, including the second mapping of the data."""

    def __init__(self):
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * SIZE)
        self.at = 0

    def header(self, at, word):
        for base in (2 * PAGE, 2 * PAGE + SIZE):
            os.pwrite(self.fd, struct.pack("=II", word, 0), base + at % SIZE)

    def put(self, payload, flags=0):
        at, data = self.at, payload.ljust(-(-len(payload) // 8) * 8, b"\0")
        self.header(at, len(payload) | flags)
        for number, byte in enumerate(data):
            where = (at + 8 + number) % SIZE
            for base in (2 * PAGE, 2 * PAGE + SIZE):
                os.pwrite(self.fd, bytes([byte]), base + where)
        self.at += 8 + len(data)
        os.pwrite(self.fd, struct.pack("=Q", self.at), PAGE)
        return at

    @property
    def consumed(self):
        return struct.unpack("=Q", os.pread(self.fd, 8, 0))[0]


@pytest.fixture
def kernel():
    found = Kernel()
    yield found
    os.close(found.fd)


@pytest.fixture
def ring(kernel):
    found = Ring(kernel.fd, SIZE, RECORD)
    yield found
    found.close()


def record(number):
    return struct.pack("=Q16x", number)


def test_records_come_in_order_and_make_room(kernel, ring):
    for number in range(3):
        kernel.put(record(number))
    assert ring.read(10).raw == record(0) + record(1) + record(2)
    assert kernel.consumed == kernel.at
    assert (ring.read(10).raw, ring.fill) == (b"", 0)


def test_the_end_of_the_memory_is_no_seam(kernel, ring):
    for number in range(1000):
        kernel.put(record(number))
        assert ring.read(10).raw == record(number)
    assert kernel.at > 7 * SIZE


def test_a_read_takes_no_more_than_asked(kernel, ring):
    for number in range(5):
        kernel.put(record(number))
    assert ring.read(2).raw == record(0) + record(1)
    assert ring.fill == 3 * 32
    assert ring.read(9).raw == record(2) + record(3) + record(4)


def test_a_record_that_is_being_written_ends_the_batch_until_it_is_done(kernel, ring):
    kernel.put(record(0))
    unfinished = kernel.put(record(1), BUSY)
    kernel.put(record(2))
    assert ring.read(10).raw == record(0)
    assert ring.read(10).raw == b""
    kernel.header(unfinished, RECORD)
    assert ring.read(10).raw == record(1) + record(2)


def test_discarded_records_are_skipped_and_foreign_ones_counted(kernel, ring):
    kernel.put(record(0), DISCARD)
    kernel.put(b"short")
    kernel.put(record(1))
    batch = ring.read(10)
    assert (batch.raw, batch.foreign) == (record(1), 1)


def test_a_new_reader_goes_on_where_the_last_one_stopped(kernel, ring):
    kernel.put(record(0))
    kernel.put(record(1))
    ring.read(1)
    later = Ring(kernel.fd, SIZE, RECORD)
    assert later.read(10).raw == record(1)
    later.close()
