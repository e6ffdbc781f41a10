"""`meshwall policy`: what can be said about policy files without a daemon and without root.

Exit status: 0 good, 1 findings (invalid documents, failed tests, a difference), 2 the question could not be
answered.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from daemon.model.identity import Identity, Reserved, reserved_labels, reserved_name
from daemon.model.labels import K8S, RESERVED, UNSPEC, Label, LabelSet, parse_label
from daemon.model.net import Direction, Prefix, Proto, parse_prefix
from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy, RuleOrigin
from daemon.policy import lower
from daemon.policy.advice import advise
from daemon.policy.ccnp import LanguageSettings, Parsed, parse_cidr_list, parse_documents
from daemon.policy.check import Outcome, Suite, junit, parse_suites, run_suite
from daemon.policy.compile import Compiled, CompileSettings, Failsafe, Subject, compile_policy
from daemon.policy.diff import Change, PolicySet, differences, peer_classes
from daemon.policy.explain import Explanation, Peer, Query, describe, explain
from daemon.policy.matrix import Reach, reachability

GOOD, FINDINGS, ERROR = 0, 1, 2
DEFAULT_DIRECTORY = Path("/etc/meshwall/policies.d")
SUFFIXES = (".yaml", ".yml", ".json", ".cidrs")
MAX_FILE_BYTES = 1 << 20
MAX_LIST_BYTES = 64 << 20  # .cidrs: one prefix a line, read without YAML
DEFAULT_FAILSAFE = (
    Failsafe(Direction.INGRESS, Proto.TCP, 22),
    Failsafe(Direction.INGRESS, Proto.UDP, 68),
    Failsafe(Direction.INGRESS, Proto.UDP, 546),
    Failsafe(Direction.EGRESS, Proto.TCP, 53),
    Failsafe(Direction.EGRESS, Proto.UDP, 53),
    Failsafe(Direction.EGRESS, Proto.UDP, 67),
    Failsafe(Direction.EGRESS, Proto.UDP, 547),
)
_PROTOCOLS = {
    "tcp": Proto.TCP,
    "udp": Proto.UDP,
    "sctp": Proto.SCTP,
    "icmp": Proto.ICMP,
    "icmpv6": Proto.ICMPV6,
}


class CannotAnswerError(Exception):
    """The question itself is wrong, or a file cannot be read."""


class Loaded(NamedTuple):
    """Everything that files hold."""

    policies: tuple[Policy, ...]
    groups: dict[str, CidrGroup]
    problems: tuple[Problem, ...]
    files: tuple[str, ...]

    @property
    def errors(self) -> list[Problem]:
        return [one for one in self.problems if one.severity == "error"]


# Arguments


def register(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    online: Iterable[Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]] = (),
) -> None:
    """Add `policy` with its offline verbs; each of `online` adds verbs that need the daemon."""
    parser = subparsers.add_parser("policy", help="check, explain, test and compare policies")
    parser.set_defaults(run=lambda _: _usage(parser))
    verbs = parser.add_subparsers(metavar="VERB")
    _register_check(verbs)
    _register_explain(verbs)
    _register_test(verbs)
    _register_diff(verbs)
    _register_matrix(verbs)
    for add in online:
        add(verbs)


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return ERROR


def _register_check(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = verbs.add_parser(
        "check",
        aliases=["validate"],
        help="find errors, typing mistakes and rules that do not do what they seem to",
    )
    _paths(check)
    _language(check)
    check.add_argument("--strict", action="store_true", help="warnings count as findings")
    check.add_argument("--no-warnings", action="store_true", help="errors only")
    check.add_argument(
        "--known-address",
        action="append",
        default=[],
        metavar="IP=WHO",
        help="an address of a node or pod, for example 10.1.0.11=node/k8s-1: CIDR peers do not match it",
    )
    check.set_defaults(run=run_check)


def _register_explain(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "explain",
        aliases=["trace"],
        help="the verdict for one packet, and why",
        description="PEER is an address, an identity number, an entity (world, remote-node, ...), `unknown`, "
        "or labels such as k8s:app=web,k8s:io.kubernetes.pod.namespace=prod.",
    )
    _paths(parser)
    _language(parser)
    _subject(parser)
    parser.add_argument("-s", "--src", metavar="PEER", help="a packet from PEER to the subject")
    parser.add_argument("-d", "--dst", metavar="PEER", help="a packet from the subject to PEER")
    parser.add_argument(
        "--dport",
        required=True,
        action="append",
        metavar="PORT/PROTO",
        help="10250/TCP, 53/UDP, 8/ICMP, or a protocol",
    )
    parser.add_argument(
        "--expect", choices=["allow", "deny"], help="exit status 1 if the verdict is another one"
    )
    parser.set_defaults(run=run_explain)


def _register_test(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("test", help="run policy unit tests (docs/policy.md tells the format)")
    parser.add_argument(
        "paths", nargs="+", metavar="FILE", help="test files, or directories with *.test.yaml"
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the results as JUnit XML")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print what passed")
    _output(parser)
    parser.set_defaults(run=run_test)


def _register_diff(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "diff", help="which peers and ports change verdict between two policy sets (exit status 1 if any do)"
    )
    parser.add_argument("old", metavar="OLD", nargs="?", default=str(DEFAULT_DIRECTORY))
    parser.add_argument("new", metavar="NEW")
    _language(parser)
    _subject(parser)
    parser.set_defaults(run=run_diff)


def _register_matrix(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("matrix", help="the compiled reachability table: who reaches which ports")
    _paths(parser)
    _language(parser)
    _subject(parser)
    parser.set_defaults(run=run_matrix)


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table")


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help=f"files, directories or - (default {DEFAULT_DIRECTORY})"
    )
    parser.add_argument("-f", "--filename", action="append", default=[], metavar="PATH", help="the same")


def _language(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("language")
    group.add_argument(
        "--allow-unenforced",
        action="store_true",
        help="report what nothing enforces yet instead of refusing it",
    )
    group.add_argument(
        "--no-node-labels", action="store_true", help="fromNodes and toNodes are not available"
    )
    group.add_argument("--extended-protocols", action="store_true", help="VRRP and IGMP may be named")
    _output(parser)


def _subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("subject")
    group.add_argument(
        "--node-labels", default="", metavar="K=V,...", help="labels of this host (the default subject)"
    )
    group.add_argument(
        "--endpoint", metavar="LABELS", help="a workload with these labels instead of the host"
    )
    group.add_argument("--cluster", default="default", help="name of the local cluster")
    group.add_argument(
        "--default-local-cluster", action="store_true", help="selectors mean the local cluster"
    )
    group.add_argument("--enforcement", choices=["default", "always", "never"], default="default")
    group.add_argument("--family", choices=["dual", "ipv4", "ipv6"], default="dual")
    group.add_argument("--named-port", action="append", default=[], metavar="NAME=PORT/PROTO")
    group.add_argument("--failsafe", action="store_true", help="with the default failsafe list painted over")
    group.add_argument(
        "--exempt-node-ports",
        default="",
        metavar="FIRST-LAST",
        help="as with `node_ports.mode: exempt` in the settings",
    )


# Reading


def read_policies(paths: Sequence[str], settings: LanguageSettings) -> Loaded:
    """Everything in the files; directories are read in name order, without their sub-directories."""
    policies: list[Policy] = []
    groups: dict[str, CidrGroup] = {}
    problems: list[Problem] = []
    files = _files(paths or [str(DEFAULT_DIRECTORY)])
    for name, text in files:
        if isinstance(text, Problem):
            problems.append(text)
            continue
        parsed = _parse(name, text, settings)
        policies += parsed.policies
        problems += parsed.problems
        for group in parsed.groups:
            if group.name in groups:
                problems.append(
                    Problem(name, 0, 0, "metadata.name", f"CIDR group {group.name} is defined twice")
                )
            groups[group.name] = group
    problems += _twice(policies)
    return Loaded(tuple(policies), groups, tuple(problems), tuple(name for name, _ in files))


def _parse(name: str, text: str, settings: LanguageSettings) -> Parsed:
    if name.endswith(".cidrs"):
        return parse_cidr_list(text, name)
    return parse_documents(text, name, settings)


def _twice(policies: Iterable[Policy]) -> list[Problem]:
    """The same object in two files."""
    seen: dict[tuple[str, str, str], Policy] = {}
    found = []
    for policy in policies:
        key = (policy.kind, policy.namespace, policy.name)
        before = seen.setdefault(key, policy)
        if before is not policy and before.file != policy.file:
            text = f"{policy.kind} {policy.title} is also defined in {before.file}:{before.line}"
            found.append(Problem(policy.file, policy.line, 1, "metadata.name", text))
    return found


def _files(paths: Sequence[str]) -> list[tuple[str, str | Problem]]:
    """(name, text) of every file that the paths mean; or why it has no text, so that the others are judged too."""
    found: list[tuple[str, str | Problem]] = []
    for path in paths:
        if path == "-":
            found.append(("<stdin>", sys.stdin.read()))
        elif Path(path).is_dir():
            inside = sorted(one for one in Path(path).iterdir() if one.suffix in SUFFIXES and one.is_file())
            found += [(str(one), _text(one)) for one in inside if not one.name.startswith(".")]
        else:
            found.append((path, _text(Path(path))))
    return found


def _text(path: Path) -> str | Problem:
    limit = MAX_LIST_BYTES if path.suffix == ".cidrs" else MAX_FILE_BYTES
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise CannotAnswerError(f"{path}: {error.strerror}") from None
    if len(raw) > limit:
        return Problem(str(path), 0, 0, "", f"larger than {limit} bytes, the limit for one file")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Problem(str(path), line, 1, "", "not UTF-8 text")


def _readable(path: Path) -> str:
    text = _text(path)
    if isinstance(text, Problem):
        raise CannotAnswerError(str(text))
    return text


def _usable(options: argparse.Namespace, paths: Sequence[str]) -> Loaded:
    """Policies fit for a question; errors in them end the command."""
    loaded = read_policies(paths, language(options))
    for one in loaded.problems:
        print(one, file=sys.stderr)
    if loaded.errors:
        raise CannotAnswerError("the policies have errors")
    return loaded


def language(options: argparse.Namespace) -> LanguageSettings:
    """The language settings that the options ask for."""
    return LanguageSettings(
        node_selector_labels=not options.no_node_labels,
        extended_protocols=options.extended_protocols,
        allow_unenforced=options.allow_unenforced,
    )


def settings(options: argparse.Namespace) -> CompileSettings:
    """The compile settings that the options ask for."""
    named: dict[str, tuple[tuple[int, int], ...]] = {}
    for text in options.named_port:
        name, equals, rest = text.partition("=")
        if not equals:
            raise CannotAnswerError(f"--named-port {text}: expected NAME=PORT/PROTO")
        named[name.lower()] = (*named.get(name.lower(), ()), parse_port(rest))
    return CompileSettings(
        mode=options.enforcement,
        ipv4=options.family != "ipv6",
        ipv6=options.family != "ipv4",
        cluster_name=options.cluster,
        default_local_cluster=options.default_local_cluster,
        node_selector_labels=not options.no_node_labels,
        named_ports=named,
        failsafe=DEFAULT_FAILSAFE if options.failsafe else (),
        exempt_ports=_port_range(options.exempt_node_ports),
    )


def _port_range(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 65535):
        raise CannotAnswerError(f"--exempt-node-ports {text}: expected FIRST-LAST within 1-65535")
    return int(first), int(last)


def subject(options: argparse.Namespace) -> Subject:
    """The subject that the options ask for: this host unless a workload is given."""
    if options.endpoint:
        return Subject(Identity(0), labels(options.endpoint))
    return Subject(Identity(Reserved.HOST), labels(options.node_labels) | {Label(RESERVED, "host")})


def labels(text: str) -> LabelSet:
    """Labels separated by commas; without a source they are `k8s:`."""
    found = [parse_label(part.strip()) for part in text.split(",") if part.strip()]
    return frozenset(one._replace(source=K8S) if one.source == UNSPEC else one for one in found)


def parse_peer(text: str) -> Peer:
    """See the description of `policy explain`."""
    if text == "unknown":
        return Peer()
    if text.isdigit():
        number = Identity(int(text))
        known = reserved_name(number) is not None and number != 0
        return Peer(number, reserved_labels(number) if known else None)
    for one in Reserved:
        if text == reserved_name(Identity(one)):
            return Peer(Identity(one), reserved_labels(Identity(one)))
    if "=" not in text:
        try:
            return Peer(address=parse_prefix(text))
        except ValueError:
            pass
    if "=" not in text and ":" not in text:
        raise CannotAnswerError(
            f"{text}: expected an address, an identity number, an entity or labels (key=value,...)"
        )
    return Peer(labels=labels(text))


def parse_port(text: str) -> tuple[int, int]:
    """(protocol, port) of `10250/TCP`, `tcp/10250`, `8/ICMP` or `TCP` (no port); a bare number is TCP."""
    first, slash, second = text.replace(":", "/").partition("/")
    if not slash:
        first, second = (first, "tcp") if first.isdigit() else ("", first)
    if first.lower() in _PROTOCOLS:
        first, second = second, first
    proto = _PROTOCOLS.get(second.lower())
    limit = 255 if proto in (Proto.ICMP, Proto.ICMPV6) else 65535
    if proto is None or (first and not first.isdigit()) or int(first or 0) > limit:
        raise CannotAnswerError(f"{text}: expected PORT/PROTO, for example 10250/TCP or 8/ICMP")
    return int(proto), int(first) if first else -1


# Verbs


def main_guard(work: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A verb whose wrong questions end in one line and exit status 2."""

    def guarded(options: argparse.Namespace) -> int:
        try:
            return work(options)
        except CannotAnswerError as error:
            print(f"meshwall policy: {error}", file=sys.stderr)
            return ERROR

    return guarded


