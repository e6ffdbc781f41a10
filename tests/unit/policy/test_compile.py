"""What the compiler promises beside the meaning: failsafe, fixed rules, sharing, and rule numbers."""

import json
from dataclasses import replace

import pytest

from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, Proto, parse_prefix
from daemon.model.rule import CidrGroup
from daemon.model.verdict import FIRST_RULE, CellFlag, FixedRule, Verdict, unpack_cell
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import CompileSettings, Failsafe, Subject, compile_policy
from daemon.policy.explain import Peer, Query, explain
from daemon.policy.tables import PORTLESS

HOST = Subject(Identity(1), parse_labels(["reserved:host"]))
POD = Identity(70_000)
PODS = {POD: parse_labels(["k8s:io.kubernetes.pod.namespace=prod", "k8s:app=web"])}


def policies(*specs):
    text = "\n".join(
        "---\n"
        + json.dumps(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumClusterwideNetworkPolicy",
                "metadata": {"name": f"p{at}"},
                "spec": spec,
            }
        )
        for at, spec in enumerate(specs)
    )
    found = parse_documents(text, "a.yaml")
    assert not found.problems
    return found.policies


def ingress(*rules, **more):
    return {"nodeSelector": {}, "ingress": list(rules), **more}


def answer(tables, row, proto, port=PORTLESS, direction=Direction.INGRESS):
    return unpack_cell(tables.matrix(direction).cell(row[direction], proto, port))[:2]


def test_the_failsafe_list_is_painted_over_denies():
    safe = (Failsafe(Direction.INGRESS, Proto.TCP, 22), Failsafe(Direction.EGRESS, Proto.UDP, 53))
    deny = {"nodeSelector": {}, "ingressDeny": [{"fromEntities": ["all"]}]}
    tables = compile_policy(policies(deny), {}, HOST, PODS, CompileSettings(failsafe=safe))
    for row in (tables.identities[POD], tables.unknown, tables.rows_of_address(parse_prefix("8.8.8.8"))):
        assert answer(tables, row, 6, 22) == (Verdict.ALLOW, FixedRule.FAILSAFE)
        assert answer(tables, row, 6, 23) == (Verdict.DENY, FIRST_RULE)
        assert answer(tables, row, 6) == (Verdict.DENY, FIRST_RULE)  # a fragment without its first one
    assert not tables.egress.enforced


def test_a_failsafe_entry_can_be_narrowed_to_sources():
    safe = (Failsafe(Direction.INGRESS, Proto.TCP, 22, (parse_prefix("10.0.0.0/8"),)),)
    tables = compile_policy(policies(ingress({})), {}, HOST, PODS, CompileSettings(failsafe=safe))
    assert answer(tables, tables.rows_of_address(parse_prefix("10.1.1.1")), 6, 22) == (
        Verdict.ALLOW,
        FixedRule.FAILSAFE,
    )
    assert answer(tables, tables.rows_of_address(parse_prefix("11.1.1.1")), 6, 22)[0] is Verdict.DEFAULT_DENY


def test_the_failsafe_list_is_there_where_nothing_is_enforced_for_a_panic_that_enforces_everything():
    safe = (Failsafe(Direction.INGRESS, Proto.TCP, 22), Failsafe(Direction.EGRESS, Proto.UDP, 53))
    tables = compile_policy((), {}, HOST, PODS, CompileSettings(failsafe=safe))
    row = tables.rows_of(POD)
    assert answer(tables, row, 6, 22) == (Verdict.ALLOW, FixedRule.FAILSAFE)
    assert answer(tables, row, 6, 23) == (Verdict.ALLOW, FixedRule.DEFAULT_ALLOW)
    assert answer(tables, row, 17, 53, Direction.EGRESS) == (Verdict.ALLOW, FixedRule.FAILSAFE)


