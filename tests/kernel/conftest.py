"""A machine under test: a namespace with a real meshwalld, and a peer namespace at the other end of a cable."""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bpf import layout
from bpf.syscall import PinnedMap

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "mwd0"
OUTSIDE = 7100
NODE, PEER = "10.96.0.1", "10.96.0.2"
NODE6, PEER6 = "fd96::1", "fd96::2"
SIZES = {
    "slots": 1024,
    "cells": 16_384,
    "hosts": 1024,
    "conntrack": 4096,
    "ip4_blocks": 1024,
    "prefixes6": 1024,
}
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = count()


@dataclass
class Traffic:
    """What was sent and what arrived, at sockets."""

    sent: int = 0
    arrived: int = 0
    leaked: int = 0
    echoed: int = 0
    cut: str = ""  # what became of the connection, if it did not go on to the end


@dataclass
class Machine:
    """The machine under test (`us`) and everybody else (`peer`)."""

    home: Path
    us: str
    peer: str
    daemon: "subprocess.Popen[bytes] | None" = None
    settings: dict[str, Any] = field(default_factory=dict)
    tree: Path = ROOT  # the release that runs

    device, node, other, node6, other6 = DEVICE, NODE, PEER, NODE6, PEER6
    sizes = SIZES

    # -- the place

    def up(self) -> None:
        for name in (self.us, self.peer):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.plug(DEVICE, (NODE, NODE6), (PEER, PEER6))
        for name in ("policies", "run", "state", "bpf"):
            (self.home / name).mkdir(mode=0o755)

    def down(self) -> None:
        self.stop(signal.SIGKILL)
        subprocess.run(["umount", self.home / "bpf"], check=False, capture_output=True)
        for name in (self.us, self.peer):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def plug(self, device: str, ours: tuple[str, str] | None, theirs: tuple[str, str] | None) -> None:
        """A new cable between the two, both ends of the same name; up if they have addresses."""
        self.ip(
            "-n", self.us, "link", "add", device, "type", "veth", "peer", "name", device, "netns", self.peer
        )
        for name, addresses in ((self.us, ours), (self.peer, theirs)):
            if addresses:
                self.ip("-n", name, "addr", "add", f"{addresses[0]}/24", "dev", device)
                self.ip("-n", name, "-6", "addr", "add", f"{addresses[1]}/64", "dev", device, "nodad")
                self.ip("-n", name, "link", "set", device, "up")

    @contextlib.contextmanager
    def inside(self, namespace: str = "") -> Iterator[None]:
        """This thread in a namespace (ours, if none is named); sockets made there stay there."""
        with (
            Path("/proc/thread-self/ns/net").open() as before,
            Path(f"/run/netns/{namespace or self.us}").open() as there,
        ):
            assert _libc.setns(there.fileno(), 0) == 0
            try:
                yield
            finally:
                _libc.setns(before.fileno(), 0)

    def index(self, device: str = DEVICE) -> int:
        with self.inside():
            return socket.if_nametoindex(device)

    # -- the daemon

    @property
    def pins(self) -> Path:
        return self.home / "bpf" / f"v{layout.LAYOUT_VERSION}"

    def start(self, **settings: Any) -> None:
        """Start meshwalld; it is ready when the kernel has a generation, or, without policies, programs."""
        self.settings |= settings
        whole = {
            "node_name": "n1", "policy_dir": str(self.home / "policies"), "pins": str(self.home / "bpf"),
            "run_dir": str(self.home / "run"), "state_dir": str(self.home / "state"), "devices": ["mwd*"],
            "identities_file": str(self.home / "identities.yaml"), "map_sizes": SIZES,
        } | self.settings  # fmt: skip
        (self.home / "meshwall.yaml").write_text(json.dumps(whole))
        command = [sys.executable, "-m", "daemon.main", "--config", str(self.home / "meshwall.yaml")]
        with (self.home / "log").open("a") as log:
            self.daemon = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.us}", *command], cwd=self.tree, stderr=log
            )

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(how)
            self.daemon.wait(15)
            self.daemon = None

    def log(self) -> str:
        path = self.home / "log"
        return path.read_text() if path.exists() else ""

    def meshwall(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The command line, with the settings and the socket of this machine."""
        command = [
            "nsenter",
            f"--net=/run/netns/{self.us}",
            sys.executable,
            "-m",
            "daemon.cli.main",
            "--socket",
            str(self.home / "run" / "meshwall.sock"),
        ]
        environment = os.environ | {"MESHWALL_CONFIG": str(self.home / "meshwall.yaml")}
        return subprocess.run(
            [*command, *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def status(self) -> Any:
        """GET /v1/status; an empty answer while nobody listens."""
        answer = self.meshwall("status", "-o", "json").stdout
        return json.loads(answer) if answer else {"parts": {}, "ok": False}

    def config(self) -> dict[str, Any]:
        """The word that programs read first."""
        with PinnedMap.open(self.pins / "maps" / "config", layout.maps()["config"]) as config:
            return layout.CONFIG.unpack(config.lookup(0) or b"")

    def get(self, path: str) -> tuple[int, str]:
        """Status code and body of a GET on the socket."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(self.home / "run" / "meshwall.sock"))
            channel.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: channel.recv(1 << 16), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), body

    def generation(self) -> int:
        """What the kernel enforces; 0 before there is anything."""
        try:
            return int(self.config()["generation"])
        except OSError:
            return 0

    def enforce(self, text: str) -> None:
        """Replace the policy and wait until the kernel enforces it."""
        before = self.generation()
        new = self.home / "new.yaml"
        new.write_text(text)
        new.rename(self.home / "policies" / "base.yaml")
        if self.daemon is None:
            self.start()
        self.until(lambda: self.generation() > before, 60)

    @staticmethod
    def until(condition: Callable[[], bool], within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    # -- traffic

    def bound(self, namespace: str, address: str, port: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Bound, and listening if that is its kind."""
        with self.inside(namespace):
            one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.settimeout(0.5)
        one.bind((address, port))
        return one

    def listener(self, namespace: str, address: str, port: int) -> socket.socket:
        one = self.bound(namespace, address, port, socket.SOCK_STREAM)
        one.listen(512)
        return one

    def connects(self, port: int, target: str = NODE, source: str = PEER) -> bool:
        """Does a TCP connection from the peer to us come about?"""
        with self.bound(self.peer, source, 0, socket.SOCK_STREAM) as one:
            try:
                one.connect((target, port))
            except OSError:
                return False
            return True

    @contextlib.contextmanager
    def traffic(self, open_to: int, closed_to: int) -> Iterator[Traffic]:
        """Datagrams to an open and a closed port, and a connection of ours that the peer answers, all the time."""
        seen, stop = Traffic(), threading.Event()
        with (
            self.bound(self.us, self.node, open_to) as open_port,
            self.bound(self.us, self.node, closed_to) as closed_port,
            self.bound(self.peer, self.other, 0) as sender,
            self.listener(self.peer, self.other, OUTSIDE) as there,
            self.bound(self.us, self.node, 0, socket.SOCK_STREAM) as ours,
        ):
            ours.settimeout(5)
            ours.connect((self.other, OUTSIDE))
            theirs, _ = there.accept()
            theirs.settimeout(5)

            def send() -> None:
                while not stop.is_set():
                    sender.sendto(b"x", (self.node, open_to))
                    sender.sendto(b"x", (self.node, closed_to))
                    seen.sent += 1
                    time.sleep(0.0005)

            def echo() -> None:
                try:
                    while not stop.is_set():
                        theirs.sendall(b"answer")
                        assert ours.recv(64)
                        ours.sendall(b"question")
                        assert theirs.recv(64)
                        seen.echoed += 1
                        time.sleep(0.001)
                except (OSError, AssertionError) as error:
                    seen.cut = repr(error)

            def count() -> None:
                quiet = 0
                while quiet < 5:
                    quiet = quiet + 1 if stop.is_set() else 0
                    with contextlib.suppress(TimeoutError):
                        while open_port.recv(16):
                            seen.arrived += 1

            open_port.settimeout(0.05)
            closed_port.settimeout(0.05)
            threads = [threading.Thread(target=one) for one in (send, echo, count)]
            for one in threads:
                one.start()
            try:
                yield seen
            finally:
                stop.set()
                for one in threads:
                    one.join(10)
                theirs.close()
                seen.leaked = len(self.received(closed_port))

    @staticmethod
    def received(one: socket.socket, within_s: float = 0.3) -> list[bytes]:
        """The datagrams that come within that time, and those that wait then."""
        found: list[bytes] = []
        while select.select([one], [], [], 0 if found else within_s)[0]:
            found.append(one.recv(2048))
        return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One for a module: each test leaves it with a daemon that runs, or none at all."""
    number = f"{os.getpid()}{next(_numbers)}"
    made = Machine(tmp_path_factory.mktemp("machine"), f"mwm{number}", f"mwo{number}")
    try:
        made.up()
        yield made
    finally:
        print(made.log())
        made.down()
