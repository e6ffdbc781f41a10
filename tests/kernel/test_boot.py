"""A boot: pins are gone, the last good state is on disk, and the daemon comes late."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bpf import layout
from daemon.datapath.snapshot import FILE, MAGIC

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSED, FAILSAFE = 7000, 7001, 7022
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{fromCIDR: [10.96.0.0/24, "fd96::/64"], toPorts: [{{ports: [{{port: "{OPEN}", protocol: ANY}}]}}]}}]
"""
SETTINGS = {
    "failsafe": [{"direction": "ingress", "protocol": one, "port": FAILSAFE} for one in ("TCP", "UDP")]
}


@pytest.fixture(scope="module")
def kept(machine):
    """The machine with its ports; its last good state, and the file as it was written."""
    with contextlib.ExitStack() as stack:
        for port in (OPEN, CLOSED, FAILSAFE):
            stack.enter_context(machine.listener(machine.us, machine.node, port))
            stack.enter_context(machine.listener(machine.us, machine.node6, port))
        machine.start(**SETTINGS)
        machine.enforce(POLICY)
        state = machine.home / "state" / FILE
        machine.until(state.exists, 20)
        machine.until(lambda: written(machine), 20)
        machine.stop(signal.SIGTERM)
        machine.written = state.read_bytes()
        yield machine


def written(machine) -> bool:
    part = machine.status()["parts"].get("last good state", {})
    return part.get("ok") is True and machine.generation() > 0 and state_is_new(machine)


def state_is_new(machine) -> bool:
    from bpf.layout import Sizes
    from daemon.datapath.snapshot import load

    sizes = layout.sized(**machine.sizes)
    assert isinstance(sizes, Sizes)
    return load(machine.home / "state" / FILE, sizes).head.config["generation"] == machine.generation()


@pytest.fixture
def booted(kept):
    """As after a boot: no pins, so no filter."""
    kept.stop(signal.SIGKILL)
    subprocess.run(["umount", str(kept.home / "bpf")], check=False, capture_output=True)
    kept.until(lambda: kept.connects(CLOSED))
    (kept.home / "state" / FILE).write_bytes(kept.written)
    yield kept
    kept.stop(signal.SIGKILL)


def restore(machine, *words: str) -> str:
    command = [
        sys.executable,
        "-m",
        "daemon.restore",
        "--config",
        str(machine.home / "meshwall.yaml"),
        *words,
    ]
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{machine.us}", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def open_ports(machine, target: str, source: str) -> list[int]:
    return [port for port in (OPEN, CLOSED, FAILSAFE) if machine.connects(port, target, source)]


def test_the_last_policy_is_enforced_before_the_daemon_and_while_it_starts(booted):
    began = time.monotonic()
    said = restore(booted)
    print(f"cold start to enforced from disk: {time.monotonic() - began:.2f} s")
    assert "is enforced again" in said
    assert "device mwd0 is filtered" in said
    for target, source in ((booted.node, booted.other), (booted.node6, booted.other6)):
        assert open_ports(booted, target, source) == [OPEN, FAILSAFE]
    leaks, stop = [], threading.Event()

    def knock() -> None:
        while not stop.is_set():
            leaks.append(booted.connects(CLOSED))

    watcher = threading.Thread(target=knock)
    watcher.start()
    try:
        booted.start()
        booted.until(lambda: booted.status().get("enforcement", {}).get("ok") is True, 90)
        time.sleep(1)
    finally:
        stop.set()
        watcher.join()
    assert len(leaks) > 3
    assert not any(leaks)
    assert open_ports(booted, booted.node, booted.other) == [OPEN, FAILSAFE]
    assert not layout.ConfigFlag(booted.config()["flags"]) & layout.ConfigFlag.ALL_OURS


def test_an_address_that_the_state_does_not_know_is_closed_too(booted):
    restore(booted)
    booted.ip("-n", booted.us, "addr", "add", "10.96.0.77/24", "dev", booted.device)
    try:
        with booted.listener(booted.us, "10.96.0.77", CLOSED):
            assert not booted.connects(CLOSED, "10.96.0.77")
    finally:
        booted.ip("-n", booted.us, "addr", "del", "10.96.0.77/24", "dev", booted.device)


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flipped(raw: bytes) -> bytes:
    at = len(raw) - 20
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def empty(_: bytes) -> bytes:
    return b""


def foreign(raw: bytes) -> bytes:
    """A whole state of another layout."""
    import zlib
    from hashlib import sha256

    body = zlib.decompress(raw[len(MAGIC) + 32 :])
    other = body.replace(f'"layout": {layout.LAYOUT_VERSION}'.encode(), b'"layout": 1')
    packed = zlib.compress(other)
    return MAGIC + sha256(packed).digest() + packed


@pytest.mark.parametrize("damage", [cut, flipped, empty, foreign])
def test_without_a_usable_state_only_the_failsafe_list_passes(booted, damage):
    (booted.home / "state" / FILE).write_bytes(damage(booted.written))
    assert "only the failsafe list passes" in restore(booted)
    for target, source in ((booted.node, booted.other), (booted.node6, booted.other6)):
        assert open_ports(booted, target, source) == [FAILSAFE]


def test_where_nothing_was_enforced_nothing_is(booted):
    (booted.home / "state" / FILE).unlink()
    assert "nothing was enforced" in restore(booted)
    assert booted.connects(CLOSED)


def test_a_second_run_changes_nothing(booted):
    restore(booted)
    before = booted.config()
    (booted.home / "state" / FILE).write_bytes(cut(booted.written))
    assert "enforced already" in restore(booted)
    assert booted.config() == before
    assert open_ports(booted, booted.node, booted.other) == [OPEN, FAILSAFE]


def test_a_device_that_comes_late_is_filtered_when_it_comes(booted):
    booted.ip("-n", booted.us, "link", "set", booted.device, "name", "later0")
    came = threading.Timer(
        1.5, lambda: booted.ip("-n", booted.us, "link", "set", "later0", "name", booted.device)
    )
    came.start()
    try:
        assert "device mwd0 is filtered" in restore(booted, "--wait", "20")
    finally:
        came.join()
    assert open_ports(booted, booted.node, booted.other) == [OPEN, FAILSAFE]


def test_a_disk_that_fails_is_a_row_of_the_status(kept):
    state = kept.home / "state" / FILE
    state.unlink()
    state.mkdir()
    try:
        kept.start()
        kept.until(lambda: "not written" in json.dumps(kept.status()["parts"].get("last good state", {})), 90)
    finally:
        state.rmdir()
        kept.stop(signal.SIGTERM)
        state.write_bytes(kept.written)
