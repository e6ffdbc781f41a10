"""How long addresses and identities in etcd take to become rows, and to be enforced, against a bare client.

    ./dev bench mesh [--addresses 100000] [--identities 10000] [--idle] [--json]

Runs in a namespace of its own, with an etcd on its loopback and, for `enforced`, a real meshwalld on a veth with one
policy: from its start, compiling the data path included, until it reports that all is in the kernel; then again with
the etcd stopped and the pins gone, from disk. The bare client lists the same keys in pages of 5,000 with the same gRPC
stubs and does json.loads on each value: the least that any Python reader can do. --idle: what a reader costs that has
nothing to do, with 50 clusters of 200 hosts in the etcd, of which each rewrites its node every five minutes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.etcdpb import etcd_pb2 as pb
from clustermesh.kv import ConnectionLost
from clustermesh.settings import EtcdSettings
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables

ROOT = Path(__file__).resolve().parents[2]
FIRST = 131072 + 1
CLUSTER = 200_000  # addresses that one cluster may have


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_etcd(directory: str) -> tuple[subprocess.Popen[bytes], str]:
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    binary = shutil.which("etcd") or sys.exit("no etcd here: install the package etcd-server")
    process = subprocess.Popen(
        [binary, "--data-dir", directory, "--listen-client-urls", client, "--advertise-client-urls", client,
         "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
         "--initial-cluster", f"default={peer}", "--unsafe-no-fsync", "--quota-backend-bytes", str(4 << 30)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process, client


def config(name: str, number: int) -> tuple[str, bytes]:
    return wire.config_key(name), wire.encode_config(wire.ClusterConfig(number, max_clusters=255))


async def fill(endpoint: str, addresses: int, identities: int) -> None:
    clusters = -(-addresses // CLUSTER)
    pairs = [config(f"west{cluster}", cluster) for cluster in range(2, clusters + 2)]
    each = identities // clusters
    for number in [(cluster << 16) + 1 + one for cluster in range(2, clusters + 2) for one in range(each)]:
        labels = [f"k8s:app=app-{number}", "k8s:io.kubernetes.pod.namespace=prod",
                  "k8s:io.cilium.k8s.policy.serviceaccount=default"]  # fmt: skip
        pairs.append((wire.identity_key(number), wire.encode_identity(labels, f"west{number >> 16}")))
    for number in range(addresses):
        text = wire.ip_text(4, (10 << 24) + number + 1)
        identity = ((2 + number % clusters) << 16) + 1 + number % each
        entry = wire.ip_entry(text, identity, "192.168.5.1", "prod", f"pod-{number}")
        pairs.append((wire.ip_key(text), wire.encode_ip(entry)))
    await put_all(endpoint, pairs)


async def put_all(endpoint: str, pairs: Sequence[tuple[str, bytes]]) -> None:
    """A hundred keys at a time, once the etcd has started."""
    kv = EtcdKV(EtcdSettings((endpoint,)))
    for _ in range(100):
        with contextlib.suppress(ConnectionLost):
            await kv.get("x")
            break
        await asyncio.sleep(0.1)
    session = await kv._connected()
    for start in range(0, len(pairs), 100):
        puts = [
            pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=value))
            for key, value in pairs[start : start + 100]
        ]
        await session.txn(pb.TxnRequest(success=puts))
    await kv.close()


async def bare(endpoint: str) -> float:
    """Seconds to list and decode all identities and addresses."""
    kv = EtcdKV(EtcdSettings((endpoint,)))
    await kv.get("x")
    start = time.perf_counter()
    found = {}
    for prefix in (wire.IDENTITIES, wire.IPS):
        for entry in (await kv.list(f"{prefix}/")).entries:
            found[entry.key] = (
                json.loads(entry.value) if entry.value[:1] == b"{" else entry.value.decode().split(";")
            )
    took = time.perf_counter() - start
    await kv.close()
    return took


async def stalls(worst: list[float]) -> None:
    """The longest time that the loop was not ours."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        worst[0] = max(worst[0], time.perf_counter() - before - 0.001)


async def reader(endpoint: str, addresses: int) -> tuple[float, float]:
    """Seconds until all is rows, and the longest stall of the loop."""
    kv, tables, worst = EtcdKV(EtcdSettings((endpoint,))), Tables(), [0.0]
    source = MeshSource(tables, kv, cluster_name="east", cluster_id=1)
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(stalls(worst))
        start = time.perf_counter()
        run = group.create_task(source.run())
        while not tables.ips.synced:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        took = time.perf_counter() - start
        assert len(tables.ips) == addresses, f"{len(tables.ips)} rows"
        run.cancel()
        watch.cancel()
    await kv.close()
    return took, worst[0]


