"""The demo's machines: namespaces, cables, processes, all named mwdemo-* or standing below /run/mwdemo.

Nothing outside is touched: the namespaces are joined by a bridge that is itself in a namespace.
"""

import ctypes
import fcntl
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from places import (
    A1,
    BASE,
    CLUSTERS,
    ETCD,
    HOSTS,
    KUBELET,
    NETWORK,
    NEWCOMER,
    NODE_EXPORTER,
    PODS,
    SSH,
    Host,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
NETNS = Path("/run/netns")
LOCK = Path("/run/mwdemo.lock")
CLONE_NEWNET = 0x40000000

Result = TypeVar("Result")
_libc = ctypes.CDLL(None, use_errno=True)


class DemoError(Exception):
    """Something outside of us failed; the text is for a person."""


# --- namespaces


def within(namespace: str, work: Callable[[], Result]) -> Result:
    """Call `work` in a thread that has entered the network namespace; its sockets stay there."""

    def enter_and_work() -> Result:
        with (NETNS / namespace).open("rb") as handle:
            if _libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
        return work()

    with ThreadPoolExecutor(1) as one:  # the thread ends here, and with it the stay in the namespace
        return one.submit(enter_and_work).result()


def nsenter(namespace: str) -> list[str]:
    return ["nsenter", f"--net={NETNS / namespace}"]


def command(arguments: Sequence[str], given: str = "") -> str:
    done = subprocess.run(arguments, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"{' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ip_batch(namespace: str, lines: Sequence[str]) -> None:
    """`ip` commands inside a namespace. Not by `ip -n`, which mounts a /sys of its own."""
    command([*nsenter(namespace), "ip", "-batch", "-"], "\n".join(lines) + "\n")


def sysctl(namespace: str, **values: int) -> None:
    def write() -> None:
        for name, value in values.items():
            Path("/proc/sys/net", *name.split("__")).write_text(str(value), encoding="ascii")

    within(namespace, write)


def connected(namespace: str, source: str, target: str, port: int, timeout_s: float) -> bool:
    """A TCP connection from that address, greeted by the other end."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET

    def attempt() -> bool:
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.bind((source, 0))
            try:
                client.connect((target, port))
                greeting = client.recv(100).decode()
            except TimeoutError:
                return False
            if greeting != f"hello {source}\n":
                raise DemoError(f"port {port} of {target} saw {greeting!r} instead of {source}")
            return True

    return within(namespace, attempt)


# --- processes: each has a file with its pid and start time, so that a later run can end it


def _started(pid: int) -> str:
    """Start time as the kernel counts it, or empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def start(name: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """In the background, beyond the end of this program if need be; output goes to a log file."""
    logs = BASE / "log"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )
    pids = BASE / "pids"
    pids.mkdir(exist_ok=True)
    (pids / name).write_text(f"{process.pid} {_started(process.pid)}", encoding="ascii")
    return process.pid


def pid_of(name: str) -> int | None:
    """The process of that name if it still runs."""
    try:
        pid, started = (BASE / "pids" / name).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(pid) if _started(int(pid)) == started else None


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # started by an earlier run
        os.waitpid(pid, os.WNOHANG)


def stop(name: str, how: signal.Signals = signal.SIGTERM, patience_s: float = 5.0) -> None:
    """End it and wait; a process that ignores the signal is killed."""
    pid = pid_of(name)
    if pid is not None:
        os.kill(pid, how)
        deadline = time.monotonic() + patience_s
        _reap(pid)
        while pid_of(name) is not None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline += 3600
            time.sleep(0.02)
            _reap(pid)
    (BASE / "pids" / name).unlink(missing_ok=True)


def log_tail(name: str, lines: int = 15) -> str:
    try:
        text = (BASE / "log" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])


def wait_for(what: str, process: str, ready: Callable[[], bool], patience_s: float) -> None:
    """Poll until it is so; the end of `process`, or of patience, is an error with the tail of its log."""
    deadline = time.monotonic() + patience_s
    while not ready():
        _reap(pid_of(process) or 0) if pid_of(process) else None
        if pid_of(process) is None:
            raise DemoError(f"{process} ended before it was ready:\n{log_tail(process)}")
        if time.monotonic() > deadline:
            raise DemoError(f"{what}: not within {patience_s:.0f} s:\n{log_tail(process)}")
        time.sleep(0.05)


# --- the whole


def lock(patience_s: float = 120.0) -> IO[str]:
    """One demo at a time, the next one waits; keep the result as long as the demo runs."""
    handle = LOCK.open("w")
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise DemoError("another ./dev demo is running on this machine") from None
        else:
            return handle
        if not told:
            print("another ./dev demo is running on this machine: waiting for its end", file=sys.stderr)
            told = True
        time.sleep(0.2)


def leftovers() -> bool:
    return BASE.exists() or any(NETNS.glob("mwdemo-*"))


def build() -> None:
    """Namespaces, the bridge, cables, addresses and routes."""
    names = [NETWORK]
    for host in HOSTS:
        names += [host.namespace, host.pod_namespace] if host.pods_v4 else [host.namespace]
    for namespace in names:
        command(["ip", "netns", "add", namespace])
        sysctl(namespace, ipv6__conf__default__accept_dad=0)  # or the first second has no IPv6
    ip_batch(
        NETWORK,
        [
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.77.0.1/24 dev br0",
            "addr add fd77::1/64 dev br0 nodad",
            *(f"link add {host.name} type veth peer name net0 netns {host.namespace}" for host in HOSTS),
            *(f"link set {host.name} master br0 up" for host in HOSTS),
        ],
    )
    for host in HOSTS:
        ip_batch(
            host.namespace,
            [
                "link set lo up",
                "link set net0 up",
                f"addr add {host.address.v4}/24 dev net0",
                f"addr add {host.address.v6}/64 dev net0 nodad",
                *(
                    f"route add {pods} via {via}"
                    for other in HOSTS
                    if other is not host and other.pods_v4
                    for pods, via in ((other.pods_v4, other.address.v4), (other.pods_v6, other.address.v6))
                ),
            ],
        )
        if host.pods_v4:
            _build_pods(host)


def _build_pods(host: Host) -> None:
    gateway_v4 = host.pods_v4.replace(".0/24", ".1")
    gateway_v6 = host.pods_v6.replace("::/64", "::1")
    sysctl(host.namespace, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    ip_batch(
        host.namespace,
        [
            f"link add pods0 type veth peer name pod0 netns {host.pod_namespace}",
            "link set pods0 up",
            f"addr add {gateway_v4}/24 dev pods0",
            f"addr add {gateway_v6}/64 dev pods0 nodad",
        ],
    )
    addresses = [pod.address for pod in (*PODS, NEWCOMER) if pod.host is host]
    ip_batch(
        host.pod_namespace,
        [
            "link set lo up",
            "link set pod0 up",
            *(f"addr add {pair.v4}/24 dev pod0" for pair in addresses),
            *(f"addr add {pair.v6}/64 dev pod0 nodad" for pair in addresses),
            f"route add default via {gateway_v4}",
            f"route add ::/0 via {gateway_v6}",
        ],
    )


def etcd_start() -> None:
    """Debian's etcd, with its data below /run/mwdemo."""
    peer = "http://127.0.0.1:2380"
    start(
        "etcd",
        [
            *nsenter(NETWORK),
            "etcd",
            "--name=mwdemo",
            f"--data-dir={BASE / 'etcd'}",
            f"--listen-client-urls={ETCD}",
            f"--advertise-client-urls={ETCD}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=mwdemo={peer}",
        ],
        {"ETCD_UNSUPPORTED_ARCH": "arm64"} if platform.machine() == "aarch64" else None,
    )

    def answers() -> bool:
        try:
            reach_store(NETWORK)
        except OSError:
            return False
        return True

    wait_for("etcd", "etcd", answers, 20)


def reach_store(namespace: str) -> None:
    """Connect to the etcd from there; OSError when that is not possible."""
    address, port = ETCD.removeprefix("http://").split(":")
    within(namespace, lambda: socket.create_connection((address, int(port)), 1.5).close())


def store_arguments(*arguments: str) -> list[str]:
    return [*nsenter(NETWORK), str(PYTHON), str(HERE / "store.py"), *arguments]


def store(*arguments: str) -> float:
    """Run store.py; the moment of its first write, or 0."""
    return float(command(store_arguments(*arguments)) or 0)


def serve() -> None:
    """The "kubelet" and two more ports on a1."""
    start("kubelet", [*nsenter(A1.namespace), str(PYTHON), str(HERE / "serve.py"), *map(str, PORTS)])
    a2 = HOSTS[1]

    def answers() -> bool:
        try:
            return all(connected(a2.namespace, a2.address.v6, A1.address.v6, port, 1.0) for port in PORTS)
        except ConnectionRefusedError:
            return False

    wait_for("the listening ports of a1", "kubelet", answers, 10)


PORTS = (KUBELET, NODE_EXPORTER, SSH)


def configuration(host: Host) -> dict[str, object]:
    """The daemon's settings; JSON is YAML."""
    directory = host.directory
    return {
        "node_name": host.name,
        "cluster_name": host.cluster,
        "cluster_id": CLUSTERS[host.cluster],
        "node_labels": {"kubernetes.io/hostname": host.name},
        "policy_dir": str(directory / "policies.d"),
        "pins": str(directory / "bpf"),
        "run_dir": str(directory / "run"),
        "state_dir": str(directory / "state"),
        "devices": ["net0"],
        "etcd": {"endpoints": [ETCD], "insecure_transport": True},
        "clusters": {name: number for name, number in CLUSTERS.items() if name != host.cluster},
    }


def daemon_start(host: Host) -> None:
    """One real meshwalld in the host's namespace, with directories of its own."""
    for name in ("policies.d", "run", "state", "bpf"):
        (host.directory / name).mkdir(parents=True, exist_ok=True)
    settings = host.directory / "meshwall.yaml"
    settings.write_text(json.dumps(configuration(host), indent=2) + "\n", encoding="utf-8")
    start(
        f"meshwalld-{host.name}",
        [*nsenter(host.namespace), str(PYTHON), "-m", "daemon.main", "--config", str(settings)],
    )


def meshwall(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / ".venv/bin/meshwall"), *arguments, "--socket", str(host.socket)],
        capture_output=True,
        text=True,
        check=False,
    )


def teardown() -> None:
    """Remove everything that carries our name, whoever made it; safe to call at any moment and twice."""
    for name in sorted(path.name for path in (BASE / "pids").glob("*")) if (BASE / "pids").exists() else []:
        stop(name)
    for namespace in sorted(path.name for path in NETNS.glob("mwdemo-*")):
        command(["ip", "netns", "delete", namespace])
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()[::-1]:
        if line.split()[1].startswith(f"{BASE}/"):
            command(["umount", line.split()[1]])
    if BASE.exists():
        shutil.rmtree(BASE)


if __name__ == "__main__":
    sys.exit("this is a part of ./dev demo")
