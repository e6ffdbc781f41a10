"""The audit log: whole lines, kept as long as asked, and a disk that fails is said."""

import json
import socket

import pytest

from daemon.runtime import auditlog
from daemon.runtime.auditlog import AuditLog

NOON = 1_790_000_000.5  # 2026-09-21


@pytest.fixture(autouse=True)
def no_journal(monkeypatch, tmp_path):
    monkeypatch.setattr(auditlog, "JOURNAL", tmp_path / "no-journal")


def test_a_record_says_when_who_and_what(tmp_path):
    AuditLog(tmp_path / "audit", 180, lambda: NOON).write("api", "root", request="POST /v1/x", status=200)
    (path,) = (tmp_path / "audit").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {
        "time": "2026-09-21T14:13:20.500Z", "act": "api", "who": "root", "request": "POST /v1/x", "status": 200,
    }  # fmt: skip


def test_days_older_than_the_retention_go(tmp_path):
    now = NOON
    log = AuditLog(tmp_path, 10, lambda: now)
    for _ in range(20):
        log.write("a", "b")
        now += 86_400
    assert len(list(tmp_path.iterdir())) == 11


def test_reading_begins_where_it_is_asked_to_and_passes_over_torn_lines(tmp_path):
    now = NOON
    log = AuditLog(tmp_path, 10, lambda: now)
    for number in range(3):
        log.write("a", "b", number=number)
        now += 60
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"time": "2026-09-21T23')
    assert [one["number"] for one in log.read(0)] == [0, 1, 2]
    assert [one["number"] for one in log.read(NOON + 30)] == [1, 2]


def test_a_newline_in_a_member_does_not_make_two_records(tmp_path):
    log = AuditLog(tmp_path, 10, lambda: NOON)
    log.write("a", 'x"}\n{"act":"forged"', text="\x1b[31m\n")
    assert [one["act"] for one in log.read(0)] == ["a"]


def test_a_disk_that_fails_is_told_and_mended(tmp_path):
    (tmp_path / "audit").write_text("in the way")
    log = AuditLog(tmp_path / "audit", 10, lambda: NOON)
    log.write("a", "b")
    assert "audit" in log.failed
    (tmp_path / "audit").unlink()
    log.write("a", "b")
    assert log.failed == ""


def test_the_journal_gets_the_members_as_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(auditlog, "JOURNAL", tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        AuditLog(tmp_path / "audit", 10, lambda: NOON).write("api", "ro\not", policies=["x"], status=200)
        sent = journal.recv(65_536).decode()
    assert "MESHWALL_WHO=ro?ot\n" in sent
    assert "MESHWALL_STATUS=200\n" in sent
    assert "MESSAGE={" in sent
