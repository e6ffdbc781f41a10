"""Pinned programs onto devices by system calls alone: for the loader, and for the daemon as devices appear.

A link of ours that exists is updated in place, so there is no moment without a filter. A program of
somebody else is never detached: where XDP is taken, TCX carries the policy alone and the result says so.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bpf import clsact
from bpf.features import has_tcx
from bpf.layout import LAYOUT_VERSION
from bpf.syscall import (
    BPF_F_BEFORE,
    XDP_GENERIC,
    XDP_NATIVE,
    AttachType,
    link_create,
    link_detach,
    link_info,
    link_update,
    obj_get,
    obj_pin,
    prog_info,
    prog_query,
)

SIOCGIFHWADDR = 0x8927
ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772
# Devices whose packets begin with layer 3: as the kernel's dev_is_mac_header_xmit() has it. PPP, RAWIP, TUNNEL,
# TUNNEL6, SIT, IPGRE, IP6GRE, and NONE: tun, WireGuard, xfrm
ARPHRD_BARE = frozenset({512, 519, 768, 769, 776, 778, 823, 0xFFFE})


class XdpMode(Enum):
    """How XDP is to be attached; AUTO takes native or nothing, because generic costs more than TCX."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"
    OFF = "off"


@dataclass(frozen=True)
class Hook:
    """One attachment point of ours."""

    name: str  # of the pinned link
    program: str
    attach_type: AttachType


XDP = Hook("xdp", "xdp", AttachType.XDP)
INGRESS = Hook("ingress", "tcx_ingress", AttachType.TCX_INGRESS)
EGRESS = Hook("egress", "tcx_egress", AttachType.TCX_EGRESS)
INGRESS_L3 = Hook(INGRESS.name, "tcx_ingress_l3", INGRESS.attach_type)
EGRESS_L3 = Hook(EGRESS.name, "tcx_egress_l3", EGRESS.attach_type)
HOOKS = (INGRESS, EGRESS, XDP)  # XDP last: it may mark packets only when TCX reads the mark


@dataclass(frozen=True)
class Attachment:
    """What is attached to one device. `xdp` is native, generic or off; `note` says why not as asked. `taken`: because
    of a program of somebody else, which may go."""

    ifindex: int
    ingress: bool
    egress: bool
    xdp: str
    by: str  # "tcx" or "clsact"
    note: str = ""
    taken: bool = False


def home(pins: Path) -> Path:
    """The directory of this layout version."""
    return pins / f"v{LAYOUT_VERSION}"


def homes(pins: Path) -> dict[int, Path]:
    """The directories of all layout versions that are there, by version."""
    found = pins.iterdir() if pins.is_dir() else ()
    return {int(one.name[1:]): one for one in found if one.name[:1] == "v" and one.name[1:].isdigit()}


def older(pins: Path) -> list[Path]:
    """Directories of earlier layouts, newest first: what a release before this one has left, and may still enforce."""
    return [one for version, one in sorted(homes(pins).items(), reverse=True) if version < LAYOUT_VERSION]


def _link_path(pins: Path, ifindex: int, hook: Hook) -> Path:
    return home(pins) / "links" / f"{ifindex}-{hook.name}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _alive(path: Path, ifindex: int) -> bool:
    """Is a link of ours pinned and still on its device? The pin of a device that vanished is removed."""
    if not path.exists():
        return False
    with _opened(path) as link:
        if link_info(link).ifindex == ifindex:
            return True
    path.unlink()
    return False


def _elsewhere(pins: Path, ifindex: int) -> bool:
    """Are our links on a device that has moved to another namespace, and its number was given to another one here?"""
    path = _link_path(pins, ifindex, INGRESS)
    if not path.exists():
        return False
    with _opened(path) as link:
        info = link_info(link)
    return info.ifindex == ifindex and info.prog_id not in prog_query(ifindex, INGRESS.attach_type)


def _put(pins: Path, ifindex: int, hook: Hook, flags: int = 0) -> None:
    """Attach, or swap the program of the link that is there."""
    path = _link_path(pins, ifindex, hook)
    with _opened(home(pins) / "progs" / hook.program) as program:
        if _alive(path, ifindex):
            with _opened(path) as link:
                link_update(link, program)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if _inherit(pins, path, ifindex, program):
            return
        link = link_create(program, ifindex, hook.attach_type, flags)
        try:
            obj_pin(link, path)
        finally:
            os.close(link)


