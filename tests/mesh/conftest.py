"""A real etcd on loopback, in a directory of its own."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from clustermesh.etcd import EtcdKV
from clustermesh.settings import EtcdSettings

BINARY = shutil.which("etcd") or "/usr/bin/etcd"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mesh)
            if not Path(BINARY).exists():
                item.add_marker(pytest.mark.skip(reason="no etcd here: install the package etcd-server"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Etcd:
    """One member. `stop` and `start` keep data and port; `wipe` forgets the data."""

    def __init__(self, directory: Path, *arguments: str, tls: bool = False) -> None:
        self.directory = directory
        self.scheme = "https" if tls else "http"
        self.port = free_port()
        self._peer = free_port()
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        peer = f"http://127.0.0.1:{self._peer}"
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "--data-dir", self.directory / "data", "--listen-client-urls", self.endpoint,
                 "--advertise-client-urls", self.endpoint, "--listen-peer-urls", peer,
                 "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
                 "--unsafe-no-fsync", "--logger", "zap", *self._arguments],
                stdout=log, stderr=log,
            )  # fmt: skip
        self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process is not None
            assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
            time.sleep(0.02)
        raise TimeoutError(f"etcd does not listen on port {self.port}")

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    def hang(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        shutil.rmtree(self.directory / "data")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    member = Etcd(tmp_path / "etcd")
    member.start()
    yield member
    member.stop()


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    member = Etcd(tmp_path_factory.mktemp("shared") / "etcd")
    member.start()
    yield member
    member.stop()


@pytest.fixture
def live(_shared: Etcd) -> Etcd:
    """An empty etcd for tests that leave it running: starting one takes half a second."""
    subprocess.run(
        ["etcdctl", "--endpoints", _shared.endpoint, "del", "--prefix", ""],
        check=True, capture_output=True, env={"ETCDCTL_API": "3"},
    )  # fmt: skip
    return _shared


@pytest.fixture
async def kv(request: pytest.FixtureRequest) -> AsyncIterator[EtcdKV]:
    """A client of the test's own `etcd`, or else of the shared one."""
    member: Etcd = request.getfixturevalue("etcd" if "etcd" in request.fixturenames else "live")
    store = EtcdKV(EtcdSettings((member.endpoint,)))
    yield store
    await store.close()


class Certificates:
    """A CA, a server certificate for the name `mesh.example` and 127.0.0.1, and client certificates by user."""

    def __init__(self, directory: Path) -> None:
        trustme = pytest.importorskip("trustme")
        self._ca = trustme.CA()
        self._directory = directory
        directory.mkdir()
        self.ca = directory / "ca.crt"
        self._ca.cert_pem.write_to_path(self.ca)
        self.server = self._pair(
            "server", self._ca.issue_cert("mesh.example", "127.0.0.1", common_name="server")
        )

    def user(self, name: str) -> tuple[str, str]:
        """Paths of a client certificate and its key."""
        cert, key = self._pair(name, self._ca.issue_cert(f"{name}.example", common_name=name))
        return str(cert), str(key)

    def _pair(self, name: str, issued: object) -> tuple[Path, Path]:
        cert, key = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(cert)  # type: ignore[attr-defined]
        issued.private_key_pem.write_to_path(key)  # type: ignore[attr-defined]
        return cert, key


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "tls")


@pytest.fixture
def tls_etcd(tmp_path: Path, certificates: Certificates) -> Iterator[Etcd]:
    cert, key = certificates.server
    member = Etcd(
        tmp_path / "etcd", "--cert-file", str(cert), "--key-file", str(key), "--trusted-ca-file",
        str(certificates.ca), "--client-cert-auth", tls=True,
    )  # fmt: skip
    member.start()
    yield member
    member.stop()
