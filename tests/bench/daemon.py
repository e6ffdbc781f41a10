"""What the daemon itself costs: memory, and the time from a policy file to its effect on packets.

`./dev bench daemon [ROUNDS]`. One real meshwalld in a namespace, without a mesh. A policy of 100 rules is replaced
ROUNDS times (default 30) by one that denies, then allows, a UDP port; a sender numbers and times a datagram each half
millisecond, and the moment of the effect is read from what arrived at the socket: nothing of ours decides.
Aims: 80 MB resident, 50 ms.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent.parent
HOST, PEER = "mwbench-host", "mwbench-peer"
ADDRESS, PEER_ADDRESS, PORT = "10.99.0.1", "10.99.0.2", 5000
RULES = 100
GAP_S = 0.0005

Result = TypeVar("Result")


def within(namespace: str, work: Callable[[], Result]) -> Result:
    """Call `work` in a thread inside the namespace."""

    def enter() -> Result:
        with Path("/run/netns", namespace).open("rb") as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
        return work()

    with ThreadPoolExecutor(1) as one:
        return one.submit(enter).result()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def build() -> None:
    for name in (HOST, PEER):
        ip("netns", "add", name)
    ip("-n", HOST, "link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", PEER)
    for name, address in ((HOST, ADDRESS), (PEER, PEER_ADDRESS)):
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "net0", "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "net0")


def teardown(base: Path) -> None:
    subprocess.run(["umount", base / "bpf"], check=False, stderr=subprocess.DEVNULL)
    for name in (HOST, PEER):
        if Path("/run/netns", name).exists():
            ip("netns", "delete", name)
    shutil.rmtree(base, ignore_errors=True)


def policy(allow: bool) -> str:
    """100 rules; the last one is for the port that is watched."""
    rules = [
        {
            "fromCIDR": [f"10.{number}.0.0/16"],
            "toPorts": [{"ports": [{"port": str(6000 + number), "protocol": "UDP"}]}],
        }
        for number in range(RULES - 1)
    ]
    watched = PORT if allow else PORT + 1
    rules.append(
        {"fromCIDR": ["10.99.0.0/24"], "toPorts": [{"ports": [{"port": str(watched), "protocol": "UDP"}]}]}
    )
    return json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumClusterwideNetworkPolicy",
            "metadata": {"name": "bench"},
            "spec": {"nodeSelector": {}, "ingress": rules},
        }
    )


class Arrivals:
    """What came through: the sending times, by the socket's own account."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.stop = threading.Event()
        self._receiver = within(HOST, self._listen)
        self._sender = within(PEER, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._threads = [threading.Thread(target=one) for one in (self._receive, self._send)]
        for one in self._threads:
            one.start()

    @staticmethod
    def _listen() -> socket.socket:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((ADDRESS, PORT))
        receiver.settimeout(0.2)
        return receiver

    def _receive(self) -> None:
        while not self.stop.is_set():
            try:
                (sent,) = struct.unpack("=d", self._receiver.recv(16))
            except TimeoutError:
                continue
            self.times.append(sent)

    def _send(self) -> None:
        while not self.stop.is_set():
            self._sender.sendto(struct.pack("=d", time.monotonic()), (ADDRESS, PORT))
            time.sleep(GAP_S)

    def close(self) -> None:
        self.stop.set()
        for one in self._threads:
            one.join()


def effect(arrivals: Arrivals, since: float, allow: bool) -> float:
    """Seconds from `since` until the first datagram passed, or the last one did."""
    time.sleep(0.5)
    passed = [one for one in arrivals.times if one >= since]
    if allow:
        return passed[0] - since if passed else float("inf")
    return (passed[-1] if passed else since) - since


def memory(pid: int) -> dict[str, float]:
    """Resident MB by kind; `maps` are the kernel's own tables, seen through mmap."""
    kinds = {"heap and stacks": 0, "files": 0, "maps": 0}
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[0] == "Rss:":
            kind = "maps" if "bpf-map" in name else "files" if name.startswith("/") else "heap and stacks"
            kinds[kind] += int(words[1])
        elif "-" in words[0] and not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
    return {kind: size * 1024 / 1e6 for kind, size in kinds.items()}


def main(rounds: int) -> None:
    base = Path(tempfile.mkdtemp(prefix="mwbench-"))
    daemon = None
    arrivals = None
    try:
        build()
        for name in ("bpf", "run", "state", "policies.d"):
            (base / name).mkdir()
        settings = {
            "node_name": "bench",
            "pins": str(base / "bpf"),
            "run_dir": str(base / "run"),
            "devices": ["net0"],
        }
        settings |= {"state_dir": str(base / "state"), "policy_dir": str(base / "policies.d")}
        (base / "meshwall.yaml").write_text(json.dumps(settings))
        started = time.monotonic()
        with (base / "log").open("wb") as log:
            daemon = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{HOST}", sys.executable),
                    *("-m", "daemon.main", "--config", str(base / "meshwall.yaml")),
                ],
                cwd=ROOT, stderr=log, stdout=log, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        while b"ready" not in (base / "log").read_bytes():
            if daemon.poll() is not None or time.monotonic() > started + 60:
                sys.exit((base / "log").read_text())
            time.sleep(0.02)
        print(f"start to ready{time.monotonic() - started:>22.2f} s, with compiling the data path")
        time.sleep(2)
        kinds = memory(daemon.pid)
        print(f"resident, idle{sum(kinds.values()):>22.1f} MB: ", end="")
        print(", ".join(f"{size:.1f} {kind}" for kind, size in kinds.items()))
        arrivals = Arrivals()
        figures: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            allow = bool(number % 2)
            partial = base / "policies.d" / "bench.partial"
            partial.write_text(policy(allow))
            since = time.monotonic()
            partial.rename(partial.with_suffix(".yaml"))
            figures[allow].append(effect(arrivals, since, allow) * 1000)
        for allow, found in figures.items():
            what = f"{RULES} rules, now {'allowed' if allow else 'denied'}"
            print(
                f"{what:<28}{statistics.median(found):>8.1f} ms median, {max(found):.1f} ms worst of {len(found)}"
            )
        kinds = memory(daemon.pid)
        print(f"resident, after that{sum(kinds.values()):>16.1f} MB")
    finally:
        if arrivals:
            arrivals.close()
        if daemon:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
        teardown(base)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
