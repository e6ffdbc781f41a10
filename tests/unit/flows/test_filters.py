"""Hubble's filter language on our events."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.layout import FIRST_RULE, EventKind, Reason
from daemon.flows.decode import Brief, briefs, events
from daemon.flows.filters import EVENT_FIELDS, FLOW_FIELDS, FilterError, _wildcard, parse_filters


@pytest.fixture
def shown(pipeline, pack):
    """Whether an event with some changes passes a whitelist entry."""

    def judge(spec, **changes):
        raw = pack(**changes)
        pipeline.directory.note(map(Brief._make, briefs(raw)))
        pipeline.directory.refresh()
        event = next(events(raw))
        filters = parse_filters([spec], [])
        return filters.select(event, lambda: pipeline.directory.flow(0, event, 0)) is not None

    return judge


ALLOWED = {"kind": EventKind.ALLOW, "reason": 0, "verdict": 1, "rule": FIRST_RULE}
POD = {"saddr": "10.2.1.7", "identity": 70_000}


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ({"source_ip": ["203.0.113.9"]}, {}),
        ({"source_ip": ["192.0.2.1", "203.0.113.0/24"]}, {}),
        ({"destination_ip": ["2001:DB8:1::/48"]}, {"saddr": "2001:db8::9", "daddr": "2001:db8:1::4"}),
        ({"source_ip": ["2001:db8:0:0::9"]}, {"saddr": "2001:db8::9", "daddr": "2001:db8:1::4"}),
        ({"destination_port": ["10250"]}, {}),
        ({"source_port": ["51111"], "verdict": ["DROPPED"]}, {}),
        ({"verdict": ["FORWARDED"]}, ALLOWED),
        ({"verdict": [4]}, {"kind": EventKind.AUDIT}),
        ({"source_identity": [2]}, {}),
        ({"destination_identity": [1]}, {}),
        ({"drop_reason_desc": ["POLICY_DENIED"]}, {}),
        ({"drop_reason_desc": [133]}, {}),
        ({"drop_reason_desc": ["bad-ihl"]}, {"reason": Reason.BAD_IHL}),
        ({"drop_reason_desc": ["INVALID_PACKET_DROPPED"]}, {"reason": Reason.BAD_IHL}),
        ({"traffic_direction": ["INGRESS"]}, {}),
        ({"protocol": ["TCP"]}, {}),
        ({"protocol": ["icmp"]}, {"proto": 58}),
        ({"ip_version": ["IPv4"]}, {}),
        ({"tcp_flags": [{"SYN": True}]}, {"tcp_flags": 0x12}),
        ({"event_type": [{"type": 1}]}, {}),
        ({"event_type": [{"type": 1, "match_sub_type": True, "sub_type": 133}]}, {}),
        ({"event_type": [{"type": 5}]}, ALLOWED),
        ({"reply": [False]}, {}),
        ({"generation": [5]}, {}),
        ({"source_label": ["k8s:app=metrics-server"]}, POD),
        ({"source_label": ["app in (web, metrics-server),!old,tier!=db"]}, POD),
        ({"source_label": ["reserved:world"]}, {}),
        ({"source_label": ["any:app"]}, POD),
        ({"destination_label": ["role notin (control)"]}, {}),
        ({"source_pod": ["mon/metrics"]}, POD),
        ({"source_pod": ["mon/"]}, POD),
        ({"source_fqdn": ["b*"]}, {"saddr": "10.2.0.5", "identity": 6}),
        ({"node_name": ["alpha/a1"]}, {}),
        ({"node_name": ["a*"]}, {}),
        ({"node_name": ["alpha/"]}, {}),
        ({"interface": [{"name": "eth0"}]}, {}),
        ({"policy": ["kubelet"]}, ALLOWED),
        ({"policy": ["kubelet"]}, {}),  # a default deny belongs to those who restrict
        ({"rule": ["ingress[0]"]}, ALLOWED),
        ({"rule": [str(FIRST_RULE)]}, ALLOWED),
        ({"rule": ["default-deny-ingress"]}, {}),
        ({}, {}),
    ],
)
def test_matches(shown, spec, changes):
    assert shown(spec, **changes)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ({"source_ip": ["203.0.113.8"]}, {}),
        ({"source_ip": ["0.0.0.0/0"]}, {"saddr": "2001:db8::9", "daddr": "2001:db8:1::4"}),
        ({"destination_port": ["10250"], "verdict": ["FORWARDED"]}, {}),
        ({"destination_port": ["10250"]}, {"proto": 1}),  # ICMP has no ports
        ({"source_identity": [1]}, {}),
        ({"drop_reason_desc": ["POLICY_DENIED"]}, {"kind": EventKind.AUDIT}),
        ({"drop_reason_desc": ["POLICY_DENY"]}, {}),
        ({"tcp_flags": [{"SYN": True, "ACK": True}]}, {}),
        ({"event_type": [{"type": 4}]}, {}),
        ({"reply": [True]}, {}),
        ({"source_label": ["k8s:app=metrics-server"]}, {}),
        ({"source_pod": ["metrics"]}, POD),  # namespace default
        ({"source_pod": ["/"]}, {}),  # a host is no pod
        ({"node_name": ["beta/a1"]}, {}),
        ({"policy": ["kubelet"]}, {"reason": Reason.BAD_IHL}),
    ],
)
def test_does_not_match(shown, spec, changes):
    assert not shown(spec, **changes)


def test_a_blacklist_wins_over_a_whitelist(pack, pipeline):
    event = next(events(pack()))
    filters = parse_filters([{"verdict": ["DROPPED"]}], [{"destination_port": ["10250"]}])
    assert filters.select(event, lambda: pipeline.directory.flow(0, event, 0)) is None


def test_a_flow_is_built_only_for_what_the_event_cannot_answer(pack):
    def build():
        raise AssertionError("not needed")

    filters = parse_filters([{"verdict": ["FORWARDED"], "source_label": ["app=x"]}], [])
    assert filters.select(next(events(pack())), build) is None


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"source_ip": ["10.0.0.300"]}, r"whitelist\[0\].source_ip: .*10.0.0.300"),
        ({"destination_port": ["http"]}, "number from 0 to 65535, got 'http'"),
        ({"destination_port": ["65536"]}, "number from 0 to 65535"),
        ({"protocol": ["vrrp"]}, "unknown protocol 'vrrp'"),
        ({"verdict": ["MAYBE"]}, "expected one of FORWARDED, DROPPED"),
        ({"source_label": ["in (a"]}, "column"),
        ({"source_label": [""]}, "column 1"),
        ({"node_name": ["a/b/c"]}, "expected letters"),
        ({"tcp_flags": ["SYN"]}, "expected an object"),
        ({"uuid": ["x"]}, "not a filter that a host firewall has"),
        ({"source_ip": []}, "at least one value"),
        ({"source_ip": [7]}, "expected text, got 7"),
        ({"reply": ["no"]}, "expected true or false"),
        ("drop", "expected an object"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_it(spec, complaint):
    with pytest.raises(FilterError, match=complaint):
        parse_filters([spec], [])
    with pytest.raises(FilterError, match="expected a list"):
        parse_filters({}, [])


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a1", "a1", True),
        ("a1", "a12", False),
        ("*", "", True),
        ("a*", "a", True),
        ("*.example", "x.y.example", True),
        ("a*a", "a", False),
        ("a*b*c", "axxbxxc", True),
        ("a*b*c", "axxcxxc", False),
        ("a*bc*c", "abc", False),
        ("**a**", "bab", True),
    ],
)
def test_a_star_is_any_text(pattern, name, fits):
    assert _wildcard(pattern)(name) is fits


def test_many_stars_take_no_time():
    before = time.monotonic()
    assert not _wildcard("*a" * 60 + "*b")("a" * 253)
    assert time.monotonic() - before < 0.1


words = st.text("aZ0/:*!=,() .-\x00", max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(sorted({*EVENT_FIELDS, *FLOW_FIELDS}))


@given(st.dictionaries(fields, anything, max_size=3))
def test_any_json_is_a_filter_or_a_filter_error(spec):
    with contextlib.suppress(FilterError):
        parse_filters([spec], [])
