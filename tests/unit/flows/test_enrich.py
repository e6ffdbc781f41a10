"""What a person sees of an event."""

from dataclasses import replace

import pytest

from bpf.layout import FIRST_RULE, EventKind, Hook, PacketClass, Reason
from daemon.flows.decode import Brief, briefs, events
from daemon.flows.enrich import GENERATIONS, Directory
from daemon.model.flow import DropReason, FlowType, FlowVerdict, summary
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, parse_prefix
from daemon.model.rule import LabelSelector, Policy, Spec, SubjectKind
from daemon.state.tables import IpKey, IpRow, NodeKey, PolicyKey

BAN_KIND = "CiliumClusterwideNetworkPolicy"


@pytest.fixture
def see(tables):
    """Event bytes -> Flow, as if it arrived and was looked at now."""
    directory = Directory(tables)

    def look(raw):
        directory.note(map(Brief._make, briefs(raw)))
        directory.refresh()
        return directory.flow(0, next(events(raw)), 0)

    look.directory = directory
    return look


def test_a_default_deny_names_who_restricts_and_no_rule(see, pack):
    flow = see(pack())
    assert (flow.type, flow.verdict, flow.drop) == (
        FlowType.DROP,
        FlowVerdict.DROPPED,
        DropReason.POLICY_DENIED,
    )
    assert (flow.reason, flow.rule_name, flow.origin) == ("policy-default", "default-deny-ingress", None)
    assert flow.restricting == ("ban", "kubelet")
    assert (flow.interface, flow.hook, flow.generation) == ("eth0", "xdp", 5)
    assert summary(flow) == "TCP Flags: SYN"


def test_a_policy_that_asks_for_no_default_deny_is_not_blamed_for_it(see, tables, pack):
    spec = Spec(SubjectKind.NODE, LabelSelector(), (), (True, False), (False, False))
    policy = Policy("ban", "", BAN_KIND, "", 0, specs=(spec, spec))
    tables.policies.put(PolicyKey(BAN_KIND, "", "ban"), policy)
    assert see(pack()).restricting == ("kubelet",)


def test_the_local_side_is_this_host_in_either_direction(see, pack):
    into, out = see(pack()), see(pack(saddr="10.1.0.4", daddr="203.0.113.9", direction=1, rule=1))
    assert (into.destination.identity, into.destination.node) == (1, "a1")
    assert (into.source.identity, into.source.labels) == (2, ("reserved:world",))
    assert (out.source.identity, out.source.labels) == (1, ("reserved:host", "k8s:role=worker"))
    assert (out.destination.identity, out.direction) == (2, Direction.EGRESS)
    assert out.remote is out.destination
    assert out.restricting == ()


def test_a_rule_tells_policy_file_and_line(see, pack):
    flow = see(pack(rule=FIRST_RULE + 1, reason=Reason.POLICY_DENY))
    assert (flow.origin.policy, flow.rule_name) == ("ban", "specs[1].ingressDeny[2]")
    assert (flow.origin.file, flow.origin.line) == ("/etc/meshwall/policies.d/ban.yaml", 20)
    assert flow.restricting == ()


def test_an_allowed_connection_is_a_policy_verdict_with_names(see, pack):
    flow = see(
        pack(saddr="10.2.1.7", identity=70_000, kind=EventKind.ALLOW, reason=0, verdict=1, rule=FIRST_RULE)
    )
    assert (flow.type, flow.verdict, flow.drop) == (
        FlowType.POLICY_VERDICT,
        FlowVerdict.FORWARDED,
        DropReason.DROP_REASON_UNKNOWN,
    )
    assert (flow.source.namespace, flow.source.pod, flow.source.cluster) == (
        "mon",
        "metrics-server-0",
        "beta",
    )
    assert "k8s:app=metrics-server" in flow.source.labels
    assert flow.origin.log == "kubelet access"


def test_audit_keeps_the_reason_that_would_have_dropped(see, pack):
    flow = see(pack(kind=EventKind.AUDIT))
    assert (flow.type, flow.verdict, flow.reason) == (
        FlowType.POLICY_VERDICT,
        FlowVerdict.AUDIT,
        "policy-default",
    )


def test_a_packet_refused_by_the_parser_blames_no_rule(see, pack):
    flow = see(pack(reason=Reason.BAD_IHL, rule=0, hook=Hook.TCX_INGRESS))
    assert (flow.rule, flow.rule_name, flow.restricting) == (None, "", ())
    assert flow.drop is DropReason.INVALID_PACKET_DROPPED
    assert summary(flow) == "TCP Flags: SYN; bad-ihl"


