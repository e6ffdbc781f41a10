"""From a million address rows to the kernel: what the loop of the data path needs, beside the table and the maps.

`./dev bench rows [ADDRESSES] [CHANGES]`. Rows are put into the table as a source puts them, the real Program takes
them to real pinned maps (no device attached). Aims: the event loop never blocked above 100 ms; resident memory counts
towards 900 MB for a daemon with 1,000,000 addresses.
"""

import asyncio
import gc
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bpf.attach import XdpMode
from bpf.layout import Sizes
from daemon.datapath.devices import Devices
from daemon.datapath.links import cleanup
from daemon.datapath.program import Program, ProgramSettings
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Prefix, parse_prefix
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import CompileSettings
from daemon.state.tables import HostRow, IdentityRow, IpKey, IpRow, PolicyKey, Tables

FIRST, IDENTITIES = 131073, 10_000
PIECE = 1_000  # rows that a source puts between two turns of the loop
STALL_MS = 100
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: web}
spec:
  nodeSelector: {}
  ingress:
    - fromEndpoints: [{matchLabels: {app: app-7}}]
      toPorts: [{ports: [{port: "443", protocol: TCP}]}]
"""


def resident_mb() -> float:
    with Path("/proc/self/statm").open() as statm:
        return int(statm.read().split()[1]) * 4 / 1024


class Stall:
    """The longest time that the loop was not ours, since `reset`."""

    def __init__(self) -> None:
        self.worst_ms = 0.0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.worst_ms = max(self.worst_ms, 1000 * (time.perf_counter() - before - 0.001))

    def reset(self) -> float:
        worst, self.worst_ms = self.worst_ms, 0.0
        return worst


def key(number: int) -> IpKey:
    return IpKey(Prefix(4, (10 << 24) + (number // 110 << 8) + number % 110, 32), "mesh:west")


async def fill(tables: Tables, addresses: int) -> None:
    for at in range(IDENTITIES):
        labels = parse_labels([f"k8s:app=app-{at}", "k8s:io.kubernetes.pod.namespace=prod"])
        tables.identities.put(Identity(FIRST + at), IdentityRow(labels, "mesh:west"))
        if not at % PIECE:
            await asyncio.sleep(0)
    for at in range(addresses):
        row = IpRow(Identity(FIRST + at % IDENTITIES), f"pod-{at}", "prod", "192.168.5.1", "mesh:west")
        tables.ips.put(key(at), row)
        if not at % PIECE:
            gc.freeze()
            await asyncio.sleep(0)


async def quiet(tables: Tables) -> None:
    """Until the data path has said that it is done with all of it."""
    while not (tables.status.get("datapath") and tables.status["datapath"].ok):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def latency(program: Program, tables: Tables, changes: int) -> list[float]:
    """Milliseconds from a row that is put until the kernel has it, one after the other."""
    found = []
    for at in range(changes):
        one, identity = key(at * 97), Identity(FIRST + (at * 97 + 1) % IDENTITIES)
        started = time.perf_counter()
        tables.ips.put(one, IpRow(identity, "moved", "prod", "192.168.5.1", "mesh:west"))
        image = program._image
        while image._owner_of.get(image.addresses.get(one.prefix) or 0) != identity:  # noqa: ASYNC110
            await asyncio.sleep(0.0005)
        found.append(1000 * (time.perf_counter() - started))
    return sorted(found)


async def run(pins: Path, addresses: int, changes: int) -> bool:
    tables, stall = Tables(), Stall()
    labels = parse_labels(["reserved:host"])
    tables.host.put("host", HostRow("one", "east", 1, labels, frozenset({parse_prefix("192.0.2.1")})))
    for policy in parse_documents(POLICY, "bench.yaml").policies:
        tables.policies.put(PolicyKey("CiliumClusterwideNetworkPolicy", "", policy.title), policy)
    program = Program(
        tables, ProgramSettings(pins, CompileSettings(), Sizes()), Devices(tables, pins, (), XdpMode.AUTO)
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stall.watch()), group.create_task(program.run())]
        while program._maps is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        gc.collect()
        gc.freeze()
        empty, started = resident_mb(), time.perf_counter()
        stall.reset()
        await fill(tables, addresses)
        filled, filling, rows_ms = time.perf_counter(), resident_mb(), stall.reset()
        for table in (tables.policies, tables.identities, tables.ips, tables.nodes):
            table.mark_synced()
        await quiet(tables)
        done, first_ms = time.perf_counter(), stall.reset()
        after = resident_mb()
        lag = await latency(program, tables, changes)
        change_ms = stall.reset()
        for task in tasks:
            task.cancel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"rows into the table        {filled - started:6.2f} s, loop blocked for at most {rows_ms:.0f} ms")
    print(f"first policy and addresses {done - filled:6.2f} s, loop blocked for at most {first_ms:.0f} ms")
    print(
        f"one address moves          {lag[len(lag) // 2]:6.2f} ms median, {lag[len(lag) * 99 // 100]:.2f} p99, "
        f"loop blocked for at most {change_ms:.0f} ms"
    )
    print(
        f"resident MB                {empty:6.0f} empty, {filling:.0f} with rows, {after:.0f} enforced, "
        f"{peak:.0f} at most"
    )
    return max(rows_ms, first_ms, change_ms) <= STALL_MS


def main() -> int:
    """Print what each step took; the status says whether the loop was free."""
    addresses = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    changes = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    with tempfile.TemporaryDirectory(prefix="mwrows") as home:
        pins = Path(home)
        try:
            return 0 if asyncio.run(run(pins, addresses, changes)) else 1
        finally:
            cleanup(pins)
            subprocess.run(["umount", pins], check=False, capture_output=True)


if __name__ == "__main__":
    raise SystemExit(main())
