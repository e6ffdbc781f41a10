"""What the documentation shows has to work as shown."""

import re
from pathlib import Path

import pytest

from daemon.policy.ccnp import parse_documents
from daemon.policy.check import parse_suites

PAGE = Path(__file__).resolve().parents[3] / "docs" / "policy.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
HEAD = "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: example}\n"


@pytest.mark.parametrize("text", [one for one in EXAMPLES if "PolicyTest" not in one])
def test_each_example_policy_is_valid(text):
    found = parse_documents(text if text.startswith("apiVersion") else HEAD + text, "docs/policy.md")
    assert found.problems == ()
    assert len(found.policies) == 1


def test_the_example_of_a_unit_test_is_valid():
    (text,) = [one for one in EXAMPLES if "PolicyTest" in one]
    suites, problems = parse_suites(text, "docs/policy.md")
    assert problems == []
    assert len(suites[0].expectations) == 10
