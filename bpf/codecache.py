"""Compiled programs on disk: compiling takes seconds and 120 MB, and the same source gives the same instructions.

A file is named by what it was compiled from. Programs are kept with numbers in the place of map descriptors; `relocate`
puts those of this process there. Only files and a directory that nobody but us can write are believed: whoever could
put a program here could open the host.
"""

import base64
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path

MOST_FILES = 8
LD_IMM64 = 0x18
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE = 1, 2
_INSTRUCTION = struct.Struct("=BBhi")


@dataclass(frozen=True)
class Compiled:
    """Instructions by program, with placeholders for descriptors; `cookie` is compiled into them."""

    cookie: int
    programs: Mapping[str, bytes]


def directory() -> Path | None:
    """Where compiled programs are kept: below CACHE_DIRECTORY, as systemd sets it; None: nowhere."""
    found = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(found) / "programs" if found else None


def key_of(source: str) -> str:
    """The name of what a source compiles to, on this kind of machine."""
    return sha256(f"{os.uname().machine}\n{source}".encode()).hexdigest()


def recall(cache: Path, key: str) -> Compiled | None:
    """What was kept under that name; None when there is nothing that can be believed."""
    path = cache / f"{key}.json"
    try:
        if not (_ours_alone(cache) and _ours_alone(path)):
            return None
        digest, _, text = path.read_text(encoding="ascii").partition("\n")
        if sha256(text.encode()).hexdigest() != digest:
            return None
        found = json.loads(text)
        programs = {name: base64.b64decode(code) for name, code in found["programs"].items()}
        return Compiled(int(found["cookie"]), programs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(cache: Path, key: str, compiled: Compiled) -> None:
    """Write it for the next start; a disk that fails costs the next start its time and nothing else."""
    programs = {name: base64.b64encode(code).decode() for name, code in compiled.programs.items()}
    text = json.dumps({"cookie": compiled.cookie, "programs": programs})
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = cache / f".{key}.{os.getpid()}"
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{sha256(text.encode()).hexdigest()}\n{text}")
        fresh.rename(cache / f"{key}.json")
        kept = sorted(cache.glob("*.json"), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in kept[MOST_FILES:]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def relocate(code: bytes, descriptors: Mapping[int, int]) -> bytes:
    """The same instructions with descriptors in the place of placeholders. ValueError for one that has none."""
    found = bytearray(code)
    for at, immediate in _map_references(code):
        if immediate not in descriptors:
            raise ValueError(f"instruction {at // 8} refers to map {immediate:#x}, which there is not")
        struct.pack_into("=i", found, at + 4, descriptors[immediate])
    return bytes(found)


def maps_of(code: bytes) -> frozenset[int]:
    """The placeholders that a program uses."""
    return frozenset(immediate for _, immediate in _map_references(code))


def tags(code: bytes) -> tuple[str, str]:
    """What a kernel may call these instructions: a hash of them without the maps, by SHA-1 and (since 6.18) SHA-256."""
    bare = bytearray(code)
    for at, _ in _map_references(code):
        bare[at + 4 : at + 8] = bare[at + 12 : at + 16] = bytes(4)
    return sha1(bare, usedforsecurity=False).hexdigest()[:16], sha256(bare).hexdigest()[:16]


def _map_references(code: bytes) -> Iterator[tuple[int, int]]:
    """Offset and number of each instruction that loads a map."""
    at = 0
    while at < len(code):
        opcode, registers, _, immediate = _INSTRUCTION.unpack_from(code, at)
        if opcode == LD_IMM64 and registers >> 4 in (PSEUDO_MAP_FD, PSEUDO_MAP_VALUE):
            yield at, immediate
        at += 16 if opcode == LD_IMM64 else 8  # it takes two


def _ours_alone(path: Path) -> bool:
    found = path.lstat()
    return (
        found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        and not stat.S_ISLNK(found.st_mode)
    )