@main_guard
def run_check(options: argparse.Namespace) -> int:
    """`policy check`."""
    loaded = read_policies([*options.paths, *options.filename], language(options))
    found = list(loaded.problems)
    if not options.no_warnings:
        found += advise(
            loaded.policies, loaded.groups, _known_addresses(options.known_address), DEFAULT_FAILSAFE
        )
    else:
        found = [one for one in found if one.severity == "error"]
    found.sort(key=lambda one: (one.file, one.line, one.column))
    errors = sum(one.severity == "error" for one in found)
    if options.output == "table":
        for one in found:
            print(one)
        count = (
            f"{len(loaded.policies)} policies, {len(loaded.groups)} CIDR groups in {len(loaded.files)} files"
        )
        print(f"{count}: {errors} errors, {len(found) - errors} warnings")
    else:
        _print(
            {
                "valid": not errors,
                "files": list(loaded.files),
                "policies": [
                    {"name": one.title, "kind": one.kind, "file": one.file, "line": one.line}
                    for one in loaded.policies
                ],
                "problems": [_problem(one) for one in found],
            },
            options.output,
        )
    return FINDINGS if errors or (options.strict and found) else GOOD


def _known_addresses(texts: Sequence[str]) -> dict[Prefix, str]:
    found = {}
    for text in texts:
        address, equals, who = text.partition("=")
        try:
            found[parse_prefix(address)] = who if equals else "a node or pod"
        except ValueError as error:
            raise CannotAnswerError(f"--known-address {text}: {error}") from None
    return found


