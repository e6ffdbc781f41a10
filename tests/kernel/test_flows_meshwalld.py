"""`meshwall observe` beside a real meshwalld in a namespace: packets, a policy file, lines."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.kernel

BIN = Path(sys.executable).parent
NODE, PEER = "mwfdnode", "mwfdpeer"
NODE_IP, PEER_IP, LISTED_IP = "10.252.0.1", "10.252.0.2", "10.252.0.70"
SIZES = {
    "slots": 1024,
    "cells": 16_384,
    "hosts": 1024,
    "conntrack": 1024,
    "ip4_blocks": 1024,
    "prefixes6": 1024,
}
POLICY = """apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: kubelet
spec:
  nodeSelector: {}
  ingress:
    - fromCIDR: ["10.252.0.64/26"]
      toPorts:
        - ports:
            - {port: "10250", protocol: TCP}
"""
SEND = """
import socket, sys, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for port in range(20000, 20000 + int(sys.argv[2])):
    print(port, time.monotonic_ns(), flush=True)
    one.sendto(b"x", (sys.argv[1], port))
    time.sleep(0.005)
"""
CONNECT = """
import contextlib, socket, sys
one = socket.socket()
one.settimeout(0.3)
one.bind((sys.argv[2], 0))
with contextlib.suppress(OSError):
    one.connect((sys.argv[1], int(sys.argv[3])))
"""


def sh(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def inside(namespace: str, *words: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}", *words]


def remove() -> None:
    for name in (NODE, PEER):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def namespaces():
    if os.geteuid():
        pytest.skip("needs root")
    remove()
    try:
        for name in (NODE, PEER):
            sh("ip", "netns", "add", name)
        sh(
            "ip",
            "link",
            "add",
            "mwfd0",
            "netns",
            NODE,
            "type",
            "veth",
            "peer",
            "name",
            "mwfd1",
            "netns",
            PEER,
        )
        for name, device, address in (
            (NODE, "mwfd0", NODE_IP), (PEER, "mwfd1", PEER_IP), (PEER, "mwfd1", LISTED_IP)
        ):  # fmt: skip
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            sh("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        remove()


@pytest.fixture(scope="module")
def socket(namespaces, tmp_path_factory):
    """A meshwalld that enforces the policy; its socket."""
    home = tmp_path_factory.mktemp("meshwalld")
    (home / "policies").mkdir(mode=0o755)
    (home / "policies" / "kubelet.yaml").write_text(POLICY)
    settings = {
        "node_name": "n1", "policy_dir": str(home / "policies"), "pins": str(home / "bpf"),
        "run_dir": str(home / "run"), "state_dir": str(home / "state"), "devices": ["mwfd0"], "map_sizes": SIZES,
        "identities_file": str(home / "identities.yaml"),
    }  # fmt: skip
    (home / "meshwall.yaml").write_text(yaml.safe_dump(settings))
    with (home / "log").open("w") as log:
        command = inside(NODE, str(BIN / "meshwalld"), "--config", str(home / "meshwall.yaml"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        path = home / "run" / "meshwall.sock"
        try:
            wait_until_enforcing(path, home / "log")
            yield path
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)
            subprocess.run(["umount", str(home / "bpf")], check=False, capture_output=True)


def wait_until_enforcing(path: Path, log: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = subprocess.run(
            [BIN / "meshwall", "--socket", str(path), "status", "-o", "json"],
            capture_output=True,
            text=True,
            check=False,
        )
        if '"enforcing' in found.stdout:
            return
        time.sleep(0.2)
    raise AssertionError(f"not enforcing: {found.stdout} {found.stderr}\n{log.read_text()}")


def observed(path: Path, *words: str) -> list[dict]:
    done = sh(str(BIN / "meshwall"), "--socket", str(path), "observe", "-o", "json", *words)
    return [json.loads(line) for line in done.splitlines()]


@contextlib.asynccontextmanager
async def following(path, *words):
    process = await asyncio.create_subprocess_exec(
        BIN / "meshwall", "--socket", str(path), "observe", "-f", *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        await asyncio.sleep(0.5)  # until it listens
        yield process.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_packet_to_line_is_within_150_ms(socket):
    seen: dict[int, int] = {}

    async def read(stream):
        while len(seen) < 200:
            text = (await stream.readline()).decode()
            seen[int(re.search(rf"{NODE_IP}:(\d+)", text)[1])] = time.monotonic_ns()

    async def send():
        words = inside(PEER, sys.executable, "-c", SEND, NODE_IP, "200")
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        return {int(port): int(at) for port, at in (row.split() for row in out.splitlines())}

    async with following(socket, "--protocol", "udp", "--verdict", "DROPPED") as stream:
        sent, _ = await asyncio.gather(send(), asyncio.wait_for(read(stream), 15))
    delays = sorted((seen[port] - at) / 1e6 for port, at in sent.items())
    print(f"packet to line: p50 {delays[100]:.1f} ms, p99 {delays[197]:.1f} ms, max {delays[-1]:.1f} ms")
    assert delays[197] <= 150


def test_a_drop_says_who_restricts_and_an_allowed_connection_which_line_allows(socket):
    for source, port in ((PEER_IP, "10250"), (LISTED_IP, "10250")):
        subprocess.run(inside(PEER, sys.executable, "-c", CONNECT, NODE_IP, source, port), check=True)
    time.sleep(0.1)
    (dropped, *_) = observed(socket, "--from-ip", PEER_IP, "--to-port", "10250")
    assert dropped["flow"]["source"] == {"identity": 2, "labels": ["reserved:world"]}
    assert dropped["meshwall"]["restricted_by"] == ["kubelet"]
    assert dropped["meshwall"]["rule_name"] == "default-deny-ingress"
    (allowed, *_) = observed(socket, "--from-ip", LISTED_IP, "--to-port", "10250")
    assert allowed["flow"]["verdict"] == "FORWARDED"
    assert allowed["flow"]["ingress_allowed_by"][0]["name"] == "kubelet"
    ours = allowed["meshwall"]
    assert (ours["rule_name"], Path(ours["file"]).name, ours["line"]) == ("ingress[0]", "kubelet.yaml", 8)
    text = sh(
        str(BIN / "meshwall"),
        "--socket",
        str(socket),
        "observe",
        "--policy",
        "kubelet",
        "--verdict",
        "FORWARDED",
    )
    assert "policy-verdict INGRESS ALLOWED (TCP Flags: SYN) policy=kubelet rule=ingress[0] " in text
