"""`./dev run [DEVICE...]`: meshwalld on this machine in audit mode; verdicts are told, nothing is dropped.

Without devices it attaches to none. Everything stands below /run/meshwall-dev and is removed when it ends.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = Path("/run/meshwall-dev")
LOCK = Path("/run/meshwall-dev.lock")
BIN = ROOT / ".venv" / "bin"
SOCKET = BASE / "run" / "meshwall.sock"
POLICY = Path(__file__).with_name("policy.yaml")


def settings(devices: list[str]) -> dict[str, object]:
    return {
        "node_name": os.uname().nodename.partition(".")[0],
        "cluster_name": "default",
        "policy_dir": str(BASE / "policies.d"),
        "pins": str(BASE / "bpf"),
        "run_dir": str(BASE / "run"),
        "state_dir": str(BASE / "state"),
        "devices": devices,
        "audit": True,
    }


def what_next(devices: list[str]) -> str:
    judged = (
        f"attached to {', '.join(devices)}"
        if devices
        else "attached to no device: name some to judge traffic"
    )
    option = f"--socket {SOCKET}"
    return f"""
meshwalld runs in audit mode, {judged}.
Verdicts are reported; nothing is dropped. Ctrl-C ends it and removes what it attached.

In another terminal:
  {BIN}/meshwall status {option}
  cp {POLICY.relative_to(ROOT)} {BASE}/policies.d/     # a policy is in force when its file appears
  {BIN}/meshwall policy list {option}
  {BIN}/meshwall observe -f {option}
"""


def unknown(devices: list[str]) -> list[str]:
    present = {name for _, name in socket.if_nameindex()}  # /sys may show another network namespace
    return [name for name in devices if name not in present]


def clean_up() -> None:
    """Detach everything, with or without a daemon, and forget the directories."""
    subprocess.run(
        [BIN / "meshwall", "cleanup", "--yes", "--pins", BASE / "bpf"], stdout=subprocess.DEVNULL, check=False
    )
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()[::-1]:
        if line.split()[1].startswith(f"{BASE}/"):
            subprocess.run(["umount", line.split()[1]], check=False)
    shutil.rmtree(BASE, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("devices", nargs="*", metavar="DEVICE", help="network device whose traffic is judged")
    devices: list[str] = parser.parse_args().devices
    if missing := unknown(devices):
        print(f"./dev run: no network device {missing[0]!r} on this machine", file=sys.stderr)
        return 2
    lock = LOCK.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("./dev run: it runs already; end that one first", file=sys.stderr)
        return 2
    with lock:
        return run(devices)


def run(devices: list[str]) -> int:
    """The daemon's exit status; what it attached is gone afterwards."""
    if BASE.exists():  # a run that was killed
        clean_up()
    for name in ("policies.d", "run", "state", "bpf"):
        (BASE / name).mkdir(parents=True)
    config = BASE / "meshwall.yaml"
    config.write_text(json.dumps(settings(devices), indent=2) + "\n", encoding="utf-8")
    daemon = subprocess.Popen([BIN / "meshwalld", "--config", config], start_new_session=True)

    def end(_number: int, _frame: FrameType | None) -> None:
        daemon.terminate()

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, end)
    print(what_next(devices), flush=True)
    try:
        return daemon.wait()
    finally:
        clean_up()


if __name__ == "__main__":
    sys.exit(main())
