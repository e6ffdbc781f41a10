"""`meshwall panic`: the way out when policy is wrong and nothing else works. Needs root, and nothing that runs."""

import argparse
import json
import os
import sys
from pathlib import Path

from daemon.cli.cleanup import pins_in_use
from daemon.cli.client import seconds, span

MEANINGS = """\
open      every packet passes, in and out: no policy, no failsafe list, no check of malformed packets
failsafe  in both directions only the failsafe list passes (`meshwall status` shows it), besides what keeps the
          link alive and answers to connections that this host has open; policy and audit do not count
off       policy decides again
status    what holds now
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs."""
    parser = subparsers.add_parser(
        "panic",
        help="let everything pass, or only the failsafe list, at once and without the daemon",
        description=MEANINGS
        + "\nIt is written to the kernel's tables, holds for the next packet, and survives "
        "a restart of the daemon. A reboot ends it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["open", "failsafe", "off", "status"])
    parser.add_argument(
        "--for",
        dest="span",
        type=seconds,
        metavar="SPAN",
        help="ends by itself: 90s, 10m, 1h (default: `off` ends it)",
    )
    parser.add_argument("--json", action="store_true", help="what holds afterwards, as data")
    parser.add_argument(
        "--pins", type=Path, metavar="DIR", help="default: of the settings, or /sys/fs/bpf/meshwall"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings that name the pins")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.what is None:
        print(MEANINGS, end="")
        return 2
    if options.span is not None and options.what not in ("open", "failsafe"):
        return _wrong(f"--for says how long `open` or `failsafe` is to hold, not `{options.what}`")
    if os.geteuid() != 0:
        return _wrong("only root can read or write the kernel's tables")
    pins = options.pins or pins_in_use(options.config, "panic")
    return 2 if pins is None else _do(options, pins)


def _do(options: argparse.Namespace, pins: Path) -> int:
    from bpf.layout import Panic  # noqa: PLC0415 - not for those who ask for help
    from bpf.syscall import LayoutMismatch  # noqa: PLC0415
    from daemon.datapath.panic import PanicRefusedError, PanicState, read, write  # noqa: PLC0415

    kinds = {"open": Panic.OPEN, "failsafe": Panic.FAILSAFE, "off": Panic.NONE}
    try:
        state: PanicState = (
            read(pins) if options.what == "status" else write(pins, kinds[options.what], options.span)
        )
    except PanicRefusedError as error:
        return _wrong(str(error))
    except FileNotFoundError:
        return _wrong(f"there is no data path of this version in {pins}: nothing is enforced by it")
    except (OSError, LayoutMismatch) as error:
        return _wrong(
            f"{error}; `meshwall cleanup --yes` removes all enforcement, if that is what you want", 1
        )
    if options.json:
        print(json.dumps({"panic": state.kind.name.lower(), "left_s": state.left_s, "pins": str(pins)}))
    else:
        print(_text(state.kind.name.lower(), state.left_s))
    return 0


def _text(kind: str, left_s: float | None) -> str:
    if kind == "none":
        return "no panic: policy decides"
    until = f"for another {span(left_s)}" if left_s is not None else "until `meshwall panic off`"
    return f"PANIC {kind}: {'every packet passes' if kind == 'open' else 'only the failsafe list passes'}, {until}"


def _wrong(text: str, code: int = 2) -> int:
    print(f"meshwall panic: {text}", file=sys.stderr)
    return code
