"""The packet model: total on any bytes, and right on the cases that filters get wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import frames
from bpf.layout import CellVerdict, PacketClass, Reason
from bpf.model import Direction, Host, Policy, parse, quoted

GOLDEN = Path(__file__).parents[2] / "vectors" / "packets.jsonl"
ROWS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
NAMES = {kind: kind.name.lower().replace("_", "-") for kind in PacketClass}


@given(st.binary(max_size=200))
def test_every_frame_gets_a_class_and_only_malformed_ones_a_reason(frame: bytes) -> None:
    packet = parse(frame)
    assert (packet.kind is PacketClass.MALFORMED) == (packet.reason is not None)


@given(st.sampled_from(ROWS), st.integers(0, 100), st.integers(0, 255))
def test_a_changed_byte_never_breaks_the_parser(row: dict[str, str], at: int, value: int) -> None:
    frame = bytearray.fromhex(row["hex"])
    frame[at % len(frame)] = value
    packet = parse(bytes(frame))
    assert packet.limit <= len(frame)
    Host(Policy()).judge(bytes(frame), Direction.INGRESS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_golden_frames_have_the_facts_that_were_measured(row: dict[str, object]) -> None:
    import ipaddress

    facts = row["facts"]
    assert isinstance(facts, dict)
    packet = parse(bytes.fromhex(str(row["hex"])))
    assert NAMES[packet.kind] in [facts["class"], *(row.get("alt") or [])]  # type: ignore[misc]
    if packet.kind is PacketClass.MALFORMED or NAMES[packet.kind] != facts["class"]:
        return
    assert [packet.sport, packet.dport] == [facts["sport"], facts["dport"]]
    if facts["family"]:
        # compared as values: Python 3.13 writes mapped addresses in another way
        assert [ipaddress.ip_address(raw) for raw in (packet.src, packet.dst)] == [
            ipaddress.ip_address(facts["src"]),
            ipaddress.ip_address(facts["dst"]),
        ]
        assert packet.proto == facts["proto"]
    if facts["l4_off"]:
        assert packet.l4_off == facts["l4_off"]
    assert packet.vlans == facts["vlan"]
    assert [packet.icmp_type, packet.icmp_code] == [facts["icmp_type"], facts["icmp_code"]]


def test_a_quote_that_ends_before_its_ports_names_no_flow() -> None:
    sent = frames.tcp("192.0.2.1", "198.51.100.1", 1, 2)
    whole = frames.icmp_error("203.0.113.1", "192.0.2.1", 3, 1, sent)
    cut = frames.icmp_error("203.0.113.1", "192.0.2.1", 3, 1, sent[: 14 + 22])
    found = quoted(parse(whole), whole)
    assert found is not None
    assert (found.sport, found.dport) == (1, 2)
    assert quoted(parse(cut), cut) is None


def test_what_no_rule_paints_takes_the_default_of_its_direction() -> None:
    allow = CellVerdict.ALLOW << 28
    policy = Policy(rows={(Direction.INGRESS, 0): ((80, 90, allow),)}, default={Direction.EGRESS: allow})
    assert [policy.cell(Direction.INGRESS, 0, port) for port in (79, 80, 90, 91)] == [0, allow, allow, 0]
    assert policy.cell(Direction.EGRESS, 5, 1) == allow


@given(
    st.integers(0, 2**32 - 1), st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 32)), max_size=6)
)
def test_the_longest_prefix_gives_the_slot(address: int, networks: list[tuple[int, int]]) -> None:
    prefixes = {
        ((low >> 32 - length << 32 - length).to_bytes(4, "big"), length): 10 + length
        for low, length in networks
    }
    covering = [length for low, length in networks if low >> 32 - length == address >> 32 - length]
    wanted = 10 + max(covering) if covering else 0
    assert Policy(prefixes=prefixes).slot(address.to_bytes(4, "big")) == wanted


def test_a_short_arp_request_is_malformed_and_a_whole_one_keeps_the_link_alive() -> None:
    assert parse(frames.ethernet(bytes(27), 0x0806)).reason is Reason.SHORT_IP
    assert parse(frames.ethernet(bytes(28), 0x0806)).link
