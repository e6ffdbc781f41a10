"""The policy directory: watched by inotify, read safely, and held on to when it breaks.

Writes `policies`, `cidr_groups`, `problems` (by file path) and `status["policy files"]`. The last good
version of each file is also kept on disk, so that a file that is broken at the next start still counts.
"""

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from asyncinotify import Event, Inotify, Mask

from daemon.model.problem import Problem
from daemon.policy.ccnp import LanguageSettings, Parsed, parse_cidr_list, parse_documents
from daemon.sources.holding import EMPTY, FileState, Held, accept_empty, effect, observe
from daemon.sources.safefiles import Stamp, UnsafeError, opened_directory, read_file, stamp_of, write_file
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json", ".cidrs")
MAX_FILE_BYTES = 1 << 20
MAX_LIST_BYTES = 64 << 20  # .cidrs: one prefix a line, read without YAML
MAX_FILES = 10_000
SETTLE_S = 0.01  # changes this close together are read at once
LOOK_EVERY_S = 30.0  # also without an event: overflow, another mount on top
GONE_EVERY_S = 1.0  # while there is no directory to watch

# Not CREATE: a file that is just being written is read when it is closed or moved into place.
_EVENTS = (
    Mask.CLOSE_WRITE
    | Mask.MOVED_TO
    | Mask.MOVED_FROM
    | Mask.DELETE
    | Mask.ATTRIB
    | Mask.DELETE_SELF
    | Mask.MOVE_SELF
    | Mask.ONLYDIR
)


@dataclass(frozen=True, slots=True)
class _Read:
    """A file that was read: its stamp, its text (empty when it could not be read) and what it says."""

    stamp: Stamp | None
    text: str
    parsed: Parsed


