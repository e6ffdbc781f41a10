"""Certificates, users and rights: what works, and how it is told when it does not."""

import subprocess
from pathlib import Path

import pytest

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.kv import ConnectionLost, Denied
from clustermesh.settings import EtcdSettings

PASSWORD = "right"


async def attempt(settings: EtcdSettings) -> None:
    kv = EtcdKV(settings)
    try:
        await kv.put("a", b"one")
    finally:
        await kv.close()


async def test_a_client_certificate_is_let_in_and_the_server_is_checked_by_name(
    tls_etcd, certificates
) -> None:
    cert, key = certificates.user("meshwall")
    by_address = EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key)
    await attempt(by_address)
    await attempt(EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key, "mesh.example"))
    with pytest.raises(ConnectionLost, match=r"https://127\.0\.0\.1:\d+: .* set etcd\.server_name"):
        await attempt(EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key, "other.example"))


async def test_a_server_of_another_authority_is_not_talked_to(tls_etcd, certificates, tmp_path: Path) -> None:
    other = type(certificates)(tmp_path / "other")
    cert, key = certificates.user("meshwall")
    with pytest.raises(ConnectionLost, match=r"not signed by etcd\.ca"):
        await attempt(EtcdSettings((tls_etcd.endpoint,), str(other.ca), cert, key))


async def test_no_client_certificate_and_no_tls_are_refused_in_one_line(tls_etcd, certificates) -> None:
    with pytest.raises(ConnectionLost, match=r"etcd\.cert"):
        await attempt(EtcdSettings((tls_etcd.endpoint,), str(certificates.ca)))
    plain = tls_etcd.endpoint.replace("https", "http")
    with pytest.raises(ConnectionLost, match="if it speaks TLS"):
        await attempt(EtcdSettings((plain,)))


async def test_a_key_that_does_not_fit_its_certificate_is_named(tls_etcd, certificates) -> None:
    cert, _ = certificates.user("meshwall")
    _, key = certificates.user("other")
    with pytest.raises(ConnectionLost, match=r"etcd.cert, etcd.key: .*meshwall.crt"):
        await attempt(EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key))


async def test_a_rotated_certificate_is_used_at_the_next_connection(tls_etcd, certificates) -> None:
    # ruff: noqa: ASYNC240 - small files
    cert, key = certificates.user("meshwall")
    good = Path(cert).read_bytes()
    Path(cert).write_text("half written")
    kv = EtcdKV(EtcdSettings((tls_etcd.endpoint,), str(certificates.ca), cert, key))
    with pytest.raises(ConnectionLost):
        await kv.get("a")
    Path(cert).write_bytes(good)
    assert await kv.get("a") is None
    await kv.close()


def etcdctl(endpoint: str, *words: str) -> None:
    subprocess.run(
        ["etcdctl", "--endpoints", endpoint, *words],
        check=True,
        capture_output=True,
        env={"ETCDCTL_API": "3"},
    )


@pytest.fixture
def users(etcd) -> None:
    """`reader` may read what a mesh reader needs; `root` may everything."""
    etcdctl(etcd.endpoint, "user", "add", f"root:{PASSWORD}")
    etcdctl(etcd.endpoint, "user", "add", f"reader:{PASSWORD}")
    etcdctl(etcd.endpoint, "role", "add", "reader")
    etcdctl(etcd.endpoint, "role", "grant-permission", "reader", "read", "--prefix", "cilium/state/")
    etcdctl(etcd.endpoint, "user", "grant-role", "reader", "reader")
    etcdctl(etcd.endpoint, "user", "grant-role", "root", "root")
    etcdctl(etcd.endpoint, "auth", "enable")


@pytest.mark.usefixtures("users")
async def test_a_user_may_do_what_its_role_says(etcd) -> None:
    kv = EtcdKV(EtcdSettings((etcd.endpoint,), username="reader", password=PASSWORD))
    assert (await kv.list(f"{wire.IPS}/")).entries == ()
    with pytest.raises(Denied, match="permission denied"):
        await kv.put(wire.ip_key("10.0.0.1"), b"x")
    with pytest.raises(Denied, match="permission denied"):
        await kv.list(wire.CLUSTER_CONFIG)
    with pytest.raises(Denied, match="permission denied"):
        async for _ in kv.watch(wire.CLUSTER_CONFIG, 1):
            pass
    await kv.close()


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"username": "reader", "password": "wrong"}, "check etcd.username and etcd.password"),
        ({"username": "nobody", "password": PASSWORD}, "check etcd.username and etcd.password"),
        ({}, "set etcd.username or etcd.cert"),
    ],
)
async def test_wrong_users_are_told_what_to_look_at(etcd, settings: dict[str, str], message: str) -> None:
    with pytest.raises(Denied, match=message):
        await attempt(EtcdSettings((etcd.endpoint,), **settings))


async def test_a_user_for_a_store_without_users_is_told_so(etcd) -> None:
    with pytest.raises(Denied, match=r"remove etcd.username"):
        await attempt(EtcdSettings((etcd.endpoint,), username="reader", password=PASSWORD))