def _inherit(pins: Path, path: Path, ifindex: int, program: int) -> bool:
    """Take over the link of an earlier layout: one atomic update puts the new program in the old one's place."""
    for one in older(pins):
        before = one / "links" / path.name
        if not _alive(before, ifindex):
            continue
        with _opened(before) as link:
            link_update(link, program)
            obj_pin(link, path)
        before.unlink()
        return True
    return False


def remove_older(pins: Path) -> list[str]:
    """What earlier layouts have left, once this one enforces. Returns what was removed, for people."""
    done = []
    for one in older(pins):
        links = one / "links"
        for path in [*links.iterdir()] if links.is_dir() else []:
            if (home(pins) / "links" / path.name).exists():  # it is ours now; this is a second name of it
                path.unlink()
        done += dismantle(one)
    return done


def dismantle(one: Path) -> list[str]:
    """Detach all that the links of a layout's directory hold, and remove the directory."""
    done = []
    links = one / "links"
    for path in sorted(links.iterdir()) if links.is_dir() else ():
        device, _, kind = path.name.partition("-")
        if kind == "clsact":
            with contextlib.suppress(OSError):  # the device has gone, and its filters with it
                clsact.detach(int(device))
            path.unlink()
        else:
            _remove(path)
        done.append(f"detached {kind} from device {device}")
    for directory in (links, one / "progs", one / "maps", one):
        if not directory.is_dir():
            continue
        for path in directory.iterdir():
            path.unlink()
            done.append(f"removed {path}")
        directory.rmdir()
    return done


def _clsact_mark(pins: Path, ifindex: int) -> Path:
    return home(pins) / "links" / f"{ifindex}-clsact"


def _mark_clsact(pins: Path, ifindex: int, program: int) -> None:
    """Filters have no link to pin; a pin of the program tells later runs that this device has ours."""
    mark = _clsact_mark(pins, ifindex)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    obj_pin(program, mark)


def _xdp(mode: str) -> Hook:
    """The pin's name tells the XDP mode, which the kernel's link info does not."""
    return Hook(f"xdp-{mode}", XDP.program, XDP.attach_type)


def attach_xdp(pins: Path, ifindex: int, mode: XdpMode) -> tuple[str, str, bool]:
    """The mode that is in force, a note why not as asked, and whether somebody else's program is the reason."""
    flags = {"native": XDP_NATIVE, "generic": XDP_GENERIC}
    wanted = {XdpMode.AUTO: "native", XdpMode.NATIVE: "native", XdpMode.GENERIC: "generic", XdpMode.OFF: ""}[
        mode
    ]
    for other in flags:
        if other != wanted:
            _remove(_link_path(pins, ifindex, _xdp(other)))
    if not wanted:
        return "off", "", False
    if not has_link_header(ifindex):
        return "off", "no XDP on devices without link header; TCX carries the policy alone", False
    try:
        _put(pins, ifindex, _xdp(wanted), flags[wanted])
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST):
            note = "another program owns XDP on this device and stays; TCX carries the policy alone"
            return "off", note, True
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE, errno.ENOMEM):
            return (
                "off",
                f"{wanted} XDP is not possible here ({error.strerror}); TCX carries the policy alone",
                False,
            )
        raise
    return wanted, "", False


