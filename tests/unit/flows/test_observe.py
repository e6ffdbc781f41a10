"""What readers get, with the meaning of Hubble's GetFlows."""

import asyncio

import pytest

from daemon.flows import observe as observing
from daemon.flows.filters import parse_filters
from daemon.flows.observe import Request
from daemon.model.flow import Flow, Lost, LostSource

SECOND = 1_000_000_000


def ports(answers):
    return [one.destination.port for one in answers if isinstance(one, Flow)]


async def collect(pipeline, **request):
    return [one async for answer in pipeline.observe(Request(**request)) for one in answer]


@pytest.fixture
def filled(pipeline, pack, monkeypatch):
    """1,000 drops: port n arrives at second n, every tenth from another address."""
    monkeypatch.setattr("daemon.flows.pipeline.time.time_ns", lambda: 0)
    monkeypatch.setattr("daemon.flows.pipeline.time.monotonic_ns", lambda: 0)
    for number in range(1000):
        source = "192.0.2.1" if number % 10 == 0 else "203.0.113.9"
        pipeline.append(pack(dport=number, time_ns=number * SECOND, saddr=source))
    return pipeline


TENTH = parse_filters([{"source_ip": ["192.0.2.1"]}], [])


async def test_without_limits_everything_is_shown_oldest_first(filled):
    assert ports(await collect(filled)) == list(range(1000))


async def test_the_last_n_are_the_newest_that_match_oldest_first(filled):
    assert ports(await collect(filled, number=3)) == [997, 998, 999]
    assert ports(await collect(filled, number=60, filters=TENTH)) == list(range(400, 1000, 10))
    assert ports(await collect(filled, number=2**64 - 1, filters=TENTH)) == list(range(0, 1000, 10))


async def test_the_first_n_are_the_oldest_that_match(filled):
    assert ports(await collect(filled, number=3, first=True, filters=TENTH)) == [0, 10, 20]


async def test_times_are_inclusive_and_since_beats_number_as_the_start(filled):
    assert ports(await collect(filled, since_ns=990 * SECOND, until_ns=992 * SECOND)) == [990, 991, 992]
    assert ports(await collect(filled, since_ns=990 * SECOND, number=2)) == [990, 991]


async def test_a_follower_sees_only_what_is_new_unless_it_asks_for_more(filled, pack):
    async def follow(expected, **request):
        found = []
        async for answer in filled.observe(Request(follow=True, **request)):
            found += answer
            if len(found) >= expected:
                break
        return ports(found)

    tasks = [asyncio.ensure_future(follow(1)), asyncio.ensure_future(follow(3, number=2))]
    await asyncio.sleep(0.01)
    filled.append(pack(dport=5000))
    assert await asyncio.wait_for(asyncio.gather(*tasks), 5) == [[5000], [998, 999, 5000]]


async def test_a_slow_follower_is_told_how_many_it_missed_and_goes_on(pipeline, pack):
    reader = pipeline.observe(Request(follow=True))
    first = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    pipeline.append(pack(dport=1))
    assert ports(await first) == [1]
    pipeline.append(pack() * 2000)  # the store has room for 1,024
    answer = await anext(reader)
    assert answer[0] == Lost(LostSource.HUBBLE_RING_BUFFER, 2000 - 1024)
    assert answer[1].number == 2001 - 1024


async def test_a_query_in_the_middle_of_a_flood_ends_and_tells_what_it_missed(filled, pack):
    found = []
    async for answer in filled.observe(Request()):
        found += answer
        filled.append(pack(dport=60_000) * 512)
    numbers = [one.number for one in found if isinstance(one, Flow)]
    missed = sum(one.count for one in found if isinstance(one, Lost))
    assert len(numbers) + missed >= 1000
    assert numbers == sorted(set(numbers))


async def test_losses_of_the_kernel_stand_where_they_happened_and_pass_every_filter(pipeline, pack):
    pipeline.append(pack(dport=1))
    pipeline.store.note(Lost(LostSource.PERF_EVENT_RING_BUFFER, 9, 3))
    pipeline.append(pack(dport=2))
    found = await collect(pipeline)
    assert [one.count if isinstance(one, Lost) else one.destination.port for one in found] == [1, 9, 2]
    nothing = parse_filters([{"source_ip": ["192.0.2.77"]}], [])
    assert await collect(pipeline, filters=nothing) == [found[1]]


async def test_an_idle_follower_hears_from_us_and_ends_when_the_pipeline_does(pipeline, monkeypatch):
    monkeypatch.setattr(observing, "IDLE_S", 0.01)
    reader = pipeline.observe(Request(follow=True))
    assert await anext(reader) == ()
    pipeline.store.close()
    assert [one async for one in reader if one] == []


def test_counters_fold_events_of_one_kind(pipeline, pack):
    pipeline.append(pack() * 5 + pack(proto=17) * 2 + pack(identity=70_000))
    folded = {(one.proto, one.reason): count for one, count in pipeline.counters.events.items()}
    assert folded == {(6, 16): 6, (17, 16): 2}
