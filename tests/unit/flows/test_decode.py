"""Event structs, and our reasons in Hubble's words."""

from bpf.layout import EVENT, Reason
from daemon.flows.decode import (
    HUBBLE_REASON,
    Brief,
    Event,
    address_text,
    briefs,
    drop_reason,
    events,
    reason_name,
)
from daemon.model.flow import DROP_TEXT, FIXED_RULES, DropReason
from daemon.model.net import parse_prefix


def test_an_event_has_the_fields_of_the_layout_in_its_order():
    assert Event._fields == tuple(name for name, _ in EVENT.fields)


def test_a_run_of_structs_is_read_back_in_order(pack):
    first, second = events(pack(dport=22) + pack(saddr="2001:db8::9", daddr="2001:db8:1::4", identity=9))
    assert (first.dport_be, first.family, first.identity) == (b"\x00\x16", 4, 2)
    assert address_text(first.family, first.saddr) == "203.0.113.9"
    assert address_text(second.family, second.daddr) == "2001:db8:1::4"


def test_a_brief_holds_the_same_values_as_the_event(pack):
    raw = pack(identity=70_000, generation=9, proto=17, direction=1)
    (whole,), (short,) = events(raw), briefs(raw)
    assert Brief._make(short)._asdict() == {name: getattr(whole, name) for name in Brief._fields}


def test_every_reason_that_drops_has_a_hubble_number_and_text():
    dropping = {reason for reason in Reason if reason >= Reason.POLICY_DEFAULT}
    assert set(HUBBLE_REASON) == dropping
    assert set(DROP_TEXT) == set(DropReason)


def test_passing_and_unknown_reasons_have_an_answer_too():
    assert drop_reason(Reason.FORWARDED) is DropReason.DROP_REASON_UNKNOWN
    assert drop_reason(63) is DropReason.INVALID_PACKET_DROPPED
    assert (reason_name(Reason.BAD_IHL), reason_name(63)) == ("bad-ihl", "reason-63")


def test_the_fixed_rules_are_those_of_the_layout():
    from bpf import layout

    assert FIXED_RULES == {
        layout.RULE_DEFAULT_DENY_INGRESS: "default-deny-ingress",
        layout.RULE_DEFAULT_DENY_EGRESS: "default-deny-egress",
        layout.RULE_DEFAULT_ALLOW: "default-allow",
        layout.RULE_FAILSAFE: "failsafe",
        layout.RULE_EXEMPT: "exempt-node-port",
    }


def test_a_frame_that_is_not_ip_has_no_address():
    assert address_text(0, parse_prefix("10.0.0.1").packed) == ""
