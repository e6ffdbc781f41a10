"""Settings: what is accepted, and how mistakes are told."""

from pathlib import Path

import pytest

from daemon.config import DEFAULT_FAILSAFE, Config, ConfigError, load, parse, reference

ROOT = Path(__file__).resolve().parents[2]


def read(text: str, **environment: str) -> Config:
    return parse(text.encode(), "m.yaml", environment)


def complaint(text: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, **environment)
    return str(caught.value)


def test_an_empty_file_is_the_default() -> None:
    assert read("").failsafe == DEFAULT_FAILSAFE
    assert read("").socket == Path("/run/meshwall/meshwall.sock")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "xdp: fast\n",
            "m.yaml:1:6: error: xdp: input should be 'auto', 'native', 'generic' or 'off', found \"fast\"",
        ),
        ("audit: 1.5\n", "m.yaml:1:8: error: audit: input should be a valid boolean"),
        ("\nlog_levle: info\n", "m.yaml:2:1: error: log_levle: unknown key, did you mean log_level?"),
        (
            "etcd:\n  endpoints: [10.0.0.1]\n",
            'm.yaml:2:14: error: etcd.endpoints: "10.0.0.1" is not a URL like',
        ),
        ("etcd: {}\n", "m.yaml:1:7: error: etcd.endpoints: required key is missing"),
        (
            "failsafe:\n- {direction: ingress, protocol: TCP, port: 70000}\n",
            "m.yaml:2:45: error: failsafe[0].port:",
        ),
        ("failsafe: []\n", "failsafe is empty: set i_can_reach_the_console"),
        ("clusters: {beta: 900}\n", "clusters: beta: expected an id of 1..511, found 900"),
        ("cluster_id: 2\nclusters: {beta: 2}\n", "id 2 is this cluster's own"),
        ("pins: bpf\n", "bpf is not an absolute path"),
        ("x: [\n", "m.yaml:2:1: error: not valid YAML"),
        ("- a\n", "expected `key: value` lines"),
        ("audit: true\n---\naudit: false\n", "more than one document"),
    ],
)
def test_a_mistake_names_file_place_key_and_expectation(text: str, told: str) -> None:
    assert told in complaint(text)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(complaint("xdp: fast\nflows: many\n").splitlines()) == 2


def test_the_environment_wins_over_the_file() -> None:
    config = read(
        "audit: false\netcd: {endpoints: ['https://a:1'], username: u}\n",
        MESHWALL_AUDIT="true",
        MESHWALL_ETCD__ENDPOINTS="https://b:2,https://c:3",
        MESHWALL_ETCD__PASSWORD="0123",
        MESHWALL_NODE_LABELS="{role: edge}",
        MESHWALL_DEVICES="",
        MESHWALL_SOCKET="/not/ours",
        OTHER="x",
    )
    assert config.audit
    assert config.etcd is not None
    assert config.etcd.endpoints == ("https://b:2", "https://c:3")
    assert config.etcd.password == "0123"
    assert config.node_labels == {"role": "edge"}
    assert config.devices == ()


def test_a_wrong_variable_is_named() -> None:
    assert "environment variable MESHWALL_FLOWS: error: input should be a valid integer" in complaint(
        "", MESHWALL_FLOWS="many"
    )
    assert "MESHWALL_NO_SUCH" in complaint("", MESHWALL_NO_SUCH="1")


def test_a_password_is_never_shown() -> None:
    text = "etcd: {endpoints: ['https://a:1'], username: u, password: [hunter2]}\n"
    assert "hunter2" not in complaint(text)
    assert "hunter2" not in repr(read(text.replace("[hunter2]", "hunter2")))


def test_a_named_file_must_exist_and_be_readable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {})
    (tmp_path / "m.yaml").write_bytes(b"audit: true\nnode_name: \xff\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:2:1: error: not UTF-8"):
        load(tmp_path / "m.yaml", {})


def test_the_kubernetes_profile_never_opens_the_kubelet() -> None:
    ports = {one.port for one in read("failsafe_kubernetes: true").failsafes}
    assert {22, 6443} <= ports
    assert 10250 not in ports


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m daemon.config > docs/configuration.md"


def test_every_key_is_explained() -> None:
    assert all(field.description for field in Config.model_fields.values())


def test_node_ports_are_a_range_that_is_exempt_only_when_asked_for():
    assert parse(b"", "c", {}).node_ports.exempt is None
    assert parse(b"node_ports: {mode: exempt}", "c", {}).node_ports.exempt == (30_000, 32_767)
    with pytest.raises(ConfigError, match="30000-40: expected FIRST-LAST within 1-65535"):
        parse(b"node_ports: {range: 30000-40}", "c", {})