@main_guard
def run_explain(options: argparse.Namespace) -> int:
    """`policy explain`."""
    if (options.src is None) == (options.dst is None):
        raise CannotAnswerError("give either -s PEER (into the subject) or -d PEER (out of it)")
    direction = Direction.INGRESS if options.src is not None else Direction.EGRESS
    peer = parse_peer(options.src if options.src is not None else options.dst)
    ports = [parse_port(text) for text in options.dport]
    loaded = _usable(options, [*options.paths, *options.filename])
    compiled = compile_policy(loaded.policies, loaded.groups, subject(options), {}, settings(options))
    found = [explain(compiled, Query(direction, peer, *one)) for one in ports]
    if options.output == "table":
        for one in found:
            print("\n".join(explanation_lines(one)))
    else:
        _print([explanation_json(one) for one in found], options.output)
    wrong = options.expect and any(one.passes != (options.expect == "allow") for one in found)
    return FINDINGS if wrong else GOOD


def explanation_lines(one: Explanation) -> list[str]:
    """An explanation for people."""
    way = "from" if one.query.direction is Direction.INGRESS else "to"
    lines = [
        f"{one.word.upper()}  {one.query.direction} {way} {one.query.peer}, {one.query.port_text}",
        f"  {one.reason}",
    ]
    others = [origin for origin in one.matching if origin != one.rule]
    if others:
        lines.append("  also matching:")
        lines += [f"    {describe(origin)}" for origin in others]
    if one.restricted_by:
        lines.append(f"  {one.query.direction} is restricted by:")
        lines += [
            f'    policy "{origin.policy}" ({origin.file}:{origin.line})' for origin in one.restricted_by
        ]
    if one.nearest:
        lines.append("  nearest rules that would allow it:")
        for miss in one.nearest:
            lines.append(f"    {describe(miss.rule)}")
            lines += [f"      {text}" for text in miss.fields]
    labels_ = one.query.peer.labels
    if labels_ and not any(label.source == RESERVED or label.key == lower.NAMESPACE_KEY for label in labels_):
        lines.append(f"  note: the peer has no {lower.NAMESPACE_KEY} label, so no pod selector matches it")
    return lines


