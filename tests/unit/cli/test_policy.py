"""The offline verbs: exit statuses, JSON, and sentences that name file, line and reason."""

import argparse
import json
from textwrap import dedent

import pytest

from daemon.cli.policy import register

KUBELET = dedent("""\
    apiVersion: cilium.io/v2
    kind: CiliumClusterwideNetworkPolicy
    metadata: {name: kubelet}
    spec:
      nodeSelector: {}
      ingress:
      - fromEndpoints:
        - matchLabels:
            k8s:io.cilium.k8s.policy.serviceaccount: metrics-server
            k8s:io.kubernetes.pod.namespace: my-metrics-namespace
        toPorts: [{ports: [{port: "10250", protocol: TCP}]}]
    """)
SAME = dedent("""\
    apiVersion: cilium.io/v2
    kind: CiliumClusterwideNetworkPolicy
    metadata: {name: written-differently}
    specs:
    - nodeSelector: {matchLabels: {}}
      ingress:
      - fromEndpoints:
        - matchExpressions:
          - {key: "k8s:io.kubernetes.pod.namespace", operator: In, values: [my-metrics-namespace]}
          matchLabels: {"k8s:io.cilium.k8s.policy.serviceaccount": metrics-server}
        toPorts:
        - ports: [{port: "10250", endPort: 10249, protocol: TCP}]
      - {}
    """)
METRICS = (
    "io.kubernetes.pod.namespace=my-metrics-namespace,io.cilium.k8s.policy.serviceaccount=metrics-server"
)
TESTS = dedent("""\
    apiVersion: meshwall.io/v1
    kind: PolicyTest
    metadata: {name: kubelet}
    policies: [kubelet.yaml]
    identities:
      metrics: {namespace: my-metrics-namespace, serviceAccount: metrics-server}
      stranger: {address: 203.0.113.7}
    tests:
    - {from: metrics, ports: [10250/TCP], expect: allow, policy: kubelet}
    - {from: [stranger, world-ipv4, unknown], ports: [10250/TCP, 8/ICMP], expect: deny}
    - {to: stranger, ports: [443/TCP], expect: allow}
    """)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "kubelet.yaml").write_text(KUBELET)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        parser = argparse.ArgumentParser()
        register(parser.add_subparsers())
        options = parser.parse_args(["policy", *map(str, arguments)])
        status = options.run(options)
        return status, capsys.readouterr()

    return call


def test_check_accepts_a_good_directory(run, directory):
    status, shown = run("check", directory)
    assert status == 0
    assert "1 policies, 0 CIDR groups in 1 files: 0 errors, 0 warnings" in shown.out


def test_check_names_file_line_and_column_of_a_mistake(run, directory):
    (directory / "bad.yaml").write_text(KUBELET.replace("fromEndpoints", "fromEndpoint"))
    status, shown = run("validate", directory)
    assert status == 1
    assert f"{directory}/bad.yaml:7:5: error: spec.ingress[0].fromEndpoint: unknown field" in shown.out
    status, shown = run("check", directory, "-o", "json")
    assert json.loads(shown.out)["valid"] is False


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("- fromEntities: [remote-node]", "nodes of every connected cluster"),
        ("- fromEndpoints: [{}]", "all pods of all connected clusters"),
        ("- fromCIDR: [10.1.0.0/16]", "10.1.0.11 is node k8s-1"),
        ("- fromCIDRSet: [{cidrGroupRef: nobody}]", "does not exist or is empty"),
        ("- fromEntities: []\n    toPorts: [{ports: [{port: '1'}]}]", "matches nobody"),
        ("- toPorts: [{}]", "matches no port"),
        ("- icmps: [{fields: [{family: IPv6, type: 135}]}]", "always passes on hosts"),
        ("- fromEntities: [init]\n  - fromEntities: [init]\n    toPorts: [{ports: [{port: '1'}]}]", "adds nothing to"),
    ],
)  # fmt: skip
def test_check_warns_about_what_does_not_do_what_it_seems_to(run, tmp_path, rule, expected):
    text = KUBELET[: KUBELET.index("  - fromEndpoints")] + "  " + rule + "\n"
    (tmp_path / "a.yaml").write_text(text)
    status, shown = run("check", tmp_path, "--known-address", "10.1.0.11=node k8s-1")
    assert expected in shown.out
    assert status == 0
    assert run("check", tmp_path, "--strict", "--known-address", "10.1.0.11=node k8s-1")[0] == 1


def test_check_warns_that_a_deny_alone_blocks_everything_and_spares_the_failsafe_ports(run, tmp_path):
    text = KUBELET[: KUBELET.index("  ingress:")] + "  ingressDeny:\n  - fromEntities: [world]\n"
    (tmp_path / "a.yaml").write_text(text)
    shown = run("check", tmp_path)[1].out
    assert "default deny and blocks everything" in shown
    assert "failsafe list keeps 22/TCP" in shown


