"""The imperative tool-box: tasks, back-off, the service manager, loop stalls."""

import asyncio
import socket
import time
from pathlib import Path

import pytest

from daemon.runtime.backoff import Backoff
from daemon.runtime.loopwatch import LoopWatch, Stalls
from daemon.runtime.notify import Notify, watchdog_s
from daemon.runtime.tasks import Tasks


def test_waits_double_up_to_a_limit_and_start_anew() -> None:
    backoff = Backoff(1, 5, jitter=0)
    assert [backoff.next_s() for _ in range(4)] == [1, 2, 4, 5]
    backoff.reset()
    assert backoff.next_s() == 1


async def test_a_task_that_dies_is_told_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.runtime.tasks.Backoff", lambda: Backoff(0.01, 0.01))
    told: list[tuple[str, str | None]] = []
    tasks = Tasks(lambda name, why: told.append((name, why)))
    lives = 0
    alive = asyncio.Event()

    async def work() -> None:
        nonlocal lives
        lives += 1
        if lives < 3:
            raise ExceptionGroup("many", [ValueError("first\nsecond")])
        alive.set()
        await asyncio.Event().wait()

    tasks.start("part", work)
    async with asyncio.timeout(2):
        await alive.wait()
    await tasks.stop()
    assert told == [("part", "ValueError: first"), ("part", "ValueError: first")]


async def test_a_task_that_is_cancelled_from_inside_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.runtime.tasks.Backoff", lambda: Backoff(0.01, 0.01))
    told: list[str | None] = []
    tasks = Tasks(lambda _name, why: told.append(why))
    again = asyncio.Event()

    async def work() -> None:
        if told:
            again.set()
            await asyncio.Event().wait()
        raise asyncio.CancelledError

    tasks.start("part", work)
    async with asyncio.timeout(2):
        await again.wait()
        await tasks.stop()
    assert told == ["was cancelled from inside"]


async def test_work_that_is_started_once_ends_and_may_be_started_again() -> None:
    tasks = Tasks(lambda _name, _why: None)
    runs = []

    async def work() -> None:
        runs.append(1)
        raise ValueError

    for _ in range(2):
        tasks.once("reload", work)
        tasks.once("reload", work)
        await asyncio.sleep(0.01)
    assert len(runs) == 2


async def test_two_tasks_of_one_name_are_a_mistake() -> None:
    tasks = Tasks(lambda _name, _why: None)
    tasks.start("part", asyncio.Event().wait)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part"):
        tasks.start("part", asyncio.Event().wait)  # type: ignore[arg-type]
    await tasks.stop()


async def test_work_that_loses_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.runtime.tasks.LOST_S", 0.01)
    tasks = Tasks(lambda _name, _why: None)
    lost = []

    async def forgetful() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append(1)

    tasks.start("part", forgetful)
    await asyncio.sleep(0)
    await asyncio.wait_for(tasks.stop(), 5)
    assert lost == [1]


def test_the_service_manager_hears_states(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notify = Notify(str(tmp_path / "notify"))
        notify.ready("enforcing")
        assert manager.recv(200) == b"READY=1\nSTATUS=enforcing"
        notify.reloading()
        assert manager.recv(200).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        notify.alive()
        assert manager.recv(200) == b"WATCHDOG=1"


def test_without_a_service_manager_nothing_happens(tmp_path: Path) -> None:
    assert not Notify("").send("READY=1")
    assert not Notify(str(tmp_path / "nobody")).send("READY=1")


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "15000000")
    assert watchdog_s() == 15
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_s() is None


async def test_a_stall_is_counted_and_its_length_kept() -> None:
    beats = []
    watch = LoopWatch(lambda: beats.append(1), 0.0)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch.run())
        await asyncio.sleep(0.05)
        time.sleep(0.4)  # noqa: ASYNC251 - the stall itself
        await asyncio.sleep(0.05)
        task.cancel()
    assert watch.stalls.count == 1
    assert 0.2 < watch.stalls.worst_s < 2
    assert beats


def test_ordinary_delays_are_no_stalls() -> None:
    stalls = Stalls()
    stalls.add(0.05)
    assert stalls.count == 0
