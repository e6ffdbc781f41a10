"""How long a million addresses take into the kernel, one more, and a new process that finds them; memory for each.

`./dev bench load [ADDRESSES]`. Real pinned maps, no device attached. Each figure stands beside its floor: the same rows
written to the same maps by bare batches, without a plan. Aim: 1 s for 1,000,000.
"""

import asyncio
import gc
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bpf.layout import Sizes
from daemon.datapath.image import Image
from daemon.datapath.links import cleanup, load
from daemon.datapath.maps import KernelMaps
from daemon.datapath.ops import Op, Put, Store
from daemon.model.identity import Identity
from daemon.model.net import Prefix, compact

AIM_S = 1.0
IDENTITIES = 10_000
SHAPES: dict[str, Callable[[int], list[int]]] = {
    "IPv4, whole /24s": lambda count: [(10 << 24) + at for at in range(count)],
    "IPv4, 110 in each /24": lambda count: [(10 << 24) + (at // 110 << 8) + at % 110 for at in range(count)],
    "IPv4, anywhere": lambda count: random.Random(1).sample(range(1 << 24, 224 << 24), count),  # noqa: S311
    "IPv6": lambda count: [compact(Prefix(6, (0xFD << 120) + at, 128)) for at in range(count)],
}


def resident_mb() -> float:
    with Path("/proc/self/statm").open() as statm:
        return int(statm.read().split()[1]) * 4 / 1024


def floor(maps: KernelMaps, ops: list[Op]) -> float:
    """Seconds for the rows of these operations, written as they are."""
    rows = [op for op in ops if isinstance(op, Put) or (isinstance(op, Store) and op.table == "ip4_blocks")]
    before = time.perf_counter()
    maps.apply(rows)
    return time.perf_counter() - before


def empty(maps: KernelMaps) -> None:
    for table in ("ip4_hosts", "ip6_hosts"):
        hosts = maps._maps[table]
        keys = [key for key, _ in hosts.items()]
        hosts.delete_batch(b"".join(keys), len(keys))


def measure(maps: KernelMaps, sizes: Sizes, name: str, count: int) -> bool:
    identities = [Identity(131073 + at) for at in range(IDENTITIES)]
    addresses = SHAPES[name](count)
    put: dict[int, Identity | None] = {one: identities[at % IDENTITIES] for at, one in enumerate(addresses)}
    image = Image(sizes)
    gc.collect()
    gc.freeze()
    resident, started = resident_mb(), time.perf_counter()
    ops = image.claim(put, ())
    planned = time.perf_counter()
    maps.apply(ops)
    took = time.perf_counter() - started
    plan_s = planned - started
    heir, before = Image(sizes), time.perf_counter()
    heir.adopt(maps.leftover())
    adopted = time.perf_counter() - before
    del heir
    empty(maps)
    bare = floor(maps, ops)
    del ops
    gc.collect()
    grown = resident_mb() - resident
    change, one = [], addresses[count // 2]
    for at in range(200):
        before = time.perf_counter()
        more = image.claim({one: identities[at % 7]}, ())
        change.append(time.perf_counter() - before)
        maps.apply(more)
    print(
        f"{name:22} {took:5.2f} s (plan {plan_s:.2f}, bare rows {bare:.2f}); {grown * 1e6 / count:4.0f} bytes each; "
        f"one change planned in {1e6 * median(change):.0f} us; taken over by a new process in {adopted:.2f} s"
    )
    empty(maps)
    return took <= AIM_S * count / 1_000_000


def main() -> int:
    """Print a line for each shape; the status says whether all reach the aim."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    sizes, good = Sizes(), True
    with tempfile.TemporaryDirectory(prefix="mwload") as home:
        pins = Path(home)
        try:
            asyncio.run(load(pins, sizes))
            maps = KernelMaps(pins, sizes)
            for name in SHAPES:
                good &= measure(maps, sizes, name, count)
            maps.close()
        finally:
            cleanup(pins)
            subprocess.run(["umount", pins], check=False, capture_output=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
