"""What a reader and a writer may do in an etcd with users, as `meshwall mesh invite --apply` sets them up."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clustermesh import admin, rights, wire
from clustermesh.collect import Collector
from clustermesh.etcd import EtcdKV
from clustermesh.follow import Backoff
from clustermesh.kv import Compare, Denied, Put
from clustermesh.leases import Leases
from clustermesh.publish import Address, Host, Member, Publisher, publishable
from clustermesh.settings import EtcdSettings
from daemon.cli.main import main
from daemon.sources.meshdir import parse_remote

WEB = wire.encode_identity(["k8s:app=web"], "alpha").decode()
HOST = Host("alpha", 1, "a1", publishable(["10.0.0.1"]), {"role": "infra"})


class Guarded:
    """An etcd that asks for certificates, and whose users are those of their common names."""

    def __init__(self, etcd, certificates) -> None:  # type: ignore[no-untyped-def]
        self.etcd, self.certificates = etcd, certificates

    def settings(self, user: str) -> EtcdSettings:
        cert, key = self.certificates.user(user)
        return EtcdSettings((self.etcd.endpoint,), ca=str(self.certificates.ca), cert=cert, key=key)

    @asynccontextmanager
    async def as_user(self, user: str) -> AsyncIterator[EtcdKV]:
        kv = EtcdKV(self.settings(user))
        yield kv
        await kv.close()

    def etcdctl(self, *words: str) -> None:
        cert, key = self.certificates.user("root")
        command = ["etcdctl", "--endpoints", self.etcd.endpoint, "--cacert", str(self.certificates.ca),
                   "--cert", cert, "--key", key, *words]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env={"ETCDCTL_API": "3"})

    def invite(self, cluster: str, *more: str) -> int:
        cert, key = self.certificates.user("root")
        return main(["mesh", "invite", "--cluster", cluster, "--apply", "--endpoints", self.etcd.endpoint,
                     "--ca", str(self.certificates.ca), "--cert", cert, "--key", key, *more])  # fmt: skip


@pytest.fixture
def store(tls_etcd, certificates) -> Iterator[Guarded]:  # type: ignore[no-untyped-def]
    guarded = Guarded(tls_etcd, certificates)
    guarded.etcdctl("user", "add", "root", "--no-password")
    guarded.etcdctl("user", "grant-role", "root", "root")
    guarded.etcdctl("auth", "enable")
    return guarded


async def everything_published(publisher: Publisher) -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(publisher.run())
        async with asyncio.timeout(10):
            while not publisher.ok:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        task.cancel()


async def test_the_writer_can_publish_everything_of_ours_and_nothing_of_others(store: Guarded) -> None:
    assert await asyncio.to_thread(store.invite, "alpha") == 0
    async with store.as_user("alpha-writer") as kv:
        publisher = Publisher(kv, Member("alpha", 1, "a1"), backoff=Backoff(0.05, 0.2))
        publisher.publish(HOST)
        export = wire.service_export_key("alpha", "prod", "web")
        keys = {wire.service_key("alpha", "prod", "web"): b"{}", export: b"{}"}
        publisher.want("services", keys)
        publisher.want("workloads", addresses=[Address("10.1.0.5", WEB)])
        await everything_published(publisher)
        first, last = wire.identity_range(1)
        collector = Collector(kv, Leases(kv), cluster="alpha", first=first, last=last, node="a1")
        collector._pause_s = 0
        await collector.round()
        assert collector.leading
        for key in (
            wire.config_key("beta"), wire.canary_key("beta", wire.IPS), wire.node_key("beta", "b1"),
            wire.node_key("alphaX", "b1"), wire.service_key("beta", "x", "y"), "cilium/cache/ip/v1/alpha/10.0.0.1",
            "cilium/cluster-config/alphaX", wire.collector_key("beta"), "other",
        ):  # fmt: skip
            with pytest.raises(Denied):
                await kv.put(key, b"mine")
            with pytest.raises(Denied):
                await kv.commit((Compare(key, "version", 0),), (Put(key, b"mine"),))


async def test_the_reader_sees_this_cluster_and_can_change_nothing(store: Guarded) -> None:
    assert await asyncio.to_thread(store.invite, "alpha", "--reader", "beta-hosts") == 0
    async with store.as_user("beta-hosts") as kv:
        assert await kv.get(wire.config_key("alpha")) is None
        for prefix in (
            wire.IDENTITY_MASTERS,
            f"{wire.IPS}/default/",
            "cilium/synced/alpha/",
            "cilium/state/",
        ):
            await kv.list(prefix)
        await kv.list(wire.HEARTBEAT)
        for prefix in (
            "cilium/cache/",
            "cilium/cluster-config/",
            "cilium/synced/",
            "cilium/state",
            "meshwall/",
        ):
            with pytest.raises(Denied):
                await kv.list(prefix)
        with pytest.raises(Denied):
            await kv.get(wire.config_key("beta"))
        for key in (
            wire.HEARTBEAT,
            wire.config_key("alpha"),
            wire.identity_key(65536),
            wire.ip_key("10.0.0.1"),
        ):
            with pytest.raises(Denied):
                await kv.put(key, b"mine")
            with pytest.raises(Denied):
                await kv.delete(key)


async def test_doing_it_again_changes_nothing_and_takes_away_what_is_too_much(store: Guarded, capsys) -> None:
    await asyncio.to_thread(store.invite, "alpha")
    await asyncio.to_thread(store.etcdctl, "role", "grant-permission", "alpha-reader", "readwrite", "x", "z")
    capsys.readouterr()
    await asyncio.to_thread(store.invite, "alpha")
    assert capsys.readouterr().out == "role alpha-reader: readwrite of x revoked\n"
    await asyncio.to_thread(store.invite, "alpha")
    assert capsys.readouterr().out == "everything is as it should be\n"


async def test_the_printed_commands_do_the_same(store: Guarded, tmp_path: Path, capsys) -> None:
    assert main(["mesh", "invite", "--cluster", "alpha"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith("#"):
            await asyncio.to_thread(store.etcdctl, *line.split()[1:])
    async with store.as_user("root") as kv:
        roles = [rights.reader("alpha", ["alpha-reader"]), rights.writer("alpha", ["alpha-writer"]),
                 rights.member("alpha", ["alpha-writer"])]  # fmt: skip
        assert await admin.apply(kv, roles) == []


async def test_who_is_no_administrator_is_told_so(store: Guarded, capsys) -> None:
    await asyncio.to_thread(store.invite, "alpha")
    cert, key = store.certificates.user("alpha-reader")
    words = ["mesh", "invite", "--cluster", "beta", "--apply", "--endpoints", store.etcd.endpoint,
             "--ca", str(store.certificates.ca), "--cert", cert, "--key", key]  # fmt: skip
    assert await asyncio.to_thread(main, words) == 1
    assert "permission denied" in capsys.readouterr().err


def test_the_file_of_join_is_what_the_daemon_reads(tmp_path: Path, capsys) -> None:
    words = ["mesh", "join", "--cluster", "beta", "--directory", str(tmp_path / "clusters.d"),
             "--endpoints", "https://etcd.beta.example:2379,https://[fd00::1]:2379",
             "--ca", "/k/ca.crt", "--cert", "/k/c.crt", "--key", "/k/c.key"]  # fmt: skip
    assert main(words) == 0
    file = tmp_path / "clusters.d" / "beta"
    assert file.read_text() == (
        "endpoints:\n- https://etcd.beta.example:2379\n- https://[fd00::1]:2379\n"
        "trusted-ca-file: /k/ca.crt\ncert-file: /k/c.crt\nkey-file: /k/c.key\n"
    )
    assert file.stat().st_mode & 0o777 == 0o600
    found = parse_remote(file.read_text(), str(file))
    assert isinstance(found, EtcdSettings)
    assert (found.ca, found.cert, len(found.endpoints)) == ("/k/ca.crt", "/k/c.crt", 2)
    assert main(words) == 2
    assert "use --force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["invite", "--cluster", "Bad_Name"], "is not a cluster name"),
        (["invite", "--cluster", "a", "--reader", "x", "--writer", "x"], "they must be different users"),
        (["invite", "--cluster", "a", "--apply"], "--endpoints: empty"),
        (["join", "--cluster", "b", "--endpoints", "ftp://x"], "is not like https://host:2379"),
    ],
)
def test_wrong_arguments_are_told_by_name(words: list[str], says: str, capsys) -> None:
    assert main(["mesh", *words]) == 2
    assert says in capsys.readouterr().err


def test_the_help_does_not_load_grpc() -> None:
    code = (
        "import sys; from daemon.cli.main import parser_for; parser_for('mesh'); print('grpc' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
