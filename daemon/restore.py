"""`meshwall-restore`: the filter of the last good state, before there is a network. No store, no loop, no daemon.

Without a usable state only the failsafe list passes: neither open nor locked out. Where there is no state at all,
nothing was enforced, and nothing is. The daemon takes over what this leaves as it does after a crash.

Exit status: 0 done (or nothing to do), 1 nothing could be enforced.
"""

import argparse
import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bpf import attach
from bpf.layout import CONFIG, LAYOUT_VERSION, ConfigFlag, Sizes, maps
from bpf.syscall import LayoutMismatch, PinnedMap
from daemon.config import Config, ConfigError, load
from daemon.datapath.links import keep_compiled, loader_command, loader_environment
from daemon.datapath.snapshot import FILE, AttachedDevice, SnapshotError
from daemon.datapath.snapshot import load as load_snapshot

WAIT_S = 5.0  # for devices of the last state that are not there yet
LOOK_EVERY_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="meshwall-restore", description="Enforce the last good state, before the network comes up."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (default: as meshwalld)")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help=f"for missing devices (default {WAIT_S:g})",
    )
    options = parser.parse_args(argv)
    try:
        config = load(options.config)
    except ConfigError as error:
        tell(f"settings are broken, the default places are used: {error}")
        config = Config()
    try:
        return restore(config, options.wait)
    except (OSError, LayoutMismatch, subprocess.CalledProcessError) as error:
        tell(f"nothing could be enforced: {error}")
        return 1


def restore(config: Config, wait_s: float) -> int:
    """See the module. Raises OSError, LayoutMismatch and CalledProcessError."""
    keep_compiled(config.state_dir)
    sizes = Sizes(**config.map_sizes.model_dump())
    path = config.state_dir / FILE
    if enforced(config.pins):
        tell("a policy is enforced already; it stays")
        if not attach.older(config.pins):
            with contextlib.suppress(
                SnapshotError
            ):  # an earlier run may have ended before it filtered all devices
                follow(config, load_snapshot(path, sizes).head.devices, 0)
        return 0
    try:
        found = load_snapshot(path, sizes)
    except SnapshotError as error:
        if not path.exists():
            tell(f"no last good state: {error}; nothing was enforced")
            return 0
        tell(f"{error}: only the failsafe list passes until meshwalld starts")
        run_loader(config.pins, sizes)
        failsafe_only(config, sizes)
        follow(config, everything(config), wait_s)
        return 0
    run_loader(config.pins, sizes)
    try:
        found.fill(config.pins, ConfigFlag.ALL_OURS)
    except (OSError, IndexError, struct.error) as error:
        tell(f"{path} cannot be restored ({error}): only the failsafe list passes until meshwalld starts")
        failsafe_only(config, sizes)
        follow(config, everything(config), wait_s)
        return 0
    age = time.time() - found.head.made
    tell(f"generation {found.head.config['generation']} is enforced again, written {age:.0f} s ago")
    follow(config, found.head.devices, wait_s)
    return 0


def enforced(pins: Path) -> bool:
    """Whether the kernel has a policy of ours: a restart of the unit must not replace it by an older one."""
    try:
        with PinnedMap.open(pins / f"v{LAYOUT_VERSION}" / "maps" / "config", maps()["config"]) as config:
            return bool(CONFIG.unpack(config.lookup(0) or bytes(CONFIG.size))["generation"])
    except FileNotFoundError:
        return bool(attach.older(pins))  # an earlier layout enforces; the daemon will take over from it


def run_loader(pins: Path, sizes: Sizes) -> None:
    """Programs and empty tables. Raises CalledProcessError with what the loader said."""
    done = subprocess.run(
        loader_command(pins, sizes), env=loader_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the loader failed")


def failsafe_only(config: Config, sizes: Sizes) -> None:
    """Default deny both ways and the failsafe list. This host's addresses are not known: all are taken for its own."""
    from daemon.datapath.image import Image  # noqa: PLC0415 - hardly ever needed
    from daemon.datapath.maps import KernelMaps  # noqa: PLC0415
    from daemon.datapath.program import failsafe_policy  # noqa: PLC0415
    from daemon.main import compile_settings  # noqa: PLC0415

    image = Image(sizes)
    tables = KernelMaps(config.pins, sizes)
    tables.apply(image.set_flags(ConfigFlag.ALL_OURS))
    tables.apply(image.switch(failsafe_policy(compile_settings(config))))
    tables.close()


def everything(config: Config) -> tuple[AttachedDevice, ...]:
    """Without a state that tells which: every device that is here but loopback."""
    return tuple(AttachedDevice(name, config.xdp) for _, name in socket.if_nameindex() if name != "lo")


def follow(config: Config, devices: Iterable[AttachedDevice], wait_s: float) -> None:
    """Filter the devices, and those that appear within the time."""
    missing = {one.name for one in devices}
    deadline = time.monotonic() + wait_s
    mode = attach.XdpMode(config.xdp)
    while missing:
        for index, name in socket.if_nameindex():
            if name in missing:
                missing.discard(name)
                try:
                    how = attach.attach(config.pins, index, mode)
                    tell(f"device {name} is filtered: {how.by}, XDP {how.xdp}")
                except OSError as error:
                    tell(f"device {name} is not filtered: {error}")
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(LOOK_EVERY_S)
    if missing:
        tell(f"not there yet: {', '.join(sorted(missing))}; meshwalld filters them when they come")


def tell(text: str) -> None:
    """To the journal."""
    print(f"meshwall-restore: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
