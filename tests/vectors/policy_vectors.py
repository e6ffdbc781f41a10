"""Run policy vector files through the reader, the compiler and the tables that the data path gets.

`python tests/vectors/policy_vectors.py FILE.jsonl...` prints each wrong answer and one line of totals; exit
status 1 when any answer is wrong. Verdict and validation cases may be mixed.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.model.identity import Identity
from daemon.model.labels import LabelSet, parse_labels
from daemon.model.net import Direction, Prefix, Proto, parse_prefix
from daemon.model.rule import CidrGroup
from daemon.model.verdict import FIRST_RULE, CellFlag, FixedRule, Verdict, unpack_cell
from daemon.policy.ccnp import LanguageSettings, parse_documents
from daemon.policy.compile import Compiled, CompileSettings, Subject, compile_policy, selected_specs
from daemon.policy.lower import label_prefix

PROTOS = {
    "TCP": Proto.TCP,
    "UDP": Proto.UDP,
    "SCTP": Proto.SCTP,
    "ICMP": Proto.ICMP,
    "ICMPv6": Proto.ICMPV6,
}


@dataclass
class Score:
    """Counts, and a line for each wrong answer."""

    queries: int = 0
    wrong_queries: int = 0
    documents: int = 0
    wrong_documents: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return (
            f"{self.queries} queries, {self.wrong_queries} wrong; "
            f"{self.documents} documents, {self.wrong_documents} wrong"
        )

    @property
    def failed(self) -> bool:
        return bool(self.lines)


def read_cases(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a file, one JSON object a line."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def run_case(case: dict[str, Any], score: Score) -> None:
    """Judge one case."""
    if "queries" in case:
        _verdicts(case, score)
    else:
        _validation(case, score)


def _validation(case: dict[str, Any], score: Score) -> None:
    score.documents += 1
    text = json.dumps(case["policy"], indent=1)
    parsed = parse_documents(text, case["name"], LanguageSettings(allow_unenforced=True))
    errors = [one for one in parsed.problems if one.severity == "error"]
    answer = "reject" if errors or not parsed.policies else "accept"
    if answer != case["expect"]:
        score.wrong_documents += 1
        why = "; ".join(map(str, errors)) or case.get("why", "")
        score.lines.append(f"{case['name']}: expected {case['expect']}, got {answer}: {why}")


def _compile(case: dict[str, Any], score: Score) -> tuple[Compiled, Subject, list[str]] | None:
    config = case["config"]
    language = LanguageSettings(node_selector_labels=config["node_selector_labels"], allow_unenforced=True)
    text = "\n".join("---\n" + json.dumps(one, indent=1) for one in case["policies"])
    parsed = parse_documents(text, case["name"], language)
    errors = [str(one) for one in parsed.problems if one.severity == "error"]
    if errors:
        score.wrong_documents += 1
        score.lines += errors
        return None
    named: dict[str, tuple[tuple[int, int], ...]] = {}
    for one in config.get("named_ports", ()):
        name = one["name"].lower()
        named[name] = (*named.get(name, ()), (PROTOS[one["proto"]], one["port"]))
    settings = CompileSettings(
        mode=case["enforcement"],
        ipv4=config["ipv4"],
        ipv6=config["ipv6"],
        cluster_name=config["cluster_name"],
        default_local_cluster=config.get("default_local_cluster", False),
        node_selector_labels=config["node_selector_labels"],
        named_ports=named,
        allow_localhost=config["allow_localhost"] == "always",
    )
    groups = {
        name: CidrGroup(name, tuple(map(parse_prefix, prefixes)))
        for name, prefixes in (case.get("cidr_groups") or {}).items()
    }
    subject = Subject(Identity(case["subject_id"]), parse_labels(case["subject_labels"]))
    identities = {
        Identity(int(number)): parse_labels(labels) for number, labels in case["identities"].items()
    }
    tables = compile_policy(parsed.policies, groups, subject, identities, settings)
    selected = sorted({policy.title for policy, _ in selected_specs(parsed.policies, subject)})
    return tables, subject, selected


def _verdicts(case: dict[str, Any], score: Score) -> None:
    compiled = _compile(case, score)
    if compiled is None:
        score.queries += len(case["queries"])
        score.wrong_queries += len(case["queries"])
        return
    tables, _, selected = compiled
    matrices = {str(one): tables.matrix(one) for one in Direction}
    facts = {
        "selected_by": (sorted(case["selected_by"]), selected),
        "enforced": (case["enforced"], {name: one.enforced for name, one in matrices.items()}),
        "default_deny": (case["default_deny"], {name: one.default_deny for name, one in matrices.items()}),
    }
    for name, (expected, found) in facts.items():
        if expected != found:
            score.wrong_queries += 1
            score.lines.append(f"{case['name']}: {name}: expected {expected}, got {found}")
    labels = {int(number): parse_labels(one) for number, one in case["identities"].items()}
    strays = _addresses(tables, labels)
    for query in case["queries"]:
        score.queries += 1
        wrong = _judge(tables, query, strays.get(query["peer"]))
        if wrong:
            score.wrong_queries += 1
            score.lines.append(
                f"{case['name']}: {json.dumps(query)} {case['identities'].get(str(query['peer']))}: {wrong}"
            )


def _judge(tables: Compiled, query: dict[str, Any], address: Prefix | None) -> str:
    """What is wrong with our answer, by identity and, for prefixes that have addresses of their own.

    By address.
    """
    direction = Direction[query["direction"].upper()]
    matrix = tables.matrix(direction)
    rows = [tables.rows_of(Identity(query["peer"]))]
    if address is not None:
        rows.append(tables.rows_of_address(address))
    for at, one in enumerate(rows):
        cell = matrix.cell(one[direction], PROTOS[query["proto"]], query["port"])
        verdict, rule, flags = unpack_cell(cell)
        found = (_word(verdict), _why(matrix.enforced, verdict, rule), bool(flags & CellFlag.AUTH))
        expected = (query["verdict"], query["why"], query.get("auth") == "spire")
        if found != expected:
            return f"got {found} rule {rule}" + (f" by address {address}" if at else "")
    return ""


def _word(verdict: Verdict) -> str:
    return {Verdict.ALLOW: "allow", Verdict.REDIRECT: "redirect"}.get(verdict, "deny")


def _why(enforced: bool, verdict: Verdict, rule: int) -> str:
    if not enforced:
        return "not-enforced"
    if verdict is Verdict.DENY:
        return "deny-rule"
    if verdict is Verdict.DEFAULT_DENY:
        return "default-deny"
    return (
        "localhost"
        if rule == FixedRule.LOCALHOST
        else "allow-rule"
        if rule >= FIRST_RULE or rule == 2
        else "?"
    )


def _addresses(tables: Compiled, identities: dict[int, LabelSet]) -> dict[int, Prefix]:
    """An address for each outside prefix that the tables name and do not split.

    There both questions are one.
    """
    prefixes = {}
    for number, labels in identities.items():
        found = [label_prefix(one.key) for one in labels if one.source == "cidr"]
        if found and found[0] and len(labels) == 2 and any(one.key.startswith("world") for one in labels):
            prefixes[number] = found[0]
    named = [*tables.prefixes, *prefixes.values()]
    strays = {}
    for number, prefix in prefixes.items():
        inner = [one for one in named if one != prefix and prefix.contains(one)]
        if not inner and prefix in tables.prefixes:
            width = 32 if prefix.family == 4 else 128
            strays[number] = Prefix(prefix.family, prefix.address, width)
    return strays


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    score = Score()
    for path in parser.parse_args(arguments).files:
        try:
            for case in read_cases(path):
                run_case(case, score)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    for line in score.lines:
        print(line)
    print(score.summary)
    return 1 if score.failed else 0


if __name__ == "__main__":
    sys.exit(main())
