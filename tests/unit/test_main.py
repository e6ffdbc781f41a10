"""The composition root's own decisions."""

import json
from pathlib import Path

import pytest

from daemon import main
from daemon.config import Config, parse
from daemon.main import StartError, compile_settings, failsafe_text, failsafes, foreign_package, only_one


def config(**given: object) -> Config:
    return parse(json.dumps(given).encode(), "m.yaml", {})


def test_the_way_to_the_store_cannot_be_closed_by_policy() -> None:
    found = failsafes(config(etcd={"endpoints": ["https://10.0.0.1:2379", "https://[fd00::1]:2390"]}))
    texts = [failsafe_text(one) for one in found]
    assert "egress TCP/2379" in texts
    assert "egress TCP/2390" in texts


def test_failsafe_entries_may_be_narrowed() -> None:
    entry = {"direction": "ingress", "protocol": "TCP", "port": 22, "cidrs": ["10.0.0.0/8"]}
    assert [failsafe_text(one) for one in failsafes(config(failsafe=[entry]))] == [
        "ingress TCP/22 10.0.0.0/8"
    ]


def test_settings_reach_the_compiler() -> None:
    found = compile_settings(config(enforcement="always", cluster_name="alpha"))
    assert (found.mode, found.cluster_name) == ("always", "alpha")


def test_another_package_called_daemon_is_named(tmp_path: Path) -> None:
    own = tmp_path / "ours" / "daemon"
    own.mkdir(parents=True)
    (tmp_path / "theirs" / "daemon").mkdir(parents=True)
    search = [str(tmp_path / "theirs"), str(own.parent)]
    assert foreign_package(own, search) is None
    other = tmp_path / "theirs" / "daemon" / "__init__.py"
    other.touch()
    assert foreign_package(own, search) == other
    assert foreign_package(own, search[::-1]) is None
    (own / "pidfile.py").touch()
    assert foreign_package(own, search[::-1]) == own / "pidfile.py"


def test_a_second_daemon_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with (
        only_one(tmp_path),
        pytest.raises(StartError, match=r"another meshwalld \(pid [0-9]+\)"),
        only_one(tmp_path),
    ):
        pass
    with only_one(tmp_path):
        pass


def test_checking_the_settings_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("xdp: fast\n")
    assert main.main(["--config", str(file), "--check-config"]) == main.BAD_SETTINGS
    assert capsys.readouterr().err.startswith(f"meshwalld: {file}:1:6: error: xdp:")
    file.write_text("xdp: off\n")
    assert main.main(["--config", str(file), "--check-config"]) == main.OK


def test_a_kernel_without_bpf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise OSError(1, "BPF_PROG_LOAD: Operation not permitted")

    monkeypatch.setattr(main, "probe", refused)
    with pytest.raises(StartError, match="cannot run the data path") as caught:
        main.check_kernel()
    assert caught.value.code == main.MISSING
