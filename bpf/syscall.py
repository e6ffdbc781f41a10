"""bpf(2) by ctypes: maps, links, programs and pins, without a library and without LLVM.

Every failure is an OSError whose text begins with the command's name. Descriptors are plain ints that the
caller closes, except those held by PinnedMap.
"""

import ctypes
import errno
import functools
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType

from bpf.layout import Map, MapKind

SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
BATCH = 4096  # entries per batch call while listing
ENOTSUPP = 524  # the kernel's own "not supported", which has no name in errno


class Cmd(IntEnum):
    """Commands of bpf(2)."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class ProgType(IntEnum):
    """Program types that we load."""

    SCHED_CLS = 3
    XDP = 6


class AttachType(IntEnum):
    """Where a link attaches."""

    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class LinkType(IntEnum):
    """Link types by their kernel numbers, as link_info reports them."""

    XDP = 6
    TCX = 11


XDP_GENERIC = 2  # link_create flags
XDP_NATIVE = 4
BPF_F_BEFORE = 1 << 3
BPF_F_AFTER = 1 << 4
XDP_HAS_FRAGS = 1 << 5  # prog_load flags
TEST_RUN_LIVE_FRAMES = 2

_libc = ctypes.CDLL(None, use_errno=True)


class LayoutMismatch(Exception):  # noqa: N818 - read as a fact: "that is a layout mismatch"
    """A pinned map exists but has another shape than this version uses."""


def bpf(cmd: Cmd, attr: bytes | ctypes.Array[ctypes.c_char], what: str = "") -> int:
    """One system call; `what` names the object in error texts. A ctypes buffer holds the reply afterwards."""
    number = SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2): the number of the call is not known on {platform.machine()}")
    buffer = attr if isinstance(attr, ctypes.Array) else ctypes.create_string_buffer(attr, len(attr))
    while True:
        result = int(_libc.syscall(number, int(cmd), buffer, len(buffer)))
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code == errno.EINTR or (code == errno.EAGAIN and cmd is Cmd.PROG_LOAD):
            continue
        text = "operation not supported by this map" if code == ENOTSUPP else os.strerror(code)
        raise OSError(code, f"BPF_{cmd.name}{' ' + what if what else ''}: {text}")


def _in(data: bytes) -> int:
    """Address of the bytes; the caller keeps `data` alive over the call."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


@functools.cache
def possible_cpus() -> int:
    """How many values a per-CPU map has for each key."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(text.rpartition(",")[2].rpartition("-")[2]) + 1


# Objects


def obj_get(path: Path) -> int:
    """A descriptor of what is pinned at `path`."""
    name = bytes(path) + b"\0"
    return bpf(Cmd.OBJ_GET, struct.pack("=QII", _in(name), 0, 0), str(path))


def obj_pin(fd: int, path: Path) -> None:
    """Give the object a name on bpffs, so that it outlives this process."""
    name = bytes(path) + b"\0"
    bpf(Cmd.OBJ_PIN, struct.pack("=QII", _in(name), fd, 0), str(path))


_MAPS_OF_A_PROGRAM = 64  # the kernel's own limit


def _info(fd: int, size: int, *, ask: bytes = b"") -> bytes:
    """`ask`: the beginning of the reply's buffer, where the kernel finds rooms for what does not fit into it."""
    reply = ctypes.create_string_buffer(ask, size)
    bpf(Cmd.OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(reply)))
    return reply.raw


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of a map."""

    kind: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True)
class ProgInfo:
    """What the kernel says of a program; `tag` is a hash of its instructions, whatever maps they use."""

    kind: int
    id: int
    tag: str
    jited_bytes: int
    name: str
    instructions: int
    verified_instructions: int
    map_ids: frozenset[int]


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says of a link; `ifindex` is 0 when its device has gone."""

    kind: int
    id: int
    prog_id: int
    ifindex: int
    attach_type: int  # TCX only, else 0


def map_info(fd: int) -> MapInfo:
    """Shape of the map behind `fd`."""
    kind, number, key, value, entries, flags, name = struct.unpack_from("=6I16s", _info(fd, 80))
    return MapInfo(kind, number, key, value, entries, flags, name.rstrip(b"\0").decode())


