"""Flows a second and core, stage by stage: `./dev bench flows [COUNT]`. No root, no kernel.

The last two stages are done for flows that somebody looks at; the first two for every event.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bpf.layout import EVENT, FIRST_RULE, EventKind, Reason
from daemon.flows.decode import Event, events
from daemon.flows.filters import parse_filters
from daemon.flows.lines import line
from daemon.flows.pipeline import FlowPipeline
from daemon.flows.record import FRAME_EVENTS
from daemon.flows.recorded import matching
from daemon.flows.segments import EVENTS, KNOWN, SUFFIX, Frame, columns, files, pack, pack_known, stored
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, packed_prefix
from daemon.model.rule import RuleOrigin
from daemon.state.tables import Device, HostRow, IdentityRow, IpKey, IpRow, Tables

ROUNDS = 5
BATCH = 2_048


def packed(count: int, sources: int, chance: random.Random) -> bytes:
    """Events from `sources` addresses, a fifth of them allowed."""
    rows = []
    for number in range(count):
        source = chance.randrange(sources)
        allowed = number % 5 == 0
        rows.append(
            EVENT.pack(
                time_ns=number,
                saddr=(0x0A02_0000 + source).to_bytes(4, "big"),
                daddr=b"\x0a\x01\x00\x04",
                sport_be=chance.randbytes(2),
                dport_be=b"\x28\x0a",
                kind=EventKind.ALLOW if allowed else EventKind.DROP,
                reason=Reason.FORWARDED if allowed else Reason.POLICY_DENY,
                family=4,
                proto=6,
                tcp_flags=2,
                identity=70_000 + source % 512,
                rule=FIRST_RULE + source % 64,
                ifindex=2,
                length=74,
                generation=5,
            )
        )
    return b"".join(rows)


def tables() -> Tables:
    """A host with 64 rules, 512 identities and 4,096 named addresses."""
    found = Tables()
    found.host.put("host", HostRow("a1", "alpha", 1, frozenset(), frozenset()))
    found.devices.put(2, Device("eth0", 2, True, "", 1500))
    for number in range(512):
        labels = parse_labels(
            [
                f"k8s:app=web-{number}",
                "k8s:io.cilium.k8s.policy.cluster=beta",
                "k8s:io.kubernetes.pod.namespace=x",
            ]
        )
        found.identities.put(Identity(70_000 + number), IdentityRow(labels, "mesh:beta"))
    for number in range(4_096):
        prefix = packed_prefix((0x0A02_0000 + number).to_bytes(4, "big"))
        found.ips.put(
            IpKey(prefix, "mesh:beta"), IpRow(Identity(70_000 + number % 512), f"web-{number}", "x")
        )
    for number in range(64):
        found.rules.put(
            FIRST_RULE + number,
            RuleOrigin(
                f"policy-{number}", "CiliumClusterwideNetworkPolicy", Direction.INGRESS, True, 0, 0, "/p", 7
            ),
        )
    return found


def rate(count: int, work: Callable[[], object]) -> float:
    """Median of some rounds, in flows a second of processor time."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        found.append(count / (time.process_time() - start))
    return sorted(found)[ROUNDS // 2]


def main() -> None:
    """Print one line a stage."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    chance = random.Random(1)  # noqa: S311 - the same traffic in every run
    with tempfile.TemporaryDirectory() as pins:
        for name, sources in (("256 sources", 256), ("random sources", 1 << 16)):
            raw = packed(count, sources, chance)
            pipeline = FlowPipeline(tables(), Path(pins))
            report(f"{name}: {count} events", raw, pipeline, count)
        for name, sources in (("256 sources", 256), ("random sources", 1 << 16)):
            with tempfile.TemporaryDirectory() as directory:
                raw = packed(FRAME_EVENTS, sources, chance)
                report_recorded(name, raw, FlowPipeline(tables(), Path(pins)), Path(directory), count)


def report_recorded(name: str, raw: bytes, pipeline: FlowPipeline, directory: Path, count: int) -> None:
    """Write `count` times ten events in ten files, then ask them: the floor is decompressing them, in the same run."""
    pipeline.append(raw)
    pipeline.directory.refresh()
    begun = time.process_time()
    known = pipeline.directory.known(raw)
    described = FRAME_EVENTS / (time.process_time() - begun)
    frame = Frame(EVENTS, FRAME_EVENTS, 0, 1, 0, 0, FRAME_EVENTS)
    frames = max(1, count // FRAME_EVENTS)
    begun = time.process_time()
    for number in range(10):
        with (directory / f"{number}{SUFFIX}").open("wb") as file:
            file.write(pack(frame._replace(kind=KNOWN, events=0), pack_known(known)))
            for _ in range(frames):
                file.write(pack(frame, columns(raw)))
    total = 10 * frames * FRAME_EVENTS
    written = total / (time.process_time() - begun)
    size = sum(path.stat().st_size for path in files(directory))
    found = [one for path in files(directory) for one in stored(path) if one.frame.kind == EVENTS]
    floor = rate(total, lambda: [one.payload() for one in found])
    print(f"recorded, {name}: {total} events in {size >> 20} MiB, {size / total:.1f} bytes each")
    print(f"  {'describe':<26}{described:>12,.0f} flows/s")
    print(f"  {'write':<26}{written:>12,.0f} flows/s")
    print(f"  {'floor: decompress':<26}{floor:>12,.0f} flows/s")
    questions: tuple[tuple[str, list[dict[str, list[object]]]], ...] = (
        ("scan for a port", [{"destination_port": ["22"]}]),
        ("scan for a network", [{"source_ip": ["192.0.2.0/24"], "verdict": ["DROPPED"]}]),
    )
    for text, whitelist in questions:
        asked = {"since_ns": 0, "until_ns": 1 << 62, "whitelist": whitelist}
        speed = rate(total, lambda: list(matching(directory, asked)))  # noqa: B023 - called at once
        print(f"  {text:<26}{speed:>12,.0f} flows/s, {floor / speed:.2f} x the floor")
    print(f"  {'first line of a process':<26}{first_line_ms(directory):>12,.0f} ms")


def first_line_ms(directory: Path) -> float:
    """Median wall time from starting the reader, as the daemon does, to its first line."""
    took = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        command = (sys.executable, "-m", "daemon.flows.recorded", str(directory))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None and child.stdout is not None  # noqa: PT018
            child.stdin.write(json.dumps({"since_ns": 0, "until_ns": 1 << 62}).encode())
            child.stdin.close()
            child.stdout.readline()
            took.append(time.perf_counter() - begun)
            child.kill()
    return 1e3 * sorted(took)[ROUNDS // 2]


def report(title: str, raw: bytes, pipeline: FlowPipeline, count: int) -> None:
    """Measure each stage by itself."""
    step = BATCH * EVENT.size

    def ingest() -> None:
        for at in range(0, len(raw), step):
            pipeline.append(raw[at : at + step])

    def decode() -> None:
        for _ in events(raw):
            pass

    ingest()
    found: list[Event] = list(events(raw))
    directory = pipeline.directory
    directory.refresh()
    flows = [directory.flow(0, event, 0) for event in found]
    drops = parse_filters([{"verdict": ["FORWARDED"], "destination_port": ["22"]}], [])

    def narrow() -> None:
        for event in found:
            drops.select(event, lambda: flows[0])

    print(title)
    stages: tuple[tuple[str, Callable[[], object]], ...] = (
        ("count and store a batch", ingest),
        ("decode", decode),
        ("filter on the event", narrow),
        ("enrich", lambda: [directory.flow(0, event, 0) for event in found]),
        ("as JSON line", lambda: [line(flow, 1) for flow in flows]),
    )
    for name, work in stages:
        print(f"  {name:<26}{rate(count, work):>12,.0f} flows/s")


if __name__ == "__main__":
    main()
