"""`meshwall policy report`."""

import csv
import io

from daemon.cli.report import _csv, _markdown, _row, _unused

RULE = {
    "policy": "kubelet", "state": "enforced", "name": "ingress[0]", "action": "allow", "peers": ["10.0.0.0/8"],
    "ports": ["10250/TCP"], "owner": "sre", "reason": "metrics | scrape", "review_by": "2026-01-01",
    "review_due": True, "packets": 7, "last_hit": 0.0, "counted_since": 0.0, "useless": "", "file": "/p/k.yaml",
    "line": 7,
}  # fmt: skip
HEAD = {"cluster": "alpha", "node": "a1", "made": 1_790_000_000}


def test_a_cell_cannot_end_a_markdown_row():
    text = _markdown([_row(RULE)], HEAD)
    row = text.splitlines()[-1]
    assert "metrics \\| scrape" in row
    assert row.replace("\\|", "").count("|") == text.splitlines()[2].count("|")
    assert "review is due; not counted yet" in row


def test_a_spreadsheet_sees_text_and_no_formula():
    evil = RULE | {"owner": '=HYPERLINK("http://x")', "reason": "a,b\nc"}
    head, row = csv.reader(io.StringIO(_csv([_row(evil)], HEAD)))
    found = dict(zip(head, row, strict=True))
    assert found["owner"] == '\'=HYPERLINK("http://x")'
    assert found["reason"] == "a,b\\x0ac"


def test_unused_needs_to_have_been_counted_for_that_long():
    day = 86_400.0
    assert _unused(RULE | {"counted_since": 1 * day, "last_hit": 2 * day}, before=10 * day)
    assert not _unused(RULE | {"counted_since": 1 * day, "last_hit": 11 * day}, before=10 * day)
    assert not _unused(RULE | {"counted_since": 11 * day}, before=10 * day)
    assert not _unused(RULE, before=10 * day)
