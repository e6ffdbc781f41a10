"""A real meshwalld in a network namespace of its own, with one veth to the outside."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bpf.layout import LAYOUT_VERSION
from bpf.syscall import obj_get

ROOT = Path(__file__).resolve().parents[2]
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: only-8000-from-the-peer}
spec:
  nodeSelector: {}
  ingress:
  - fromCIDR: [10.99.0.2/32]
    toPorts: [{ports: [{port: "8000", protocol: TCP}]}]
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Machine:
    """Two namespaces: the host under test and its peer."""

    def __init__(self, root: Path) -> None:
        self.host, self.peer = f"mwdh{os.getpid()}", f"mwdp{os.getpid()}"
        self.root = root
        self.process: subprocess.Popen[str] | None = None
        self.listener: subprocess.Popen[bytes] | None = None
        for name in ("policies.d", "workloads.d", "services.d", "run", "state", "bpf"):
            (root / name).mkdir()

    def up(self) -> None:
        run("ip", "netns", "add", self.host)
        run("ip", "netns", "add", self.peer)
        self.inside(
            self.peer, "ip", "link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", self.host
        )
        for name, end in ((self.host, 1), (self.peer, 2)):
            self.inside(name, "ip", "addr", "add", f"10.99.0.{end}/24", "dev", "net0")
            self.inside(name, "ip", "link", "set", "net0", "up")
            self.inside(name, "ip", "link", "set", "lo", "up")
        code = (
            "import socket,selectors\ns=selectors.DefaultSelector()\n"
            "for p in (8000,8001):\n l=socket.create_server(('10.99.0.1',p));s.register(l,1)\n"
            "while 1:\n for k,_ in s.select():\n  c,_a=k.fileobj.accept();c.send(b'x');c.close()\n"
        )
        self.listener = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.host}", sys.executable, "-c", code]
        )

    def inside(self, namespace: str, *command: str) -> None:
        run("nsenter", f"--net=/run/netns/{namespace}", *command)

    def down(self) -> None:
        self.kill(signal.SIGKILL)
        if self.listener:
            self.listener.kill()
            self.listener.wait()
        subprocess.run(["umount", self.root / "bpf"], check=False, capture_output=True)
        for name in (self.host, self.peer):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def settings(self, **more: object) -> Path:
        path = self.root / "meshwall.yaml"
        given = {
            "node_name": "t1",
            "policy_dir": str(self.root / "policies.d"),
            "pins": str(self.root / "bpf"),
            "run_dir": str(self.root / "run"),
            "state_dir": str(self.root / "state"),
            "identities_file": str(self.root / "identities.yaml"),
            "workloads_dir": str(self.root / "workloads.d"),
            "services_dir": str(self.root / "services.d"),
            "devices": ["net0"],
        }
        path.write_text(json.dumps(given | more))
        return path

    def command(self, *prefix: str) -> list[str]:
        daemon = [sys.executable, "-m", "daemon.main", "--config", str(self.root / "meshwall.yaml")]
        return ["nsenter", f"--net=/run/netns/{self.host}", *prefix, *daemon]

    def start(self, **more: object) -> None:
        """Start it and wait until it reports ready."""
        self.settings(**more)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            address = self.root / "notify"
            address.unlink(missing_ok=True)
            manager.bind(str(address))
            manager.settimeout(1)
            with (self.root / "log").open("a") as log:
                self.process = subprocess.Popen(
                    self.command(),
                    cwd=ROOT,
                    stderr=log,
                    text=True,
                    env=os.environ | {"NOTIFY_SOCKET": str(address)},
                )
            until, heard = time.monotonic() + 40, b""
            while b"READY=1" not in heard:
                assert self.process.poll() is None, (self.root / "log").read_text()
                assert time.monotonic() < until, "not ready"
                with contextlib.suppress(TimeoutError):
                    heard = manager.recv(4096)

    def refuses(self, *prefix: str) -> tuple[int, str]:
        """Exit status and stderr of a start that must fail."""
        done = subprocess.run(
            self.command(*prefix), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, done.stderr

    def kill(self, how: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(how)
            self.process.wait(10)
            self.process = None

    def meshwall(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "daemon.cli.main",
            *arguments,
            "--socket",
            str(self.root / "run/meshwall.sock"),
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)

    def status(self) -> Any:
        return json.loads(self.meshwall("status", "-o", "json").stdout)

    def write(self, file: str, text: str) -> None:
        (self.root / "policies.d" / file).write_text(text)

    def connects(self, port: int) -> bool:
        code = f"import socket;socket.create_connection(('10.99.0.1',{port}),0.3).recv(1)"
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.peer}", sys.executable, "-c", code],
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def programs(self) -> list[str]:
        """Pinned links, opened to see that they are there."""
        found = sorted((self.root / "bpf" / f"v{LAYOUT_VERSION}" / "links").iterdir())
        for path in found:
            os.close(obj_get(path))
        return [path.name for path in found]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose daemon runs already, for tests that change nothing."""
    made = Machine(tmp_path_factory.mktemp("idle"))
    made.host, made.peer = f"{made.host}i", f"{made.peer}i"
    try:
        made.up()
        made.start()
        yield made
    finally:
        made.down()


@pytest.fixture
def policy() -> str:
    return POLICY


@pytest.fixture
def within() -> Callable[[Callable[[], bool]], None]:
    """Wait until it is so, five seconds at most."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return wait
