"""How long a policy change takes until the kernel enforces it: compile, plan, write, flip.

`./dev bench switch [ROUNDS]`. Real pinned maps, no device attached. Every round changes the last rule of 100 and of
1,000 rules, each with its own prefix and port. Aims, for 99 of 100: 50 ms and 200 ms. That no packet sees a part of
each policy meanwhile is shown by tests/kernel/test_switch.py.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from bpf.layout import Sizes
from daemon.datapath.image import Image
from daemon.datapath.links import cleanup, load
from daemon.datapath.maps import KernelMaps
from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import parse_labels
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import Compiled, CompileSettings, Subject, compile_policy

HOST = Subject(Identity(1), parse_labels(["reserved:host"]))
KNOWN = {Identity(one): reserved_labels(Identity(one)) for one in Reserved if one}
AIMS_MS = {100: 50, 1000: 200}
RULES_PER_POLICY = 10


def policies(rules: int, change: int) -> str:
    """Documents of ten rules each; the last rule of the last one has a port that depends on `change`."""
    documents = []
    for first in range(0, rules, RULES_PER_POLICY):
        ingress = []
        for at in range(first, first + RULES_PER_POLICY):
            port = 1024 + at % 64 if at < rules - 1 else 9000 + change % 2
            ports = [{"ports": [{"port": str(port), "protocol": "TCP"}]}]
            ingress.append({"fromCIDR": [f"10.{at >> 8}.{at & 255}.0/24"], "toPorts": ports})
        documents.append(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumClusterwideNetworkPolicy",
                "metadata": {"name": f"p{first}"},
                "spec": {"nodeSelector": {}, "ingress": ingress},
            }
        )
    return "\n---\n".join(map(json.dumps, documents))


def measure(maps: KernelMaps, image: Image, rules: int, rounds: int) -> list[tuple[float, ...]]:
    """Milliseconds of compile, plan and apply (to the end of the last grace period), and of all, per round."""
    previous: Compiled | None = None
    found = []
    for change in range(rounds + 1):
        parsed = parse_documents(policies(rules, change), "bench.yaml").policies
        times = [time.perf_counter()]
        previous = compile_policy(parsed, {}, HOST, KNOWN, CompileSettings(), previous=previous)
        times.append(time.perf_counter())
        ops = image.switch(previous)
        times.append(time.perf_counter())
        maps.apply(ops)
        times.append(time.perf_counter())
        steps = [1000 * (after - before) for before, after in pairwise(times)]
        found.append((*steps, sum(steps)))
    return found[1:]


def main() -> int:
    """Print medians and the slowest; the status says whether the 99th percentiles reach the aims."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    sizes, good = Sizes(), True
    with tempfile.TemporaryDirectory(prefix="mwswitch") as home:
        pins = Path(home)
        try:
            asyncio.run(load(pins, sizes))
            maps, image = KernelMaps(pins, sizes), Image(sizes)
            for rules, aim in AIMS_MS.items():
                found = measure(maps, image, rules, rounds)
                compile_ms, plan_ms, apply_ms, all_ms = (
                    median(column) for column in zip(*found, strict=True)
                )
                slow = sorted(row[-1] for row in found)
                p99 = slow[len(slow) * 99 // 100]
                good &= p99 <= aim
                print(
                    f"{rules:5} rules: {all_ms:6.1f} ms, p99 {p99:.1f}, worst {slow[-1]:.1f} (aim {aim}): compile "
                    f"{compile_ms:.1f}, plan {plan_ms:.1f}, apply {apply_ms:.1f}; {rounds} rounds"
                )
            maps.close()
        finally:
            cleanup(pins)
            subprocess.run(["umount", pins], check=False, capture_output=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
