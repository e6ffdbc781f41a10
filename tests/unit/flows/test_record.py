"""Recorded flows are the flows that were seen: through crashes, full disks, other policies and other names."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from bpf.layout import EVENT, FIRST_RULE, CellVerdict, EventKind, Reason
from daemon.flows.decode import SIZE, Event, events
from daemon.flows.filters import parse_filters
from daemon.flows.lines import line
from daemon.flows.observe import Request
from daemon.flows.pipeline import FlowPipeline
from daemon.flows.record import Recorder, RecordSettings, prune
from daemon.flows.recorded import grouped, matching
from daemon.flows.scan import Columns, prefilter
from daemon.flows.segments import begun_ns, columns, files, stored
from daemon.model.flow import Flow
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, parse_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import Device, HostRow, IdentityRow, IpKey, IpRow, Tables

HOUR_NS = 3_600 * 10**9
ALWAYS = {"since_ns": 0, "until_ns": 1 << 63}
HOST = HostRow(
    "a1",
    "alpha",
    1,
    parse_labels(("reserved:host", "k8s:rack=r12")),
    frozenset(),
)
RULE = RuleOrigin(
    "kubelet", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 0, "/p/k.yaml", 7, "tag"
)
FILTERS = [
    {},
    {"source_ip": ["203.0.113.0/30"]},
    {"source_ip": ["2001:db8::/33", "203.0.113.1"]},
    {"destination_ip": ["10.1.0.4"], "protocol": ["udp"]},
    {"destination_port": ["53", 443]},
    {"source_port": ["0"]},
    {"verdict": ["DROPPED"]},
    {"verdict": ["FORWARDED", "AUDIT"]},
    {"verdict": ["REDIRECTED"]},
    {"drop_reason_desc": ["POLICY_DENIED"]},
    {"drop_reason_desc": ["bad-ihl", 181]},
    {"traffic_direction": ["EGRESS"]},
    {"protocol": ["icmp"]},
    {"ip_version": ["IPv6"]},
    {"source_identity": [2]},
    {"destination_identity": [1, 70_000]},
    {"event_type": [{"type": 1, "match_sub_type": True, "sub_type": 133}]},
    {"source_label": ["app=web"]},
    {"policy": ["kubelet"], "verdict": ["FORWARDED"]},
    {"tcp_flags": [{"SYN": True}], "reply": [False]},
    {"node_name": ["alpha/a1"], "traffic_direction": ["INGRESS"]},
]


def some_events(seed, count, since_ns=0):
    """Events of every kind; few addresses, so that filters hit."""
    rng = random.Random(seed)  # noqa: S311 - the same in every run
    v4 = [parse_prefix(one).packed for one in ("203.0.113.1", "203.0.113.9", "10.1.0.4")]
    v6 = [parse_prefix(one).packed for one in ("2001:db8::1", "2001:db8:8000::1", "fd00::4")]
    reasons = [Reason.FORWARDED, Reason.POLICY_DEFAULT, Reason.POLICY_DENY, Reason.BAD_IHL]
    raw = []
    for at in range(count):
        family = rng.choice([4, 4, 6, 0])
        pool = {4: v4, 6: v6, 0: [b""]}[family]
        kind = rng.choice(list(EventKind))
        raw.append(
            EVENT.pack(
                time_ns=since_ns + at * 1_000, saddr=rng.choice(pool), daddr=rng.choice(pool),
                sport_be=rng.choice([0, 53, 40_000]).to_bytes(2, "big"),
                dport_be=rng.choice([53, 443, 10_250]).to_bytes(2, "big"),
                kind=kind, reason=Reason.FORWARDED if kind is EventKind.ALLOW else rng.choice(reasons[1:]),
                direction=rng.choice([0, 1]), family=family, proto=rng.choice([1, 6, 17, 58, 132]),
                tcp_flags=rng.choice([2, 18]), identity=rng.choice([1, 2, 70_000]),
                verdict=rng.choice(list(CellVerdict)), rule=rng.choice([0, 1, FIRST_RULE]), ifindex=2,
                length=74, generation=3,
            )
        )  # fmt: skip
    return b"".join(raw)


@pytest.fixture
def tables():
    tables = Tables()
    tables.host.put("host", HOST)
    tables.devices.put(2, Device("eth0", 2, True, "", 1500))
    tables.rules.put(FIRST_RULE, RULE)
    web = IdentityRow(parse_labels(("k8s:app=web", "k8s:io.cilium.k8s.policy.cluster=beta")), "mesh:beta")
    tables.identities.put(Identity(70_000), web)
    tables.ips.put(IpKey(parse_prefix("203.0.113.9"), "mesh:beta"), IpRow(Identity(70_000), "web-0", "prod"))
    return tables


@pytest.fixture
def pipeline(tables, tmp_path):
    return FlowPipeline(tables, tmp_path, capacity=4_096)


def settings(directory, **changes):
    return RecordSettings(
        **{"directory": directory, "most_bytes": 1 << 24, "age_s": 86_400, "rate": 1_000} | changes
    )


@pytest.fixture
def recorder(pipeline, tables, tmp_path):
    found = Recorder(settings(tmp_path / "flows", rate=100_000), pipeline, tables)
    yield found
    found._file.close()


async def seen_live(pipeline, spec):
    filters = parse_filters([spec], [])
    answers = [one async for answer in pipeline.observe(Request(filters)) for one in answer]
    return [line(one, pipeline.started_ns) for one in answers if isinstance(one, Flow)]


def from_disk(directory, **question):
    return [line(flow, started) for flow, started in matching(directory, ALWAYS | question)]


@pytest.mark.parametrize("spec", FILTERS, ids=str)
async def test_what_is_recorded_reads_as_what_was_seen(pipeline, recorder, tmp_path, spec):
    for seed in range(3):
        pipeline.append(some_events(seed, 500))
        await recorder._write()
    shown = from_disk(tmp_path / "flows", whitelist=[spec])
    assert shown == await seen_live(pipeline, spec)
    assert shown


@pytest.mark.parametrize("spec", FILTERS, ids=str)
def test_columns_never_pass_over_an_event_that_matches(spec):
    raw = some_events(9, 2_000)
    found = Columns(columns(raw), 2_000)
    (entry,) = parse_filters([spec], []).whitelist
    candidates = set(found.indexes(prefilter([spec])(found)))
    for index, event in enumerate(events(raw)):
        assert found.event(index) == event
        if all(test(event) for test in entry.events):
            assert index in candidates, event


def test_columns_alone_decide_where_the_event_has_the_field():
    raw = some_events(9, 2_000)
    found = Columns(columns(raw), 2_000)
    wanted = {"destination_port": ["443"], "protocol": ["tcp"], "source_ip": ["203.0.113.0/29"]}
    candidates = list(found.indexes(prefilter([wanted])(found)))
    assert 0 < len(candidates) < 60


async def test_names_and_rules_are_those_of_the_time_of_recording(pipeline, recorder, tables, tmp_path):
    pipeline.append(some_events(1, 200))
    before = await seen_live(pipeline, {})
    await recorder._write()
    tables.identities.delete(Identity(70_000))
    tables.rules.delete(FIRST_RULE)
    tables.host.put("host", replace(HOST, name="other"))
    assert from_disk(tmp_path / "flows") == before
    assert any("web-0" in one for one in before)
    assert any("/p/k.yaml" in one for one in before)


async def test_a_new_file_says_again_what_its_events_refer_to(pipeline, recorder, tmp_path):
    pipeline.append(some_events(1, 100))
    await recorder._write()
    recorder._file.close()
    pipeline.append(some_events(2, 100))
    await recorder._write()
    first, second = files(tmp_path / "flows")
    first.unlink()
    shown = from_disk(tmp_path / "flows")
    assert shown == (await seen_live(pipeline, {}))[100:]
    assert second.exists()


async def test_a_file_that_is_cut_anywhere_gives_what_is_whole(pipeline, recorder, tmp_path):
    for seed in range(4):
        pipeline.append(some_events(seed, 50))
        await recorder._write()
    everything = from_disk(tmp_path / "flows")
    (path,) = files(tmp_path / "flows")
    whole = path.read_bytes()
    rng = random.Random(5)  # noqa: S311 - the same in every run
    for cut in sorted(rng.sample(range(len(whole)), 60), reverse=True):
        path.write_bytes(whole[:cut])
        shown = from_disk(tmp_path / "flows")
        assert shown == everything[: len(shown)]
        assert len(shown) % 50 == 0


async def test_a_damaged_frame_ends_the_file_and_crashes_nobody(pipeline, recorder, tmp_path):
    for seed in range(3):
        pipeline.append(some_events(seed, 50))
        await recorder._write()
    everything = from_disk(tmp_path / "flows")
    (path,) = files(tmp_path / "flows")
    whole = path.read_bytes()
    last = [one for one in stored(path) if one.frame.events][-1]
    path.write_bytes(whole[: last.at + 5] + bytes([whole[last.at + 5] ^ 1]) + whole[last.at + 6 :])
    assert from_disk(tmp_path / "flows") == everything[:100]
    rng = random.Random(6)  # noqa: S311 - the same in every run
    for _ in range(200):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        from_disk(tmp_path / "flows")


async def test_faster_traffic_than_the_rate_is_counted_as_lost(pipeline, tables, tmp_path):
    recorder = Recorder(settings(tmp_path / "flows", rate=100), pipeline, tables)
    pipeline.append(some_events(1, 1_000))
    await recorder._write()
    assert len(from_disk(tmp_path / "flows")) == 200
    assert recorder.lost == 800
    recorder._file.close()


async def test_a_recorder_that_is_overtaken_counts_what_it_missed(pipeline, recorder, tmp_path):
    pipeline.append(some_events(1, 4_096))
    pipeline.append(some_events(2, 1_000))
    await recorder._write()
    assert recorder.lost == 1_000
    assert len(from_disk(tmp_path / "flows")) == 4_096


async def test_a_disk_that_fails_is_said_and_recording_goes_on_when_it_works(
    pipeline, recorder, tables, tmp_path
):
    (tmp_path / "flows").write_text("in the way")
    pipeline.append(some_events(1, 10))
    await recorder._write()
    row = tables.status["record"]
    assert not row.ok
    assert recorder.lost == 10
    (tmp_path / "flows").unlink()
    pipeline.append(some_events(2, 10))
    await recorder._write()
    assert tables.status["record"].ok
    assert len(from_disk(tmp_path / "flows")) == 10


def test_the_oldest_files_go_when_there_is_too_much_or_they_are_too_old(tmp_path):
    now = time.time_ns()
    for hours in (30, 20, 10, 1, 0):
        (tmp_path / f"{now - hours * HOUR_NS}.flows").write_bytes(bytes(1_000))
    prune(settings(tmp_path), now)
    assert [round((now - begun_ns(one)) / HOUR_NS) for one in files(tmp_path)] == [20, 10, 1, 0]
    prune(settings(tmp_path, most_bytes=2_500), now)
    assert [round((now - begun_ns(one)) / HOUR_NS) for one in files(tmp_path)] == [1, 0]


async def test_groups_count_what_policy_cannot_tell_apart(pipeline, recorder, tmp_path):
    for seed in range(3):
        pipeline.append(some_events(seed, 500))
        await recorder._write()
    pipeline.append(some_events(0, 500))
    await recorder._write()
    for question in ({}, {"whitelist": [{"verdict": ["DROPPED"], "source_port": ["53"]}]}):
        groups, beyond = grouped(tmp_path / "flows", ALWAYS | question)
        assert beyond == 0
        wanted = Counter(map(asked, (flow for flow, _ in matching(tmp_path / "flows", ALWAYS | question))))
        found: Counter[object] = Counter()
        for one in groups:
            found[asked(one.flow)] += one.count
        assert found == wanted
    once, _ = grouped(tmp_path / "flows", ALWAYS)
    assert len(once) < 2_000 - 400  # a run came twice


def asked(flow):
    """A flow without what policy does not ask about. Ports count for the server's end."""
    same = flow._replace(number=0, time_ns=0, tcp_flags=0, length=0, hook="")
    return same._replace(source=same.source._replace(port=0))


async def test_times_bound_what_is_read(pipeline, recorder, tmp_path):
    pipeline.append(some_events(1, 100, since_ns=10**12))
    await recorder._write()
    offset = pipeline.store.offset_ns(0)
    some = from_disk(tmp_path / "flows", since_ns=10**12 + 10_000 + offset, until_ns=10**12 + 19_000 + offset)
    assert [json.loads(one)["meshwall"]["number"] for one in some] == list(range(10, 20))


def test_the_size_of_an_event_fits_a_frame_header():
    assert EVENT.size == SIZE
    assert len(Event._fields) == len(EVENT.fields)


async def test_cancelling_the_recorder_leaves_a_readable_file(pipeline, recorder, tmp_path):
    pipeline.append(some_events(1, 10))
    await recorder._write()
    task = asyncio.get_running_loop().create_task(recorder.run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(from_disk(tmp_path / "flows")) == 10