@pytest.mark.parametrize(
    ("kind", "reason", "said"),
    [
        (EventKind.ALLOW, Reason.NOT_ENFORCED, "TCP Flags: SYN; not-enforced"),
        (EventKind.DROP, Reason.FRAG_DENIED, "TCP Flags: SYN; frag-denied"),
        (EventKind.DROP, Reason.FRAG_NO_FIRST, "TCP Flags: SYN; frag-no-first"),
    ],
)
def test_where_no_cell_was_read_its_zero_is_not_taken_for_the_default_deny(see, pack, kind, reason, said):
    flow = see(pack(kind=kind, reason=reason, rule=0))
    assert (flow.rule, flow.restricting, summary(flow)) == (None, (), said)


def test_a_name_of_another_identity_is_not_shown(see, tables, pack):
    tables.ips.put(IpKey(parse_prefix("10.2.1.7"), "mesh:beta"), IpRow(71_000, "someone-else", "mon", ""))
    assert see(pack(saddr="10.2.1.7", identity=70_000)).source.pod == ""


def test_a_node_of_another_cluster_is_named(see, pack):
    side = see(pack(saddr="10.2.0.5", identity=6)).source
    assert (side.node, side.cluster, side.labels) == ("b1", "beta", ("reserved:remote-node",))


@pytest.mark.parametrize(
    ("identity", "label"), [(0x0100_0004, "reserved:world"), (0x0200_0004, "reserved:remote-node")]
)
def test_numbers_that_the_data_path_gave_itself_have_labels_too(see, pack, identity, label):
    assert see(pack(identity=identity)).source.labels == (label,)


def test_a_node_with_a_number_of_its_own_has_its_labels(see, tables, pack):
    key = NodeKey("beta", "b1")
    tables.nodes.put(key, replace(tables.nodes[key], labels=parse_labels(["k8s:rack=r1"])))
    side = see(pack(saddr="10.2.0.5", identity=0x0200_0004)).source
    assert (side.node, side.labels) == ("b1", ("node:rack=r1", "reserved:remote-node"))


def test_labels_of_an_identity_that_has_gone_are_still_told(see, tables, pack):
    raw = pack(saddr="10.2.1.7", identity=70_000)
    see(raw)
    tables.identities.delete(70_000)
    assert "k8s:app=metrics-server" in see(raw).source.labels


def test_an_old_event_is_explained_by_the_rules_of_its_own_generation(see, tables, pack):
    raw = pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=5)
    assert see(raw).origin.policy == "kubelet"
    tables.rules.put(FIRST_RULE, replace(tables.rules[FIRST_RULE], policy="other"))
    assert see(pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=6)).origin.policy == "other"
    assert see(raw).origin.policy == "kubelet"


def test_rules_belong_to_the_generation_that_is_enforced_when_they_change(see, tables, pack):
    see(pack(generation=5))
    tables.rules.put(FIRST_RULE, replace(tables.rules[FIRST_RULE], policy="other"))
    see.directory.generation_now = lambda: 7
    late = see(pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=6))  # seen after the flip to 7
    assert late.origin.policy == "kubelet"
    assert see(pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=7)).origin.policy == "other"


def test_a_new_data_path_does_not_explain_events_of_the_old_one(see, tables, pack):
    raw = pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=5)
    see(raw)
    see.directory.new_data_path(1)
    tables.rules.put(FIRST_RULE, replace(tables.rules[FIRST_RULE], policy="other"))
    see(pack(generation=1))
    see(raw)
    assert see.directory.flow(0, next(events(raw)), 0).origin is None
    assert see.directory.flow(1, next(events(raw)), 0).origin.policy == "other"


def test_a_generation_that_is_forgotten_has_no_rule_rather_than_a_wrong_one(see, tables, pack):
    raw = pack(rule=FIRST_RULE, reason=Reason.POLICY_DENY, generation=5)
    see(raw)
    for generation in range(6, 6 + GENERATIONS):
        see(pack(generation=generation))
    assert see.directory.flow(0, next(events(raw)), 0).origin is None


def test_a_frame_without_ip_and_one_of_unknown_protocol_have_a_summary(see, pack):
    frame = see(pack(family=0, proto=0, ethertype_be=b"\x88\xcc", reason=Reason.NON_IP_REFUSED))
    assert (frame.source.address, summary(frame)) == ("", "ethertype 0x88cc; non-ip-refused")
    assert summary(see(pack(proto=112))) == "protocol 112"
    assert summary(see(pack(proto=17, packet_class=PacketClass.FRAG_NONFIRST))) == "UDP fragment"
    assert summary(see(pack(proto=1, icmp_type=8))) == "ICMPv4 EchoRequest"
    assert summary(see(pack(proto=58, icmp_type=1, icmp_code=4))) == "ICMPv6 DestinationUnreachable code 4"


def test_icmp_has_no_ports_even_if_the_event_carries_an_identifier(see, pack):
    flow = see(pack(proto=1, sport=77, dport=77))
    assert (flow.source.port, flow.destination.port) == (0, 0)
