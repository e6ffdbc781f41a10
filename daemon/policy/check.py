"""Policy unit tests: expectations that people keep beside their policies.

Judged by the tables that are enforced.

A test file holds documents of kind `PolicyTest` (docs/policy.md tells the format):

    apiVersion: meshwall.io/v1
    kind: PolicyTest
    metadata: {name: kubelet}
    policies: [kubelet.yaml]                  # relative to this file; default: its directory
    settings: {cluster: alpha}
    node: {zone: a}                           # labels of the host that is the subject
    identities:
      metrics: {namespace: my-metrics-namespace, serviceAccount: metrics-server}
      stranger: {address: 203.0.113.7}
    tests:
    - from: metrics
      ports: [10250/TCP]
      expect: allow
    - from: [stranger, world]
      ports: [10250/TCP]
      expect: deny
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from daemon.model.identity import Identity, Reserved, reserved_labels, reserved_name
from daemon.model.labels import K8S, RESERVED, Label, LabelSet, parse_label
from daemon.model.net import Direction, Proto, parse_prefix
from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy
from daemon.policy import lower
from daemon.policy.ccnp import POLICY_TEST, LanguageSettings
from daemon.policy.compile import Compiled, CompileSettings, Subject, compile_policy
from daemon.policy.document import Node, read_documents, shown
from daemon.policy.explain import Explanation, Peer, Query, describe, explain
from daemon.policy.reader import Reader, join
from daemon.policy.tables import PORTLESS

TEST_API = "meshwall.io/v1"
_PROTOCOLS = {
    "TCP": Proto.TCP,
    "UDP": Proto.UDP,
    "SCTP": Proto.SCTP,
    "ICMP": Proto.ICMP,
    "ICMPv6": Proto.ICMPV6,
}
_VERDICTS = ("allow", "deny", "redirect", "audit")
_SETTINGS = (
    "cluster", "defaultLocalCluster", "enforcement", "ipv4", "ipv6", "namedPorts", "allowUnenforced",
    "nodeLabels", "audit",
)  # fmt: skip
UNKNOWN = "unknown"


class Expectation(NamedTuple):
    """One peer, one port, one expected verdict."""

    name: str
    line: int
    direction: Direction
    peer_name: str
    peer: Peer
    proto: int
    port: int
    expect: str
    policy: str  # title of the policy that has to decide; empty: any


@dataclass(frozen=True, slots=True)
class Suite:
    """One PolicyTest document."""

    name: str
    file: str
    policies: tuple[str, ...]
    subject: Subject
    settings: CompileSettings
    language: LanguageSettings
    expectations: tuple[Expectation, ...]


class Outcome(NamedTuple):
    """What came of an expectation; `failure` is empty when it held."""

    suite: str
    title: str
    file: str
    line: int
    failure: str


def parse_suites(text: str, file: str) -> tuple[list[Suite], list[Problem]]:
    """The tests of a file; other documents in it are passed over."""
    suites: list[Suite] = []
    problems: list[Problem] = []
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            problems.append(document)
            continue
        kind = document.fields.get("kind")
        if kind is None or kind.text != POLICY_TEST:
            continue
        reader = _SuiteReader(file)
        suite = reader.suite(document)
        problems += reader.problems
        if not reader.failed:
            suites.append(suite)
    return suites, problems


def run_suite(suite: Suite, policies: Sequence[Policy], groups: Mapping[str, CidrGroup]) -> list[Outcome]:
    """Judge every expectation."""
    compiled = compile_policy(policies, groups, suite.subject, {}, suite.settings)
    return [_judge(suite, compiled, one) for one in suite.expectations]


def _judge(suite: Suite, compiled: Compiled, one: Expectation) -> Outcome:
    found = explain(compiled, Query(one.direction, one.peer, one.proto, one.port), nearest=1)
    way = "from" if one.direction is Direction.INGRESS else "to"
    title = f"{one.name or suite.name}: {way} {one.peer_name}, {found.query.port_text}"
    failure = ""
    if found.word != one.expect:
        failure = "\n".join([f"expected {one.expect}, got {found.word}: {found.reason}", *_hints(found)])
    elif one.policy and (found.rule is None or found.rule.policy != one.policy):
        failure = f'expected policy "{one.policy}" to decide, but: {found.reason}'
    return Outcome(suite.name, title, suite.file, one.line, failure)


def _hints(found: Explanation) -> list[str]:
    lines = [f"peer: {found.query.peer}"]
    for miss in found.nearest:
        lines.append(f"nearest: {describe(miss.rule)}")
        lines += [f"  {text}" for text in miss.fields]
    return lines


def junit(outcomes: Sequence[Outcome]) -> str:
    """JUnit XML, one test suite for each PolicyTest."""
    by_suite: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_suite.setdefault(one.suite, []).append(one)
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>"]
    for name, members in by_suite.items():
        failed = sum(bool(one.failure) for one in members)
        lines.append(f'<testsuite name="{_xml(name)}" tests="{len(members)}" failures="{failed}">')
        for one in members:
            where = f'file="{_xml(one.file)}" line="{one.line}"'
            lines.append(f'<testcase name="{_xml(one.title)}" classname="{_xml(name)}" {where}>')
            if one.failure:
                first = one.failure.splitlines()[0]
                lines.append(f'<failure message="{_xml(first)}">{_xml(one.failure)}</failure>')
            lines.append("</testcase>")
        lines.append("</testsuite>")
    return "\n".join([*lines, "</testsuites>", ""])


def _xml(text: str) -> str:
    """Text for an attribute or element; characters that XML cannot hold become `?`."""
    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


@dataclass(slots=True)
class _SuiteReader(Reader):
    """Reads one PolicyTest document."""

    cluster: str = "default"
    peers: dict[str, Peer] = field(default_factory=dict)

    def suite(self, node: Node) -> Suite:
        known = (
            "apiVersion", "kind", "metadata", "policies", "settings", "node", "endpoint", "identities",
            "tests",
        )  # fmt: skip
        fields = self.mapping(node, "", known, ("apiVersion", "tests"))
        if "apiVersion" in fields:
            self.choice(fields["apiVersion"], "apiVersion", (TEST_API,))
        metadata = self.mapping(fields["metadata"], "metadata", ("name",)) if "metadata" in fields else {}
        settings, language = self.settings(fields.get("settings"))
        self.cluster = settings.cluster_name
        subject = self.subject(fields)
        self.identities(fields.get("identities"))
        tests = self.items(fields.get("tests"), "tests")
        return Suite(
            self.text(metadata.get("name"), "metadata.name") or self.file,
            self.file,
            tuple(self.text(item, at) for item, at in self.items(fields.get("policies"), "policies")),
            subject,
            settings,
            language,
            tuple(one for item, at in tests for one in self.test(item, at)),
        )

    def settings(self, node: Node | None) -> tuple[CompileSettings, LanguageSettings]:
        if node is None:
            return CompileSettings(), LanguageSettings()
        fields = self.mapping(node, "settings", _SETTINGS)
        mode = "default"
        if "enforcement" in fields:
            mode = self.choice(fields["enforcement"], "settings.enforcement", ("default", "always", "never"))
        named = {
            name: tuple(
                one
                for item, at in self.items(value, join("settings.namedPorts", name))
                for one in self.port(item, at)
            )
            for name, value in self.labelled(fields.get("namedPorts"), "settings.namedPorts").items()
        }
        audit = [self.text(item, at) for item, at in self.items(fields.get("audit"), "settings.audit")]
        nodes = self.flag(fields.get("nodeLabels"), "settings.nodeLabels", True)
        compile_settings = CompileSettings(
            mode=mode,
            ipv4=self.flag(fields.get("ipv4"), "settings.ipv4", True),
            ipv6=self.flag(fields.get("ipv6"), "settings.ipv6", True),
            cluster_name=self.text(fields.get("cluster"), "settings.cluster") or "default",
            default_local_cluster=self.flag(
                fields.get("defaultLocalCluster"), "settings.defaultLocalCluster", False
            ),
            named_ports=named,
            audit_policies=frozenset(audit),
        )
        unenforced = self.flag(fields.get("allowUnenforced"), "settings.allowUnenforced", False)
        return compile_settings, LanguageSettings(node_selector_labels=nodes, allow_unenforced=unenforced)

    def labelled(self, node: Node | None, path: str) -> Mapping[str, Node]:
        """A mapping whose keys are the reader's own names."""
        return node.fields if node is not None and self.expect(node, path, "mapping") else {}

    def subject(self, fields: Mapping[str, Node]) -> Subject:
        if "node" in fields and "endpoint" in fields:
            self.fail(fields["endpoint"], "endpoint", "give either node or endpoint as the subject")
        if "endpoint" in fields:
            return Subject(Identity(0), self.peer("endpoint", fields["endpoint"]).labels or frozenset())
        labels = self.labelled(fields.get("node"), "node")
        found = {Label(K8S, key, self.text(value, f"node.{key}")) for key, value in labels.items()}
        return Subject(Identity(Reserved.HOST), frozenset(found | {Label(RESERVED, "host")}))

    def identities(self, node: Node | None) -> None:
        for name, value in self.labelled(node, "identities").items():
            self.peers[name] = self.peer(f"identities.{name}", value)

    def peer(self, path: str, node: Node) -> Peer:
        """An address, an entity, or a pod by namespace, service account, cluster and labels."""
        fields = self.mapping(
            node, path, ("address", "entity", "namespace", "serviceAccount", "cluster", "labels", "node")
        )
        alone = [name for name in ("address", "entity", "node") if name in fields]
        if alone and len(fields) > 1:
            self.fail(node, path, f"{alone[0]} stands alone")
        if "address" in fields:
            text = self.text(fields["address"], f"{path}.address")
            try:
                return Peer(address=parse_prefix(text))
            except ValueError:
                self.fail(fields["address"], f"{path}.address", f"{shown(text)} is not an address")
                return Peer()
        if "entity" in fields:
            return self.entity(fields["entity"], f"{path}.entity")
        if "node" in fields:
            labels = self.labelled(fields["node"], f"{path}.node")
            own = {
                Label("node", key, self.text(value, f"{path}.node.{key}")) for key, value in labels.items()
            }
            number = Identity(Reserved.REMOTE_NODE)
            return Peer(number, reserved_labels(number) | own)
        return Peer(labels=self.pod(fields, path))

    def pod(self, fields: Mapping[str, Node], path: str) -> LabelSet:
        values = {
            lower.NAMESPACE_KEY: self.text(fields.get("namespace"), f"{path}.namespace") or "default",
            lower.SERVICE_ACCOUNT_KEY: self.text(fields.get("serviceAccount"), f"{path}.serviceAccount")
            or "default",
            lower.CLUSTER_KEY: self.text(fields.get("cluster"), f"{path}.cluster") or self.cluster,
        }
        found = {key: Label(K8S, key, value) for key, value in values.items()}
        for key, value in self.labelled(fields.get("labels"), f"{path}.labels").items():
            one = parse_label(key)
            source = K8S if ":" not in key else one.source
            found[key] = Label(source, one.key, self.text(value, f"{path}.labels.{key}"))
        return frozenset(found.values())

    def entity(self, node: Node, path: str) -> Peer:
        names = tuple(name for one in Reserved if one and (name := reserved_name(Identity(one))))
        text = self.choice(node, path, names)
        number = next(
            (Identity(one) for one in Reserved if one and reserved_name(Identity(one)) == text), Identity(0)
        )
        return Peer(number, reserved_labels(number))

    def test(self, node: Node, path: str) -> list[Expectation]:
        known = ("name", "from", "to", "ports", "expect", "policy")
        fields = self.mapping(node, path, known, ("ports", "expect"))
        given = [name for name in ("from", "to") if name in fields]
        if len(given) != 1:
            self.fail(node, path, "expected exactly one of from (into the subject) and to (out of it)")
            return []
        peers = self.named_peers(fields[given[0]], f"{path}.{given[0]}")
        ports = [
            one
            for item, at in self.items(fields.get("ports"), f"{path}.ports")
            for one in self.port(item, at)
        ]
        expect = self.choice(fields["expect"], f"{path}.expect", _VERDICTS) if "expect" in fields else ""
        name = self.text(fields.get("name"), f"{path}.name")
        policy = self.text(fields.get("policy"), f"{path}.policy")
        direction = Direction.INGRESS if given[0] == "from" else Direction.EGRESS
        return [
            Expectation(name, node.line, direction, who, peer, proto, port, expect, policy)
            for who, peer in peers
            for proto, port in ports
        ]

    def named_peers(self, node: Node, path: str) -> list[tuple[str, Peer]]:
        """One name or a list of names: of `identities`, an entity, or `unknown`."""
        listed = [(node, path)] if node.kind == "string" else self.items(node, path)
        found = []
        for item, at in listed:
            name = self.text(item, at)
            if name in self.peers:
                found.append((name, self.peers[name]))
            elif name == UNKNOWN:
                found.append((name, Peer()))
            elif name in {reserved_name(Identity(one)) for one in Reserved}:
                found.append((name, self.entity(item, at)))
            elif name:
                known = ", ".join([*self.peers, UNKNOWN])
                self.fail(item, at, f"{shown(name)} is neither in identities ({known}) nor an entity")
        return found

    def port(self, node: Node, path: str) -> list[tuple[int, int]]:
        """`10250/TCP`, `8/ICMP`, or a protocol alone for packets without ports."""
        text = self.text(node, path)
        if not text:
            return []
        number, slash, protocol = text.rpartition("/")
        proto = _PROTOCOLS.get(protocol)
        limit = 255 if proto in (Proto.ICMP, Proto.ICMPV6) else 0xFFFF
        if proto is None or (slash and not (number.isascii() and number.isdigit() and int(number) <= limit)):
            names = ", ".join(_PROTOCOLS)
            self.fail(
                node, path, f"{shown(text)} is not a port: expected NUMBER/PROTOCOL with one of {names}"
            )
            return []
        return [(int(proto), int(number) if slash else PORTLESS)]