def prog_info(fd: int) -> ProgInfo:
    """Identity and cost of the program behind `fd`."""
    maps = (ctypes.c_uint32 * _MAPS_OF_A_PROGRAM)()
    room = struct.pack("=52xIQ", len(maps), ctypes.addressof(maps))
    raw = _info(fd, 232, ask=room)
    kind, number, tag, jited, xlated = struct.unpack_from("=II8sII", raw)
    name = raw[64:80].rstrip(b"\0").decode()
    (used,) = struct.unpack_from("=I", raw, 52)
    (verified,) = struct.unpack_from("=I", raw, 216)
    return ProgInfo(kind, number, tag.hex(), jited, name, xlated // 8, verified, frozenset(maps[:used]))


def link_info(fd: int) -> LinkInfo:
    """What the link behind `fd` connects."""
    raw = _info(fd, 64)
    kind, number, prog, _, ifindex, attach = struct.unpack_from("=6I", raw)
    return LinkInfo(kind, number, prog, ifindex, attach if kind == LinkType.TCX else 0)


# Programs and links


def prog_load(
    kind: ProgType,
    name: str,
    instructions: bytes,
    *,
    flags: int = 0,
    attach_type: int = 0,
    license_name: str = "GPL",
) -> int:
    """Verify and load; the OSError of a refusal carries the verifier's last lines."""
    licence = license_name.encode() + b"\0"

    def attr(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        at = ctypes.addressof(log) if log is not None else 0
        count, level = len(instructions) // 8, 1 if log is not None else 0
        head = struct.pack(
            "=IIQQIIQII", kind, count, _in(instructions), _in(licence), level, len(log or b""), at, 0, flags
        )
        return head + struct.pack("=16sII", name.encode()[:15], 0, attach_type)

    try:
        return bpf(Cmd.PROG_LOAD, attr(None), name)
    except OSError as error:
        log = ctypes.create_string_buffer(1 << 22)
        try:
            return bpf(Cmd.PROG_LOAD, attr(log), name)
        except OSError:
            tail = "\n".join(log.value.decode(errors="replace").splitlines()[-12:])
            raise OSError(error.errno, f"{error.strerror}\n{tail}" if tail else error.strerror) from None


def link_create(prog_fd: int, ifindex: int, attach_type: AttachType, flags: int = 0) -> int:
    """Attach a program to a device; EBUSY or EEXIST when something else owns the hook."""
    attr = struct.pack("=IIIIIIQ", prog_fd, ifindex, attach_type, flags, 0, 0, 0)
    return bpf(Cmd.LINK_CREATE, attr, f"{attach_type.name} on device {ifindex}")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program in one step: no packet passes between the old and the new one."""
    bpf(Cmd.LINK_UPDATE, struct.pack("=IIII", link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """Detach now, whoever else still holds the link."""
    bpf(Cmd.LINK_DETACH, struct.pack("=I", link_fd))


def prog_query(ifindex: int, attach_type: AttachType) -> list[int]:
    """Ids of the programs on a TCX hook, in the order in which they run."""
    ids = ctypes.create_string_buffer(4 * 64)
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQIIQQQQ", ifindex, attach_type, 0, 0, ctypes.addressof(ids), 64, 0, 0, 0, 0, 0)
    )
    bpf(Cmd.PROG_QUERY, attr, f"{attach_type.name} on device {ifindex}")
    (count,) = struct.unpack_from("=I", attr.raw, 24)
    return list(struct.unpack_from(f"={count}I", ids.raw))


@dataclass(frozen=True)
class RunResult:
    """What a test run gave: return value, packet and context afterwards, mean ns per run."""

    value: int
    data: bytes
    context: bytes
    duration_ns: int


def prog_test_run(
    prog_fd: int, data: bytes, *, repeat: int = 1, context: bytes = b"", flags: int = 0, batch_size: int = 0
) -> RunResult:
    """Run a loaded program on `data`; a context (xdp_md, __sk_buff) may be given and is read back."""
    live = flags & TEST_RUN_LIVE_FRAMES
    out = ctypes.create_string_buffer(0 if live else max(len(data) + 512, 1))
    context_out = ctypes.create_string_buffer(max(len(context), 1))
    attr = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQIIIIQQIIII",
            prog_fd,
            0,
            len(data),
            0 if live else len(out),
            _in(data),
            0 if live else ctypes.addressof(out),
            repeat,
            0,
            len(context),
            0 if live else len(context),
            _in(context) if context else 0,
            ctypes.addressof(context_out) if context and not live else 0,
            flags,
            0,
            batch_size,
            0,
        )
    )
    bpf(Cmd.PROG_TEST_RUN, attr)
    _, value, _, size_out, _, _, _, duration, _, context_size = struct.unpack_from("=IIIIQQIIII", attr.raw)
    return RunResult(value, out.raw[:size_out], context_out.raw[:context_size], duration)


# Maps


def map_create(spec: Map) -> int:
    """A new map of that shape."""
    attr = struct.pack(
        "=7I16sI",
        spec.kind,
        spec.key_size,
        spec.value_size,
        spec.max_entries,
        spec.flags,
        0,
        0,
        spec.name.encode()[:15],
        0,
    )
    return bpf(Cmd.MAP_CREATE, attr, spec.name)


def check_map(fd: int, spec: Map, where: str) -> None:
    """LayoutMismatch unless the map has the type, sizes and flags of `spec`."""
    info = map_info(fd)
    pairs = {
        "type": (info.kind, int(spec.kind)),
        "key size": (info.key_size, spec.key_size),
        "value size": (info.value_size, spec.value_size),
        "max_entries": (info.max_entries, spec.max_entries),
        "flags": (info.flags, spec.flags),
    }
    wrong = [
        f"{name} {found}, expected {wanted}" for name, (found, wanted) in pairs.items() if found != wanted
    ]
    if wrong:
        raise LayoutMismatch(f"{where}: {'; '.join(wrong)}")


class PinnedMap:
    """A map that is pinned on bpffs; keys and values are bytes in the layout of `spec`."""

    def __init__(self, fd: int, spec: Map) -> None:
        self.fd = fd
        self.spec = spec
        percpu = spec.kind is MapKind.PERCPU_ARRAY
        self._stride = -(-spec.value_size // 8) * 8
        self._value_size = self._stride * possible_cpus() if percpu else spec.value_size

    @classmethod
    def open(cls, path: Path, spec: Map) -> "PinnedMap":
        """Open what is pinned at `path`; LayoutMismatch when it is not of that shape."""
        fd = obj_get(path)
        try:
            check_map(fd, spec, str(path))
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, spec)

    @classmethod
    def open_sized(cls, path: Path, spec: Map) -> "PinnedMap":
        """Open what is pinned at `path`, of this shape but of whatever size the operator chose."""
        fd = obj_get(path)
        try:
            sized = replace(spec, max_entries=map_info(fd).max_entries)
            check_map(fd, sized, str(path))
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, sized)

    @classmethod
    def create(cls, spec: Map, path: Path | None = None) -> "PinnedMap":
        """A new map, pinned at `path` if one is given."""
        fd = map_create(spec)
        try:
            if path is not None:
                obj_pin(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, spec)

    def close(self) -> None:
        """Give up the descriptor; the pin keeps the map."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "PinnedMap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _key(key: bytes | int) -> bytes:
        return struct.pack("=I", key) if isinstance(key, int) else key

    def _check(self, data: bytes, size: int, what: str) -> bytes:
        if len(data) != size:
            raise ValueError(f"{self.spec.name}: {what} of {len(data)} bytes, expected {size}")
        return data

    def lookup(self, key: bytes | int) -> bytes | None:
        """The value, or None; for a per-CPU map the values of all CPUs joined. Arrays take an int as key."""
        raw = self._check(self._key(key), self.spec.key_size, "key")
        out = ctypes.create_string_buffer(self._value_size)
        try:
            bpf(
                Cmd.MAP_LOOKUP_ELEM,
                struct.pack("=IIQQQ", self.fd, 0, _in(raw), ctypes.addressof(out), 0),
                self.spec.name,
            )
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return out.raw

    def lookup_percpu(self, index: int) -> list[bytes]:
        """The value of each possible CPU."""
        raw = self.lookup(index)
        if raw is None:
            raise IndexError(f"{self.spec.name}: no entry {index}")
        return [raw[at : at + self.spec.value_size] for at in range(0, len(raw), self._stride)]

    def update(self, key: bytes | int, value: bytes) -> None:
        """Insert or replace; E2BIG when a hash is full."""
        raw = self._check(self._key(key), self.spec.key_size, "key")
        self._check(value, self._value_size, "value")
        bpf(Cmd.MAP_UPDATE_ELEM, struct.pack("=IIQQQ", self.fd, 0, _in(raw), _in(value), 0), self.spec.name)

    def delete(self, key: bytes) -> bool:
        """True if there was such a key."""
        self._check(key, self.spec.key_size, "key")
        try:
            bpf(Cmd.MAP_DELETE_ELEM, struct.pack("=IIQQQ", self.fd, 0, _in(key), 0, 0), self.spec.name)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def update_batch(self, keys: bytes, values: bytes, count: int) -> None:
        """`count` packed keys and values. Not atomic: an error leaves the first entries written."""
        self._check(keys, count * self.spec.key_size, "keys")
        self._check(values, count * self._value_size, "values")
        self._batch(Cmd.MAP_UPDATE_BATCH, keys, values, count)

    def delete_batch(self, keys: bytes, count: int) -> None:
        """Delete `count` packed keys; keys that are not there are skipped."""
        self._check(keys, count * self.spec.key_size, "keys")
        done, size = 0, self.spec.key_size
        while done < count:
            try:
                self._batch(Cmd.MAP_DELETE_BATCH, keys[done * size :], b"", count - done)
            except _BatchError as stopped:
                if stopped.errno != errno.ENOENT:
                    raise
                done += stopped.done + 1  # the key after the last deleted one was the missing one
            else:
                return

    def _batch(self, cmd: Cmd, keys: bytes, values: bytes, count: int) -> None:
        if not count:
            return
        attr = ctypes.create_string_buffer(
            struct.pack("=QQQQIIQQ", 0, 0, _in(keys), _in(values) if values else 0, count, self.fd, 0, 0)
        )
        struct.pack_into("=I", attr, 32, count)
        try:
            bpf(cmd, attr, self.spec.name)
        except OSError as error:
            (done,) = struct.unpack_from("=I", attr.raw, 32)
            raise _BatchError(error.errno or 0, f"{error.strerror} after {done} of {count}", done) from None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry. Entries that others add or remove meanwhile may or may not be seen."""
        try:
            yield from self._items_by_batch()
        except OSError as error:
            if error.errno not in (errno.EINVAL, ENOTSUPP, errno.EOPNOTSUPP):
                raise
            yield from self._items_one_by_one()

    def _items_by_batch(self) -> Iterator[tuple[bytes, bytes]]:
        key_size, value_size = self.spec.key_size, self._value_size
        for keys, values in self.batches():
            for one in range(len(keys) // key_size):
                yield (
                    keys[one * key_size : (one + 1) * key_size],
                    values[one * value_size : (one + 1) * value_size],
                )

    def batches(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry, many at once: packed keys and packed values. OSError where the map has no batches."""
        key_size, value_size, room = self.spec.key_size, self._value_size, BATCH
        cursor: ctypes.Array[ctypes.c_char] | None = None
        more = True
        while more:
            keys, values = (
                ctypes.create_string_buffer(room * key_size),
                ctypes.create_string_buffer(room * value_size),
            )
            following = ctypes.create_string_buffer(max(key_size, 4))
            at = ctypes.addressof(cursor) if cursor is not None else 0
            attr = ctypes.create_string_buffer(
                struct.pack(
                    "=QQQQIIQQ",
                    at,
                    ctypes.addressof(following),
                    ctypes.addressof(keys),
                    ctypes.addressof(values),
                    room,
                    self.fd,
                    0,
                    0,
                )
            )
            try:
                bpf(Cmd.MAP_LOOKUP_BATCH, attr, self.spec.name)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # one hash bucket holds more than fits
                    room *= 2
                    continue
                if error.errno != errno.ENOENT:
                    raise
                more = False
            (count,) = struct.unpack_from("=I", attr.raw, 32)
            cursor = following
            yield keys.raw[: count * key_size], values.raw[: count * value_size]

    def _items_one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        key: bytes | None = None
        while True:
            following = ctypes.create_string_buffer(self.spec.key_size)
            attr = struct.pack(
                "=IIQQQ", self.fd, 0, _in(key) if key is not None else 0, ctypes.addressof(following), 0
            )
            try:
                bpf(Cmd.MAP_GET_NEXT_KEY, attr, self.spec.name)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            key = following.raw
            value = self.lookup(key)
            if value is not None:
                yield key, value

    @property
    def stride(self) -> int:
        """Distance of two values in the memory of an array map: the kernel rounds up to 8."""
        return self._stride

    def mmap(self, *, writable: bool) -> mmap.mmap:
        """The array's memory: value i starts at i * stride."""
        size = -(-self._stride * self.spec.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        return mmap.mmap(self.fd, size, mmap.MAP_SHARED, access)


class _BatchError(OSError):
    """A batch call that failed after `done` entries."""

    def __init__(self, code: int, text: str, done: int) -> None:
        super().__init__(code, text)
        self.done = done