def explanation_json(one: Explanation) -> dict[str, object]:
    """An explanation for programs."""
    return {
        "verdict": one.word,
        "direction": str(one.query.direction),
        "peer": str(one.query.peer),
        "port": one.query.port_text,
        "enforced": one.enforced,
        "reason": one.reason,
        "rule": origin_json(one.rule) if one.rule else None,
        "fixedRule": one.fixed.name.lower().replace("_", "-") if one.fixed is not None else None,
        "matching": [origin_json(origin) for origin in one.matching],
        "restrictedBy": [origin_json(origin) for origin in one.restricted_by],
        "nearest": [{"rule": origin_json(miss.rule), "missed": list(miss.fields)} for miss in one.nearest],
    }


def origin_json(origin: RuleOrigin) -> dict[str, object]:
    """Where a rule was written."""
    return {
        "policy": origin.policy,
        "kind": origin.kind,
        "direction": str(origin.direction),
        "deny": origin.deny,
        "spec": origin.spec,
        "index": origin.index,
        "file": origin.file,
        "line": origin.line,
    }


@main_guard
def run_test(options: argparse.Namespace) -> int:
    """`policy test`."""
    outcomes: list[Outcome] = []
    broken = False
    for name, text in _test_files(options.paths):
        suites, problems = parse_suites(text, name)
        broken = broken or bool(problems)
        print("".join(f"{problem}\n" for problem in problems), file=sys.stderr, end="")
        for suite in suites:
            outcomes += _run_suite(suite)
    if options.junit is not None:
        options.junit.write_text(junit(outcomes), encoding="utf-8")
    failed = [one for one in outcomes if one.failure]
    if options.output == "table":
        for one in outcomes:
            if one.failure or options.verbose:
                print(f"{'FAIL' if one.failure else 'ok'}    {one.title} ({one.file}:{one.line})")
                print("".join(f"        {line}\n" for line in one.failure.splitlines()), end="")
        print(f"{len(outcomes)} expectations, {len(failed)} failed")
    else:
        _print([one._asdict() for one in outcomes], options.output)
    if broken or not outcomes:
        if not broken:
            print("meshwall policy: no tests found", file=sys.stderr)
        return ERROR
    return FINDINGS if failed else GOOD


