"""`mesh check` over set-ups that are broken on purpose: each fault is named, and nothing else is."""

import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clustermesh import rights, wire
from clustermesh.admin import apply
from clustermesh.check import Finding, Look, Severity, diagnose
from clustermesh.etcd import EtcdKV
from clustermesh.settings import EtcdSettings
from clustermesh.trust import Trust
from daemon.cli.main import main

RESOURCES = (wire.NODES, wire.IDENTITIES, wire.IPS, wire.SERVICES, wire.SERVICE_EXPORTS)
EAST = Trust("east", 1)


def stamp(age_s: float = 5) -> bytes:
    return (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


async def write_cluster(kv: EtcdKV, name: str = "west", number: int = 2) -> None:
    """A cluster as it should be."""
    await kv.put(wire.HEARTBEAT, stamp())
    config = wire.ClusterConfig(number, synced_canaries=True, max_clusters=255, service_exports=True)
    await kv.put(wire.config_key(name), wire.encode_config(config))
    for resource in RESOURCES:
        await kv.put(wire.canary_key(name, resource), b"x")


def look(settings: EtcdSettings, **more: object) -> Look:
    made = {"only": "west", "expected": ("west",), **more}
    return Look("west", settings, EAST, **made)  # type: ignore[arg-type]


async def errors(what: Look, kind: Severity = Severity.ERROR) -> list[Finding]:
    return [one for one in await diagnose(what) if one.severity is kind]


def told(found: list[Finding], *parts: str) -> bool:
    return any(all(part in f"{one.where} {one.text} {one.fix}" for part in parts) for one in found)


@pytest.fixture
async def west(live, kv: EtcdKV) -> EtcdSettings:
    await write_cluster(kv)
    return EtcdSettings((live.endpoint,))


async def test_a_good_store_has_no_errors_and_is_told_that_anybody_may_write(west: EtcdSettings) -> None:
    found = await diagnose(look(west))
    assert not [one for one in found if one.severity is Severity.ERROR], found
    assert told(await errors(look(west), Severity.WARNING), "may write", "auth enable")
    assert (await kv_count(west)) == 2 + len(RESOURCES), "it writes nothing"


async def kv_count(settings: EtcdSettings) -> int:
    kv = EtcdKV(settings)
    try:
        return len((await kv.list("cilium/")).entries)
    finally:
        await kv.close()


async def test_missing_markers_an_old_heartbeat_and_a_wrong_clock_are_told(
    west: EtcdSettings, kv: EtcdKV
) -> None:
    await kv.delete(wire.canary_key("west", wire.IPS))
    await kv.delete(wire.canary_key("west", wire.SERVICES))
    await kv.put(wire.HEARTBEAT, stamp(500))
    found = await errors(look(west))
    assert len(found) == 2
    assert told(found, wire.canary_key("west", wire.IPS), "addresses of west are not read")
    assert told(found, ".heartbeat", " s old, expected 60")
    assert told(await errors(look(west), Severity.WARNING), "services of west are not read")
    await kv.put(wire.HEARTBEAT, stamp(-90))
    assert told(await errors(look(west), Severity.WARNING), "from the future", "NTP")
    await kv.delete(wire.HEARTBEAT)
    assert told(await errors(look(west)), "nobody writes a heartbeat")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (wire.ClusterConfig(1, max_clusters=255), "id 1 is our own"),
        (wire.ClusterConfig(2, max_clusters=511), "made for 511 clusters"),
        (wire.ClusterConfig(3, max_clusters=255), "held by cluster north"),
    ],
)
async def test_a_configuration_that_does_not_fit_is_told(
    west: EtcdSettings, kv: EtcdKV, config: wire.ClusterConfig, says: str
) -> None:
    await kv.put(wire.config_key("west"), wire.encode_config(config))
    found = await errors(look(west, taken={3: "north"}))
    assert len(found) == 1
    assert told(found, says)


async def test_the_same_id_twice_in_a_shared_store_is_told(west: EtcdSettings, kv: EtcdKV) -> None:
    await write_cluster(kv, "xenon", 2)
    found = await errors(look(west, only="", expected=("west", "xenon")))
    assert len(found) == 1
    assert told(found, "xenon", "held by cluster west", "give one of them another")


async def test_a_store_of_somebody_else_is_told(west: EtcdSettings) -> None:
    found = await errors(look(west, only="north", expected=("north",)))
    assert told(found, "cluster-config/north", "no configuration")