def has_link_header(ifindex: int) -> bool:
    """Do frames of this device begin with an Ethernet header? OSError when they begin with another one."""
    name = socket.if_indextoname(ifindex)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        reply = fcntl.ioctl(handle, SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
    (kind,) = struct.unpack_from("=H", reply, 16)
    if kind in (ARPHRD_ETHER, ARPHRD_LOOPBACK):
        return True
    if kind in ARPHRD_BARE:
        return False
    raise OSError(
        errno.EOPNOTSUPP, f"device {name} is neither Ethernet nor bare IP (type {kind}): it cannot be judged"
    )


def _tcx_hooks(ifindex: int) -> tuple[Hook, Hook]:
    return (INGRESS, EGRESS) if has_link_header(ifindex) else (INGRESS_L3, EGRESS_L3)


def attach(pins: Path, ifindex: int, xdp: XdpMode) -> Attachment:
    """Put the pinned programs on a device. OSError names the hook; TCX that was attached before stays."""
    on_way_in, on_way_out = _tcx_hooks(ifindex)
    if has_tcx():
        if _elsewhere(pins, ifindex):
            detach(pins, ifindex)
        # first in the chain: a program in front of ours could accept a packet that we never see
        _put(pins, ifindex, on_way_in, BPF_F_BEFORE)
        _put(pins, ifindex, on_way_out, BPF_F_BEFORE)
        by = "tcx"
    else:
        with (
            _opened(home(pins) / "progs" / on_way_in.program) as ingress,
            _opened(home(pins) / "progs" / on_way_out.program) as egress,
        ):
            clsact.attach(ifindex, ingress, egress)
            _mark_clsact(pins, ifindex, ingress)
        by = "clsact"
    mode, note, taken = attach_xdp(pins, ifindex, xdp)
    return Attachment(ifindex, ingress=True, egress=True, xdp=mode, by=by, note=note, taken=taken)


def _remove(path: Path) -> None:
    if not path.exists():
        return
    with _opened(path) as link, contextlib.suppress(OSError):
        link_detach(link)  # ENOLINK when the device has gone
    path.unlink()


def detach(pins: Path, ifindex: int) -> None:
    """Take our programs off a device, in the reverse order."""
    for mode in ("native", "generic"):
        _remove(_link_path(pins, ifindex, _xdp(mode)))
    _remove(_link_path(pins, ifindex, EGRESS))
    _remove(_link_path(pins, ifindex, INGRESS))
    if not has_tcx():
        clsact.detach(ifindex)
        _clsact_mark(pins, ifindex).unlink(missing_ok=True)


def _program_id(pins: Path, hook: Hook) -> int:
    with _opened(home(pins) / "progs" / hook.program) as program:
        return prog_info(program).id


def _on(pins: Path, ifindex: int, hook: Hook) -> bool:
    """Is our current program on that hook, by our link?"""
    path = _link_path(pins, ifindex, hook)
    if not path.exists():
        return False
    with _opened(path) as link:
        info = link_info(link)
    if (info.ifindex, info.prog_id) != (ifindex, _program_id(pins, hook)):
        return False
    return hook.program == XDP.program or info.prog_id in prog_query(ifindex, hook.attach_type)


def _in_front(pins: Path, ifindex: int) -> str:
    """A note about programs of others that run before ours and could accept a packet that we never see."""
    found = []
    for hook in _tcx_hooks(ifindex):
        chain = prog_query(ifindex, hook.attach_type)
        if _program_id(pins, hook) in chain[1:]:
            found.append(
                f"TCX {hook.name} program {chain[0]} runs before ours and may pass what policy denies"
            )
    return "; ".join(found)


def status(pins: Path, ifindex: int) -> Attachment:
    """What is attached now, as the kernel sees it."""
    note, by = "", "tcx" if has_tcx() else "clsact"
    try:
        hooks = _tcx_hooks(ifindex)
    except OSError:  # has gone, or is of a kind that never had ours
        return Attachment(ifindex, ingress=False, egress=False, xdp="off", by=by)
    if by == "clsact":
        there = clsact.status(ifindex)
        ingress, egress = (_program_id(pins, hook) == one for hook, one in zip(hooks, there, strict=True))
    else:
        ingress, egress = (_on(pins, ifindex, hook) for hook in hooks)
        note = _in_front(pins, ifindex) if ingress and egress else ""
    on = [mode for mode in ("native", "generic") if _on(pins, ifindex, _xdp(mode))]
    return Attachment(ifindex, ingress, egress, on[0] if on else "off", by, note)


def attached_devices(pins: Path) -> list[int]:
    """Interface indexes that have a pinned link of ours, also of devices that have gone."""
    links = home(pins) / "links"
    return sorted({int(path.name.partition("-")[0]) for path in links.iterdir()}) if links.is_dir() else []
