"""The command line around a canned daemon."""

import http.server
import json
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.layout import LAYOUT_VERSION
from daemon.cli.main import ELSEWHERE, NOUNS, main, module_of, noun_in, parser_for

STATUS = {
    "ok": False, "version": "9.9", "node": "t1", "cluster": {"name": "alpha", "id": 1}, "uptime_s": 7300,
    "problems": [{"part": "datapath", "text": "not loaded", "hint": "do \x1b[2J this", "since": 0}],
    "warnings": [{"part": "tampering", "text": "once", "hint": "", "since": 0}],
    "enforcement": {"mode": "always", "audit": True, "audit_since": 0, "audit_policies": ["p"], "panic": None,
                    "ok": True, "text": "audit", "since": 0,
                    "generation": 3, "ingress": {"enforced": True, "default_deny": True}, "egress": None},
    "devices": [{"name": "eth0", "text": "tcx, XDP native", "note": ""}],
    "policies": {"total": 2, "by_state": {"audit": 1, "enforced": 1}, "findings": 1,
                 "list": [{"name": "p", "state": "audit", "reason": "why"},
                          {"name": "q", "state": "enforced", "reason": ""}]},
    "identities": {"total": 2, "by_source": {"local": 1, "mesh:beta": 1}}, "addresses": {"total": 0, "by_source": {}},
    "mesh": {"store": None, "publish": None, "clusters": [
        {"name": "beta", "id": 2, "own": False, "text": "synced, stale", "ok": False, "nodes": 1, "identities": 1,
         "addresses": 0, "stale_since": 1.0}]},
    "drops": [{"direction": "ingress", "reason": "policy-default", "packets": 5, "bytes": 300}],
    "failsafe": ["ingress TCP/22"], "event_loop": {"stalls": 1, "worst_s": 0.25, "total_s": 0.25},
    "memory": {"resident": 50 << 20, "kernel_tables": 10 << 20}, "parts": {},
}  # fmt: skip
ANSWERS: dict[str, object] = {
    "GET /v1/status": STATUS,
    "GET /v1/policies": {"policies": [], "problems": [{"file": "f", "line": 3, "column": 1, "field": "spec",
                                                       "severity": "error", "message": "wrong"}]},
    "GET /v1/ips?address=10.0.0.1": {"ips": [{"cidr": "10.0.0.1/32", "identity": 7, "source": "mesh:beta",
                                              "name": "web", "namespace": "shop", "node": ""}]},
    "GET /v1/identities": {"identities": [{"id": 7, "source": "local", "labels": ["k8s:a=b"]}]},
    "GET /v1/ct": {"connections": [{"protocol": "TCP", "local": "fd00::1", "local_port": 80, "remote": "fd00::2",
                                    "remote_port": 9, "state": "established",
                                    "origin": "in", "flags": ["SEEN_REPLY"], "age_s": 3,
                                    "expires_s": 200}]},
    "DELETE /v1/ct": {"flushed": 4},
    "DELETE /v1/ct?address=10.0.0.0%2F8&port=80&state=half-open": {"flushed": 1},
    "POST /v1/policies/accept-empty": {"accepted": False},
}  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    def _answer(self) -> None:
        found = ANSWERS.get(f"{self.command} {self.path}")
        body = json.dumps(found if found is not None else {"error": "no \x1b such thing"}).encode()
        self.send_response(200 if found is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "sock")
    with socketserver.ThreadingUnixStreamServer(path, _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield path
        server.shutdown()


@pytest.fixture
def run(daemon: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--socket", daemon])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def test_the_status_begins_with_what_is_wrong_and_its_cure(run) -> None:
    code, out, _ = run("status")
    assert code == 1
    lines = out.splitlines()
    assert lines[:2] == ["FAIL  datapath: not loaded", "      hint: do \\x1b[2J this"]
    for text in (
        "AUDIT: audit", "audited policies: p", "ingress: default deny, generation 3, mode always",
        "eth0: tcx, XDP native", "2: 1 audit, 1 enforced; 1 findings", "p: audit (why)", "1 from mesh:beta",
        "beta (id 2): synced, stale", "5 ingress: policy-default", "1 event loop stalls, worst 250 ms",
        "40 MiB and 10 MiB of kernel tables", "up 2h",
    ):  # fmt: skip
        assert text in out
    assert len(lines) < 30


def test_the_status_in_one_line_and_as_data(run) -> None:
    assert run("status", "--brief") == (1, "FAIL: datapath: not loaded\n", "")
    code, out, _ = run("status", "-o", "json")
    assert (code, json.loads(out)) == (1, STATUS)
    assert "kernel_tables: 10485760" in run("status", "-o", "yaml")[1]


def test_waiting_ends_after_the_given_time(run) -> None:
    started = time.monotonic()
    assert run("status", "--wait", "--wait-duration", "0.3s", "--brief")[0] == 1
    assert 0.3 <= time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("ip", "get", "10.0.0.1"), "10.0.0.1/32  7         mesh:beta  shop/web  -"),
        (("ipcache", "get", "10.0.0.1"), "10.0.0.1/32  7         mesh:beta  shop/web  -"),
        (("identity", "ls"), "7         local   k8s:a=b"),
        (("ct", "list"), "TCP    [fd00::1]:80  <-  [fd00::2]:9  established  3s   3m       SEEN_REPLY"),
        (("ct", "flush"), "4 connections forgotten"),
        (
            ("ct", "flush", "--address", "10.0.0.0/8", "--port", "80", "--state", "half-open"),
            "1 connections forgotten",
        ),
        (("policy", "list"), "f:3:1: error: spec: wrong"),
        (("policy", "accept-empty"), "nothing to accept: the directory was not emptied"),
        (("version",), "daemon  9.9"),
    ],
)
def test_a_verb_prints_what_the_daemon_says(run, arguments: tuple[str, ...], line: str) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert line in out.splitlines()


def test_what_the_daemon_refuses_is_status_2_and_cannot_control_the_terminal(run) -> None:
    assert run("identity", "get", "nobody") == (2, "", "meshwall: no \\x1b such thing\n")


def test_without_a_daemon_the_line_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--socket", str(tmp_path / "none"), "status"]) == 1
    assert "start it with `systemctl start meshwalld`" in capsys.readouterr().err


def test_words_of_other_programs_are_answered_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ELSEWHERE:
        assert main([word]) == 2
        assert "use: " in capsys.readouterr().err


@pytest.mark.parametrize("noun", sorted({name for nouns in NOUNS.values() for name in nouns}))
def test_every_noun_explains_itself_and_takes_a_socket(noun: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_for(noun)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([noun, "--help"])
    assert ended.value.code == 0
    assert f"meshwall {noun}" in capsys.readouterr().out
    assert module_of(noun)


def test_the_noun_is_found_behind_options() -> None:
    assert noun_in(["--socket", "status", "ip", "list"]) == "ip"
    assert noun_in(["--version"]) is None


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom daemon.cli.main import parser_for\nparser_for(None).format_help()\n"
        "print([one for one in ('yaml','aiohttp','pydantic','http.client','json','socket') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_cleanup_asks_for_yes_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pins" / f"v{LAYOUT_VERSION}").mkdir(parents=True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["cleanup", "--pins", str(tmp_path / "pins")]) == 2
    assert "repeat with --yes" in capsys.readouterr().err
    assert main(["cleanup", "--pins", str(tmp_path / "pins"), "--dry-run"]) == 0
    assert (tmp_path / "pins" / f"v{LAYOUT_VERSION}").exists()
    assert main(["cleanup", "--pins", str(tmp_path / "none")]) == 0