async def test_tls_faults_are_told_by_their_cause(tls_etcd, certificates, tmp_path: Path) -> None:
    cert, key = certificates.user("reader")
    good = EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key)
    other = type(certificates)(tmp_path / "other")
    assert told(await errors(look(replace(good, ca=str(other.ca)))), "not signed by", "set etcd.ca")
    assert told(
        await errors(look(replace(good, server_name="x.example"))), "is not for x.example", "server_name"
    )
    assert told(await errors(look(replace(good, ca=str(tmp_path / "none")))), "No such file")
    assert told(await errors(look(replace(good, cert="", key=""))), "client certificate")
    early = await diagnose(look(good), clock=lambda: 0.0)
    assert told(
        [one for one in early if one.severity is Severity.ERROR],
        "the server's certificate is good from",
        "clock",
    )


async def test_an_expired_certificate_is_told_with_its_date(etcd, certificates, tmp_path: Path) -> None:
    ended = datetime.now(UTC) - timedelta(days=3)
    issued = certificates._ca.issue_cert("127.0.0.1", not_after=ended)
    cert, key = certificates._pair("old", issued)
    member = type(etcd)(tmp_path / "old", "--cert-file", str(cert), "--key-file", str(key), tls=True)
    member.start()
    try:
        found = await errors(look(EtcdSettings((member.endpoint,), str(certificates.ca))))
    finally:
        member.stop()
    assert len(found) == 1
    assert told(found, "the server's certificate expired", f"{ended:%Y-%m-%d}", "issue a new")


async def test_rights_that_are_missing_and_rights_too_many_are_told(tls_etcd, certificates) -> None:
    def settings(user: str) -> EtcdSettings:
        cert, key = certificates.user(user)
        return EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key)

    root = EtcdKV(settings("root"))
    await write_cluster(root)
    roles = (
        rights.reader("west", ["good"]),
        rights.writer("west", ["writer"]),
        rights.member("west", ["writer"]),
    )
    narrow = rights.Role("narrow", rights.reader("west", ()).rights[:3], ("narrow",))
    await apply(root, (*roles, narrow, rights.Role("root", (), ("root",))))
    etcdctl(tls_etcd, certificates, "auth", "enable")
    await root.close()
    found = [one for one in await diagnose(look(settings("good"))) if one.severity is not Severity.OK]
    assert not [one for one in found if "get around their roles" not in one.text]
    assert told(await errors(look(settings("narrow"))), wire.IPS, "may not be read", "mesh invite")
    assert told(await errors(look(settings("stranger"))), wire.HEARTBEAT, "permission denied", "mesh invite")
    assert told(await errors(look(settings("writer")), Severity.WARNING), "may write", "need not")
    ours = look(settings("good"), only="", writes=True, node="w1")
    ours = replace(ours, trust=Trust("west", 2))
    assert told(await errors(ours), "may not be written", "west-writer")
    ours = replace(ours, settings=settings("writer"))
    assert not await errors(ours)
    assert told(await errors(ours, Severity.WARNING), "this host is not published")


def etcdctl(member, certificates, *words: str) -> None:  # type: ignore[no-untyped-def]
    cert, key = certificates.user("root")
    command = ["etcdctl", "--endpoints", member.endpoint, "--cacert", str(certificates.ca), "--cert", cert,
               "--key", key, *words]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env={"ETCDCTL_API": "3"})


async def test_a_dead_endpoint_is_told_and_nothing_after_it() -> None:
    found = await diagnose(look(EtcdSettings(("http://127.0.0.1:1",))))
    assert [one.severity for one in found] == [Severity.ERROR]
    assert told(found, "127.0.0.1:1", "cannot be reached")


def test_the_command_needs_no_daemon_and_fails_on_errors(live, tmp_path: Path, capfd) -> None:
    directory = tmp_path / "clusters"
    directory.mkdir()
    (directory / "west").write_text(f"endpoints: [{live.endpoint}]\n")
    (directory / "north").write_text("endpoints: 5\n")
    file = tmp_path / "meshwall.yaml"
    file.write_text(f"cluster_name: east\ncluster_id: 1\nclusters_dir: {directory}\n")
    file.chmod(0o644)
    assert main(["mesh", "check", "--config", str(file)]) == 1
    out = capfd.readouterr()
    assert "west has no configuration here" in out.out
    assert "north" in out.out
    assert "expected a list" in out.out
    assert "fix: " in out.out
    assert not out.err
