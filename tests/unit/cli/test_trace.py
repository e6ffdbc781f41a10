"""`meshwall trace packet`: the packet that the options describe, and what is said about it."""

import argparse
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import frames
from bpf.layout import EVENT, EventKind, Hook, PacketClass, Reason
from bpf.model import parse
from bpf.trace import Traced
from daemon.cli import trace
from daemon.cli.client import DaemonError, Json
from daemon.cli.main import main, parser_for
from daemon.datapath.tracing import Traces

THEM, US = "198.51.100.7", "192.0.2.1"
OUTCOME = {
    "cell": 0,
    "slot": 5,
    "passes": 0,
    "audited": 0,
    "judged": 1,
    "opens": 0,
    "deferred": 0,
    "answered": 0,
}


def options(*words: str) -> argparse.Namespace:
    return parser_for("trace").parse_args(["trace", "packet", *words])


def frame(*words: str) -> bytes:
    return trace.frame_of(options(*words))


def test_a_tcp_packet_is_built_from_its_ends_with_flags_and_tags() -> None:
    packet = parse(
        frame("--tcp", f"{THEM}:40000", f"{US}:22", "--flags", "syn,ack", "--vlan", "5", "--vlan", "7")
    )
    assert (packet.kind, packet.sport, packet.dport, packet.tcp_flags) == (PacketClass.TCP, 40000, 22, 18)
    assert packet.vlans == [5, 7]
    assert parse(frame("--tcp", f"{THEM}:1", f"{US}:2")).tcp_flags == 2


@pytest.mark.parametrize(
    ("words", "kind", "dport"),
    [
        (("--udp", "[2001:db8::1]:53", "[2001:db8::2]:99"), PacketClass.UDP, 99),
        (("--sctp", f"{THEM}:1", f"{US}:2905"), PacketClass.SCTP, 2905),
        (("--icmp", THEM, US), PacketClass.ICMP4, None),
        (("--icmp", "fe80::1", "fe80::2", "--type", "1/4"), PacketClass.ICMP6, None),
    ],
)
def test_every_protocol_parses_as_what_it_was_built_for(
    words: tuple[str, ...], kind: PacketClass, dport: int | None
) -> None:
    packet = parse(frame(*words))
    assert (packet.reason, packet.kind, packet.dport) == (None, kind, dport)


def test_an_icmp_packet_is_an_echo_request_unless_told_otherwise() -> None:
    assert parse(frame("--icmp", THEM, US)).icmp_type == 8
    assert parse(frame("--icmp", "fe80::1", "fe80::2")).icmp_type == 128
    packet = parse(frame("--icmp", THEM, US, "--type", "3/4"))
    assert (packet.icmp_type, packet.icmp_code) == (3, 4)


def test_hexadecimal_digits_may_have_spaces_and_colons() -> None:
    assert frame("00:11 2233\n44") == bytes.fromhex("0011223344")


def capture(found: list[bytes], *, order: str = "<", link: int = 1, cut: int = 0) -> bytes:
    data = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    for one in found:
        data += struct.pack(f"{order}IIII", 1, 2, len(one), len(one) + cut) + one
    return data


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_frame_of_a_capture_is_found_by_its_number(tmp_path: Path, order: str) -> None:
    file, some = tmp_path / "a.pcap", [frames.tcp(THEM, US, port, 22) for port in (1, 2, 3)]
    file.write_bytes(capture(some, order=order))
    assert frame("--pcap", str(file)) == some[0]
    assert frame("--pcap", str(file), "--frame", "3") == some[2]


@pytest.mark.parametrize(("src", "dst"), [(THEM, US), ("2001:db8::1", "2001:db8::2")])
def test_a_capture_without_link_headers_gets_one(tmp_path: Path, src: str, dst: str) -> None:
    file, whole = tmp_path / "a.pcap", frames.udp(src, dst, 1, 2)
    file.write_bytes(capture([whole[14:]], link=101))
    assert frame("--pcap", str(file))[12:] == whole[12:]


