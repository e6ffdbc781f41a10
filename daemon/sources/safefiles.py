"""Reading files that others could have tampered with: regular, not links, root's own, of bounded size."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Differs whenever a file's content may differ."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class UnsafeError(Exception):
    """The file is not read; the message says why and what to do."""


@contextmanager
def opened_directory(path: Path, *, owner_check: bool) -> Iterator[int]:
    """A descriptor of a directory. Raises OSError or UnsafeError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if owner_check:
            _check_owner(os.fstat(handle), "directory")
        yield handle
    finally:
        os.close(handle)


def stamp_of(directory: int, name: str) -> Stamp:
    """The stamp of a file as it is now; links are not followed. Raises OSError."""
    return _stamp(os.stat(name, dir_fd=directory, follow_symlinks=False))


def read_file(
    directory: int, name: str, *, most_bytes: int, owner_check: bool, follow: bool = False
) -> tuple[Stamp, str]:
    """A file's text, through a link only with `follow`. Raises OSError or UnsafeError; never blocks on a pipe."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    if not follow and stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise UnsafeError("is a symbolic link, expected a regular file: copy it here")
    with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeError("is not a regular file")
        if owner_check:
            _check_owner(found, "file")
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise UnsafeError(f"is larger than {most_bytes} bytes, the limit for one file: split it")
    try:
        return _stamp(found), raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UnsafeError(f"is not UTF-8 text (line {line})") from None


def write_file(directory: Path, name: str, text: str) -> None:
    """Replace a file as a whole and for good: written, synced, renamed. Raises OSError."""
    fresh = directory / f".{name}.new"
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(directory / name)


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _check_owner(found: os.stat_result, what: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise UnsafeError(
            f"belongs to uid {found.st_uid}, expected root: chown root it, or check who wrote it"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise UnsafeError(f"{what} may be written by group or others (mode {mode:04o}): chmod go-w")
