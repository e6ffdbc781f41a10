"""The last good state on disk: what the kernel's tables of policy and addresses hold, for the next boot.

A file is a magic, the SHA-256 of the rest, and a zlib stream: a length and a JSON head (layout, sizes, devices), then
runs of array memory (zero runs left out) and runs of keys and values. It is read only by the layout that wrote it.
"""

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from bpf.layout import CONFIG, LAYOUT_VERSION, ConfigFlag, Map, MapKind, Sizes, maps
from bpf.syscall import PinnedMap

FILE = "last-good.state"
MAGIC = b"meshwall state 1"
ARRAYS = ("ip4_blocks", "slot_info", "class_of", "port_class", "cells")
TABLES = ("ip4_hosts", "ip6_hosts", "ip6_nets", "ip6_prefixes")
CHUNK = 1 << 16
MOST_BYTES = 1 << 31  # of a stream that is read; a larger one is damaged or hostile
_HEAD = struct.Struct("=I")
_RUN = struct.Struct("=BQI")  # index of the map, offset (arrays) or entries (tables), bytes
_ALL = (*ARRAYS, *TABLES)


class SnapshotError(Exception):
    """The state cannot be used; the text says why."""


class AttachedDevice(NamedTuple):
    """A device that was filtered, by name: its index is another one after a boot."""

    name: str
    xdp: str


@dataclass(frozen=True, slots=True)
class Head:
    """What has to fit before anything is restored. `config`: fields of layout.CONFIG."""

    layout: int
    sizes: Sizes
    devices: tuple[AttachedDevice, ...]
    config: Mapping[str, int]
    made: float  # wall clock, s


def packed(pins: Path, sizes: Sizes, devices: Sequence[AttachedDevice]) -> bytes:
    """The state as a file has it. The caller keeps others from changing the tables. Raises OSError."""
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(raw) for raw in _stream(pins, sizes, devices)) + packer.flush()
    return MAGIC + sha256(body).digest() + body


def store(state: bytes, path: Path) -> int:
    """Write it as a whole or not at all; returns bytes. Raises OSError; what was there before stays then."""
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return len(state)


def _stream(pins: Path, sizes: Sizes, devices: Sequence[AttachedDevice]) -> Iterator[bytes]:
    home = pins / f"v{LAYOUT_VERSION}" / "maps"
    shapes = maps(sizes)
    with PinnedMap.open(home / "config", shapes["config"]) as config:
        words = CONFIG.unpack(config.lookup(0) or bytes(CONFIG.size))
    kept = ("generation", "flags", "buffer_flags0", "buffer_flags1")
    head = {
        "layout": LAYOUT_VERSION,
        "sizes": asdict(sizes),
        "devices": [list(one) for one in devices],
        "config": {name: words[name] for name in kept},
        "made": time.time(),
    }
    raw = json.dumps(head).encode()
    yield _HEAD.pack(len(raw)) + raw
    for number, name in enumerate(_ALL):
        with PinnedMap.open(home / name, shapes[name]) as one:
            yield from _array(number, one) if name in ARRAYS else _table(number, one)


def _array(number: int, one: PinnedMap) -> Iterator[bytes]:
    with one.mmap(writable=False) as memory:
        for at in range(0, len(memory), CHUNK):
            raw = memory[at : at + CHUNK]
            if raw.count(0) != len(raw):
                yield _RUN.pack(number, at, len(raw)) + raw


def _table(number: int, one: PinnedMap) -> Iterator[bytes]:
    keys, values = bytearray(), bytearray()
    entries = 0
    for key, value in one.items():
        keys += key
        values += value
        entries += 1
        if len(keys) >= CHUNK:
            yield _RUN.pack(number, entries, len(keys) + len(values)) + keys + values
            keys, values, entries = bytearray(), bytearray(), 0
    if entries:
        yield _RUN.pack(number, entries, len(keys) + len(values)) + keys + values


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state that is whole: its checksum was right."""

    head: Head
    _runs: bytes

    def fill(self, pins: Path, flags: ConfigFlag) -> None:
        """Write it into pinned tables that nobody uses yet, the generation last. `flags` are added. Raises OSError."""
        home = pins / f"v{LAYOUT_VERSION}" / "maps"
        shapes = maps(self.head.sizes)
        view, at = memoryview(self._runs), 0
        while at < len(view):
            number, where, length = _RUN.unpack_from(view, at)
            at += _RUN.size
            _put(home, shapes[_ALL[number]], where, view[at : at + length])
            at += length
        words = self.head.config
        with (
            PinnedMap.open(home / "config", shapes["config"]) as config,
            config.mmap(writable=True) as memory,
        ):
            offsets = CONFIG.offsets()
            for name in ("flags", "buffer_flags0", "buffer_flags1", "generation"):
                value = words[name] | (flags if name == "flags" else 0)
                struct.pack_into("=I", memory, offsets[name], value)


def _put(home: Path, shape: Map, where: int, raw: memoryview) -> None:
    with PinnedMap.open(home / shape.name, shape) as one:
        if shape.name in ARRAYS:
            with one.mmap(writable=True) as memory:
                memory[where : where + len(raw)] = raw
            return
        keys = where * shape.key_size
        if shape.kind is not MapKind.LPM_TRIE:
            one.update_batch(bytes(raw[:keys]), bytes(raw[keys:]), where)
            return
        width = shape.value_size
        for entry in range(where):
            key = bytes(raw[entry * shape.key_size : (entry + 1) * shape.key_size])
            one.update(key, bytes(raw[keys + entry * width : keys + (entry + 1) * width]))


def load(path: Path, sizes: Sizes) -> Snapshot:
    """Read and check a state for tables of these sizes. SnapshotError when there is none that can be used."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotError("there is none yet") from None
    except OSError as error:
        raise SnapshotError(str(error)) from None
    start = len(MAGIC) + sha256().digest_size
    if raw[: len(MAGIC)] != MAGIC or sha256(raw[start:]).digest() != raw[len(MAGIC) : start]:
        raise SnapshotError(f"{path} is damaged")
    try:
        body = zlib.decompressobj().decompress(raw[start:], MOST_BYTES)
        (size,) = _HEAD.unpack_from(body)
        head = _head(json.loads(body[_HEAD.size : _HEAD.size + size]))
    except (ValueError, KeyError, TypeError, zlib.error, struct.error) as error:
        raise SnapshotError(f"{path} is of another release: {error}") from None
    if head.layout != LAYOUT_VERSION:
        raise SnapshotError(f"{path} is of layout {head.layout}, this release has {LAYOUT_VERSION}")
    if head.sizes != sizes:
        raise SnapshotError(f"{path} is of other map_sizes")
    return Snapshot(head, body[_HEAD.size + size :])


def _head(found: dict[str, object]) -> Head:
    sizes, devices, words = found["sizes"], found["devices"], found["config"]
    if not isinstance(sizes, dict) or not isinstance(devices, list) or not isinstance(words, dict):
        raise TypeError("its head is not as it should be")
    return Head(
        int(str(found["layout"])),
        Sizes(**sizes) if found["layout"] == LAYOUT_VERSION else Sizes(),
        tuple(AttachedDevice(str(name), str(xdp)) for name, xdp in devices),
        {str(name): int(value) for name, value in words.items()},
        float(str(found["made"])),
    )
