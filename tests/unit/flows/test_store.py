"""The ring of events and its notes."""

import pytest

from daemon.flows.decode import SIZE
from daemon.flows.store import FlowStore
from daemon.model.flow import Lost, LostSource


def numbered(first, count):
    return b"".join(number.to_bytes(8, "little").ljust(SIZE, b"\0") for number in range(first, first + count))


@pytest.mark.parametrize("batch", [1, 3, 10, 11, 25, 100])
def test_whatever_the_batch_size_the_newest_events_are_kept_in_order(batch):
    store = FlowStore(10)
    for first in range(0, 100, batch):
        store.append(numbered(first, min(batch, 100 - first)), 0)
    assert (store.first, store.end, len(store)) == (90, 100, 10)
    assert store.read(90, 100) == numbered(90, 10)
    assert store.read(93, 97) == numbered(93, 4)


def test_what_is_gone_cannot_be_read():
    store = FlowStore(4)
    store.append(numbered(0, 6), 0)
    with pytest.raises(IndexError, match="1 to 3 of 2 to 6"):
        store.read(1, 3)


def test_an_event_keeps_the_clock_of_its_arrival():
    store = FlowStore(10)
    store.append(numbered(0, 2), 1_000)
    store.append(numbered(2, 2), 1_500)  # drift below a millisecond is not worth a note
    store.append(numbered(4, 2), 5_000_000_000)
    assert [store.offset_ns(number) for number in range(6)] == [1_000] * 4 + [5_000_000_000] * 2


def test_a_loss_is_told_once_to_each_reader_and_where_it_happened():
    store = FlowStore(10)
    store.append(numbered(0, 3), 0)
    store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, 7))
    store.append(numbered(3, 3), 0)
    assert store.losses(0, 2) == (0, [])
    seen, losses = store.losses(0, 6)
    assert [(at, lost.count) for at, lost in losses] == [(3, 7)]
    assert store.losses(seen, 6) == (1, [])
