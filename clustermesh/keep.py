"""What a store said, kept on disk, so that a host can start without its store.

A text file: a line about the store, then what `Mesh.dump` gave, a JSON list a line, then the SHA-256 of all before.
It is written beside and renamed; a file that is not whole and unchanged counts as absent.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from clustermesh.remote import Saved

FORMAT = 1
MAX_BYTES = 1 << 30
_FLUSH_BYTES = 1 << 20


class Unusable(Exception):  # noqa: N818 - says what the file is
    """The file is not used; the text says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """Which store it was, at which revision, and which cluster read it."""

    store: int
    revision: int
    own_cluster: str
    format: int = FORMAT


async def save(path: Path, header: Header, pieces: Iterator[Saved]) -> None:
    """Replace the file as a whole and for good. `pieces` is consumed on the loop, with turns for others.

    Raises OSError; the former file is untouched then.
    """
    async with _replacing(path) as file:
        digest = hashlib.sha256()

        def flush(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        buffer = bytearray(_line(asdict(header)))
        for piece in pieces:
            buffer += _line(piece)
            if len(buffer) >= _FLUSH_BYTES:
                await asyncio.to_thread(flush, bytes(buffer))
                buffer.clear()
            else:
                await asyncio.sleep(0)
        await asyncio.to_thread(flush, bytes(buffer))
        await asyncio.to_thread(file.write, f"{digest.hexdigest()}\n".encode())


@asynccontextmanager
async def _replacing(path: Path) -> AsyncIterator[IO[bytes]]:
    """A file that takes the place of `path` once it is complete and on the disk; nothing is left otherwise."""
    fresh = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    def finish() -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        fresh.replace(path)

    file = await asyncio.to_thread(_private, fresh)
    try:
        yield file
        await asyncio.to_thread(finish)
    finally:
        file.close()
        fresh.unlink(missing_ok=True)


def _private(path: Path) -> IO[bytes]:
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def check(path: Path) -> Header:
    """Read the whole file and compare its checksum. Raises FileNotFoundError, OSError or Unusable. Blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise Unusable(f"is larger than {MAX_BYTES} bytes")
        first = before = file.readline()
        for line in file:
            digest.update(before)
            before = line
    if before.strip() != digest.hexdigest().encode():
        raise Unusable("is damaged: its checksum is another")
    try:
        header = Header(**json.loads(first))
    except (ValueError, TypeError) as error:
        raise Unusable(f"has a header that cannot be read: {error}") from error
    if header.format != FORMAT:
        raise Unusable(f"has format {header.format}, expected {FORMAT}")
    return header


def pieces(path: Path) -> Iterator[Saved]:
    """What `save` was given, of a file that was checked. Raises OSError, or ValueError when it has changed since."""
    with path.open("rb") as file:
        file.readline()
        before = file.readline()
        for line in file:
            yield json.loads(before)
            before = line
