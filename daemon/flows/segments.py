"""Recorded flows on disk: files of frames, each with a run of events or with what they refer to.

A frame is a header and a zlib payload. Events are stored column by column (all first bytes, then all second
bytes): equal bytes stand together, which compresses well and lets a reader test a field of every event at once.
A file is only ever appended to. Whatever follows the first frame that is cut short or damaged is not read, so a
crash costs at most the frame that was being written.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from daemon.flows.decode import SIZE
from daemon.flows.enrich import Book, Enricher, Known, Side, SideKey, plain_side
from daemon.model.identity import Identity
from daemon.model.net import Direction
from daemon.model.rule import RuleOrigin

SUFFIX = ".flows"
FORMAT = b"MWF1"
EVENTS, KNOWN = 1, 2
LEVEL = 1  # of zlib: five times the speed of the default for a tenth more bytes
MOST_PAYLOAD = 64 << 20  # a frame that claims more is damaged

_HEADER = struct.Struct("=4sIIIQQqQQ")


class Frame(NamedTuple):
    """The header of a frame. Times are wall clock in ns; number is that of the first event since `started_ns`."""

    kind: int
    events: int
    number: int
    started_ns: int
    offset_ns: int  # wall clock minus monotonic
    oldest_ns: int
    newest_ns: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A frame in a file; `payload` reads it."""

    frame: Frame
    path: Path
    at: int
    length: int
    crc: int

    def payload(self) -> bytes | None:
        """None when it is damaged."""
        with self.path.open("rb") as file:
            file.seek(self.at)
            raw = file.read(self.length)
        if len(raw) != self.length or zlib.crc32(raw) != self.crc:
            return None
        try:
            return zlib.decompress(raw)
        except zlib.error:
            return None


def pack(frame: Frame, payload: bytes) -> bytes:
    """The bytes of one frame."""
    raw = zlib.compress(payload, LEVEL)
    kind, number, *rest = frame
    return _HEADER.pack(FORMAT, kind << 24 | number, zlib.crc32(raw), len(raw), *rest) + raw


def stored(path: Path) -> Iterator[Stored]:
    """The frames of a file, payloads unread, up to the first that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at + _HEADER.size <= size:
            file.seek(at)
            magic, what, crc, length, *rest = _HEADER.unpack(file.read(_HEADER.size))
            at += _HEADER.size
            if magic != FORMAT or length > MOST_PAYLOAD or at + length > size:
                return
            yield Stored(Frame(what >> 24, what & 0xFFFFFF, *rest), path, at, length, crc)
            at += length


def files(directory: Path) -> list[Path]:
    """Files of recorded flows, oldest first: they are named by the wall clock, in ns, of their beginning."""
    return sorted(directory.glob(f"*{SUFFIX}"), key=begun_ns)


def begun_ns(path: Path) -> int:
    """When a file was begun; 0 for a name that is not ours."""
    return int(path.stem) if path.stem.isdigit() else 0


def columns(raw: bytes) -> bytes:
    """A run of events, turned: the first byte of each, then the second of each, and so on."""
    return b"".join(raw[at::SIZE] for at in range(SIZE))


# What events refer to


def pack_known(known: Known) -> bytes:
    """As JSON: it is small, and a later version can read it."""
    shape = {
        "node": known.node,
        "cluster": known.cluster,
        "devices": list(known.devices.items()),
        "labels": list(known.labels.items()),
        "sides": [[key[0], key[1].hex(), *key[2:], *side] for key, side in known.sides.items()],
        "books": [
            [generation, [[number, asdict(rule)] for number, rule in book.rules.items()], book.restricting]
            for generation, book in known.books.items()
        ],
    }
    return json.dumps(shape, separators=(",", ":")).encode()


def unpack_known(payload: bytes) -> Known:
    """Inverse of pack_known."""
    shape: dict[str, Any] = json.loads(payload)
    return Known(
        shape["node"],
        shape["cluster"],
        dict(shape["devices"]),
        {identity: tuple(labels) for identity, labels in shape["labels"]},
        dict(map(_side, shape["sides"])),
        {
            generation: Book(
                {number: _origin(fields) for number, fields in rules}, (tuple(inward), tuple(outward))
            )
            for generation, rules, (inward, outward) in shape["books"]
        },
    )


def _side(listed: list[Any]) -> tuple[SideKey, Side]:
    family, address, identity, local, text, number, labels, *names = listed
    key = (family, bytes.fromhex(address), identity, local)
    return key, Side(text, Identity(number), tuple(labels), *names)


def _origin(fields: dict[str, Any]) -> RuleOrigin:
    return RuleOrigin(**fields | {"direction": Direction(fields["direction"])})


class Recalled(Enricher):
    """Events to flows by what was recorded with them; one per file."""

    def __init__(self) -> None:
        super().__init__()
        self._labels: dict[int, tuple[str, ...]] = {}
        self._sides: dict[SideKey, Side] = {}

    def learn(self, known: Known) -> None:
        """Add what a frame says."""
        self.node, self.cluster = known.node, known.cluster
        self._devices.update(known.devices)
        self._labels.update(known.labels)
        self._sides.update(known.sides)
        self._books.update(known.books)

    def _side(self, family: int, address: bytes, identity: int, local: bool) -> Side:
        key = (family, address, identity, local)
        return self._sides.get(key) or plain_side(key, self._labels.get(identity, ()))
