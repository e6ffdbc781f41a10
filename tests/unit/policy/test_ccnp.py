"""Documents are read strictly, with positions and hints, and nothing in a file can hurt the reader."""

# ruff: noqa: E501, S311
import random
import resource
import time
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.model.labels import parse_labels
from daemon.model.rule import MatchType
from daemon.policy.ccnp import LanguageSettings, parse_cidr_list, parse_documents
from daemon.policy.matching import matches

KUBELET = dedent("""\
    apiVersion: cilium.io/v2
    kind: CiliumClusterwideNetworkPolicy
    metadata:
      name: kubelet
    spec:
      nodeSelector:
        matchLabels: {}
      ingress:
        - fromEndpoints:
            - matchLabels:
                k8s:io.cilium.k8s.policy.serviceaccount: metrics-server
                k8s:io.kubernetes.pod.namespace: my-metrics-namespace
          toPorts:
            - ports:
                - port: "10250"
                  protocol: TCP
    """)


def problems(text, **more):
    found = parse_documents(text, "a.yaml", LanguageSettings(**more))
    return [str(one) for one in found.problems]


def broken(old, new):
    assert old in KUBELET
    return problems(KUBELET.replace(old, new))


def test_a_good_document_has_no_problems_and_knows_its_lines():
    found = parse_documents(KUBELET, "a.yaml")
    assert found.problems == ()
    (policy,) = found.policies
    assert policy.title == "kubelet"
    assert policy.specs[0].rules[0].origin.line == 9


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("fromEndpoints", "fromEndpoint", "a.yaml:9:7: error: spec.ingress[0].fromEndpoint: unknown field"),
        ("fromEndpoints", "fromEndpoint", "did you mean fromEndpoints?"),
        ('"10250"', "10250", 'spec.ingress[0].toPorts[0].ports[0].port: expected a string, found the number 10250 (put it in quotes: "10250")'),
        ("TCP", "tcp", '"tcp" is not one of TCP, UDP, SCTP, ANY (did you mean TCP?)'),
        ('"10250"', '"70000"', '"70000" is not a port'),
        ("matchLabels: {}", "matchLabels:", "spec.nodeSelector.matchLabels: expected a mapping, found null"),
        ("kind: CiliumClusterwide", "kind: CiliumClusterWide", "did you mean CiliumClusterwideNetworkPolicy?"),
        ("nodeSelector", "endpointSelectr", "expected exactly one of endpointSelector and nodeSelector"),
        ("name: kubelet", "name: Kube_let", '"Kube_let" is not a valid name'),
        ("metrics-server\n", "metrics server\n", "is not a label value"),
    ],
)  # fmt: skip
def test_an_error_names_place_value_and_expectation(old, new, expected):
    assert any(expected in one for one in broken(old, new))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x 1\nb: *x\n", "anchors"),
        ("a: 1\na: 2\n", "already given in line 1"),
        ("a: {<<: {b: 1}}\n", "merge keys"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 100_000, "nested deeper than 32"),
        ("- a\n" * 100_001, "more than 100000 nodes"),
        ("x" * (1 << 20) + "yy", "larger than 1048576 bytes"),
        ("a:\n\tb: 1\n", "indent with spaces"),
        ("a: 'x\n", "not valid YAML"),
        ("a: \x01\n", "unacceptable character"),
        ("? [a, b]\n: 1\n", "a mapping key has to be plain text"),
    ],
)
def test_yaml_that_could_mislead_or_overwhelm_is_refused(text, expected):
    assert any(expected in one for one in problems(text))


def test_a_broken_document_does_not_take_the_good_ones_with_it():
    text = f"{KUBELET}---\na: [\n---\nkind: Nothing\n---\n{KUBELET.replace('name: kubelet', 'name: second')}"
    found = parse_documents(text, "a.yaml")
    assert [one.title for one in found.policies] == ["kubelet", "second"]
    assert len(found.problems) == 2
    assert found.policies[1].line > found.policies[0].line