def test_exempt_node_ports_pass_whatever_policy_says_and_the_failsafe_list_is_stronger():
    safe = (Failsafe(Direction.INGRESS, Proto.TCP, 30_000),)
    settings = CompileSettings(failsafe=safe, exempt_ports=(30_000, 32_767))
    tables = compile_policy(policies(ingress({}, egress=[{}])), {}, HOST, PODS, settings)
    row = tables.rows_of(POD)
    for proto, port in ((6, 30_001), (17, 30_000), (132, 32_767)):
        assert answer(tables, row, proto, port) == (Verdict.ALLOW, FixedRule.EXEMPT)
    assert answer(tables, row, 6, 30_000) == (Verdict.ALLOW, FixedRule.FAILSAFE)
    assert answer(tables, row, 6, 29_999)[0] is Verdict.DEFAULT_DENY
    assert answer(tables, row, 6, 32_768)[0] is Verdict.DEFAULT_DENY
    assert answer(tables, row, 6, 30_001, Direction.EGRESS)[0] is Verdict.DEFAULT_DENY


def test_without_a_policy_nothing_is_enforced_and_every_cell_allows():
    tables = compile_policy((), {}, HOST, PODS, CompileSettings())
    assert (tables.ingress.enforced, tables.egress.enforced) == (False, False)
    assert tables.ingress.rows == ((1 << 28 | FixedRule.DEFAULT_ALLOW,),)


def test_default_denies_carry_the_fixed_rule_of_their_direction():
    tables = compile_policy((), {}, HOST, PODS, CompileSettings(mode="always"))
    assert answer(tables, tables.unknown, 6, 1) == (Verdict.DEFAULT_DENY, FixedRule.DEFAULT_DENY_INGRESS)
    assert answer(tables, tables.unknown, 6, 1, Direction.EGRESS) == (
        Verdict.DEFAULT_DENY,
        FixedRule.DEFAULT_DENY_EGRESS,
    )


def test_a_group_of_many_prefixes_shares_rows_and_groups():
    group = CidrGroup("office", tuple(parse_prefix(f"10.{at >> 8}.{at & 255}.0/24") for at in range(5_000)))
    rule = {"fromCIDRSet": [{"cidrGroupRef": "office"}]}
    tables = compile_policy(policies(ingress(rule)), {"office": group}, HOST, {}, CompileSettings())
    assert len(tables.prefixes) == 5_002
    assert len(tables.groups) == 2
    assert len(tables.ingress.rows) == 2


def test_equal_rows_and_columns_are_one():
    ports = [{"ports": [{"port": str(port), "protocol": "TCP"} for port in (22, 80, 443)]}]
    rules = [{"fromEntities": [entity], "toPorts": ports} for entity in ("health", "init")]
    tables = compile_policy(policies(ingress(*rules)), {}, HOST, PODS, CompileSettings())
    assert tables.ingress.columns.count == 2  # named ports together, and everything else
    many = {
        Identity(100_000 + at): parse_labels([f"k8s:app=a{at}", "k8s:io.kubernetes.pod.namespace=x"])
        for at in range(500)
    }
    assert len(compile_policy(policies(ingress(*rules)), {}, HOST, many, CompileSettings()).ingress.rows) == 1


def test_rule_numbers_lead_to_file_line_and_policy():
    tables = compile_policy(
        policies(ingress({"fromEntities": ["health"]}), ingress({"fromEntities": ["init"]})),
        {},
        HOST,
        {},
        CompileSettings(),
    )
    assert sorted(tables.rules) == [FIRST_RULE, FIRST_RULE + 1]
    assert [one.policy for one in tables.rules.values()] == ["p0", "p1"]
    assert all(one.file == "a.yaml" and one.line for one in tables.rules.values())