class PolicyFiles:
    """Keeps the policy tables equal to a directory. `run` is the task."""

    def __init__(
        self,
        tables: Tables,
        directory: Path,
        state_dir: Path,
        *,
        language: LanguageSettings | None = None,
        owner_check: bool = True,
    ) -> None:
        self._tables = tables
        self._directory = directory
        self._kept = state_dir / "last-good-policies"
        self._language = language or LanguageSettings()
        self._owner_check = owner_check
        self._read: dict[str, _Read] = {}
        self._written: dict[str, str] = {}  # what is in `_kept`
        self._held = Held()
        self._fault = ""  # why the directory cannot be read
        self._unsaved = ""  # why the last good versions are not on disk
        self._told: set[str] = set()
        self._since = time.time()
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """For ever. A directory that is missing is waited for."""
        await self._restore()
        await self.look()
        while True:
            try:
                await self._watch()
            except OSError as error:
                if not self._fault:
                    log.warning("%s cannot be watched: %s", self._directory, error.strerror)
                await asyncio.sleep(GONE_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Read the whole directory anew, as far as it changed."""
        await self._take(None)

    async def accept_empty(self) -> bool:
        """The directory is empty on purpose: drop what it held. False when nothing waits for that."""
        await self.look()
        if not self._held.waiting:
            return False
        log.warning("%s is empty on purpose: its policies are dropped", self._directory)
        self._held = accept_empty(self._held)
        await self._publish()
        return True

    async def _watch(self) -> None:
        """Until the directory goes away or another takes its place. Raises OSError when there is none."""
        with Inotify(sync_timeout=0) as inotify:
            inotify.add_watch(self._directory, _EVENTS)
            await self.look()
            while True:
                names, gone = await _changes(inotify)
                await self._take(names)
                if gone:
                    return

    async def _take(self, names: set[str] | None) -> None:
        """Read these files, or all; then tell the tables."""
        async with self._one_at_a_time:
            try:
                self._read = await asyncio.to_thread(self._scan, names)
                self._fault = ""
            except (FileNotFoundError, NotADirectoryError) as error:
                self._read, self._fault = {}, f"is not there ({error.strerror})"
            except (OSError, UnsafeError) as error:
                self._fault = getattr(error, "strerror", None) or str(error)
                await self._publish()
                return
            self._held = observe(self._held, {name: one.parsed for name, one in self._read.items()})
            await self._publish()

    def _scan(self, names: set[str] | None) -> dict[str, _Read]:
        """In a thread. Files whose stamp is as it was are not read again."""
        with opened_directory(self._directory, owner_check=self._owner_check) as handle:
            present = _names(handle)
            if len(present) > MAX_FILES:
                raise UnsafeError(f"holds {len(present)} files, the limit is {MAX_FILES}")
            found = {}
            for name in present:
                before = self._read.get(name)
                if before and (
                    (names is not None and name not in names) or self._unchanged(handle, name, before)
                ):
                    found[name] = before
                else:
                    found[name] = self._read_one(handle, name)
            return found

    def _unchanged(self, handle: int, name: str, before: _Read) -> bool:
        try:
            return before.stamp is not None and stamp_of(handle, name) == before.stamp
        except OSError:
            return False

    def _read_one(self, handle: int, name: str) -> _Read:
        path = str(self._directory / name)
        most = MAX_LIST_BYTES if name.endswith(".cidrs") else MAX_FILE_BYTES
        try:
            stamp, text = read_file(handle, name, most_bytes=most, owner_check=self._owner_check)
        except UnsafeError as error:
            return _Read(None, "", _unreadable(path, str(error)))
        except OSError as error:
            return _Read(None, "", _unreadable(path, f"cannot be read: {error.strerror}"))
        return _Read(stamp, text, self._parse(path, text))

    def _parse(self, path: str, text: str) -> Parsed:
        if path.endswith(".cidrs"):
            return parse_cidr_list(text, path)
        return parse_documents(text, path, self._language)

    # -- the last good versions on disk

    async def _restore(self) -> None:
        """What was good before we started is what a broken file falls back to."""
        texts = await asyncio.to_thread(self._load_kept)
        self._written = dict(texts)
        parsed = {name: self._parse(str(self._directory / name), text) for name, text in texts.items()}
        self._held = Held({name: FileState(EMPTY, one) for name, one in parsed.items()})

    def _load_kept(self) -> dict[str, str]:
        found = {}
        with (
            contextlib.suppress(OSError, UnsafeError),
            opened_directory(self._kept, owner_check=True) as handle,
        ):
            for name in _names(handle):
                with contextlib.suppress(OSError, UnsafeError):
                    found[name] = read_file(handle, name, most_bytes=MAX_LIST_BYTES, owner_check=True)[1]
        return found

    def _keep(self) -> None:
        """In a thread: write what became good, remove what is no longer wanted."""
        wanted = {}
        for name, state in self._held.files.items():
            read = self._read.get(name)
            if read and state.good is state.now and read.parsed is state.now:
                wanted[name] = read.text
            elif name in self._written:
                wanted[name] = self._written[name]
        if wanted == self._written:
            return
        self._kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, text in wanted.items():
            if self._written.get(name) != text:
                write_file(self._kept, name, text)
        for name in self._written.keys() - wanted.keys():
            (self._kept / name).unlink(missing_ok=True)
        self._written = wanted

    # -- tables

    async def _publish(self) -> None:
        now = effect(self._held)
        tables = self._tables
        tables.policies.replace(now.policies)
        tables.cidr_groups.replace(now.groups)
        ours = {key for key in tables.problems if Path(key).parent == self._directory}
        findings = {str(self._directory / name): found for name, found in now.problems.items()}
        tables.problems.replace(findings, within=ours)
        texts = {str(one) for found in findings.values() for one in found}
        if self._held.waiting or self._fault:
            texts.add(f"{self._directory} {self._directory_text()}")
        self._log(texts)
        self._status(len(now.policies), len(now.groups), sum(map(len, findings.values())))
        tables.policies.mark_synced()
        tables.cidr_groups.mark_synced()
        await self._save()

    async def _save(self) -> None:
        """A full or read-only disk changes nothing that is enforced; it is said once."""
        try:
            await asyncio.to_thread(self._keep)
            self._unsaved = ""
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._unsaved:
                log.warning("%s: the last good policies are not saved: %s", self._kept, reason)
            self._unsaved = reason

    def _directory_text(self) -> str:
        count = len(effect(self._held).policies)
        what = self._fault or "holds no policy any more"
        return f"{what}; the {count} policies it held stay enforced" if count else what

    def _log(self, texts: set[str]) -> None:
        """Each finding once, for as long as it lasts."""
        for text in sorted(texts - self._told):
            log.warning("%s", text)
        if self._told and not texts:
            log.info("%s: all files are in order", self._directory)
        self._told = texts

    def _status(self, policies: int, groups: int, problems: int) -> None:
        files = len(self._held.files)
        text = f"{policies} policies, {groups} CIDR groups in {files} files of {self._directory}"
        hint = ""
        ok = not (problems or self._held.waiting or self._fault)
        if self._held.waiting:
            text = f"{self._directory} {self._directory_text()}"
            hint = "put the files back, or confirm with: meshwall policy accept-empty"
        elif self._fault:
            text = f"{self._directory} {self._directory_text()}"
            hint = f"check with: ls -ld {self._directory}"
        elif problems:
            text = f"{text}; {problems} findings"
            hint = f"see: meshwall policy check {self._directory}"
        before = self._tables.status.get("policy files")
        if before is None or before.ok != ok:
            self._since = time.time()
        details = {"policies": policies, "groups": groups, "files": files, "waiting": self._held.waiting}
        self._tables.status.put("policy files", StatusRow(ok, text, hint, self._since, details))


async def _changes(inotify: Inotify) -> tuple[set[str] | None, bool]:
    """Names that changed (None: look at all), and whether the directory itself has gone."""
    try:
        async with asyncio.timeout(LOOK_EVERY_S):
            event: Event | None = await inotify.get()
    except TimeoutError:
        return None, False
    await asyncio.sleep(SETTLE_S)
    names: set[str] = set()
    every = gone = False
    while event is not None:
        if event.mask & (Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.IGNORED | Mask.UNMOUNT):
            gone = True
        elif event.mask & Mask.Q_OVERFLOW or event.name is None:
            every = True
        else:
            names.add(str(event.name))
        event = inotify.sync_get()
    return (None if every or gone else names), gone


def _names(directory: int) -> list[str]:
    """The policy files of an open directory."""
    present = os.listdir(directory)
    return sorted(name for name in present if name.endswith(SUFFIXES) and not name.startswith("."))


def _unreadable(path: str, text: str) -> Parsed:
    return Parsed((), (), (Problem(path, 0, 0, "", text),))
