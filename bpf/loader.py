"""`python -m bpf.loader`: compile for this host, load, check, pin, attach, exit.

The only process that maps LLVM, and the only importer of bcc. Everything it leaves behind is pinned below
`PINS/v<LAYOUT_VERSION>/`: `maps/<name>`, `progs/<name>`, `links/<ifindex>-<hook>`. It runs in the network
namespace of its caller. One JSON object on stdout; on failure exit status 1 and one line on stderr, and
nothing that was attached has changed.
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from bpf import attach, codecache, layout
from bpf.features import Features, MissingFeatureError, probe
from bpf.syscall import (
    XDP_HAS_FRAGS,
    AttachType,
    LayoutMismatch,
    PinnedMap,
    ProgInfo,
    ProgType,
    map_info,
    obj_get,
    obj_pin,
    prog_info,
    prog_load,
    prog_test_run,
)

HERE = Path(__file__).parent
SOURCES = (
    "maps.h",
    "parse.h",
    "peer.h",
    "verdict.h",
    "conntrack.h",
    "fragments.h",
    "events.h",
    "reject.h",
    "host.c",
)
DEBIAN_PACKAGES = "/usr/lib/python3/dist-packages"  # bcc comes from the distribution, not from PyPI
PROGRAMS = {
    "xdp": ProgType.XDP,
    "tcx_ingress": ProgType.SCHED_CLS,
    "tcx_egress": ProgType.SCHED_CLS,
    "tcx_ingress_l3": ProgType.SCHED_CLS,
    "tcx_egress_l3": ProgType.SCHED_CLS,
}
PLACEHOLDERS = 0x4D57_0000  # numbers that stand for the descriptors of maps until the programs are loaded
DEFAULT_EVENT_BUDGET = 1_000
DEFAULT_REJECT_BUDGET = 100


class LoaderError(Exception):
    """One line for the person who started us."""


class _Module(Protocol):
    """What we use of bcc.BPF."""

    module: ctypes.c_void_p

    def dump_func(self, name: bytes) -> bytes: ...


@dataclass(frozen=True)
class Loaded:
    """The programs by name, with their descriptors, and what loading took; `adopted`: they were pinned already."""

    fds: Mapping[str, int]
    info: Mapping[str, ProgInfo]
    compile_s: float
    load_s: float
    cookie: int
    adopted: bool = False


def source_text(fds: Mapping[str, int], sizes: layout.Sizes, features: Features, cookie: int) -> str:
    """The whole C as one text: bcc looks at nothing but its main file."""
    numbers = dict(layout.constants()) | {f"FD_{name}": fd for name, fd in fds.items()}
    numbers |= {"SLOTS": sizes.slots, "FRAGMENTS": sizes.fragments, "HZ": features.hz}
    lines = [f"#define {name} {value}u" for name, value in numbers.items()]
    lines.append(f"#define COOKIE {cookie}ull")
    lines.append(f"#define ANSWER_MARK {cookie & 0xFFFFFFFF | 1}u")  # no packet has mark 0 by accident
    length = "xdp_buff_len(ctx)" if features.xdp_frags else "(ctx->data_end - ctx->data)"
    lines.append(f"#define XDP_LENGTH(ctx) {length}")
    lines += [f'#line 1 "{name}"\n{(HERE / "src" / name).read_text(encoding="ascii")}' for name in SOURCES]
    lines.append(f'#line 1 "layout.py"\n{layout.static_asserts()}')
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _stderr_to(file: int) -> Iterator[None]:
    """LLVM and libbcc write to descriptor 2; keep it for the error report."""
    saved = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def compile_programs(text: str) -> dict[str, bytes]:
    """Instructions of each program."""
    if DEBIAN_PACKAGES not in sys.path:
        sys.path.append(DEBIAN_PACKAGES)
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE / "shim")
    try:
        bcc = importlib.import_module("bcc")
    except ImportError as error:
        raise LoaderError(f"bcc is not installed ({error}): apt install python3-bpfcc") from error
    with tempfile.TemporaryFile() as log:
        try:
            with _stderr_to(log.fileno()):
                module: _Module = bcc.BPF(text=text.encode())
                return {name: module.dump_func(name.encode()) for name in PROGRAMS}
        except Exception as error:  # bcc raises bare Exception
            log.seek(0)
            told = [line for line in log.read().decode(errors="replace").splitlines() if "error" in line]
            raise LoaderError(f"the C does not compile: {'; '.join(told[:3]) or error}") from error


def load_programs(
    maps: Mapping[str, PinnedMap],
    sizes: layout.Sizes,
    features: Features,
    cookie: int | None = None,
    pinned: Path | None = None,
) -> Loaded:
    """Compile (or recall) against these open maps and load. Nothing is pinned or attached.

    Programs in the directory `pinned` that are the same, on the same maps, are taken instead: the kernel has verified
    them before, which is most of the work of a restart.
    """
    started = time.monotonic()
    names = {name: PLACEHOLDERS + number for number, name in enumerate(sorted(maps))}
    found = _compiled(names, sizes, features, cookie)
    if pinned and (
        same := _pinned(pinned, found, {names[name]: map_info(one.fd).id for name, one in maps.items()})
    ):
        fds, info = same
        return Loaded(fds, info, time.monotonic() - started, 0.0, found.cookie, adopted=True)
    descriptors = {names[name]: one.fd for name, one in maps.items()}
    code = {name: codecache.relocate(raw, descriptors) for name, raw in found.programs.items()}
    compiled = time.monotonic()
    loaded: dict[str, int] = {}
    for name, kind in PROGRAMS.items():
        flags = XDP_HAS_FRAGS if kind is ProgType.XDP and features.xdp_frags else 0
        loaded[name] = prog_load(kind, f"mw_{name}", code[name], flags=flags, attach_type=_expected(name))
    info = {name: prog_info(fd) for name, fd in loaded.items()}
    return Loaded(loaded, info, compiled - started, time.monotonic() - compiled, found.cookie)


def _pinned(
    directory: Path, wanted: codecache.Compiled, map_ids: Mapping[int, int]
) -> tuple[dict[str, int], dict[str, ProgInfo]] | None:
    """The pinned programs, when each has the wanted instructions and uses the wanted maps."""
    with contextlib.ExitStack() as opened:
        fds: dict[str, int] = {}
        info: dict[str, ProgInfo] = {}
        for name, code in wanted.programs.items():
            try:
                fds[name] = obj_get(directory / name)
            except FileNotFoundError:
                return None
            opened.callback(os.close, fds[name])
            info[name] = prog_info(fds[name])
            used = {map_ids[number] for number in codecache.maps_of(code)}
            if info[name].tag not in codecache.tags(code) or info[name].map_ids != used:
                return None
        opened.pop_all()
        return fds, info


def _compiled(
    names: Mapping[str, int], sizes: layout.Sizes, features: Features, cookie: int | None
) -> codecache.Compiled:
    """The programs with placeholders for descriptors; compiled once for each source, unless the cookie is given."""
    cache = codecache.directory() if cookie is None else None
    key = codecache.key_of(source_text(names, sizes, features, 0))
    kept = codecache.recall(cache, key) if cache else None
    if kept is not None and kept.programs.keys() == PROGRAMS.keys():
        return kept
    secret = secrets.randbits(64) if cookie is None else cookie
    fresh = codecache.Compiled(secret, compile_programs(source_text(names, sizes, features, secret)))
    if cache:
        codecache.keep(cache, key, fresh)
    return fresh


def _expected(name: str) -> int:
    return AttachType.XDP if name == "xdp" else 0


# State of packets that are under way: kept through a change of layout where its shape has not changed.
KEPT = ("ct4", "ct6", "ct4_new", "ct6_new", "fragments", "fragments_denied")


def refuse_newer(pins: Path) -> None:
    """LoaderError when a later release has left its pins: this one cannot read them and must not filter beside."""
    newer = max(attach.homes(pins), default=0)
    if newer > layout.LAYOUT_VERSION:
        raise LoaderError(
            f"{pins}/v{newer} is enforced by a newer release (layout {newer}, this one has {layout.LAYOUT_VERSION}): "
            "go back to that release, or end its enforcement with its `meshwall cleanup`"
        )


def inherited(pins: Path, name: str, spec: layout.Map) -> PinnedMap | None:
    """The same table of an earlier layout, if it has the same shape."""
    for one in attach.older(pins):
        with contextlib.suppress(LayoutMismatch, FileNotFoundError):
            return PinnedMap.open(one / "maps" / name, spec)
    return None


def inherit_panic(pins: Path, config: PinnedMap) -> None:
    """A panic goes on through a change of layout."""
    before = inherited(pins, "config", config.spec)
    if before is None:
        return
    with before:
        old = layout.CONFIG.unpack(before.lookup(0) or bytes(layout.CONFIG.size))
    new = layout.CONFIG.unpack(config.lookup(0) or bytes(layout.CONFIG.size))
    config.update(0, layout.CONFIG.pack(**new | {name: old[name] for name in ("panic_until", "panic")}))


def open_maps(directory: Path, sizes: layout.Sizes) -> tuple[dict[str, PinnedMap], int]:
    """Adopt what is pinned, create the rest; second: the number adopted. LayoutMismatch touches nothing."""
    pins = directory.parent.parent
    directory.mkdir(parents=True, exist_ok=True)
    wanted = layout.maps(sizes)
    opened = {
        name: PinnedMap.open(directory / name, spec)
        for name, spec in wanted.items()
        if (directory / name).exists()
    }
    adopted = len(opened)
    for name, spec in wanted.items():
        if name in opened:
            continue
        kept = inherited(pins, name, spec) if name in KEPT else None
        if kept is not None:
            obj_pin(kept.fd, directory / name)
        opened[name] = kept or PinnedMap.create(spec, directory / name)
        if name == "config":
            inherit_panic(pins, opened[name])
    return opened, adopted


def prepare_config(config: PinnedMap, hz: int) -> None:
    """Put what the daemon does not know into `config`, word by word: the daemon may be flipping the generation."""
    offsets = layout.CONFIG.offsets()
    with config.mmap(writable=True) as memory:
        struct.pack_into("=I", memory, offsets["hz"], hz)
        if not struct.unpack_from("=Q", memory, offsets["trace_cookie"])[0]:
            struct.pack_into("=Q", memory, offsets["trace_cookie"], secrets.randbits(64) | 1)
        for name, most in (("event_budget", DEFAULT_EVENT_BUDGET), ("reject_budget", DEFAULT_REJECT_BUDGET)):
            if not struct.unpack_from("=I", memory, offsets[name])[0]:
                struct.pack_into("=I", memory, offsets[name], most)


def name_fixed_slots(slot_info: PinnedMap) -> None:
    """Identities of the slots with a fixed meaning, for events; SLOT_UNKNOWN stays 0, which is `unknown`."""
    for slot, identity in layout.FIXED_IDENTITIES.items():
        slot_info.update(slot, layout.SLOT_INFO.pack(identity=identity))


def check_programs(loaded: Loaded) -> None:
    """A frame that is not IP passes everywhere: a program that fails this is never attached."""
    frame = bytes(12) + b"\x88\xcc" + bytes(50)
    for name, fd in loaded.fds.items():
        value, wanted = prog_test_run(fd, frame).value, 2 if name == "xdp" else 0xFFFFFFFF
        if value != wanted:
            raise LoaderError(
                f"program {name} answers {value:#x} to a frame that is not IP, expected {wanted:#x}"
            )


def ensure_bpffs(path: Path) -> None:
    """Mount a bpf file system on `path` unless it is inside one."""
    path.mkdir(parents=True, exist_ok=True)
    if _is_bpffs(path):
        return
    done = subprocess.run(
        ["mount", "-t", "bpf", "bpf", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LoaderError(f"cannot mount a bpf file system on {path}: {done.stderr.strip()}")


def _is_bpffs(path: Path) -> bool:
    deepest: tuple[int, str] = (0, "")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        where = where.encode().decode("unicode_escape")
        if path.resolve().is_relative_to(where) and len(where) >= deepest[0]:
            deepest = (len(where), kind)
    return deepest[1] == "bpf"


def pin_programs(fds: Mapping[str, int], directory: Path) -> None:
    """Put new programs in the place of old ones; the old ones stay attached until the links are updated."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, fd in fds.items():
        fresh = directory / f"{name}-new"
        fresh.unlink(missing_ok=True)
        obj_pin(fd, fresh)
        fresh.rename(directory / name)


