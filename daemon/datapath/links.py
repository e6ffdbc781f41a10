"""Programs on devices: runs the loader, attaches to devices as they appear, puts back what somebody took away."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bpf import attach
from bpf.layout import LAYOUT_VERSION, Sizes
from daemon.datapath.pins import Pins
from daemon.state.tables import Device

log = logging.getLogger(__name__)


class LoadFailed(Exception):  # noqa: N818 - read as a fact
    """The loader could not do its work; what was attached stays. The text is its one line."""


def loader_command(pins: Path, sizes: Sizes) -> list[str]:
    """The process that compiles and pins."""
    arguments = ["--pins", str(pins), "--sizes", json.dumps(asdict(sizes)), "--json"]
    return [sys.executable, "-m", "bpf.loader", *arguments]


def keep_compiled(state_dir: Path) -> None:
    """Let the loader keep what it compiles, where the service manager does not say another place."""
    os.environ.setdefault("CACHE_DIRECTORY", str(state_dir / "cache"))


def loader_environment() -> dict[str, str]:
    """So that it runs the code that we run."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


async def load(pins: Path, sizes: Sizes) -> dict[str, object]:
    """Run the loader: maps and programs are pinned afterwards, and attached links run the new programs."""
    process = await asyncio.create_subprocess_exec(
        *loader_command(pins, sizes),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=loader_environment(),
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):  # already ended: no news
            process.kill()
        raise
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise LoadFailed(lines[-1])
    answer = json.loads(out)
    if not isinstance(answer, dict):
        raise LoadFailed(f"the loader answered {answer!r}, expected an object")
    return answer


@dataclass(slots=True)
class Filtered:
    """A device that carries our programs, and how."""

    device: Device
    how: attach.Attachment
    in_front: str = ""  # programs of others that run before ours


class Links:
    """Keeps our programs on the wanted devices. Blocking system calls: use it off the event loop."""

    def __init__(self, pins: Path, xdp: attach.XdpMode) -> None:
        self._pins = pins
        self._xdp = xdp
        self._held = Pins(attach.home(pins))
        self.attached: dict[int, Filtered] = {}  # by index
        self.problems: dict[str, str] = {}  # device name -> why it is not filtered
        self.tampered: Counter[str] = Counter()  # what somebody took away, and we put back
        self.last_tampering = ""

    def reconcile(self, wanted: Iterable[Device]) -> None:
        """Attach where it is missing, detach where it is not wanted, put back what somebody else took away."""
        devices = {one.index: one for one in wanted}
        self.problems = {}
        try:
            for path in self._held.restore():
                self._tampering("pin", f"{path} was removed")
        except OSError as error:
            self.problems["pins"] = f"{attach.home(self._pins)} cannot be restored: {error.strerror}"
        for index in attach.attached_devices(self._pins):
            if index not in devices:
                attach.detach(self._pins, index)
                known = self.attached.get(index)
                log.info("device %s is not filtered any more", known.device.name if known else index)
        self.attached = {index: one for index, one in self.attached.items() if index in devices}
        for device in devices.values():
            try:
                self._one(device)
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENXIO):  # gone since it was listed
                    self.problems[device.name] = error.strerror or str(error)
        self._held.hold()

    def renew(self) -> None:
        """After the loader has pinned new programs: hold those, and put them on every device that has ours."""
        self._held.close()
        for index in attach.attached_devices(self._pins):
            with contextlib.suppress(OSError):  # the device may have gone; whoever is wanted is attached anew
                attach.attach(self._pins, index, self._xdp)
        self._held.hold()

    def take_over(self) -> None:
        """From an earlier layout, whose programs have filtered so far: what is enforced now is complete.

        OSError when a device cannot be taken over: the earlier layout filters it on.
        """
        indexes = {
            int(path.name.partition("-")[0])
            for one in attach.older(self._pins)
            if (one / "links").is_dir()
            for path in (one / "links").iterdir()
        }
        for index in sorted(indexes):
            try:
                attach.attach(self._pins, index, self._xdp)
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENXIO):  # the device has gone
                    raise  # the earlier programs stay
        names = ", ".join(one.name for one in attach.older(self._pins))
        removed = attach.remove_older(self._pins)
        log.info(
            "layout %s enforces; %s is gone (%d pins)", attach.home(self._pins).name, names, len(removed)
        )

    def _one(self, device: Device) -> None:
        known = self.attached.get(device.index)
        mode = self._xdp if device.up else attach.XdpMode.OFF
        if known is None:
            how = attach.attach(self._pins, device.index, mode)
            note = f" ({how.note})" if how.note else ""
            log.info("device %s is filtered: %s, XDP %s%s", device.name, how.by, how.xdp, note)
            known = Filtered(device, how)
        else:
            self._intact(known, device, mode)
            if known.device != device or known.how.taken:
                self._xdp_again(known, device, mode)
        known.device = device
        self.attached[device.index] = known
        if (note := attach.status(self._pins, device.index).note) != known.in_front:
            known.in_front = note
            log.warning("device %s: %s", device.name, note or "no other program runs before ours any more")

    def _intact(self, known: Filtered, device: Device, mode: attach.XdpMode) -> None:
        """Compare with what we left there; put it back at once."""
        now = attach.status(self._pins, device.index)
        pairs = (
            (now.ingress, True, "ingress"),
            (now.egress, True, "egress"),
            (now.xdp, known.how.xdp, "xdp"),
        )
        lost = [name for found, expected, name in pairs if found != expected]
        if not lost:
            return
        known.how = attach.attach(self._pins, device.index, mode)
        for name in lost:
            self._tampering(name, f"the {name} program of {device.name} was detached or replaced")

    def _xdp_again(self, known: Filtered, device: Device, mode: attach.XdpMode) -> None:
        """The device has changed, or a program of somebody else was in the way: XDP may be possible now.

        A device that is down has none: a bond takes no port that runs XDP, and ports are down when they join.
        """
        before = known.how.xdp
        xdp, note, taken = attach.attach_xdp(self._pins, device.index, mode)
        known.how = replace(known.how, xdp=xdp, note=note, taken=taken)
        if xdp != before:
            log.info("device %s: XDP %s%s", device.name, xdp, f" ({note})" if note else "")

    def _tampering(self, what: str, text: str) -> None:
        self.tampered[what] += 1
        self.last_tampering = text
        log.warning("tampering: %s; put back", text)


def cleanup(pins: Path) -> list[str]:
    """Remove all enforcement: links, programs, maps of every layout version, and the file system that held them.

    Returns what was removed, for people. OSError when something stayed.
    """
    done = [text for one in attach.homes(pins).values() for text in attach.dismantle(one)]
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
