"""A cluster that changes too much is slowed, nobody else, and in the end everything is as it says."""

from clustermesh import wire
from clustermesh.kv import Event
from clustermesh.pace import Pace
from clustermesh.remote import SHARED_STORE, Kind

IPS = next(part for part in SHARED_STORE if part.kind is Kind.IP and not part.cached)


def event(number: int, value: bytes | None = b"x") -> Event:
    return Event(wire.ip_key(wire.ip_text(4, number)), value, number)


def test_a_burst_is_fine_and_a_flood_is_spread_over_time() -> None:
    pace = Pace(rate=100, window_s=10)
    assert sum(pace.admit(IPS, event(one), "west", 0.0) for one in range(1500)) == 1000
    assert [len(events) for _, events in pace.due(1.0)] == [100]
    assert [len(events) for _, events in pace.due(1.0)] == []
    assert [len(events) for _, events in pace.due(60.0)] == [400]
    assert not pace


def test_another_cluster_is_not_slowed() -> None:
    pace = Pace(rate=100, window_s=1)
    for one in range(500):
        pace.admit(IPS, event(one), "west", 0.0)
    assert all(pace.admit(IPS, event(1000 + one), "north", 0.0) for one in range(100))


def test_only_the_newest_change_of_a_key_waits_and_none_overtakes_it() -> None:
    pace = Pace(rate=1, window_s=1)
    assert pace.admit(IPS, event(7), "west", 0.0)
    assert not pace.admit(IPS, event(7, b"old"), "west", 0.0)
    assert not pace.admit(IPS, event(7, b"new"), "west", 0.0)
    assert not pace.admit(IPS, event(7, None), "north", 100.0)  # it changed hands meanwhile
    assert [one for _, events in pace.due(200.0) for one in events] == [event(7, None)]


def test_what_does_not_fit_is_left_to_a_new_listing(monkeypatch) -> None:
    monkeypatch.setattr("clustermesh.pace.MAX_LATE", 10)
    pace = Pace(rate=1, window_s=1)
    for one in range(20):
        pace.admit(IPS, event(one), "west", 0.0)
    assert pace.lost
    assert sum(len(events) for _, events in pace.due(100.0)) == 1
    pace.clear()
    assert not pace.lost
