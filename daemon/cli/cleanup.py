"""`meshwall cleanup`: the explicit removal of all enforcement. Works without the daemon."""

import argparse
import os
import sys
from pathlib import Path

DEFAULT_PINS = Path("/sys/fs/bpf/meshwall")
DEFAULT_STATE_DIR = Path("/var/lib/meshwall")
DEFAULT_CONFIG = Path("/etc/meshwall/meshwall.yaml")
LAST_GOOD_STATE = "last-good.state"  # of daemon/datapath/snapshot.py


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "cleanup",
        help="remove all enforcement from this host",
        description="Detach every program and remove every map. From then on every packet passes. A running daemon "
        "would put them back: stop it first. The last good state goes too, so that the next boot does not put it back; "
        "with --pins it stays.",
    )
    parser.add_argument("--yes", action="store_true", help="yes, I mean it (needed on a terminal)")
    parser.add_argument("--dry-run", action="store_true", help="only say what is there")
    parser.add_argument(
        "--pins", type=Path, metavar="DIR", help=f"default: of the settings, or {DEFAULT_PINS}"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings that name the pins")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    pins = options.pins or pins_in_use(options.config, "cleanup")
    if pins is None:
        return 2
    found = sorted(pins.rglob("*")) if pins.exists() else []
    state = None if options.pins else _last_good_state(options.config)
    if not found and state is None:
        print(f"nothing of ours in {pins}")
        return 0
    if options.dry_run:
        print("\n".join(map(str, [*found, *([state] if state else [])])))
        return 0
    if why := _refusal(options, pins):
        print(f"meshwall cleanup: {why}", file=sys.stderr)
        return 2
    return _remove(pins, state)


def _last_good_state(config: Path | None) -> Path | None:
    """The file that the boot restorer would enforce, if there is one."""
    directory = _place("state_dir", DEFAULT_STATE_DIR, config, "cleanup")
    file = directory / LAST_GOOD_STATE if directory else None
    return file if file and file.exists() else None


def _refusal(options: argparse.Namespace, pins: Path) -> str:
    if sys.stdin.isatty() and not options.yes:
        return f"this opens the host (pins in {pins}); repeat with --yes"
    return "" if os.geteuid() == 0 else "only root can remove enforcement"


def _remove(pins: Path, state: Path | None) -> int:
    from daemon.datapath.links import cleanup  # noqa: PLC0415 - the rest of the command line does not need it

    try:
        done = cleanup(pins) if pins.exists() else []
        if state:
            state.unlink(missing_ok=True)
            done.append(f"removed {state}")
    except OSError as error:
        print(f"meshwall cleanup: {error}", file=sys.stderr)
        return 1
    print("\n".join(done))
    return 0


def pins_in_use(file: Path | None, verb: str) -> Path | None:
    """The place of the pins as the settings have it. None: told what is wrong."""
    return _place("pins", DEFAULT_PINS, file, verb)


def _place(key: str, default: Path, file: Path | None, verb: str) -> Path | None:
    """A place as the settings have it; no other line of them is read or has to be right.

    Broken settings must not keep anybody from the default place, unless they were named. None: told what is wrong.
    """
    if from_environment := os.environ.get(f"MESHWALL_{key.upper()}"):
        return Path(from_environment)
    named = file or Path(os.environ.get("MESHWALL_CONFIG") or DEFAULT_CONFIG)
    try:
        text = named.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if file is None:
            return default
        print(f"meshwall {verb}: {file}: {error.strerror}", file=sys.stderr)
        return None
    from daemon.policy.document import Node, read_documents  # noqa: PLC0415 - only where there are settings

    for document in read_documents(text, str(named)):
        if not isinstance(document, Node):
            print(f"meshwall {verb}: {document}; --pins names the place", file=sys.stderr)
            return default if file is None else None
        if (found := document.fields.get(key)) is not None:
            return Path(found.text)
    return default
