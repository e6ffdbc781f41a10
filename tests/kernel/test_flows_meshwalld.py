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

import grpc
import pytest
import yaml
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from daemon.api.hubblepb import flow_pb2, observer_pb2

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
def daemon(namespaces, tmp_path_factory):
    """A meshwalld that enforces the policy."""
    home = tmp_path_factory.mktemp("meshwalld")
    (home / "policies").mkdir(mode=0o755)
    (home / "policies" / "kubelet.yaml").write_text(POLICY)
    settings = {
        "node_name": "n1", "policy_dir": str(home / "policies"), "pins": str(home / "bpf"),
        "run_dir": str(home / "run"), "state_dir": str(home / "state"), "devices": ["mwfd0"], "map_sizes": SIZES,
        "identities_file": str(home / "identities.yaml"),
    }  # fmt: skip
    (home / "meshwall.yaml").write_text(yaml.safe_dump(settings))
    running = Meshwalld(home)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        subprocess.run(["umount", str(home / "bpf")], check=False, capture_output=True)


class Meshwalld:
    """The daemon of a home directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.socket = home / "run" / "meshwall.sock"

    def start(self) -> None:
        with (self.home / "log").open("a") as log:
            command = inside(NODE, str(BIN / "meshwalld"), "--config", str(self.home / "meshwall.yaml"))
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until_enforcing(self.socket, self.home / "log")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)


@pytest.fixture(scope="module")
def socket(daemon):
    return daemon.socket


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
    assert "policy-verdict:L3-L4 INGRESS ALLOWED (TCP Flags: SYN) policy=kubelet rule=ingress[0] " in text


async def test_hubble_clients_see_the_drops(daemon):
    """As hubble CLI does it: status, then flows, over the unix socket."""
    await asyncio.to_thread(sh, *inside(PEER, sys.executable, "-c", CONNECT, NODE_IP, PEER_IP, "4443"))
    async with grpc.aio.insecure_channel(f"unix:{daemon.home / 'run' / 'hubble.sock'}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, HealthCheckResponse.FromString)
        request = HealthCheckRequest(service="hubble.server.Observer").SerializeToString()
        assert (await check(request, timeout=10)).status == HealthCheckResponse.SERVING
        flows = channel.unary_stream(
            "/observer.Observer/GetFlows",
            observer_pb2.GetFlowsRequest.SerializeToString,
            observer_pb2.GetFlowsResponse.FromString,
        )
        wanted = {"verdict": ["DROPPED"], "destination_port": ["4443"]}
        request = observer_pb2.GetFlowsRequest(number=1, whitelist=[wanted])
        (one,) = [one async for one in flows(request, timeout=10)]
    assert (one.flow.IP.source, one.flow.drop_reason_desc) == (PEER_IP, flow_pb2.POLICY_DENIED)
    assert one.flow.Summary == "TCP Flags: SYN"
    assert one.node_name == "default/n1"


def test_flows_outlive_the_daemon_and_tell_what_other_policies_would_change(daemon):
    subprocess.run(inside(PEER, sys.executable, "-c", CONNECT, NODE_IP, PEER_IP, "5001"), check=True)
    time.sleep(2.5)  # the recorder writes every 2 s
    daemon.stop()
    daemon.start()
    assert observed(daemon.socket, "--to-port", "5001", "--from-ip", PEER_IP) == []
    (old, *_) = observed(daemon.socket, "--since", "1h", "--to-port", "5001", "--from-ip", PEER_IP)
    assert old["meshwall"]["restricted_by"] == ["kubelet"]
    opening = daemon.home / "new.yaml"
    opening.write_text(POLICY.replace('["10.252.0.64/26"]', f'["{PEER_IP}/32"]').replace("10250", "5001"))
    meshwall = [str(BIN / "meshwall"), "--socket", str(daemon.socket), "policy"]
    done = subprocess.run(
        [*meshwall, "replay", str(opening), "-o", "json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    changes = {(one["peer"], one["port"]): one for one in json.loads(done.stdout)["changes"]}
    assert changes[PEER_IP, "5001/TCP"]["before"] == "deny"
    assert changes[PEER_IP, "5001/TCP"]["after"] == "allow"
    assert changes[LISTED_IP, "10250/TCP"]["after"] == "deny"
    draft = daemon.home / "draft.yaml"
    draft.write_text(sh(*meshwall, "suggest", "--dropped"))
    again = subprocess.run(
        [*meshwall, "replay", str(draft), "-o", "json"], capture_output=True, text=True, check=False
    )
    assert again.returncode in (0, 1), again.stderr
    assert all(one["after"] != "deny" for one in json.loads(again.stdout)["changes"]), again.stdout
