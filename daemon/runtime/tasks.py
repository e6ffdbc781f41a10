"""Tasks: the one place that starts tasks. Named, referenced, their death noticed, restarted with back-off."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from daemon.runtime.backoff import Backoff

log = logging.getLogger(__name__)

LOST_S = 5.0  # a task that still runs this long after its cancellation has lost it
HEALTHY_S = 60.0  # a task that ran this long starts its back-off anew

Work = Callable[[], Coroutine[Any, Any, None]]


class Tasks:
    """Long-running work by name. `failed` is told when a task dies (reason) and when it runs again (None)."""

    def __init__(self, failed: Callable[[str, str | None], None]) -> None:
        self._failed = failed
        self._running: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    def start(self, name: str, work: Work) -> None:
        """Keep `work` running until `stop`; an exception ends one life, not the task."""
        if name in self._running:
            raise ValueError(f"task {name} runs already")
        loop = asyncio.get_running_loop()
        self._running[name] = loop.create_task(self._keep(name, work), name=name)

    def once(self, name: str, work: Work) -> None:
        """Run `work` to its end; what it raises is logged. A second call while it runs does nothing."""
        if name not in self._running:
            task = asyncio.get_running_loop().create_task(self._try(name, work), name=name)
            self._running[name] = task
            task.add_done_callback(lambda _: self._running.pop(name, None))

    async def stop(self) -> None:
        """Cancel everything and wait for it; again what has let its cancellation get lost."""
        self._stopping = True
        left = set(self._running.values())
        while left:
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=LOST_S)
            if left:
                log.warning(
                    "still running, cancelled again: %s", ", ".join(sorted(t.get_name() for t in left))
                )
        self._running.clear()

    async def _try(self, name: str, work: Work) -> None:
        try:
            await work()
        except Exception:
            log.exception("%s failed", name)

    async def _keep(self, name: str, work: Work) -> None:
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        told = ""
        while True:
            started = loop.time()
            settled = loop.call_later(1.0, self._failed, name, None) if told else None
            try:
                await work()
                reason = "ended by itself"
            except asyncio.CancelledError:
                if self._stopping:
                    raise
                reason = "was cancelled from inside"  # must not look like being stopped
                log.error("%s: %s, starting it again", name, reason)  # noqa: TRY400 - there is no story to tell
            except Exception as error:  # this is the supervisor
                reason = _reason(error)
                if reason != told:
                    log.exception("%s: died, starting it again", name)
            finally:
                if settled:
                    settled.cancel()
            if loop.time() - started > HEALTHY_S:
                backoff.reset()
            told = reason
            self._failed(name, reason)
            await asyncio.sleep(backoff.next_s())


def _reason(error: BaseException) -> str:
    """The innermost story of an exception group, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0]
