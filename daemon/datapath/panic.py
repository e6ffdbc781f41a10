"""What somebody demands of every packet at once: read from and written to the pinned configuration alone.

No daemon, store or network takes part, and no settings beyond the place of the pins.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bpf.features import Ticks
from bpf.layout import CONFIG, LAYOUT_VERSION, Panic, maps
from bpf.syscall import LayoutMismatch, PinnedMap
from daemon.datapath.conntrack import Conntrack, existing

_AT = CONFIG.offsets()


class PanicState(NamedTuple):
    """`left_s`: seconds until it ends by itself, None: it does not. `generation` 0: no policy was ever loaded."""

    kind: Panic
    left_s: float | None
    generation: int


class PanicRefusedError(Exception):
    """Nothing was changed; the text is for a person."""


def read(pins: Path) -> PanicState:
    """What holds now. OSError or LayoutMismatch when there is no data path of this version."""
    with _config(pins) as config:
        return _state(config.lookup(0) or bytes(CONFIG.size))


def _state(raw: bytes) -> PanicState:
    generation, kind, until, hz = (
        _field(raw, name, size)
        for name, size in (("generation", 4), ("panic", 4), ("panic_until", 8), ("hz", 4))
    )
    if not kind or not until:
        return PanicState(Panic(kind), None, generation)
    ticks = Ticks()
    try:
        left = (until - ticks.now64(hz)) / hz
    finally:
        ticks.close()
    return PanicState(Panic(kind), left, generation) if left > 0 else PanicState(Panic.NONE, None, generation)


def write(pins: Path, kind: Panic, for_s: float | None) -> PanicState:
    """In force for the next packet, and until that time (None: until it is ended).

    Raises OSError, LayoutMismatch or PanicRefusedError.
    """
    with _config(pins) as config:
        raw = config.lookup(0) or bytes(CONFIG.size)
        if kind is Panic.FAILSAFE:
            if not _field(raw, "generation", 4):
                raise PanicRefusedError(
                    "no policy has ever been loaded here, so the kernel does not know the failsafe list and would drop "
                    "everything, your session too: start meshwalld first"
                )
            _remember_connections(pins)
        until = 0
        if for_s is not None:
            ticks = Ticks()
            try:
                hz = _field(raw, "hz", 4)
                until = ticks.now64(hz) + max(1, int(for_s * hz))
            finally:
                ticks.close()
        # Two words of their own: the daemon may be flipping the generation in the same struct.
        with config.mmap(writable=True) as memory:
            ctypes.c_uint64.from_buffer(memory, _AT["panic_until"]).value = until
            ctypes.c_uint32.from_buffer(memory, _AT["panic"]).value = kind
        return _state(config.lookup(0) or raw)


def _remember_connections(pins: Path) -> None:
    """Answers to what this host has open pass in a failsafe panic, also where no policy has kept track so far."""
    with suppress(OSError, LayoutMismatch), Conntrack(pins) as table:
        table.seed(*existing())


@contextmanager
def _config(pins: Path) -> Iterator[PinnedMap]:
    with PinnedMap.open(_maps(pins) / "config", maps()["config"]) as config:
        yield config


def _maps(pins: Path) -> Path:
    return pins / f"v{LAYOUT_VERSION}" / "maps"


def _field(raw: bytes, name: str, size: int) -> int:
    return int.from_bytes(raw[_AT[name] : _AT[name] + size], sys.byteorder)
