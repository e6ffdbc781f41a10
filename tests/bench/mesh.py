"""How long addresses and identities in etcd take to become rows, against a bare client.

    python -P tests/bench/mesh.py [--addresses 100000] [--identities 10000] [--json]

Starts an etcd of its own on loopback. The bare client lists the same keys in pages of 5,000 with the same
gRPC stubs and does json.loads on each value: the least that any Python reader can do.
"""

import argparse
import asyncio
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.etcdpb import etcd_pb2 as pb
from clustermesh.settings import EtcdSettings
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables

FIRST = 131072 + 1


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


async def fill(endpoint: str, addresses: int, identities: int) -> None:
    kv = EtcdKV(EtcdSettings((endpoint,)))
    for _ in range(100):
        try:
            await kv.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2, max_clusters=255)))
            break
        except Exception:  # noqa: BLE001 - it is starting
            await asyncio.sleep(0.1)
    pairs: list[tuple[str, bytes]] = []
    for number in range(FIRST, FIRST + identities):
        labels = [f"k8s:app=app-{number}", "k8s:io.kubernetes.pod.namespace=prod",
                  "k8s:io.cilium.k8s.policy.serviceaccount=default"]  # fmt: skip
        pairs.append((wire.identity_key(number), wire.encode_identity(labels, "west")))
    for number in range(addresses):
        text = wire.ip_text(4, (10 << 24) + number + 1)
        entry = wire.ip_entry(text, FIRST + number % identities, "192.168.5.1", "prod", f"pod-{number}")
        pairs.append((wire.ip_key(text), wire.encode_ip(entry)))
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


def be_reader(endpoint: str, addresses: int) -> None:
    took, stall = asyncio.run(reader(endpoint, addresses))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"took_s": took, "stall_s": stall, "peak_rss_mb": peak}))


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
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--addresses", type=int, default=100_000)
    parser.add_argument("--identities", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reader", metavar="ENDPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reader:
        be_reader(args.reader, args.addresses)
        return
    with tempfile.TemporaryDirectory() as directory:
        process, endpoint = start_etcd(str(Path(directory) / "etcd"))
        try:
            found = asyncio.run(measure(args, endpoint))
        finally:
            process.kill()
            process.wait()
    print(
        json.dumps(found) if args.json else "\n".join(f"{name:20} {value}" for name, value in found.items())
    )


if __name__ == "__main__":
    main()
