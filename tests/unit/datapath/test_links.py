"""The loader's process: what its end may not do to ours."""

import asyncio
from pathlib import Path

import pytest
import uvloop

from bpf.layout import Sizes
from daemon.datapath import links


def test_a_loader_that_has_just_ended_does_not_replace_a_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, released = tmp_path / "ended", tmp_path / "released"
    # Its child keeps the pipe open, so the reader still waits when the loader is gone.
    command = ["sh", "-c", f"until [ -e {released} ]; do sleep 0.02; done & touch {ended}"]
    monkeypatch.setattr(links, "loader_command", lambda _pins, _sizes: command)

    async def cancelled_too_late() -> None:
        loading = asyncio.get_running_loop().create_task(links.load(tmp_path, Sizes()))
        await asyncio.sleep(0.5)  # until it has ended and the loop has heard of it
        assert ended.exists()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        released.touch()
        await asyncio.sleep(0.2)  # the pipes close before the loop does

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # asyncio's own loop forgives it
        runner.run(cancelled_too_late())
