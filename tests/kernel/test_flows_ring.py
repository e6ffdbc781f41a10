"""FlowPipeline on real pinned maps; a small program of our own sends the events that it is given."""

import asyncio
import contextlib
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest
import uvloop

from bpf.layout import BUDGET, CONFIG, EVENT, LAYOUT_VERSION, EventKind, Reason, maps, sized
from bpf.syscall import PinnedMap, ProgType, possible_cpus, prog_load, prog_test_run
from daemon.flows.observe import Request
from daemon.flows.pipeline import FlowPipeline
from daemon.model.flow import Flow, Lost, LostSource
from daemon.model.net import Direction
from daemon.model.rule import RuleOrigin
from daemon.state.tables import Tables

pytestmark = pytest.mark.kernel

SPECS = maps(sized(events_bytes=1 << 16))


def sender(events_fd: int) -> int:
    """A program that sends the first bytes of its packet as one event."""
    size, r0, r1, r2, r3, r4, r6, r10 = EVENT.size, 0, 1, 2, 3, 4, 6, 10

    def op(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
        return struct.pack("=BBhi", code, src << 4 | dst, off, imm)

    move, move_imm, add_imm, call, leave = 0xBF, 0xB7, 0x07, 0x85, 0x95
    return prog_load(
        ProgType.SCHED_CLS,
        "send",
        op(move, r6, r1)
        + op(move_imm, r2)
        + op(move, r3, r10)
        + op(add_imm, r3, imm=-size)
        + op(move_imm, r4, imm=size)
        + op(call, imm=26)  # skb_load_bytes
        + op(0x55, r0, off=7)  # leave on error
        + op(0x18, r1, src=1, imm=events_fd)
        + op(0)
        + op(move, r2, r10)
        + op(add_imm, r2, imm=-size)
        + op(move_imm, r3, imm=size)
        + op(move_imm, r4)
        + op(call, imm=130)  # ringbuf_output: 0, or an error when the ring is full
        + op(leave),
    )


class FakeDatapath:
    """Pinned maps and the sender."""

    def __init__(self, pins: Path) -> None:
        self.directory = pins / f"v{LAYOUT_VERSION}" / "maps"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.events = PinnedMap.create(SPECS["events"], self.directory / "events")
        self.budgets = PinnedMap.create(SPECS["budgets"], self.directory / "budgets")
        self.config = PinnedMap.create(SPECS["config"], self.directory / "config")
        self.program = sender(self.events.fd)

    def send(self, count: int = 1, **changes: object) -> None:
        fields = {
            "time_ns": time.monotonic_ns(),
            "kind": EventKind.DROP,
            "reason": Reason.POLICY_DEFAULT,
            "family": 4,
            "proto": 17,
        }
        prog_test_run(self.program, EVENT.pack(**fields | changes), repeat=count)

    def lose(self, reason: Reason, *, lost: int, suppressed: int) -> None:
        one = BUDGET.pack(lost=lost, suppressed=suppressed)
        self.budgets.update(int(reason), one + bytes(BUDGET.size) * (possible_cpus() - 1))

    def unpin(self) -> None:
        (self.directory / "events").unlink()
        (self.directory / "budgets").unlink()
        (self.directory / "config").unlink()
        self.close()

    def close(self) -> None:
        self.events.close()
        self.budgets.close()
        self.config.close()
        os.close(self.program)


@pytest.fixture
def pins(tmp_path):
    if os.geteuid():
        pytest.skip("needs root")
    found = tmp_path / "bpf"
    found.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(found)], check=True)
    yield found
    subprocess.run(["umount", str(found)], check=True)


@pytest.fixture
async def run():
    """Start pipelines; all are stopped at the end."""
    tasks = []

    async def start(pipeline):
        tasks.append(asyncio.ensure_future(pipeline.run()))
        await asyncio.sleep(0.05)
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def take(reader, count, within=5.0):
    """At least `count` flows and losses from a reader."""
    found = []
    async with asyncio.timeout(within):
        while len(found) < count:
            found += await anext(reader)
    return found


async def test_every_event_of_the_kernel_becomes_a_flow_in_order(pins, run):
    datapath = FakeDatapath(pins)
    pipeline = FlowPipeline(Tables(), pins)
    await run(pipeline)
    for number in range(3000):  # some rounds of the ring
        datapath.send(length=number)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    found = await take(pipeline.observe(Request()), 3000)
    assert [flow.length for flow in found if isinstance(flow, Flow)] == list(range(3000))
    datapath.close()


