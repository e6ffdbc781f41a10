"""A directory of YAML files of one kind: watched, read safely; a file with a mistake stays what it was before.

The last good text of each file is also kept on disk, so that this holds over a restart.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from asyncinotify import Inotify, Mask

from daemon.model.problem import Problem
from daemon.sources.safefiles import Stamp, UnsafeError, opened_directory, read_file, stamp_of, write_file
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 1 << 20
MAX_FILES = 10_000
SETTLE_S = 0.01
LOOK_EVERY_S = 30.0  # also without an event: overflow, another mount on top
GONE_EVERY_S = 1.0
_EVENTS = (
    Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.ATTRIB | Mask.DELETE_SELF
    | Mask.MOVE_SELF | Mask.ONLYDIR
)  # fmt: skip

T = TypeVar("T")
Parse = Callable[[str, str], tuple[T, tuple[Problem, ...]]]


@dataclass(frozen=True, slots=True)
class _File(Generic[T]):
    """A file as it is: the last content without an error (None: never any), and what is wrong with it now."""

    stamp: Stamp | None
    text: str
    good: T | None
    problems: tuple[Problem, ...]


class DocumentFiles(Generic[T]):
    """Tells `changed` what the files say, by file name. `run` is the task.

    name: of the status row, such as `workload files`. parse: text and path -> content and problems; never raises.
    kept: the directory of the last good texts.
    """

    def __init__(
        self,
        tables: Tables,
        directory: Path,
        kept: Path,
        *,
        name: str,
        parse: Parse[T],
        changed: Callable[[Mapping[str, T]], None],
        owner_check: bool = True,
    ) -> None:
        self._tables = tables
        self._directory = directory
        self._kept = kept
        self._name = name
        self._parse = parse
        self._changed = changed
        self._owner_check = owner_check
        self._files: dict[str, _File[T]] = {}
        self._saved: dict[str, str] = {}
        self._fault = ""
        self._told: set[str] = set()

    async def run(self) -> None:
        """For ever. A directory that is not there is an empty one, until it is."""
        await asyncio.to_thread(self._restore)
        while True:
            try:
                await self._watch()
            except OSError:
                await self.look()
                await asyncio.sleep(GONE_EVERY_S)

    async def _watch(self) -> None:
        """Until the directory goes away. Raises OSError when there is none."""
        with Inotify(sync_timeout=0) as inotify:
            inotify.add_watch(self._directory, _EVENTS)
            while True:
                await self.look()
                event = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        event = await inotify.get()
                await asyncio.sleep(SETTLE_S)
                while event is not None:
                    if event.mask & (Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.IGNORED | Mask.UNMOUNT):
                        return
                    event = inotify.sync_get()

    async def look(self) -> None:
        """Read what changed, and tell."""
        try:
            self._files = await asyncio.to_thread(self._scan)
            self._fault = ""
        except FileNotFoundError:
            self._files, self._fault = {}, ""
        except (OSError, UnsafeError) as error:
            self._fault = getattr(error, "strerror", None) or str(error)
        self._changed({name: one.good for name, one in self._files.items() if one.good is not None})
        self._status()
        try:
            await asyncio.to_thread(self._save)
        except OSError as error:
            log.warning("%s: the last good files are not saved: %s", self._kept, error.strerror)

    def _scan(self) -> dict[str, _File[T]]:
        """In a thread. Raises OSError or UnsafeError."""
        with opened_directory(self._directory, owner_check=self._owner_check) as handle:
            names = _names(self._directory)
            if len(names) > MAX_FILES:
                raise UnsafeError(f"holds {len(names)} files, the limit is {MAX_FILES}")
            return {name: self._read(handle, name) for name in names}

    def _read(self, handle: int, name: str) -> _File[T]:
        before = self._files.get(name)
        path = str(self._directory / name)
        try:
            if before is not None and before.stamp == stamp_of(handle, name):
                return before
            stamp, text = read_file(handle, name, most_bytes=MAX_FILE_BYTES, owner_check=self._owner_check)
        except (OSError, UnsafeError) as error:
            reason = str(error) if isinstance(error, UnsafeError) else f"cannot be read: {error.strerror}"
            return _File(None, "", self._good(name), (Problem(path, 0, 0, "", reason),))
        content, problems = self._parse(text, path)
        broken = any(one.severity == "error" for one in problems)
        return _File(stamp, text, self._good(name) if broken else content, problems)

    def _good(self, name: str) -> T | None:
        """What a file said before, in this run or an earlier one."""
        if name in self._files:
            return self._files[name].good
        if name not in self._saved:
            return None
        content, problems = self._parse(self._saved[name], str(self._directory / name))
        return None if any(one.severity == "error" for one in problems) else content

    def _restore(self) -> None:
        with (
            contextlib.suppress(OSError, UnsafeError),
            opened_directory(self._kept, owner_check=True) as handle,
        ):
            for name in _names(self._kept):
                with contextlib.suppress(OSError, UnsafeError):
                    text = read_file(handle, name, most_bytes=MAX_FILE_BYTES, owner_check=True)[1]
                    self._saved[name] = text

    def _save(self) -> None:
        """In a thread: write what became good, remove what is gone. Raises OSError."""
        if self._fault:
            return
        wanted = {}
        for name, one in self._files.items():
            if any(problem.severity == "error" for problem in one.problems):
                if name in self._saved:
                    wanted[name] = self._saved[name]
            else:
                wanted[name] = one.text
        if wanted == self._saved:
            return
        self._kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, text in wanted.items():
            if self._saved.get(name) != text:
                write_file(self._kept, name, text)
        for name in self._saved.keys() - wanted.keys():
            (self._kept / name).unlink(missing_ok=True)
        self._saved = wanted

    def _status(self) -> None:
        findings = {str(self._directory / name): one.problems for name, one in self._files.items()}
        findings = {path: found for path, found in findings.items() if found}
        ours = {key for key in self._tables.problems if Path(key).parent == self._directory}
        self._tables.problems.replace(findings, within=ours)
        texts = {str(one) for found in findings.values() for one in found}
        if self._fault:
            texts.add(f"{self._directory} {self._fault}")
        for text in sorted(texts - self._told):
            log.warning("%s", text)
        self._told = texts
        text, hint = f"{len(self._files)} files in {self._directory}", ""
        if texts:
            first = min(texts)
            text = f"{text}; {len(texts)} findings: {first}"
            hint = "a file with a mistake stays what it was before; correct it and it is read again"
        details = {"files": len(self._files), "problems": sorted(texts)}
        self._tables.status.put(self._name, StatusRow(not texts, text, hint, details=details))


def _names(directory: Path) -> list[str]:
    """The files that count. Raises OSError."""
    return sorted(
        one.name for one in directory.iterdir() if one.suffix in SUFFIXES and not one.name.startswith(".")
    )