@pytest.mark.parametrize(
    ("data", "words", "said"),
    [
        (capture([b"x" * 60]), ("--frame", "2"), "--frame: 2: .* has 1 frames"),
        (capture([b"x" * 60]), ("--frame", "0"), "the first one is 1"),
        (capture([b"x" * 60])[:-1], (), "ends inside frame 1"),
        (capture([b"x" * 60])[:30], (), "ends inside frame 1"),
        (capture([b"x" * 60], cut=40), (), "captured to 60 of 100 bytes"),
        (capture([], link=113), (), "link type 113, expected Ethernet"),
        (b"\x0a\x0d\x0d\x0a" + bytes(60), (), "is pcapng: `editcap"),
        (b"hello", (), "is not a pcap file"),
    ],
)
def test_a_capture_that_cannot_be_read_is_told_why(
    tmp_path: Path, data: bytes, words: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "a.pcap"
    file.write_bytes(data)
    with pytest.raises(trace.WrongPacketError, match=said):
        frame("--pcap", str(file), *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one packet, please"),
        (("00", "--icmp", THEM, US), "one packet, please"),
        (("0g",), "'0g' is not a frame"),
        (("--tcp", THEM, US), "'198.51.100.7': expected 192.0.2.1:443 or"),
        (("--tcp", "2001:db8::1:22", "[::2]:1"), "expected 192.0.2.1:443 or"),
        (("--tcp", f"{THEM}:65536", f"{US}:1"), "'198.51.100.7:65536'"),
        (("--tcp", "web:1", f"{US}:1"), "'web:1'"),
        (("--tcp", f"{THEM}:1", "[::2]:1"), "different families"),
        (("--tcp", f"{THEM}:1", f"{US}:1", "--flags", "SYN,FOO"), "'FOO': expected some of"),
        (("--udp", f"{THEM}:1", f"{US}:1", "--flags", "SYN"), "--flags goes with --tcp"),
        (("--udp", f"{THEM}:1", f"{US}:1", "--vlan", "4096"), "0 to 4095"),
        (("--udp", f"{THEM}:1", f"{US}:1", "--forwarded"), "--forwarded goes with --direction out"),
        (("00", "--vlan", "4"), "has its tags already"),
        (("--icmp", THEM, US, "--type", "3/4/5"), "expected TYPE or TYPE/CODE"),
        (("--icmp", THEM, US, "--type", "256"), "numbers to 255"),
        (("--pcap", "/nonexistent/a.pcap"), "No such file"),
    ],
)
def test_a_packet_that_cannot_be_built_is_told_why(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(trace.WrongPacketError, match=said):
        frame(*words)


def test_a_wrong_question_has_status_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "packet", "--tcp", "a", "b"]) == 2
    assert capsys.readouterr().err.startswith("meshwall trace: --tcp: 'a': expected")


def traced(hook: Hook, packet: bytes, reason: Reason, *, rule: int = 17, **outcome: int) -> Traced:
    facts = parse(packet)
    event = EVENT.unpack(
        EVENT.pack(
            saddr=facts.src, daddr=facts.dst, sport_be=(facts.sport or 0).to_bytes(2, "big"),
            dport_be=(facts.dport or 0).to_bytes(2, "big"), kind=EventKind.DROP, reason=reason, family=facts.family,
            proto=facts.proto, identity=7001, rule=rule, packet_class=facts.kind,
        )
    )  # fmt: skip
    passes = reason < Reason.POLICY_DEFAULT
    return Traced(hook, passes, event, OUTCOME | outcome)  # type: ignore[arg-type]


def answer(packet: bytes, *hooks: Traced) -> Json:
    return trace.told(parse(packet), Traces({one.hook: one for one in hooks}), "in")


SSH = frames.tcp(THEM, US, 40000, 22)
KNOWN: dict[str, Json] = {
    "/v1/identities/7001": {"id": 7001, "labels": ["k8s:app=web"], "ips": []},
    "/v1/rules/17": {
        "number": 17,
        "name": "ingressDeny[0]",
        "policy": "base",
        "kind": "CCNP",
        "file": "p.yaml",
        "line": 9,
    },
}