@pytest.mark.parametrize(
    ("line", "denied", "expected"),
    [
        ("example.org/note: hello", "", ""),
        ("meshwall.io/denied: reject", "reject", ""),
        ("meshwall.io/denied: drop", "drop", ""),
        ("meshwall.io/denied: bounce", "", '"bounce" is not known: expected drop or reject'),
        ("meshwall.io/reject: 'true'", "", "unknown annotation: expected one of meshwall.io/denied"),
    ],
)
def test_an_annotation_says_what_a_denied_packet_gets(line, denied, expected):
    found = parse_documents(KUBELET.replace("metadata:", f"metadata:\n  annotations: {{{line}}}"), "a.yaml")
    assert [one.denied for one in found.policies] == ([] if expected else [denied])
    assert [expected in one.message for one in found.problems] == ([True] if expected else [])


def test_one_object_given_twice_is_refused():
    assert any("already defined in line 1" in one for one in problems(f"{KUBELET}---\n{KUBELET}"))


def test_what_is_not_enforced_yet_is_refused_by_name_or_reported():
    text = KUBELET.replace(
        "  ingress:\n    - fromEndpoints:",
        "  egress:\n    - toFQDNs: [{matchName: a.example}]\n  ingress:\n    - fromEndpoints:",
    )
    refused = parse_documents(text, "a.yaml")
    assert not refused.policies
    assert "not enforced yet: names need a source of DNS answers" in str(refused.problems[0])
    allowed = parse_documents(text, "a.yaml", LanguageSettings(allow_unenforced=True))
    assert allowed.policies
    assert allowed.problems[0].severity == "warning"


def test_control_characters_of_a_file_never_reach_the_terminal():
    found = broken("name: kubelet", 'name: "\\e[2Jx"')
    assert found
    assert all("\x1b" not in one for one in found)


def test_a_list_of_objects_as_kubectl_prints_it_is_read():
    inner = "\n".join("  " + line for line in KUBELET.splitlines())
    text = f"apiVersion: v1\nkind: List\nitems:\n- {inner.strip()}\n"
    assert [one.title for one in parse_documents(text, "a.yaml").policies] == ["kubelet"]


def test_a_namespaced_policy_is_pinned_to_its_namespace_but_expressions_still_count():
    document = (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: prod}\n"
        "spec: {endpointSelector: {%s}, ingress: [{}]}\n"
    )
    key = '"k8s:io.kubernetes.pod.namespace"'
    web = parse_labels(["k8s:io.kubernetes.pod.namespace=prod", "k8s:app=web"])
    for selector, selected in (
        (f"matchLabels: {{{key}: other}}", True),
        ("matchLabels: {app: web}", True),
        ("matchLabels: {app: db}", False),
        (f"matchExpressions: [{{key: {key}, operator: In, values: [other]}}]", False),
        ("matchLabels: {io.kubernetes.pod.namespace: other}", False),
    ):
        (policy,) = parse_documents(document % selector, "a.yaml").policies
        assert matches(policy.specs[0].subject, web) is selected, selector


def test_vrrp_needs_the_extended_protocols():
    text = KUBELET.replace(
        'port: "10250"\n              protocol: TCP', 'port: "0"\n              protocol: VRRP'
    )
    assert problems(text)
    assert not problems(text, extended_protocols=True)


def test_a_plain_list_is_a_group_named_like_its_file():
    found = parse_cidr_list("# office\n10.0.0.1\n10.2.3.4/8 # masked\n2001:db8::/32\n", "/etc/x/office.cidrs")
    assert found.groups[0].name == "office"
    assert [one.cidr for one in found.groups[0].prefixes] == ["10.0.0.1/32", "10.0.0.0/8", "2001:db8::/32"]
    assert "a.cidrs:2" in str(parse_cidr_list("10.0.0.0/8\n10.0.0.300\n", "a.cidrs").problems[0])


# Fuzz


def mutated(rnd: random.Random) -> str:
    """A good document with some bytes, lines or tokens changed."""
    text = KUBELET * rnd.choice([1, 1, 2])
    tokens = ["{", "}", "[", "]", ":", "- ", "\n", "&a ", "*a", "!!x ", "|", ">", "'", '"', "#", "\t", "%", "---\n", "null", "~", "0x1f", "1e9", "<<: ", "\ufeff", "\u2028", "é", "\x00"]  # fmt: skip
    for _ in range(rnd.randint(1, 6)):
        at = rnd.randrange(len(text) + 1)
        kind = rnd.randrange(5)
        if kind == 0:
            text = text[:at] + rnd.choice(tokens) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rnd.randint(1, 20) :]
        elif kind == 2:
            lines = text.splitlines(keepends=True)
            rnd.shuffle(lines) if rnd.random() < 0.1 else lines.insert(
                rnd.randrange(len(lines) + 1), rnd.choice(lines or ["a"])
            )
            text = "".join(lines)
        elif kind == 3:
            text = text[:at] + chr(rnd.randrange(1, 0x2500)) + text[at + 1 :]
        else:
            text = text[:at] + text[at : at + 40] * rnd.randint(2, 50) + text[at + 40 :]
    return text


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_mutated_yaml_is_always_answered(rnd):
    found = parse_documents(mutated(rnd), "a.yaml")
    assert all(one.message and one.file == "a.yaml" for one in found.problems)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_answered(text):
    parse_documents(text, "a.yaml")
    parse_documents(f"kind: CiliumNetworkPolicy\nspec: {text}", "a.yaml")


