"""Programs on devices: runs the loader, attaches to devices as they appear, puts back what somebody took away."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from bpf import attach
from bpf.layout import LAYOUT_VERSION, Sizes
from daemon.state.tables import Device

log = logging.getLogger(__name__)

AUTO = "auto"
# Devices of containers and of other tools: their traffic reaches the host's own devices, or is not the host's.
NOT_OURS = ("lo", "veth*", "lxc*", "cali*", "cilium_*", "docker*", "br-*", "virbr*", "vnet*", "tap*", "cni*",
            "flannel*", "kube-*", "nodelocaldns", "dummy*", "ifb*", "tunl*", "sit*", "ip6tnl*", "gre*", "erspan*",
            "ip6_vti*", "ip_vti*", "ip6gre*", "gretap*")  # fmt: skip


class LoadFailed(Exception):  # noqa: N818 - read as a fact
    """The loader could not do its work; what was attached stays. The text is its one line."""


def chosen(devices: Iterable[Device], patterns: Sequence[str]) -> tuple[Device, ...]:
    """The devices to filter: by name, pattern, or `auto` for all but loopback and those of containers."""

    def wanted(name: str) -> bool:
        if any(one != AUTO and fnmatchcase(name, one) for one in patterns):
            return True
        return AUTO in patterns and not any(fnmatchcase(name, one) for one in NOT_OURS)

    return tuple(one for one in devices if wanted(one.name))


async def load(pins: Path, sizes: Sizes) -> dict[str, object]:
    """Run the loader: maps and programs are pinned afterwards, and attached links run the new programs."""
    command = (
        sys.executable,
        "-m",
        "bpf.loader",
        "--pins",
        str(pins),
        "--sizes",
        json.dumps(asdict(sizes)),
        "--json",
    )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise LoadFailed(lines[-1])
    answer = json.loads(out)
    if not isinstance(answer, dict):
        raise LoadFailed(f"the loader answered {answer!r}, expected an object")
    return answer


class Links:
    """Keeps our programs on the wanted devices. Blocking system calls: use it off the event loop."""

    def __init__(self, pins: Path, xdp: attach.XdpMode) -> None:
        self._pins = pins
        self._xdp = xdp
        self.attached: dict[int, tuple[str, attach.Attachment]] = {}  # ifindex -> device name and how
        self.problems: dict[str, str] = {}  # device name -> why it is not filtered
        self.repaired: int = 0

    def reconcile(self, wanted: Iterable[Device], *, renew: bool = False) -> None:
        """Attach where it is missing, detach where it is not wanted. `renew`: swap in newly loaded programs."""
        devices = {one.index: one for one in wanted}
        for index in attach.attached_devices(self._pins):
            if index not in devices:
                attach.detach(self._pins, index)
                name, _ = self.attached.pop(index, (str(index), None))
                log.info("device %s (%d) is not filtered any more", name, index)
        self.attached = {index: how for index, how in self.attached.items() if index in devices}
        self.problems = {}
        for index, device in devices.items():
            try:
                self._one(index, device.name, renew=renew)
            except OSError as error:
                self.problems[device.name] = error.strerror or str(error)

    def _one(self, index: int, name: str, *, renew: bool) -> None:
        known = self.attached.get(index)
        now = attach.status(self._pins, index)
        intact = known is not None and (now.ingress, now.egress, now.xdp) == (True, True, known[1].xdp)
        if intact and not renew and known is not None:
            self.attached[index] = (name, known[1])
            return
        if known is not None and not intact:
            self.repaired += 1
            log.warning("device %s: somebody took our program away; attached again", name)
        how = attach.attach(self._pins, index, self._xdp)
        if known is None:
            log.info(
                "device %s is filtered: %s, XDP %s%s",
                name,
                how.by,
                how.xdp,
                f" ({how.note})" if how.note else "",
            )
        self.attached[index] = (name, how)


def cleanup(pins: Path) -> list[str]:
    """Remove all enforcement: links, programs, maps of this layout version, and the file system that held them.

    Returns what was removed, for people. OSError when something stayed.
    """
    done = []
    for index in attach.attached_devices(pins):
        attach.detach(pins, index)
        done.append(f"detached from device {index}")
    home = attach.home(pins)
    for directory in (home / "links", home / "progs", home / "maps", home):
        if not directory.is_dir():
            continue
        for path in directory.iterdir():
            path.unlink()
            done.append(f"removed {path}")
        directory.rmdir()
    if _only_ours(pins):
        umount = subprocess.run(["umount", str(pins)], check=False, capture_output=True, text=True)
        if umount.returncode:
            raise OSError(f"enforcement is removed, but {umount.stderr.strip()}")
        done.append(f"unmounted {pins}")
    return done


def _only_ours(pins: Path) -> bool:
    """Is it the top of a bpf file system that holds nothing but what the kernel itself puts there?"""
    if not pins.is_dir() or not os.path.ismount(pins):
        return False
    return all(path.suffix == ".debug" for path in pins.iterdir())


def loaded(pins: Path) -> bool:
    """Whether there is anything of this layout version."""
    return (pins / f"v{LAYOUT_VERSION}" / "maps").is_dir()