def shown(found: Json, monkeypatch: pytest.MonkeyPatch, known: dict[str, Json] | None) -> str:
    def get(_: argparse.Namespace, target: str) -> Json:
        if known is None:
            raise DaemonError("no daemon answers")
        if target not in known:
            raise DaemonError("no such thing", refused=True)
        return known[target]

    monkeypatch.setattr(trace, "get", get)
    trace._ask_daemon(argparse.Namespace(), found)
    return "\n".join(trace.lines(found))


def test_a_drop_names_hook_reason_identity_and_the_line_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer(SSH, *(traced(hook, SSH, Reason.POLICY_DENY) for hook in (Hook.XDP, Hook.TCX_INGRESS)))
    assert shown(found, monkeypatch, KNOWN).splitlines() == [
        "verdict   DROP, by xdp",
        "packet    in, TCP, 198.51.100.7:40000 -> 192.0.2.1:22, protocol 6, SYN, 54 bytes",
        "identity  7001 k8s:app=web",
        "xdp         DROP POLICY_DENY rule 17 ingressDeny[0] of base p.yaml:9",
        "tcx-ingress DROP POLICY_DENY rule 17 ingressDeny[0] of base p.yaml:9",
    ]


def test_without_a_daemon_there_are_numbers_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(answer(SSH, traced(Hook.XDP, SSH, Reason.POLICY_DENY)), monkeypatch, None)
    assert "identity  7001\n" in text
    assert "rule 17\n" in text
    assert text.endswith("no daemon answers: identities and rules are numbers alone")


def test_what_the_daemon_does_not_know_stays_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(answer(SSH, traced(Hook.XDP, SSH, Reason.POLICY_DENY)), monkeypatch, {})
    assert "rule 17" in text
    assert "no daemon" not in text


def test_fixed_rules_have_names_without_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(answer(SSH, traced(Hook.XDP, SSH, Reason.POLICY_DEFAULT, rule=0)), monkeypatch, None)
    assert "rule 0 default-deny-ingress" in text


@pytest.mark.parametrize("leaves", [{"deferred": 1}, {"answered": 1}])
def test_where_xdp_leaves_a_packet_to_tcx_tcx_decides(leaves: dict[str, int]) -> None:
    reason = Reason.FORWARDED if "deferred" in leaves else Reason.POLICY_DENY
    found = answer(
        SSH, traced(Hook.XDP, SSH, reason, **leaves), traced(Hook.TCX_INGRESS, SSH, Reason.POLICY_DENY)
    )
    assert (found["verdict"], found["decided_by"]) == ("drop", "tcx-ingress")


def test_a_hook_that_enforces_nothing_says_so() -> None:
    nothing = Traced(Hook.XDP, True, None, None)
    found = answer(SSH, nothing, replace(nothing, hook=Hook.TCX_INGRESS))
    assert [one["reason"] for one in found["hooks"]] == ["NOT_ENFORCED"] * 2
    assert (found["verdict"], found["packet"]["class"]) == ("pass", "TCP")


def test_a_frame_that_the_kernel_cannot_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = SSH[:20]
    found = trace.told(parse(cut), Traces({Hook.TCX_INGRESS: None}), "in")
    assert found["verdict"] == "unknown"
    assert "takes no such frame (the frame is SHORT_IP)" in shown(found, monkeypatch, None)


def test_fragments_and_tags_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    packet = frames.ip(
        THEM, US, 17, frames.udp_datagram(1, 53, bytes(16)), identification=9, fragment=1, vlans=(12,)
    )
    found = answer(packet, traced(Hook.XDP, packet, Reason.FORWARDED, passes=1))
    text = shown(found, monkeypatch, KNOWN)
    assert "fragment  id 9, offset 0, more follow" in text
    assert "VLAN 12" in text
    assert found["packet"]["class"] == "FRAG_FIRST"
