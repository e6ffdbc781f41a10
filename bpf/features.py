"""What this kernel offers, found by trying: vendors backport, so the version string tells nothing."""

import contextlib
import errno
import os
import resource
import struct
import time
from dataclasses import dataclass

from bpf.layout import CT4_KEY, HITS, MMAPABLE, NO_PREALLOC, PREFIX6_KEY, Map, MapKind
from bpf.syscall import XDP_HAS_FRAGS, AttachType, PinnedMap, ProgType, prog_load, prog_query, prog_test_run

HELPER_JIFFIES64 = 118
HELPER_XDP_BUFF_LEN = 188
COMMON_HZ = (100, 250, 300, 1000)
INITIAL_JIFFIES_S = 300  # the kernel's jiffies begin this long before 2^32, so that overflows are found early
LOOPBACK = 1  # its interface index in every network namespace


class MissingFeatureError(Exception):
    """The kernel lacks something that the data path cannot do without."""


@dataclass(frozen=True)
class Features:
    """Probed abilities that choose between two ways; what is indispensable raises instead."""

    tcx: bool  # else clsact filters
    xdp_frags: bool  # XDP on devices whose frames span several buffers (large MTU)
    hz: int  # jiffies per second


def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """One BPF instruction."""
    return struct.pack("=BBhi", code, src << 4 | dst, offset, immediate)


EXIT = instruction(0x95)


def calls(helper: int) -> bytes:
    """A program that returns what the helper gives for its context."""
    return instruction(0x85, immediate=helper) + EXIT


def returns(value: int) -> bytes:
    """A program that returns a constant."""
    return instruction(0xB7, immediate=value) + EXIT


class Ticks:
    """Reads the kernel's jiffies, which no file tells: expiry in ct4, ct6 and fragments counts in them."""

    def __init__(self) -> None:
        self._fd = prog_load(ProgType.SCHED_CLS, "mw_ticks", calls(HELPER_JIFFIES64))

    def now(self) -> int:
        """The low 32 bits."""
        return prog_test_run(self._fd, bytes(64)).value

    def now64(self, hz: int) -> int:
        """All 64 bits: the upper ones by the clock, which is never 2^31 ticks off."""
        low = self.now()
        estimate = (1 << 32) - INITIAL_JIFFIES_S * hz + int(time.clock_gettime(time.CLOCK_MONOTONIC) * hz)
        return low + (estimate - low + (1 << 31) >> 32 << 32)

    def until(self, expires: int) -> int:
        """Jiffies until a 64 bit time of the kernel; negative when it has passed."""
        left = (expires - self.now()) & 0xFFFFFFFF
        return left - (1 << 32) if left >> 31 else left

    def measure_hz(self) -> int:
        """Ticks per second. Takes a tenth of a second."""
        first, started = self.now(), time.monotonic()
        time.sleep(0.1)
        rate = ((self.now() - first) & 0xFFFFFFFF) / (time.monotonic() - started)
        return min(COMMON_HZ, key=lambda hz: abs(hz - rate))

    def close(self) -> None:
        """Unload."""
        os.close(self._fd)


def _try_map(spec: Map, what: str, since: str) -> PinnedMap:
    try:
        return PinnedMap.create(spec)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise
        raise MissingFeatureError(
            f"this kernel has no {what} (Linux {since} or later has): {error.strerror}"
        ) from error


def _batches(spec: Map) -> None:
    with _try_map(spec, "hash maps", "3.18") as trial:
        try:
            trial.update_batch(bytes(spec.key_size), bytes(spec.value_size), 1)
        except OSError as error:
            raise MissingFeatureError(
                f"this kernel has no batch operations on maps (Linux 5.6 or later has): {error.strerror}"
            ) from error


def _loads(kind: ProgType, code: bytes, flags: int = 0) -> bool:
    try:
        os.close(prog_load(kind, "mw_probe", code, flags=flags))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES) and not _loads(ProgType.SCHED_CLS, returns(0)):
            raise
        return False
    return True


def probe() -> Features:
    """Try everything once. PermissionError without privileges, MissingFeatureError naming what is missing."""
    with contextlib.suppress(OSError, ValueError):  # before Linux 5.11 maps count as locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        os.close(prog_load(ProgType.SCHED_CLS, "mw_probe", returns(0)))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise PermissionError(
                errno.EPERM, "loading BPF programs needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
            ) from error
        raise MissingFeatureError(f"this kernel cannot load BPF programs: {error.strerror}") from error
    for spec, what, since in (
        (Map("p", MapKind.LRU_HASH, CT4_KEY, HITS, 16), "LRU hash maps", "4.10"),
        (Map("p", MapKind.LPM_TRIE, PREFIX6_KEY, HITS, 16, NO_PREALLOC), "longest-prefix tries", "4.11"),
        (Map("p", MapKind.ARRAY, None, HITS, 16, MMAPABLE), "arrays that can be mapped into memory", "5.5"),
        (Map("p", MapKind.RINGBUF, None, None, 4096), "BPF ring buffers", "5.8"),
    ):
        _try_map(spec, what, since).close()
    _batches(Map("p", MapKind.HASH, CT4_KEY, HITS, 16, NO_PREALLOC))
    if not _loads(ProgType.SCHED_CLS, calls(HELPER_JIFFIES64)):
        raise MissingFeatureError("this kernel has no bpf_jiffies64() for programs (Linux 5.6 or later has)")
    ticks = Ticks()
    try:
        hz = ticks.measure_hz()
    finally:
        ticks.close()
    return Features(
        tcx=has_tcx(), xdp_frags=_loads(ProgType.XDP, calls(HELPER_XDP_BUFF_LEN), XDP_HAS_FRAGS), hz=hz
    )


def has_tcx() -> bool:
    """Can links attach to TCX (Linux 6.6)?"""
    try:
        prog_query(LOOPBACK, AttachType.TCX_INGRESS)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise
        return error.errno == errno.ENOENT
    return True
