"""What a policy set would have done with traffic that was seen: pure, on groups of equal flows."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from daemon.policy.compile import Compiled
from daemon.policy.explain import Explanation, Query, explain


class Seen(NamedTuple):
    """Flows that policy cannot tell apart. `verdict` is what became of them: `allow`, `deny`, `audit`."""

    query: Query
    verdict: str
    rule: str  # as it was shown; empty when none decided
    name: str  # of the peer, for people
    flows: int
    first: str  # RFC 3339
    last: str


class Changed(NamedTuple):
    """A group whose fate differs, and why."""

    seen: Seen
    now: Explanation

    @property
    def opens(self) -> bool:
        """It was dropped and would pass; otherwise it passed and would be dropped."""
        return self.now.passes


class Replayed(NamedTuple):
    """The outcome, in flows. Groups are ordered by what would be cut first, then by their number of flows."""

    flows: int
    groups: int
    changed: tuple[Changed, ...]


def replay(compiled: Compiled, seen: Iterable[Seen]) -> Replayed:
    """Judge every group again. Audited traffic passed: it changes only where it would really be dropped."""
    flows = groups = 0
    changed = []
    for one in seen:
        flows += one.flows
        groups += 1
        now = explain(compiled, one.query, nearest=1)
        if now.passes != (one.verdict != "deny"):
            changed.append(Changed(one, now))
    changed.sort(key=lambda one: (one.opens, -one.seen.flows))
    return Replayed(flows, groups, tuple(changed))


def totals(changed: Sequence[Changed]) -> tuple[int, int]:
    """Flows that would be dropped, and flows that would pass."""
    return (
        sum(one.seen.flows for one in changed if not one.opens),
        sum(one.seen.flows for one in changed if one.opens),
    )