def _test_files(paths: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for path in paths:
        if Path(path).is_dir():
            found += [(str(one), _readable(one)) for one in sorted(Path(path).glob("*.test.y*ml"))]
        else:
            found.append((path, _readable(Path(path))))
    return found


def _run_suite(suite: Suite) -> list[Outcome]:
    """Run one suite against the policies it names, relative to its own file."""
    base = Path(suite.file).parent
    paths = [str(base / path) for path in suite.policies] or [str(base)]
    loaded = read_policies(paths, suite.language)
    if loaded.errors:
        raise CannotAnswerError(f"{suite.file}: the policies have errors: {loaded.errors[0]}")
    return run_suite(suite, loaded.policies, loaded.groups)


@main_guard
def run_diff(options: argparse.Namespace) -> int:
    """`policy diff`."""
    sets = []
    for path in (options.old, options.new):
        loaded = _usable(options, [path])
        sets.append(PolicySet(loaded.policies, loaded.groups))
    found = differences(sets[0], sets[1], subject(options), settings(options))
    if options.output == "table":
        for one in found.changes:
            print("\n".join(_change_lines(one)))
        if not found.complete:
            print(
                "too many classes of peers: only those that the rules name together were compared",
                file=sys.stderr,
            )
        print(f"{len(found.changes)} differences" if found.changes else "no change in meaning")
    else:
        _print(
            {"complete": found.complete, "changes": [_change_json(one) for one in found.changes]},
            options.output,
        )
    return FINDINGS if found.changes else GOOD


def _change_lines(one: Change) -> list[str]:
    sign = {"allow": "+", "redirect": "+"}.get(one.after, "-")
    way = "from" if one.direction is Direction.INGRESS else "to"
    lines = [f"{sign} {one.direction} {way} {one.peer}: {', '.join(one.ports)}: {one.before} -> {one.after}"]
    for word, origin in (("was", one.old_rule), ("now", one.new_rule)):
        if origin is not None:
            lines.append(f"    {word}: {describe(origin)}")
    return lines


def _change_json(one: Change) -> dict[str, object]:
    return {
        "direction": str(one.direction),
        "peer": one.peer,
        "ports": list(one.ports),
        "before": one.before,
        "after": one.after,
        "oldRule": origin_json(one.old_rule) if one.old_rule else None,
        "newRule": origin_json(one.new_rule) if one.new_rule else None,
    }


@main_guard
def run_matrix(options: argparse.Namespace) -> int:
    """`policy matrix`."""
    loaded = _usable(options, [*options.paths, *options.filename])
    who, how = subject(options), settings(options)
    compiled = compile_policy(loaded.policies, loaded.groups, who, {}, how)
    classes = peer_classes([PolicySet(loaded.policies, loaded.groups)], who, how)
    table = reachability(compiled, classes.peers)
    if options.output == "table":
        for one in table:
            print("\n".join(_reach_lines(one)))
    else:
        _print([_reach_json(one, compiled) for one in table], options.output)
    return GOOD


def _reach_lines(one: Reach) -> list[str]:
    state = "default deny" if one.default_deny else "default allow" if one.enforced else "not enforced"
    lines = [f"{one.direction}: {state}"]
    if not one.enforced:
        return lines
    for row in one.rows:
        lines.append(f"  {row.summary}")
        lines += [f"      {peer}" for peer in row.peers]
    return lines


def _reach_json(one: Reach, compiled: Compiled) -> dict[str, object]:
    return {
        "direction": str(one.direction),
        "enforced": one.enforced,
        "defaultDeny": one.default_deny,
        "rows": [
            {
                "peers": list(row.peers),
                "ports": [
                    {
                        "ports": cell.ports,
                        "verdict": cell.verdict,
                        "rule": origin_json(compiled.rules[cell.rule])
                        if cell.rule in compiled.rules
                        else None,
                    }
                    for cell in row.cells
                ],
            }
            for row in one.rows
        ],
    }


def _problem(one: Problem) -> dict[str, object]:
    return {
        "file": one.file,
        "line": one.line,
        "column": one.column,
        "field": one.field,
        "message": one.message,
        "severity": one.severity,
    }


def _print(value: object, output: str) -> None:
    if output == "json":
        print(json.dumps(value, indent=2))
        return
    import yaml  # noqa: PLC0415 - only for -o yaml

    print(yaml.safe_dump(value, sort_keys=False), end="")
