"""`meshwall cleanup`: what it removes beside the pins."""

from daemon.cli.cleanup import LAST_GOOD_STATE
from daemon.cli.main import main
from daemon.datapath.snapshot import FILE


def test_the_last_good_state_goes_with_the_pins_of_the_settings_and_stays_with_others(
    tmp_path, monkeypatch, capsys
) -> None:
    assert LAST_GOOD_STATE == FILE
    (state := tmp_path / FILE).write_bytes(b"policy")
    settings = tmp_path / "meshwall.yaml"
    settings.write_text(f"pins: {tmp_path / 'bpf'}\nstate_dir: {tmp_path}\n")
    monkeypatch.delenv("MESHWALL_PINS", raising=False)
    named = ["cleanup", "--yes", "--config", str(settings)]
    assert main([*named, "--pins", str(tmp_path / "other")]) == 0
    assert state.exists()
    assert main([*named, "--dry-run"]) == 0
    assert state.exists()
    capsys.readouterr()
    assert main(named) == 0
    assert not state.exists()
    assert str(state) in capsys.readouterr().out
    assert main(named) == 0
    assert "nothing of ours" in capsys.readouterr().out