@pytest.mark.slow
def test_twenty_thousand_mutations_stay_within_time_and_memory():
    rnd = random.Random(7)
    worst, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20_000):
        text = mutated(rnd)
        started = time.process_time()
        parse_documents(text, "a.yaml")
        worst = max(worst, time.process_time() - started)
    assert worst < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= max(before, 300 * 1024)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 30 + ",".join(["1"] * 90_000) + "]" * 30,
        "{" + ",".join(f"k{at}: v" for at in range(49_000)) + "}",
        "a: '" + "x\n\n" * 300_000 + "'",
        "\n".join(f"? k{at}" for at in range(60_000)),
        "- " * 500_000,
        "a: " + "!" * 1_000_000,
        "# " + "x" * 1_000_000,
        "---\n" * 250_000,
        "a: |\n" + "  x\n" * 250_000,
        "kind: CiliumNetworkPolicy\nspec: {ingress: [" + "{fromEntities: [wurld]}," * 30_000 + "]}",
        KUBELET.replace("kubelet", "a" * 250 + "!"),
        KUBELET.replace(
            "  ingress:\n",
            "  egress: [{toFQDNs: [{matchName: "
            + "a" * 250
            + "!}, {matchPattern: '"
            + "a*" * 120
            + "!'}]}]\n  ingress:\n",
        ),
        KUBELET.replace("10250", "a" * 1_000_000 + "!").replace("metrics-server", "a" * 1000 + "!"),
        "kind: CiliumNetworkPolicy\nspec: {" + ",".join(f"field{at}: 1" for at in range(30_000)) + "}",
    ],
)
def test_no_file_within_the_limits_takes_long(text):
    started = time.process_time()
    parse_documents(text, "a.yaml")
    assert time.process_time() - started < 3.0  # 1 s on an idle machine


def test_review_annotations_are_read_and_a_wrong_day_is_named():
    text = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: a
  annotations:
    meshwall.io/owner: sre@example.org
    meshwall.io/reason: scraping
    meshwall.io/review-by: "2027-01-31"
    other.example/thing: kept
spec: {nodeSelector: {}, ingress: [{fromEntities: [world]}]}
"""
    (policy,) = parse_documents(text, "p.yaml").policies
    assert policy.review == ("sre@example.org", "scraping", "2027-01-31")
    parsed = parse_documents(text.replace("2027-01-31", "31.1.2027"), "p.yaml")
    (problem,) = parsed.problems
    assert problem.field == "metadata.annotations.meshwall.io/review-by"
    assert "expected YYYY-MM-DD" in problem.message
    assert parsed.policies == ()


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ("fromEntities: [world]", "L3_ONLY"),
        ('fromEntities: [world], toPorts: [{ports: [{port: "80", protocol: TCP}]}]', "L3_L4"),
        ('toPorts: [{ports: [{port: "80", protocol: TCP}]}]', "L4_ONLY"),
        ('fromEntities: [world], toPorts: [{ports: [{port: "0", protocol: TCP}]}]', "L3_PROTO"),
        ('toPorts: [{ports: [{port: "0", protocol: TCP}]}]', "PROTO_ONLY"),
        ("icmps: [{fields: [{type: 8}]}]", "L4_ONLY"),
    ],
)
def test_a_rule_knows_by_what_it_matches(rule, match):
    text = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: a}}
spec: {{nodeSelector: {{}}, ingress: [{{{rule}}}]}}
"""
    (policy,) = parse_documents(text, "p.yaml").policies
    assert MatchType(policy.specs[0].rules[0].origin.match).name == match