async def latency(endpoint: str, changes: int, rate: float) -> list[float]:
    """Milliseconds from just before a put until the row is there, sorted."""
    kv, writer, tables = EtcdKV(EtcdSettings((endpoint,))), EtcdKV(EtcdSettings((endpoint,))), Tables()
    source = MeshSource(tables, kv, cluster_name="east", cluster_id=1)
    sent: dict[int, float] = {}
    seen: list[float] = []
    apply = source.follower._emit

    def timed(batch: object) -> None:
        apply(batch)  # type: ignore[arg-type]
        now = time.perf_counter()
        for change in batch:  # type: ignore[attr-defined]
            began = sent.pop(getattr(change, "cidr", (0, 0, 0))[1], None)
            if began is not None:
                seen.append((now - began) * 1000)

    source.follower._emit = timed
    async with asyncio.TaskGroup() as group:
        run = group.create_task(source.run())
        while not tables.ips.synced:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

        async def put(number: int) -> None:
            address = (172 << 24) + number
            entry = wire.ip_entry(wire.ip_text(4, address), FIRST, "192.168.5.1")
            sent[address] = time.perf_counter()
            await writer.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as puts:
            for number in range(changes):
                puts.create_task(put(number))
                await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        await asyncio.sleep(0.5)
        run.cancel()
    await kv.close()
    await writer.close()
    return sorted(seen)


