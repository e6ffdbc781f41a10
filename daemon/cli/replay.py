"""`meshwall policy replay` and `suggest`: policies against recorded traffic."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon.cli.client import DaemonError, Json, ask, fail, get, printable, show, table
from daemon.cli.flows import moment
from daemon.cli.policy import CannotAnswerError, main_guard, origin_json, read_policies
from daemon.model.identity import Identity, Reserved
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, Proto, parse_prefix
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.ccnp import LanguageSettings
from daemon.policy.compile import CompileSettings, Failsafe, Subject, compile_policy
from daemon.policy.explain import Peer, Query, port_text
from daemon.policy.replay import Changed, Replayed, Seen, replay, totals
from daemon.policy.suggest import is_outside, peer_name, suggest
from daemon.policy.tables import PORTLESS

GOOD, CHANGES = 0, 1
DEFAULT_SINCE = "24h"
CURRENT = Path("/etc/meshwall/policies.d")
_VERDICTS = {"FORWARDED": "allow", "REDIRECTED": "allow", "DROPPED": "deny", "AUDIT": "audit"}
_DECIDED = ("forwarded", "policy-default", "policy-deny")  # reasons: all else was not policy's to say
_L4 = {"TCP": Proto.TCP, "UDP": Proto.UDP, "SCTP": Proto.SCTP, "ICMPv4": Proto.ICMP, "ICMPv6": Proto.ICMPV6}

Subparsers = argparse._SubParsersAction


def register(verbs: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add both verbs."""
    again = verbs.add_parser(
        "replay",
        help="which recorded flows would change verdict under other policies (exit status 1 if any do)",
        description="Judge the recorded flows by the policies in PATH, which stand for the whole set unless --add.",
    )
    again.add_argument("paths", nargs="+", metavar="PATH")
    again.add_argument(
        "--add",
        action="store_true",
        help=f"PATH is added to {CURRENT}, or replaces policies of the same name",
    )
    _times(again)
    again.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table")
    again.set_defaults(run=_replay)
    draft = verbs.add_parser("suggest", help="draft a policy that allows what was seen, with comments")
    draft.add_argument("--name", default="suggested", help="of the policy")
    draft.add_argument(
        "--dropped",
        action="store_true",
        help="also allow what was dropped, not only what passed or was audited",
    )
    draft.add_argument("--direction", choices=["ingress", "egress"], help="one direction only")
    _times(draft)
    draft.set_defaults(run=_suggest)


def _times(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since",
        type=moment,
        default=None,
        metavar="TIME",
        help=f"5m, 2h30m or a time (default {DEFAULT_SINCE})",
    )
    parser.add_argument("--until", type=moment, metavar="TIME", help="likewise")


# What the daemon knows


def _groups(options: argparse.Namespace) -> list[Json]:
    body = ask(
        options, "/v1/flows/groups", since=options.since or moment(DEFAULT_SINCE), until=options.until or ""
    )
    found: list[Json] = [json.loads(line) for line in body.splitlines()]
    beyond = sum(one.get("beyond", 0) for one in found)
    if beyond:
        print(f"meshwall policy: {beyond} flows of further kinds are left out", file=sys.stderr)
    return [one for one in found if "flow" in one]


def seen_of(groups: Sequence[Json]) -> Iterator[Seen]:
    """Groups as /v1/flows/groups has them, without those that policy had no say in."""
    for one in groups:
        flow, ours = one["flow"], one["meshwall"]
        if ours.get("reason", "forwarded") not in _DECIDED or "IP" not in flow:
            continue
        direction = Direction[flow["traffic_direction"]]
        side = "source" if direction is Direction.INGRESS else "destination"
        peer = _peer(flow[side], flow["IP"][side])
        proto, port = _port(flow.get("l4", {}))
        yield Seen(
            Query(direction, peer, proto, port),
            _VERDICTS.get(flow["verdict"], "deny"),
            ours.get("rule_name", ""),
            flow[side].get("pod_name") or ", ".join(flow.get(f"{side}_names", ())) or peer_name(peer),
            one["count"],
            one["first"],
            one["last"],
        )


def _peer(endpoint: Json, address: str) -> Peer:
    number = Identity(endpoint.get("identity", 0))
    if is_outside(number):
        return Peer(number, None, parse_prefix(address))
    labels = endpoint.get("labels")
    return Peer(number, parse_labels(tuple(labels)) if labels else None)


def _port(l4: Json) -> tuple[int, int]:
    for name, fields in l4.items():
        proto = _L4[name]
        kind = "type" if proto in (Proto.ICMP, Proto.ICMPV6) else "destination_port"
        return proto, fields.get(kind, 0)
    return 0, PORTLESS


