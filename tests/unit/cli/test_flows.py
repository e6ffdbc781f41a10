"""`meshwall observe`: hubble's flags, hubble's lines."""

import argparse
import json
import time
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.cli import flows
from daemon.cli.flowlines import Style, compact, dictionary, lost_text, printable, table
from daemon.cli.flows import moment, query, register

PLAIN = Style(colour=False)


def parse(*words):
    parser = argparse.ArgumentParser(prog="meshwall")
    register(parser.add_subparsers())
    return parser.parse_args(words)


def lists(*words):
    found = query(parse("observe", *words))
    return json.loads(found.get("whitelist", "[]")), json.loads(found.get("blacklist", "[]"))


def flow(**changes):
    shown = {
        "time": "2026-11-23T12:22:45.052999Z",
        "verdict": "DROPPED",
        "IP": {"source": "203.0.113.9", "destination": "10.1.0.4", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 51111, "destination_port": 10250, "flags": {"SYN": True}}},
        "source": {"identity": 2},
        "destination": {"identity": 1},
        "node_name": "alpha/a1",
        "event_type": {"type": 1, "sub_type": 133},
        "traffic_direction": "INGRESS",
        "drop_reason_desc": "POLICY_DENIED",
        "Summary": "TCP Flags: SYN",
    } | changes
    return {
        "flow": shown,
        "meshwall": {"rule": 0, "rule_name": "default-deny-ingress", "restricted_by": ["kubelet"]},
    }


@pytest.fixture(autouse=True)
def _utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_drop_is_one_line_in_hubbles_layout_with_its_rule():
    assert compact(flow(), PLAIN) == (
        "Nov 23 12:22:45.052: 203.0.113.9:51111 (world) <> 10.1.0.4:10250 (host) Policy denied DROPPED "
        "(TCP Flags: SYN) rule=default-deny-ingress restricted-by=kubelet"
    )


def test_an_allowed_connection_names_pod_policy_file_and_line():
    found = flow(
        verdict="FORWARDED",
        event_type={"type": 5},
        is_reply=False,
        source={"identity": 70000, "namespace": "mon", "pod_name": "metrics-0"},
    )
    found["meshwall"] = {
        "rule": 16,
        "rule_name": "ingress[0]",
        "policy": "kubelet",
        "file": "/p/k.yaml",
        "line": 7,
    }
    expected = (
        "Nov 23 12:22:45.052: mon/metrics-0:51111 (ID:70000) -> 10.1.0.4:10250 (host) policy-verdict INGRESS "
        "ALLOWED (TCP Flags: SYN) policy=kubelet rule=ingress[0] /p/k.yaml:7"
    )
    assert compact(found, PLAIN) == expected
    assert "203.0.113.9:51111 (ID:70000)" in compact(found, Style(colour=False, numeric=True))


def test_ipv6_addresses_with_ports_can_be_read():
    found = flow(IP={"source": "2001:db8::9", "destination": "2001:db8:1::4", "ipVersion": "IPv6"})
    assert "[2001:db8::9]:51111 (world) <> [2001:db8:1::4]:10250 (host)" in compact(found, PLAIN)


def test_audit_icmp_and_frames_without_ip_are_lines_too():
    audited = flow(verdict="AUDIT", event_type={"type": 5}, is_reply=False, l4={"ICMPv4": {"type": 8}})
    assert "203.0.113.9 (world) -> 10.1.0.4 (host) policy-verdict INGRESS AUDITED" in compact(audited, PLAIN)
    bare = {"flow": {"time": "?", "verdict": "DROPPED", "event_type": {"type": 1}}}
    assert compact(bare, PLAIN) == "N/A: no IP (unknown) <> no IP (unknown)  DROPPED ()"


def test_the_node_is_shown_on_demand():
    assert compact(flow(), Style(colour=False, node=True)).startswith("Nov 23 12:22:45.052 [alpha/a1]: ")


def test_what_peers_named_cannot_move_the_cursor_or_hide():
    hostile = flow(source={"identity": 70000, "namespace": "x\x1b[2J", "pod_name": "a\u202eb\nc\x9b1m"})
    line = compact(hostile, PLAIN)
    assert line.isprintable()
    assert r"x\x1b[2J/a\u202eb\nc\x9b1m:51111" in line
    assert printable("naïve 名前") == "naïve 名前"
    found = flow()
    found["meshwall"] = {"policy": "p\r\x07", "log": "\x1b]0;x\x07"}
    assert dictionary(found, PLAIN).replace("\n", "").isprintable()
    assert all(row.isprintable() for row in table([found], PLAIN))


def test_colours_do_not_change_the_text():
    import re

    coloured = compact(flow(), Style(colour=True))
    assert "\x1b[31mDROPPED\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == compact(flow(), PLAIN)


