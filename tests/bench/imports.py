"""What each dependency costs a fresh process: milliseconds to import and resident MiB, beyond bare Python.

`./dev bench imports [MODULE...]`: median of five processes each.
"""

import statistics
import subprocess
import sys

MODULES = (
    "aiohttp.web",
    "grpc.aio",
    "google.protobuf.descriptor_pool",
    "pydantic",
    "pyroute2",
    "yaml",
    "uvloop",
    "bcc",
)
ROUNDS = 5
PROBE = """
import sys, time
sys.path.append("/usr/lib/python3/dist-packages")  # Debian's bcc, last as in bpf/loader.py
started = time.perf_counter()
for name in sys.argv[1:]:
    __import__(name)
took = time.perf_counter() - started
pages = int(open("/proc/self/statm").read().split()[1])
print(took * 1000, pages * 4096 / 2**20)
"""


def cost(*modules: str) -> tuple[float, float]:
    """Median milliseconds and MiB of a process that imports these; a first run warms the byte code."""
    samples = []
    for _ in range(ROUNDS + 1):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *modules], capture_output=True, text=True, check=True
        )
        samples.append([float(one) for one in done.stdout.split()])
    took, size = zip(*samples[1:], strict=True)
    return statistics.median(took), statistics.median(size)


def main(names: list[str]) -> None:
    _, bare = cost()
    print(f"{'module':<26}{'ms':>7}{'MiB':>8}")
    print(f"{'(bare Python)':<26}{'':>7}{bare:>8.1f}")
    for name in names or MODULES:
        took, size = cost(name)
        print(f"{name:<26}{took:>7.0f}{size - bare:>8.1f}")
    if not names:
        took, size = cost(*MODULES[:-1])
        print(f"{'all without bcc':<26}{took:>7.0f}{size - bare:>8.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