def _subject(options: argparse.Namespace) -> tuple[Subject, CompileSettings, Json]:
    found = get(options, "/v1/subject")
    settings = CompileSettings(
        mode=found["enforcement"],
        ipv4=found["ipv4"],
        ipv6=found["ipv6"],
        cluster_name=found["cluster"],
        default_local_cluster=found["default_local_cluster"],
        node_selector_labels=found["node_selector_labels"],
        audit_policies=frozenset(found["audit_policies"]),
        failsafe=tuple(
            Failsafe(
                Direction[one["direction"].upper()],
                Proto[one["protocol"]],
                one["port"],
                tuple(map(parse_prefix, one["cidrs"])),
            )
            for one in found["failsafe"]
        ),
    )
    return Subject(Identity(Reserved.HOST), parse_labels(tuple(found["labels"]))), settings, found


# Verbs


@main_guard
def _replay(options: argparse.Namespace) -> int:
    try:
        subject, settings, _ = _subject(options)
        groups = _groups(options)
    except DaemonError as error:
        return fail(error)
    policies, cidr_groups = _policies(options, settings)
    compiled = compile_policy(policies, cidr_groups, subject, {}, settings)
    found = replay(compiled, seen_of(groups))
    show(_json(found), options.output, lambda _: _lines(found))
    return CHANGES if found.changed else GOOD


def _policies(
    options: argparse.Namespace, settings: CompileSettings
) -> tuple[tuple[Policy, ...], dict[str, CidrGroup]]:
    language = LanguageSettings(node_selector_labels=settings.node_selector_labels)
    loaded = read_policies(options.paths, language)
    for one in loaded.problems:
        print(one, file=sys.stderr)
    if loaded.errors:
        raise CannotAnswerError("the policies have errors")
    if not options.add:
        return loaded.policies, loaded.groups
    current = read_policies([str(CURRENT)], language)
    named = {(one.kind, one.namespace, one.name) for one in loaded.policies}
    kept = [one for one in current.policies if (one.kind, one.namespace, one.name) not in named]
    return (*kept, *loaded.policies), current.groups | loaded.groups


def _json(found: Replayed) -> Json:
    cut, opened = totals(found.changed)
    return {
        "flows": found.flows,
        "kinds": found.groups,
        "dropped_then": cut,
        "passed_then": opened,
        "changes": [_change_json(one) for one in found.changed],
    }


def _change_json(one: Changed) -> Json:
    seen = one.seen
    return {
        "direction": str(seen.query.direction),
        "peer": seen.name,
        "identity": seen.query.peer.identity,
        "port": port_text(seen.query.proto, seen.query.port, seen.query.port),
        "flows": seen.flows,
        "first": seen.first,
        "last": seen.last,
        "before": seen.verdict,
        "before_rule": seen.rule,
        "after": one.now.word,
        "after_reason": one.now.reason,
        "after_rule": origin_json(one.now.rule) if one.now.rule else None,
    }


def _lines(found: Replayed) -> list[str]:
    if not found.changed:
        return [f"no change for {found.flows} recorded flows of {found.groups} kinds"]
    rows: list[Sequence[object]] = [("", "FLOWS", "PEER", "PORT", "LAST SEEN", "BEFORE", "AFTER")]
    for one in found.changed:
        seen = one.seen
        way = "from" if seen.query.direction is Direction.INGRESS else "to"
        port = port_text(seen.query.proto, seen.query.port, seen.query.port)
        rows.append(
            (
                "+" if one.opens else "-",
                seen.flows,
                f"{way} {seen.name}",
                port,
                seen.last[:19].replace("T", " "),
                f"{seen.verdict} ({seen.rule})" if seen.rule else seen.verdict,
                f"{one.now.word}: {one.now.reason}",
            )
        )
    cut, opened = totals(found.changed)
    summary = f"of {found.flows} recorded flows {cut} would be dropped, {opened} would pass"
    return [*table(rows), printable(summary)]


@main_guard
def _suggest(options: argparse.Namespace) -> int:
    try:
        subject, _, _ = _subject(options)
        groups = _groups(options)
    except DaemonError as error:
        return fail(error)
    wanted = [
        one
        for one in seen_of(groups)
        if (options.dropped or one.verdict != "deny")
        and options.direction in (None, str(one.query.direction))
    ]
    if not wanted:
        print(
            "meshwall policy suggest: nothing was seen in that time; new connections are recorded while a policy is "
            "enforced or audited",
            file=sys.stderr,
        )
        return CHANGES
    draft = suggest(wanted, name=options.name, node_labels=subject.labels)
    print(draft.text, end="")
    for text in draft.omitted:
        print(f"meshwall policy suggest: {printable(text)}", file=sys.stderr)
    return GOOD
