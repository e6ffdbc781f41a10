"""Which devices are filtered, and the loop that keeps it so: apart from policy, so that no compilation delays it."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from bpf.attach import XdpMode
from daemon.datapath.links import Links
from daemon.state.tables import Device, StatusRow, Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5  # also without an event: whether our programs are still there
AUTO = "auto"
# Devices of containers and of other tools: their traffic reaches the host's own devices, or is not the host's.
NOT_OURS = ("lo", "veth*", "lxc*", "cali*", "cilium_*", "docker*", "br-*", "virbr*", "vnet*", "tap*", "cni*",
            "flannel*", "kube-*", "nodelocaldns", "dummy*", "ifb*", "tunl*", "sit*", "ip6tnl*", "gre*", "erspan*",
            "ip6_vti*", "ip_vti*", "ip6gre*", "gretap*")  # fmt: skip
HANDS_UP = ("bond", "team", "bridge")  # masters that take over what their ports receive
ON_TOP = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap")  # their packets pass the device below, both ways
NO_WIRE = ("vrf",)  # packets pass a member as well, which is filtered


def chosen(devices: Iterable[Device], patterns: Sequence[str]) -> tuple[Device, ...]:
    """The devices to filter, so that each packet of this host is judged once.

    A name in `patterns` is taken as it is. For patterns and `auto` (all but loopback and those of containers) a port
    of a bond, team or bridge is left to its master, which sees only what is for this host, and a VLAN or macvlan to
    the device below, which sees all of it. A bridge with a port that would be filtered is the host's, whatever its
    name: otherwise nobody would judge what comes in through it.
    """
    present = {one.index: one for one in devices}
    wanted = {index for index, one in present.items() if _wanted(one.name, patterns)}
    wanted |= {one.master for index, one in present.items() if index in wanted and _hands_up(one, present)}
    literal = {index for index, one in present.items() if one.name in patterns}

    def covered(one: Device) -> bool:
        below = present.get(one.lower)
        return (
            one.kind in NO_WIRE
            or (one.master in wanted and _hands_up(one, present))
            or (one.kind in ON_TOP and below is not None and below.index in wanted)
        )

    kept = literal | {index for index in wanted if not covered(present[index])}
    return tuple(one for index, one in present.items() if index in kept)


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    if any(one != AUTO and fnmatchcase(name, one) for one in patterns):
        return True
    return AUTO in patterns and not any(fnmatchcase(name, one) for one in NOT_OURS)


def _hands_up(one: Device, present: Mapping[int, Device]) -> bool:
    master = present.get(one.master)
    return master is not None and master.kind in HANDS_UP


class Devices:
    """Follows `tables.devices`. `run` is the task; `loaded` is set once there are programs to attach."""

    def __init__(self, tables: Tables, pins: Path, patterns: Sequence[str], xdp: XdpMode) -> None:
        self._tables = tables
        self._patterns = tuple(patterns)
        self._links = Links(pins, xdp)
        self._tampered = 0
        self.loaded = asyncio.Event()

    def renew(self) -> None:
        """In a worker thread, after the loader ran: devices that an earlier process attached run the new programs."""
        self._links.renew()

    def take_over(self) -> None:
        """In a worker thread, after the first policy is complete: the devices of an earlier layout get our programs."""
        self._links.take_over()

    async def run(self) -> None:
        """For ever. What is wrong with a device is its row in `tables.status`."""
        wake = asyncio.Event()
        reader = self._tables.devices.reader(wake)
        while True:
            await self.loaded.wait()
            wake.clear()
            reader.take()
            if self._tables.devices.synced:
                await self._look()
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await wake.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        wanted = chosen(self._tables.devices.rows.values(), self._patterns)
        try:
            await asyncio.to_thread(self._links.reconcile, wanted)
        except OSError as error:
            log.warning("devices: %s", error)
        self._tell()

    def _tell(self) -> None:
        status, links = self._tables.status, self._links
        rows: dict[str, StatusRow] = {}
        for one in links.attached.values():
            text = f"{one.how.by}, XDP {one.how.xdp}"
            note = "; ".join(filter(None, (one.how.note, one.in_front)))
            details = asdict(one.how) | {"note": note}
            warn = bool(one.in_front)
            rows[f"device:{one.device.name}"] = StatusRow(True, text, note, details=details, warn=warn)
        for name, problem in links.problems.items():
            rows[f"device:{name}"] = StatusRow(ok=False, text=f"not filtered: {problem}")
        status.replace(rows, within={one for one in status if one.startswith("device:")} | rows.keys())
        if (count := links.tampered.total()) > self._tampered:
            self._tampered = count
            text = (
                f"{count} times something of ours was taken away and put back; last: {links.last_tampering}"
            )
            hint = "another tool, or somebody, works on the data path: `bpftool net`, `bpftool link`"
            details = {"counts": dict(links.tampered)}
            status.put("tampering", StatusRow(True, text, hint, time.time(), details, warn=True))
