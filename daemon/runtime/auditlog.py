"""AuditLog: who did what and when, one JSON object a line, in files that are kept and in the journal.

Files are named by the day (UTC), written with one append each and synced, and removed when they are older than the
retention. The journal gets the same object as MESSAGE, with its members as MESHWALL_ fields.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

JOURNAL = Path("/run/systemd/journal/socket")
SUFFIX = ".jsonl"
DAY_S = 86_400

Record = dict[str, Any]


class AuditLog:
    """Writes records below a directory; `failed` is the reason why the last one could not be kept, or empty."""

    def __init__(self, directory: Path, keep_days: int, clock: Callable[[], float] = time.time) -> None:
        self.failed = ""
        self._directory = directory
        self._keep_days = keep_days
        self._clock = clock

    def write(self, act: str, who: str, **members: object) -> Record:
        """Keep one record, and return it. Blocks for the disk: call it in a thread. Never raises OSError."""
        now = self._clock()
        record = {"time": _rfc3339(now), "act": act, "who": who} | members
        text = json.dumps(record, separators=(",", ":"), ensure_ascii=True)
        try:
            self._append(_day(now), text)
            self._prune(now)
            self.failed = ""
        except OSError as error:
            self.failed = str(error)
        with suppress(OSError):
            _to_journal(text, record)
        return record

    def read(self, since: float) -> Iterator[Record]:
        """Records from that wall-clock time on, oldest first; lines that are not whole are passed over."""
        first = _rfc3339(since)
        for path in self._files():
            if path.stem < _day(since):
                continue
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                with suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and str(record.get("time", "")) >= first:
                        yield record

    def _append(self, day: str, text: str) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self._directory / f"{day}{SUFFIX}", flags, 0o600)
        try:
            os.write(handle, f"{text}\n".encode("ascii"))
            os.fsync(handle)
        finally:
            os.close(handle)

    def _prune(self, now: float) -> None:
        oldest = _day(now - self._keep_days * DAY_S)
        for path in self._files():
            if path.stem < oldest:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(f"????-??-??{SUFFIX}"))


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _rfc3339(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1e3):03d}Z"


def _to_journal(text: str, record: Record) -> None:
    """One datagram of systemd's native protocol; members that are not plain are in MESSAGE alone."""
    if not JOURNAL.exists():
        return
    fields = {"MESSAGE": text, "PRIORITY": "5", "SYSLOG_IDENTIFIER": "meshwalld"}
    fields |= {
        f"MESHWALL_{name.upper()}": str(value)
        for name, value in record.items()
        if isinstance(value, str | int) and name.isidentifier()
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto("".join(map(_field, fields.items())).encode(), str(JOURNAL))


def _field(pair: tuple[str, str]) -> str:
    name, value = pair
    return f"{name}={''.join(one if one.isprintable() else '?' for one in value)}\n"
