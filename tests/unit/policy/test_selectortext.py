"""Label selectors as people type them."""

import pytest

from daemon.model.labels import parse_labels
from daemon.policy.matching import matches
from daemon.policy.selectortext import parse_selector

WEB = parse_labels(["k8s:app=web", "k8s:tier=front", "node:canary"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True), ("app=web", True), ("app==db", False), ("app!=db", True), ("app!=web", False),
        ("k8s:app=web", True), ("node:app=web", False), ("canary", True), ("!canary", False), ("!other", True),
        ("app in (web, db),tier=front", True), ("app notin (web)", False), ("app=web, tier=back", False),
    ],
)  # fmt: skip
def test_a_selector_matches_when_all_its_requirements_hold(text: str, expected: bool) -> None:
    assert matches(parse_selector(text), WEB) is expected


@pytest.mark.parametrize("text", ["app in (web", "app web", "=web", "a=b,,c", "!"])
def test_what_is_no_selector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_selector(text)
