"""One packet through the pinned programs without a trace of it: what each of them would do. Needs root, no daemon."""

import errno
from contextlib import ExitStack
from dataclasses import dataclass
from os import close
from pathlib import Path

from bpf import attach
from bpf.layout import Hook, maps
from bpf.loader import one_at_a_time
from bpf.syscall import PinnedMap, obj_get
from bpf.trace import LEAST_FRAME, Traced, traced

PROGRAMS = {Hook.XDP: "xdp", Hook.TCX_INGRESS: "tcx_ingress", Hook.TCX_EGRESS: "tcx_egress"}


class TraceRefusedError(Exception):
    """The frame cannot be traced at all; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Traces:
    """What the hooks of one direction do, in the order of a packet. None: the kernel runs no such frame there."""

    hooks: dict[Hook, Traced | None]

    @property
    def decided_by(self) -> Hook | None:
        """The hook whose verdict holds where both are attached: XDP's, unless it leaves the packet to the next."""
        for hook, found in self.hooks.items():
            if found is None or (hook is Hook.XDP and _leaves(found)):
                continue
            return hook
        return None

    @property
    def passes(self) -> bool | None:
        """None: no program could be asked."""
        by = self.decided_by
        found = self.hooks[by] if by is not None else None
        return found.passes if found else None


def _leaves(found: Traced) -> bool:
    return found.outcome is None or bool(found.outcome["deferred"] or found.outcome["answered"])


def run(pins: Path, frame: bytes, *, outgoing: bool, forwarded: bool = False) -> Traces:
    """Ask every program of a direction. OSError or LayoutMismatch when there is no data path of this version.

    forwarded: what goes out came in on another device.
    """
    if len(frame) < LEAST_FRAME:
        raise TraceRefusedError(
            f"the frame has {len(frame)} bytes, and the kernel runs none under {LEAST_FRAME} (an Ethernet header)"
        )
    home, shapes = attach.home(pins), maps()
    found: dict[Hook, Traced | None] = {}
    with ExitStack() as undo:
        config = undo.enter_context(PinnedMap.open(home / "maps" / "config", shapes["config"]))
        answers = undo.enter_context(PinnedMap.open(home / "maps" / "trace", shapes["trace"]))
        undo.enter_context(
            one_at_a_time(pins)
        )  # there is one place for answers; and no program changes meanwhile
        for hook in (Hook.TCX_EGRESS,) if outgoing else (Hook.XDP, Hook.TCX_INGRESS):
            program = obj_get(home / "progs" / PROGRAMS[hook])
            undo.callback(close, program)
            try:
                found[hook] = traced(program, config, answers, hook, frame, forwarded=forwarded)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                found[hook] = None
    return Traces(found)