def test_a_whole_protocol_matches_packets_without_ports_and_a_range_does_not():
    whole = ingress(
        {
            "toPorts": [
                {
                    "ports": [
                        {"port": "0", "protocol": "UDP"},
                        {"port": "1", "endPort": 65535, "protocol": "TCP"},
                    ]
                }
            ]
        }
    )
    tables = compile_policy(policies(whole), {}, HOST, {}, CompileSettings())
    assert answer(tables, tables.unknown, 17)[0] is Verdict.ALLOW
    assert answer(tables, tables.unknown, 6)[0] is Verdict.DEFAULT_DENY
    assert answer(tables, tables.unknown, 47)[0] is Verdict.DEFAULT_DENY


def test_churn_of_identities_grows_no_memory():
    rule = {"fromEndpoints": [{"matchLabels": {"app": "web"}}]}
    tables = compile_policy(policies(ingress(rule)), {}, HOST, PODS, CompileSettings())
    universe = tables.compiler.universe
    for at in range(25_000):
        labels = parse_labels([f"cidr:10.{at >> 8}.{at & 255}.0/24", "reserved:world-ipv4", f"k8s:pod=p{at}"])
        universe.change({Identity(1 << 24 | at): labels}, [Identity(1 << 24 | at - 1)])
    assert len(universe.labels) == 2
    assert len(universe.classes) < 12_000
    tables = compile_policy(policies(ingress(rule)), {}, HOST, PODS, CompileSettings(), previous=tables)
    assert answer(tables, tables.identities[POD], 6, 80) == (Verdict.ALLOW, FIRST_RULE)


def rejects(tables, port):
    return bool(unpack_cell(tables.ingress.cell(tables.unknown[0], 6, port))[2] & CellFlag.REJECT)


@pytest.mark.parametrize("host_rejects", [False, True])
@pytest.mark.parametrize("denied", ["", "drop", "reject"])
def test_a_deny_rule_answers_as_its_policy_says_or_else_as_the_host_is_set(denied, host_rejects):
    ports = [{"ports": [{"port": "80", "protocol": "TCP"}]}]
    deny = {"nodeSelector": {}, "ingressDeny": [{"fromEntities": ["all"], "toPorts": ports}]}
    (policy,) = policies(deny)
    settings = CompileSettings(reject=host_rejects)
    tables = compile_policy((replace(policy, denied=denied),), {}, HOST, PODS, settings)
    wanted = denied == "reject" if denied else host_rejects
    assert rejects(tables, 80) == rejects(tables, 81) == wanted


def test_a_default_deny_answers_only_if_no_policy_that_asks_for_it_wants_silence():
    opened, closed = policies(ingress({"fromEntities": ["health"]}), ingress({"fromEntities": ["init"]}))
    loud = [replace(one, denied="reject") for one in (opened, closed)]
    assert rejects(compile_policy(loud, {}, HOST, PODS, CompileSettings()), 80)
    assert not rejects(compile_policy([loud[0], closed], {}, HOST, PODS, CompileSettings()), 80)
    assert rejects(compile_policy([loud[0], closed], {}, HOST, PODS, CompileSettings(reject=True)), 80)
    quiet = replace(closed, denied="drop")
    assert not rejects(compile_policy([loud[0], quiet], {}, HOST, PODS, CompileSettings(reject=True)), 80)
    audited = CompileSettings(audit_policies=frozenset({closed.title}))
    assert rejects(compile_policy([loud[0], closed], {}, HOST, PODS, audited), 80)
    assert rejects(compile_policy((), {}, HOST, PODS, CompileSettings(mode="always", reject=True)), 80)


def test_an_explanation_says_that_the_sender_of_a_denied_packet_is_told():
    tables = compile_policy(
        policies(ingress({"fromEntities": ["health"]})), {}, HOST, PODS, CompileSettings(reject=True)
    )
    told = explain(tables, Query(Direction.INGRESS, Peer(POD, PODS[POD]), 6, 80))
    assert told.reason == "default deny: no rule allows it (the sender is told)"
    silent = compile_policy(
        policies(ingress({"fromEntities": ["health"]})), {}, HOST, PODS, CompileSettings()
    )
    assert explain(silent, told.query).reason == "default deny: no rule allows it"