async def test_the_time_of_a_flow_is_the_wall_clock_of_its_packet(pins, run):
    datapath = FakeDatapath(pins)
    pipeline = FlowPipeline(Tables(), pins)
    await run(pipeline)
    reader = pipeline.observe(Request(follow=True))
    waiting = asyncio.ensure_future(take(reader, 1))
    await asyncio.sleep(0.05)
    before = time.time_ns()
    datapath.send()
    (flow,) = await waiting
    assert abs(flow.time_ns - before) < 50_000_000
    datapath.close()


async def test_events_from_before_the_daemon_are_read_and_a_new_one_goes_on(pins, run):
    datapath = FakeDatapath(pins)
    datapath.send(5, length=1)
    first = FlowPipeline(Tables(), pins)
    task = await run(first)
    assert first.store.end == 5
    task.cancel()
    await asyncio.wait([task])
    datapath.send(3, length=2)
    second = FlowPipeline(Tables(), pins)
    await run(second)
    assert [flow.length for flow in await take(second.observe(Request()), 3)] == [2, 2, 2]
    datapath.close()


async def test_a_data_path_that_comes_late_or_anew_is_found(pins, run, monkeypatch):
    monkeypatch.setattr("daemon.flows.pipeline.POLL_S", 0.05)
    tables = Tables()
    pipeline = FlowPipeline(tables, pins)
    await run(pipeline)
    assert not tables.status["flows"].ok
    datapath = FakeDatapath(pins)
    datapath.send()
    await asyncio.sleep(0.15)
    assert (pipeline.store.end, tables.status["flows"].ok) == (1, True)
    datapath.unpin()
    datapath = FakeDatapath(pins)
    datapath.send()
    await asyncio.sleep(0.15)
    assert pipeline.store.end == 2
    datapath.close()


async def test_rules_are_taken_for_the_generation_in_the_kernel(pins, run):
    datapath, tables = FakeDatapath(pins), Tables()
    pipeline = FlowPipeline(tables, pins)
    await run(pipeline)
    datapath.send(rule=16, generation=3)  # before anything is known of the rules
    await asyncio.sleep(0.05)
    datapath.config.update(0, CONFIG.pack(generation=3))
    tables.rules.put(
        16, RuleOrigin("kubelet", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, False, 0, 0)
    )
    await asyncio.sleep(0.05)
    (flow,) = await take(pipeline.observe(Request()), 1)
    assert flow.origin.policy == "kubelet"
    datapath.close()


async def test_what_the_kernel_lost_or_held_back_is_told_to_followers_and_counted(pins, run, monkeypatch):
    monkeypatch.setattr("daemon.flows.pipeline.POLL_S", 0.05)
    datapath = FakeDatapath(pins)
    datapath.lose(Reason.POLICY_DENY, lost=5, suppressed=5)  # before our time
    pipeline = FlowPipeline(Tables(), pins)
    await run(pipeline)
    reader = pipeline.observe(Request(follow=True))
    waiting = asyncio.ensure_future(take(reader, 1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    datapath.lose(Reason.POLICY_DENY, lost=7, suppressed=15)
    assert await waiting == [Lost(LostSource.PERF_EVENT_RING_BUFFER, 2, 10)]
    assert (pipeline.counters.lost, pipeline.counters.suppressed) == (2, {Reason.POLICY_DENY: 10})
    datapath.close()


async def test_a_flood_leaves_the_loop_responsive(pins, run):
    datapath = FakeDatapath(pins)
    pipeline = FlowPipeline(Tables(), pins)
    await run(pipeline)
    reader = asyncio.ensure_future(take(pipeline.observe(Request(follow=True)), 10**9, within=60))
    flood = asyncio.get_running_loop().run_in_executor(None, datapath.send, 100_000)
    worst = 0.0
    while not flood.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        worst = max(worst, time.monotonic() - before)
    await flood
    assert pipeline.store.end > 0
    assert worst < 0.15
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    datapath.close()


def test_the_daemons_own_event_loop_reads_the_ring_too(pins):
    async def main():
        datapath = FakeDatapath(pins)
        pipeline = FlowPipeline(Tables(), pins)
        task = asyncio.ensure_future(pipeline.run())
        reader = asyncio.ensure_future(take(pipeline.observe(Request(follow=True)), 500))
        await asyncio.sleep(0.05)
        for number in range(500):
            datapath.send(length=number)
            await asyncio.sleep(0)
        found = await reader
        task.cancel()
        await asyncio.wait([task])
        datapath.close()
        return found

    assert [flow.length for flow in uvloop.run(main())] == list(range(500))
