"""Counts belong to what a rule says, over restarts, moves and new numbers."""

import json
from dataclasses import replace

import pytest

from bpf.layout import FIRST_RULE
from daemon.flows import usage as module
from daemon.flows.counters import Hits
from daemon.flows.usage import FILE, RuleUsage, rules_of
from daemon.policy.ccnp import parse_documents
from daemon.sources.holding import key_of
from daemon.state.tables import Tables

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: kubelet}
spec:
  nodeSelector: {}
  ingress:
"""
FIRST, SECOND = "  - fromCIDR: [10.0.0.0/8]\n", "  - fromEntities: [remote-node]\n"


@pytest.fixture
def kernel(monkeypatch):
    """Rule number -> hits, as the data path has them."""
    counted = {}
    monkeypatch.setattr(
        module, "read_rules", lambda _, rules: {one: counted[one] for one in rules if one in counted}
    )
    return counted


def tables_of(text, first_number=FIRST_RULE):
    tables = Tables()
    (policy,) = parse_documents(text, "/p/k.yaml").policies
    tables.policies.put(key_of(policy), policy)
    for number, rule in enumerate(rules_of([policy]), first_number):
        tables.rules.put(number, rule.origin)
    return tables, list(rules_of([policy]))


async def test_hits_add_up_and_the_last_one_has_a_time(kernel, tmp_path):
    tables, (rule, other) = tables_of(POLICY + FIRST + SECOND)
    usage = RuleUsage(tables, tmp_path, tmp_path)
    await usage.look(100.0)
    kernel[FIRST_RULE] = Hits(3, 180)
    await usage.look(110.0)
    await usage.look(120.0)
    kernel[FIRST_RULE] = Hits(5, 300)
    await usage.look(130.0)
    found = usage.of(rule)
    assert (found.packets, found.bytes, found.since, found.last) == (5, 300, 100.0, 130.0)
    assert (usage.of(other).packets, usage.of(other).last) == (0, 0.0)


async def test_a_rule_that_moves_or_gets_a_new_number_keeps_its_count(kernel, tmp_path):
    tables, (rule, _) = tables_of(POLICY + FIRST + SECOND)
    usage = RuleUsage(tables, tmp_path, tmp_path)
    kernel[FIRST_RULE] = Hits(5, 300)
    await usage.look(100.0)
    moved, (_, again) = tables_of(POLICY + SECOND + FIRST, first_number=90)
    tables.policies.replace(moved.policies.rows)
    tables.rules.replace(moved.rules.rows)
    kernel.clear()
    kernel[91] = Hits(2, 120)
    await usage.look(110.0)
    assert again.origin.index != rule.origin.index
    assert usage.of(again).packets == 7


async def test_a_changed_rule_begins_anew(kernel, tmp_path):
    tables, (rule,) = tables_of(POLICY + FIRST)
    usage = RuleUsage(tables, tmp_path, tmp_path)
    kernel[FIRST_RULE] = Hits(5, 300)
    await usage.look(100.0)
    assert usage.of(replace(rule, peers=())) is None


async def test_a_restart_goes_on_counting(kernel, tmp_path):
    tables, (rule,) = tables_of(POLICY + FIRST)
    first = RuleUsage(tables, tmp_path, tmp_path)
    kernel[FIRST_RULE] = Hits(5, 300)
    await first.look(100.0)
    first.save()
    kernel[FIRST_RULE] = Hits(1, 60)  # the first switch of a new daemon zeroes the counters
    second = RuleUsage(tables, tmp_path, tmp_path)
    second._load()
    await second.look(200.0)
    assert (second.of(rule).packets, second.of(rule).since) == (6, 100.0)


async def test_counters_that_were_zeroed_between_two_looks_are_not_subtracted(kernel, tmp_path):
    tables, (rule,) = tables_of(POLICY + FIRST)
    usage = RuleUsage(tables, tmp_path, tmp_path)
    kernel[FIRST_RULE] = Hits(50, 3_000)
    await usage.look(100.0)
    kernel[FIRST_RULE] = Hits(4, 240)
    await usage.look(110.0)
    assert usage.of(rule).packets == 54


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"packet": 1}}', "\x00"])
def test_a_damaged_record_is_left_and_counting_begins_anew(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    usage = RuleUsage(Tables(), tmp_path, tmp_path)
    usage._load()
    usage.save()
    assert json.loads((tmp_path / FILE).read_text()) == {}


def test_a_disk_that_fails_is_said(tmp_path):
    tables = Tables()
    RuleUsage(tables, tmp_path, tmp_path / "missing").save()
    assert not tables.status["rule usage"].ok