def test_a_dict_has_one_field_a_line_and_a_table_aligned_columns():
    assert "DESTINATION: 10.1.0.4:10250\n       TYPE: Policy denied\n    VERDICT: DROPPED" in dictionary(
        flow(), PLAIN
    )
    head, row = table([flow()], PLAIN)
    assert head.index("VERDICT") == row.index("DROPPED")
    assert list(table([], PLAIN)) == []


def test_losses_are_told_in_words():
    lost = {"lost_events": {"source": "HUBBLE_RING_BUFFER", "num_events_lost": "12"}}
    assert lost_text(lost).startswith("12 flows lost: this reader was slower")
    held = {"lost_events": {"num_events_lost": "0"}, "meshwall": {"suppressed": 5}}
    assert lost_text(held).startswith("5 events not sent")


def test_a_flag_without_from_or_to_asks_about_either_side():
    assert lists("--port", "10250") == (
        [{"source_port": ["10250"]}, {"destination_port": ["10250"]}],
        [],
    )
    assert lists("--from-ip", "10.0.0.0/8", "--port", "22", "--verdict", "DROPPED", "--verdict", "AUDIT")[
        0
    ] == [
        {"source_ip": ["10.0.0.0/8"], "source_port": ["22"], "verdict": ["DROPPED", "AUDIT"]},
        {"source_ip": ["10.0.0.0/8"], "destination_port": ["22"], "verdict": ["DROPPED", "AUDIT"]},
    ]


def test_not_excludes_with_the_next_flag_only():
    assert lists("--not", "--to-port", "22", "--protocol", "tcp") == (
        [{"protocol": ["tcp"]}],
        [{"destination_port": ["22"]}],
    )


def test_values_are_translated_as_hubble_does():
    assert lists("--from-identity", "remote-node")[0] == [{"source_identity": [6]}]
    assert lists("-t", "drop:133")[0] == [
        {"event_type": [{"type": 1, "match_sub_type": True, "sub_type": 133}]}
    ]
    assert lists("-n", "mon")[0] == [{"source_pod": ["mon/"]}, {"destination_pod": ["mon/"]}]
    assert lists("--tcp-flags", "syn,ack")[0] == [{"tcp_flags": [{"SYN": True, "ACK": True}]}]
    assert lists("--cluster", "beta")[0] == [{"node_name": ["beta/"]}]
    assert lists("--policy", "kubelet", "--rule", "ingress[0]", "--generation", "4")[0] == [
        {"policy": ["kubelet"], "rule": ["ingress[0]"], "generation": [4]}
    ]


def test_two_parses_share_nothing():
    lists("--port", "1")
    assert lists() == ([], [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"number": "20"}),
        (("--last", "7"), {"number": "7"}),
        (("--first", "3"), {"number": "3", "first": "true"}),
        (("--all",), {}),
        (("flows", "--last", "7"), {"number": "7"}),
        (("-f",), {"follow": "true"}),
        (("-f", "--last", "1"), {"follow": "true", "number": "1"}),
        (("--since", "2026-11-23T12:00:00Z"), {"since": "2026-11-23T12:00:00+00:00"}),
        (("-f", "--until", "2026-11-23T12:00:00Z"), {"follow": "true"}),
    ],
)
def test_how_much_is_asked_for(words, expected):
    assert query(parse("monitor", *words)) == expected


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--first", "3", "-f"), "--first does not go with"),
        (("-f", "-o", "table"), "use -o compact"),
        (("--not",), "--not has no filter"),
    ],
)
def test_contradictions_are_refused(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        query(parse("observe", *words))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--since", "soon"), "expected a span such as 5m"),
        (("-t", "l7"), "unknown type 'l7'"),
        (("--identity", "nobody"), "expected a number, got 'nobody'"),
    ],
)
def test_values_that_make_no_sense_end_with_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("observe", *words)
    assert complaint in capsys.readouterr().err


def test_spans_are_ago():
    found = datetime.fromisoformat(moment("1h30m"))
    assert 5399 < (datetime.now(UTC) - found).total_seconds() < 5410


def test_no_daemon_is_one_clear_line(capsys, tmp_path):
    args = parse("observe")
    args.socket = str(tmp_path / "none")
    assert flows.run(args) == 1
    assert "no daemon answers at" in capsys.readouterr().err


names = st.text(max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names, names, names, names)
def test_any_text_of_a_peer_is_one_printable_line(pod, namespace, policy, log):
    found = flow(source={"identity": 1 << 24, "namespace": namespace, "pod_name": pod})
    found["meshwall"] = {"rule": 16, "policy": policy, "file": policy, "log": log, "restricted_by": [log]}
    assert compact(found, PLAIN).isprintable()
