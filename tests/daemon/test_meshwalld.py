"""The real daemon: starts, enforces, survives faults, and never opens the host on its own."""

import json
import os
import signal

import pytest

pytestmark = pytest.mark.kernel


def test_a_policy_file_is_enforced_and_outlives_the_daemon(machine, policy, within) -> None:
    machine.start()
    assert machine.connects(8001)
    machine.write("p.yaml", policy)
    within(lambda: not machine.connects(8001))
    assert machine.connects(8000)
    status = machine.status()
    assert status["ok"]
    assert status["policies"]["by_state"] == {"enforced": 1}
    assert status["enforcement"]["ingress"] == {"enforced": True, "default_deny": True}
    assert [one["name"] for one in status["devices"]] == ["net0"]
    assert sum(one["packets"] for one in status["drops"]) > 0
    assert machine.process is not None

    machine.process.send_signal(signal.SIGHUP)
    within(lambda: "reading policies" in machine.log)
    assert not machine.connects(8001)

    machine.kill(signal.SIGTERM)
    assert "enforcement stays in place" in machine.log
    assert not machine.connects(8001)
    assert machine.connects(8000)

    machine.start()
    assert not machine.connects(8001)
    machine.kill(signal.SIGKILL)
    assert not machine.connects(8001)
    assert machine.connects(8000)

    machine.start()
    assert machine.status()["ok"]
    machine.kill(signal.SIGTERM)
    done = machine.meshwall("cleanup", "--pins", str(machine.root / "bpf"))
    assert done.returncode == 0, done.stderr
    assert machine.connects(8001)


def test_bad_input_is_told_and_changes_nothing(machine, policy, within) -> None:
    """One daemon, one fault after the other: each has its line, and the host stays closed."""
    machine.write("p.yaml", policy)
    machine.start()
    assert not machine.connects(8001)
    file = machine.root / "policies.d" / "p.yaml"

    def told(text: str) -> None:
        within(lambda: text in json.dumps(machine.status()["problems"]))
        assert not machine.connects(8001)
        assert machine.connects(8000)

    machine.write("p.yaml", policy.replace("ingress:", "ingres:"))
    told("unknown field")
    machine.write("p.yaml", policy.replace("[10.99.0.2/32]", "3"))
    told("spec.ingress[0].fromCIDR: expected a list, found the number 3")
    machine.write("p.yaml", "spec: [")
    told("not valid YAML")
    file.chmod(0o666)
    told("may be written by group or others")
    file.unlink()
    told("accept-empty")
    brief = machine.meshwall("status", "--brief")
    assert brief.returncode == 1
    assert brief.stdout.startswith("FAIL: ")

    done = machine.meshwall("policy", "accept-empty")
    assert done.stdout == "accepted: no policy\n", done.stderr
    within(lambda: machine.connects(8001))


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_told_and_policy_is_enforced_all_the_same(
    machine, policy, within
) -> None:
    machine.write("p.yaml", policy)
    broken = machine.root / "ca.pem"
    broken.write_text("no certificate")
    machine.start(cluster_id=1, etcd={"endpoints": ["https://10.99.0.9:2379"], "ca": str(broken)})
    within(lambda: not machine.connects(8001))
    problems = {one["part"]: one for one in machine.status()["problems"]}
    assert f"etcd.ca: {broken}: not a PEM certificate" in problems["mesh"]["text"]
    assert problems["mesh"]["hint"]
    machine.kill(signal.SIGTERM)
    silent = {"endpoints": ["http://10.99.0.9:2379"], "insecure_transport": True}
    machine.start(cluster_id=1, etcd=silent)
    assert "10.99.0.9:2379" in {one["part"]: one for one in machine.status()["problems"]}["mesh"]["text"]
    assert not machine.connects(8001)


def test_a_start_that_cannot_work_says_why_in_one_line_and_changes_nothing(machine) -> None:
    machine.settings(xdp="fast")
    code, text = machine.refuses()
    assert code == 2
    assert text.startswith(f"meshwalld: {machine.root}/meshwall.yaml:1:")
    assert "xdp: input should be 'auto', 'native', 'generic' or 'off', found \"fast\"" in text
    machine.settings()
    code, text = machine.refuses("setpriv", "--bounding-set", "-all,+chown")
    assert code == 3
    assert text == (
        "meshwalld: missing privileges: CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF; run as root or by the meshwalld unit\n"
    )
    assert not list((machine.root / "bpf").iterdir())


def test_two_daemons_never_share_a_run_directory(idle) -> None:
    machine = idle
    assert machine.process is not None
    code, text = machine.refuses()
    assert code == 1
    assert f"another meshwalld (pid {machine.process.pid}) runs with" in text


def test_only_root_may_change_something_through_the_socket(idle) -> None:
    machine = idle
    path = machine.root / "run" / "meshwall.sock"
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.parent.stat().st_mode & 0o777 == 0o750
    machine.root.chmod(0o755)
    path.parent.chmod(0o755)
    path.chmod(0o666)
    for parent in machine.root.parents[:2]:
        parent.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        import http.client
        import socket

        os.setgid(65534)
        os.setuid(65534)
        answers = []
        for method, target in (
            ("GET", "/v1/status"),
            ("DELETE", "/v1/ct"),
            ("POST", "/v1/policies/accept-empty"),
        ):
            connection = http.client.HTTPConnection("x")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(path))
            connection.request(method, target)
            answers.append(connection.getresponse().status)
        os._exit(0 if answers == [200, 403, 403] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert "refused DELETE /v1/ct to Peer(" in machine.log


def test_an_address_that_appears_is_the_hosts_own_at_once(idle, within) -> None:
    idle.inside(idle.host, "ip", "addr", "add", "10.99.0.77/24", "dev", "net0")
    within(lambda: "own addresses: 10.99.0.77" in idle.log)
    idle.inside(idle.host, "ip", "addr", "del", "10.99.0.77/24", "dev", "net0")
    within(lambda: "own addresses no more: 10.99.0.77" in idle.log)


def test_the_daemon_is_small(idle) -> None:
    memory = idle.status()["memory"]
    assert memory["resident"] < 80_000_000
