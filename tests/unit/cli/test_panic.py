"""`meshwall panic` before it touches the kernel: what it asks, and where it looks."""

from pathlib import Path

import pytest

from daemon.cli.cleanup import DEFAULT_PINS, pins_in_use
from daemon.cli.main import main


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MESHWALL_PINS", raising=False)
    monkeypatch.setenv("MESHWALL_CONFIG", str(tmp_path / "meshwall.yaml"))


def test_the_word_alone_says_what_the_others_mean(capsys):
    assert main(["panic"]) == 2
    assert "failsafe  in both directions" in capsys.readouterr().out


def test_the_pins_are_those_of_the_settings_whatever_else_stands_there(tmp_path, monkeypatch, capsys):
    file = tmp_path / "meshwall.yaml"
    assert pins_in_use(None, "panic") == DEFAULT_PINS
    file.write_text("nosuch: [key]\npins: /run/here\n")
    assert pins_in_use(None, "panic") == Path("/run/here")
    file.write_text("pins: [\n")
    assert pins_in_use(None, "panic") == DEFAULT_PINS
    assert "--pins names the place" in capsys.readouterr().err
    assert pins_in_use(file, "panic") is None  # named, so not another one
    assert pins_in_use(tmp_path / "gone.yaml", "panic") is None
    monkeypatch.setenv("MESHWALL_PINS", "/run/there")
    assert pins_in_use(None, "panic") == Path("/run/there")


def test_a_time_is_for_a_panic(capsys):
    assert main(["panic", "off", "--for", "1m"]) == 2
    assert "not `off`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["panic", "open", "--for", "soon"])
