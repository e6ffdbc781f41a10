"""/v1/report: every rule with its owner, reason, review date, use, and what makes it useless: for those who review."""

import asyncio
import time
from collections.abc import Sequence

from aiohttp import web

from daemon.api.app import Json, stream_rows
from daemon.api.resources import policy_state, rule_json
from daemon.flows.usage import RuleUsage, Usage
from daemon.model.rule import Policy
from daemon.policy.advice import shadowed
from daemon.state.audit import audited
from daemon.state.tables import HostRow, Tables

RuleId = tuple[str, str, int, bool, int, int]


def routes(tables: Tables, usage: RuleUsage) -> list[web.RouteDef]:
    """The handler."""

    async def report(request: web.Request) -> web.StreamResponse:
        policies = [policy for _, policy in sorted(tables.policies.rows.items())]
        useless = await asyncio.to_thread(_useless, policies)
        host, said = tables.host.get("host"), audited(tables)
        rows = [
            rule_json(rule)
            | _of_policy(policy, policy_state(tables, said, policy)[0])
            | _of_use(usage.of(rule))
            | {"line": rule.origin.line, "useless": useless.get(rule.origin.key, "")}
            for policy in policies
            for spec in policy.specs
            for rule in spec.rules
        ]
        return await stream_rows(request, _head(host), "rules", rows)

    return [web.get("/v1/report", report)]


def _head(host: HostRow | None) -> Json:
    return {"node": host.name if host else "", "cluster": host.cluster if host else "", "made": time.time()}


def _useless(policies: Sequence[Policy]) -> dict[RuleId, str]:
    return {rule.origin.key: text for rule, text in shadowed(policies)}


def _of_policy(policy: Policy, state: str) -> Json:
    review = policy.review
    return {
        "policy": policy.title,
        "kind": policy.kind,
        "state": state,
        "owner": review.owner,
        "reason": review.reason,
        "review_by": review.by,
        "review_due": bool(review.by) and review.by < time.strftime("%Y-%m-%d"),
        "file": policy.file,
    }


def _of_use(used: Usage | None) -> Json:
    found = used or Usage()
    return {
        "packets": found.packets,
        "bytes": found.bytes,
        "counted_since": found.since,
        "last_hit": found.last,
    }