@contextlib.contextmanager
def one_at_a_time(pins: Path) -> Iterator[None]:
    """Two loaders on the same pins would undo each other. bpffs has no locks: the lock is outside."""
    name = (
        Path(tempfile.gettempdir())
        / f"meshwall-loader-{pins.resolve().as_posix().strip('/').replace('/', '-')}.lock"
    )
    fd = os.open(name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def load(pins: Path, devices: list[str], xdp: attach.XdpMode, sizes: layout.Sizes) -> dict[str, object]:
    """The loader's whole work; what is returned is printed."""
    present = {name: index for index, name in socket.if_nameindex()}
    missing = [name for name in devices if name not in present]
    if missing:
        raise LoaderError(f"no network device {', '.join(missing)}; this namespace has {', '.join(present)}")
    refuse_newer(pins)
    features = probe()
    ensure_bpffs(pins)
    home = pins / f"v{layout.LAYOUT_VERSION}"
    with one_at_a_time(pins):
        maps, adopted = open_maps(home / "maps", sizes)
        prepare_config(maps["config"], features.hz)
        name_fixed_slots(maps["slot_info"])
        loaded = load_programs(maps, sizes, features, pinned=home / "progs")
        check_programs(loaded)
        if not loaded.adopted:
            pin_programs(loaded.fds, home / "progs")
        attached = {
            name: asdict(attach.attach(pins, index, xdp))
            for name, index in present.items()
            if name in devices
        }
    return {
        "layout": layout.LAYOUT_VERSION,
        "pins": str(home),
        "sizes": asdict(sizes),
        "maps": {"adopted": adopted, "created": len(maps) - adopted},
        "programs": {
            name: {"instructions": info.instructions, "verified": info.verified_instructions, "tag": info.tag}
            for name, info in loaded.info.items()
        },
        "programs_adopted": loaded.adopted,
        "compile_s": round(loaded.compile_s, 3),
        "load_s": round(loaded.load_s, 3),
        "features": asdict(features),
        "devices": attached,
    }


def _sizes(text: str) -> layout.Sizes:
    known = asdict(layout.Sizes())
    try:
        given = json.loads(text)
        wrong = [
            f"{key}: {value!r}"
            for key, value in given.items()
            if key not in known or not isinstance(value, int)
        ]
    except (ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"not a JSON object: {text!r}") from error
    if wrong:
        raise argparse.ArgumentTypeError(
            f"{', '.join(wrong)}; keys are {', '.join(known)}, values whole numbers"
        )
    return layout.sized(**given)


def main(argv: list[str] | None = None) -> int:
    """Command line of the loader."""
    parser = argparse.ArgumentParser(
        prog="bpf.loader", description="compile, load, pin and attach the data path"
    )
    parser.add_argument("--pins", type=Path, required=True, help="directory on (or for) a bpf file system")
    parser.add_argument(
        "--device", action="append", default=[], help="attach to this network device; may be repeated"
    )
    parser.add_argument(
        "--xdp", choices=[mode.value for mode in attach.XdpMode], default=attach.XdpMode.AUTO.value
    )
    parser.add_argument(
        "--sizes", type=_sizes, default=layout.Sizes(), help="JSON object: map sizes that differ"
    )
    parser.add_argument("--json", action="store_true", help="indent nothing (the answer is always JSON)")
    options = parser.parse_args(argv)
    try:
        answer = load(options.pins, options.device, attach.XdpMode(options.xdp), options.sizes)
    except LayoutMismatch as error:
        print(
            f"bpf loader: {error} (use the sizes that are pinned, or `meshwall cleanup` first)",
            file=sys.stderr,
        )
        return 1
    except (LoaderError, MissingFeatureError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print("bpf loader: " + " | ".join(text.splitlines()), file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
