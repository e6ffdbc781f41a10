"""What is in audit: settings, commands over them, and what a restart finds."""

from pathlib import Path

import pytest

from daemon.sources.audit import FILE, AuditSwitch
from daemon.state.audit import Audited, audited
from daemon.state.tables import WHOLE_HOST, Tables


def switch(tables: Tables, where: Path, *, host: bool = False, policies: tuple[str, ...] = ()) -> AuditSwitch:
    return AuditSwitch(tables, where, host=host, policies=policies)


def test_the_settings_hold_until_a_command_says_otherwise(tmp_path):
    tables = Tables()
    made = switch(tables, tmp_path, host=True, policies=("a", "b"))
    assert audited(tables) == Audited(True, frozenset({"a", "b"}))
    made.set(WHOLE_HOST, False)
    made.set("a", False)
    made.set("c", True)
    assert audited(tables) == Audited(False, frozenset({"b", "c"}))


def test_commands_outlive_the_process_and_reset_gives_way_to_the_settings(tmp_path):
    switch(Tables(), tmp_path, policies=("a",)).set("a", False)
    tables = Tables()
    again = switch(tables, tmp_path, host=True, policies=("a",))
    assert audited(tables) == Audited(True, frozenset())
    assert tables.audit["a"].by_command
    again.set("a", None)
    assert audited(tables).policies == {"a"}
    assert not tables.audit["a"].by_command


@pytest.mark.parametrize("text", ["", "[1]", '{"": 3}', "\x00"])
def test_a_broken_file_is_told_and_the_settings_hold(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    tables = Tables()
    made = switch(tables, tmp_path, host=True)
    assert audited(tables).host
    assert not tables.status["audit"].ok
    made.set(WHOLE_HOST, False)
    assert "audit" not in tables.status


def test_what_cannot_be_kept_is_not_switched(tmp_path):
    tables = Tables()
    made = switch(tables, tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        made.set(WHOLE_HOST, True)
    assert not audited(tables).host