def once(endpoint: str, addresses: int) -> dict[str, float]:
    """One reader in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-P", __file__, "--reader", endpoint, "--addresses", str(addresses)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def memory(pid: int | str = "self") -> dict[str, int]:
    """Resident MB (10^6 bytes), now and at most. (ru_maxrss would count what the parent had.)"""
    found = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        name: int(found[key].split()[0]) * 1024 // 1_000_000
        for name, key in (("resident_mb", "VmRSS"), ("peak_mb", "VmHWM"))
    }


def be_reader(endpoint: str, addresses: int) -> None:
    took, stall = asyncio.run(reader(endpoint, addresses))
    print(json.dumps({"took_s": took, "stall_s": stall, "peak_mb": memory()["peak_mb"]}))


async def measure(args: argparse.Namespace, endpoint: str) -> dict[str, float]:
    await fill(endpoint, args.addresses, args.identities)
    base = min([await bare(endpoint) for _ in range(3)])
    runs = [once(endpoint, args.addresses) for _ in range(3)]
    took = min(run["took_s"] for run in runs)
    lag = await latency(endpoint, 2000, 500)
    return {
        "addresses": args.addresses,
        "identities": args.identities,
        "bare_client_s": round(base, 3),
        "reader_s": round(took, 3),
        "ratio": round(took / base, 2),
        "worst_stall_ms": round(max(run["stall_s"] for run in runs) * 1000, 1),
        "change_p50_ms": round(lag[len(lag) // 2], 2),
        "change_p99_ms": round(lag[len(lag) * 99 // 100], 2),
        "changes_seen": len(lag),
        "reader_peak_mb": max(run["peak_mb"] for run in runs),
    }


class Machine:
    """A meshwalld on the veth of this namespace."""

    def __init__(self, base: Path, endpoint: str) -> None:
        self.base = base
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("bpf", "run", "state", "policies.d"):
            (base / name).mkdir()
        rule = {"fromEndpoints": [{"matchLabels": {"app": f"app-{FIRST}"}}]}
        policy = {
            "apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy", "metadata": {"name": "bench"},
            "spec": {"nodeSelector": {}, "ingress": [rule]},
        }  # fmt: skip
        (base / "policies.d/bench.yaml").write_text(json.dumps(policy))
        settings = {
            "node_name": "bench", "cluster_name": "east", "cluster_id": 1, "publish": False, "devices": ["net0"],
            "etcd": {"endpoints": [endpoint]}, "pins": str(base / "bpf"), "run_dir": str(base / "run"),
            "state_dir": str(base / "state"), "policy_dir": str(base / "policies.d"),
        }  # fmt: skip
        (base / "meshwall.yaml").write_text(json.dumps(settings))

    def start(self) -> tuple[subprocess.Popen[bytes], float]:
        """The daemon, and the seconds until the first generation is in the kernel, with all that is known."""
        path = self.base / "log"
        path.unlink(missing_ok=True)
        began = time.perf_counter()
        with path.open("wb") as log:
            process = self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.main", "--config", str(self.base / "meshwall.yaml")],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        while b"generation 1:" not in path.read_bytes():
            if process.poll() is not None or time.perf_counter() > began + 180:
                sys.exit(path.read_text())
            time.sleep(0.02)
        return process, time.perf_counter() - began

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "daemon.cli.main", "status", "-o", "json", "--socket"]
        done = subprocess.run(
            [*command, str(self.base / "run/meshwall.sock")], cwd=ROOT, capture_output=True, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def cleanup(self) -> None:
        command = [sys.executable, "-m", "daemon.cli.main", "cleanup", "--pins", str(self.base / "bpf")]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def enforced(base: Path, endpoint: str, addresses: int, stop_etcd: Callable[[], None]) -> dict[str, float]:
    """The whole daemon, from the etcd and then from disk."""
    machine = Machine(base, endpoint)
    try:
        return both_starts(machine, addresses, stop_etcd)
    finally:
        machine.kill()


def both_starts(machine: Machine, addresses: int, stop_etcd: Callable[[], None]) -> dict[str, float]:
    process, took = machine.start()
    time.sleep(1)
    found = machine.status()
    assert found["addresses"]["total"] >= addresses, found["addresses"]
    figures = {
        "enforced_s": round(took, 2),
        **{f"daemon_{name}": size for name, size in memory(process.pid).items()},
    }
    figures["daemon_worst_stall_ms"] = round(found["event_loop"]["worst_s"] * 1000)
    kept = machine.base / "state/mesh/_shared"
    for _ in range(600):
        if kept.exists():
            break
        time.sleep(0.1)
    figures["kept_mb"] = kept.stat().st_size // 1_000_000
    machine.kill()
    stop_etcd()
    machine.cleanup()
    _, took = machine.start()
    time.sleep(1)
    found = machine.status()
    assert found["addresses"]["total"] >= addresses, found["addresses"]
    figures["from_disk_s"] = round(took, 2)
    figures["from_disk_worst_stall_ms"] = round(found["event_loop"]["worst_s"] * 1000)
    machine.kill()
    machine.cleanup()
    return figures


async def idle(endpoint: str, clusters: int = 50, hosts: int = 200, seconds: float = 60) -> dict[str, float]:
    """CPU share of a reader of many clusters while their hosts do what they always do."""
    keys, rest = [], []
    for number in range(2, clusters + 2):
        name = f"c{number}"
        rest.append(config(name, number))
        for host in range(hosts):
            address = wire.ip_text(4, (10 << 24) + (number << 16) + host + 1)
            node = wire.Node(f"n{host}", name, (wire.NodeAddress("InternalIP", address),), cluster_id=number)
            keys.append((wire.node_key(name, node.name), wire.encode_node(node)))
            entry = wire.IpEntry(address, host_ip=address, identity=1)
            rest.append((wire.ip_key(address), wire.encode_ip(entry)))
    await put_all(endpoint, [*rest, *keys])
    writer = EtcdKV(EtcdSettings((endpoint,)))
    command = [sys.executable, "-P", __file__, "--idler", endpoint, "--addresses", str(len(keys))]
    process = subprocess.Popen(command)  # noqa: ASYNC220 - nothing else runs yet
    await asyncio.sleep(15)
    before, began = cpu_s(process.pid), time.perf_counter()
    for number in range(int(seconds * len(keys) / 300)):
        await writer.put(*keys[number * 37 % len(keys)])
        await asyncio.sleep(max(0.0, began + number * 300 / len(keys) - time.perf_counter()))
    share = (cpu_s(process.pid) - before) / (time.perf_counter() - began)
    process.kill()
    process.wait()
    await writer.close()
    return {
        "idle_clusters": clusters,
        "idle_hosts": len(keys),
        "idle_percent_of_a_core": round(share * 100, 2),
    }


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def be_idle(endpoint: str) -> None:
    await MeshSource(Tables(), EtcdKV(EtcdSettings((endpoint,))), cluster_name="east", cluster_id=1).run()


def inside(args: argparse.Namespace) -> dict[str, float]:
    """All figures; in a namespace with a device net0."""
    with tempfile.TemporaryDirectory(prefix="mwbench-") as directory:
        process, endpoint = start_etcd(str(Path(directory) / "etcd"))
        (Path(directory) / "daemon").mkdir()
        try:
            if args.idle:
                return asyncio.run(idle(endpoint))
            found = asyncio.run(measure(args, endpoint))
            return found | enforced(Path(directory) / "daemon", endpoint, args.addresses, process.kill)
        finally:
            process.kill()
            process.wait()
            subprocess.run(["umount", Path(directory) / "daemon/bpf"], check=False, stderr=subprocess.DEVNULL)


def in_namespace(argv: Sequence[str]) -> int:
    """Run this program again, with the same arguments, where it may attach things."""
    name = f"mwbenchmesh{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for words in (
            "link add net0 type veth peer name far0", "link set lo up", "link set net0 up", "link set far0 up",
            "addr add 192.0.2.1/24 dev net0",
        ):  # fmt: skip
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        command = ["nsenter", f"--net=/run/netns/{name}", sys.executable, "-P", __file__, "--inside", *argv]
        return subprocess.run(command, check=False).returncode
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--addresses", type=int, default=100_000)
    parser.add_argument("--identities", type=int, default=10_000)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reader", metavar="ENDPOINT", help=argparse.SUPPRESS)
    parser.add_argument("--idler", metavar="ENDPOINT", help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reader:
        be_reader(args.reader, args.addresses)
    elif args.idler:
        asyncio.run(be_idle(args.idler))
    elif args.inside:
        found = inside(args)
        text = (
            json.dumps(found)
            if args.json
            else "\n".join(f"{name:25} {value}" for name, value in found.items())
        )
        print(text)
    else:
        return in_namespace(sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
