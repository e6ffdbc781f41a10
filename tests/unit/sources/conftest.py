"""Running a source, and waiting for what it does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from clustermesh.follow import Backoff
from daemon.sources.mesh import MeshSource


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait until a condition holds, two seconds at most."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(2):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def running() -> Callable[[MeshSource], AbstractAsyncContextManager[None]]:
    """A mesh source at work, with short waits between its tries."""

    @asynccontextmanager
    async def run(source: MeshSource) -> AsyncIterator[None]:
        source.follower._backoff = Backoff(0.01, 0.05)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(source.run())
            try:
                yield
            finally:
                task.cancel()

    return run