def test_a_file_that_is_not_text_does_not_hide_the_findings_in_others(run, directory):
    (directory / "binary.yaml").write_bytes(b"ok: 1\n\xff\xfe")
    (directory / "wrong.yaml").write_text(KUBELET.replace("fromEndpoints", "fromEndpoint"))
    status, shown = run("check", directory)
    assert status == 1
    assert "binary.yaml:2:1: error: not UTF-8 text" in shown.out
    assert "did you mean fromEndpoints?" in shown.out


def test_explain_names_the_deciding_rule(run, directory):
    status, shown = run("explain", directory, "-s", METRICS, "--dport", "10250/TCP", "--expect", "allow")
    assert status == 0
    assert f'allowed by policy "kubelet", ingress[0] ({directory}/kubelet.yaml:7)' in shown.out


def test_explain_names_who_restricts_and_what_missed(run, directory):
    status, shown = run("trace", "-f", directory, "-s", METRICS, "--dport", "22", "-o", "json")
    (answer,) = json.loads(shown.out)
    assert status == 0
    assert answer["verdict"] == "deny"
    assert answer["fixedRule"] == "default-deny-ingress"
    assert answer["restrictedBy"][0]["policy"] == "kubelet"
    assert answer["nearest"][0]["missed"] == ["toPorts: wants 10250/TCP, the packet has 22/TCP"]
    assert run("explain", directory, "-s", METRICS, "--dport", "22", "--expect", "allow")[0] == 1


def test_explain_never_names_a_rule_where_none_decided(run, directory):
    shown = run("explain", directory, "-d", "203.0.113.7", "--dport", "443/TCP")[1].out
    assert shown.startswith("ALLOW  egress to 203.0.113.7")
    assert "no policy restricts egress" in shown


def test_a_wrong_question_ends_in_one_line_and_status_2(run, directory):
    for arguments in (
        ("explain", directory, "-s", "nonsense", "--dport", "1"),
        ("check", directory / "missing.yaml"),
    ):
        status, shown = run(*arguments)
        assert status == 2
        assert shown.err.startswith("meshwall policy: ")
        assert shown.err.count("\n") == 1


def test_diff_is_empty_for_two_ways_to_write_the_same(run, directory, tmp_path):
    (directory / "other").mkdir()
    (directory / "other" / "same.yaml").write_text(SAME)
    status, shown = run("diff", directory / "kubelet.yaml", directory / "other")
    assert (status, shown.out) == (0, "no change in meaning\n")


def test_diff_tells_peers_ports_verdicts_and_rules(run, directory):
    (directory / "new").write_text(KUBELET.replace('"10250"', '"10255"'))
    status, shown = run("diff", directory / "kubelet.yaml", directory / "new", "-o", "json")
    assert status == 1
    changes = json.loads(shown.out)["changes"]
    assert [(one["ports"], one["before"], one["after"]) for one in changes] == [
        (["10250/TCP"], "allow", "deny"),
        (["10255/TCP"], "deny", "allow"),
    ]
    assert "serviceaccount=metrics-server" in changes[0]["peer"]


def test_tests_beside_policies_pass_and_fail_readably(run, directory):
    (directory / "kubelet.test.yaml").write_text(TESTS)
    status, shown = run("test", directory, "--junit", directory / "out.xml")
    assert (status, shown.out) == (0, "8 expectations, 0 failed\n")
    assert (directory / "out.xml").read_text().count("<testcase ") == 8
    (directory / "kubelet.test.yaml").write_text(
        TESTS.replace("expect: allow, policy", "expect: deny, policy")
    )
    status, shown = run("test", directory / "kubelet.test.yaml")
    assert status == 1
    assert "expected deny, got allow: allowed by policy" in shown.out
    assert run("check", directory)[0] == 0  # tests in the policy directory are not policies


def test_a_test_that_names_nobody_known_is_an_error(run, directory):
    (directory / "kubelet.test.yaml").write_text(TESTS.replace("from: metrics", "from: metric"))
    status, shown = run("test", directory)
    assert status == 2
    assert '"metric" is neither in identities' in shown.err


def test_matrix_lists_every_class_of_peers(run, directory):
    shown = run("matrix", directory)[1].out
    assert (
        "allow 10250/TCP; otherwise deny\n      pod k8s:io.cilium.k8s.policy.serviceaccount=metrics-server"
        in shown
    )
    assert "egress: not enforced" in shown
    assert json.loads(run("matrix", directory, "-o", "json")[1].out)[0]["enforced"] is True
