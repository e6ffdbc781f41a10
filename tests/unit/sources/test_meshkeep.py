"""What a store said is kept on disk: a host starts from it without the store, and then only hears the difference."""
# ruff: noqa: ASYNC240 - short files of a test

import asyncio
import os
import time
from pathlib import Path

import pytest

from clustermesh import keep, wire
from clustermesh.kv import Listing, MemoryKV
from daemon.model.identity import Identity
from daemon.sources import mesh
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables

WEB = 131073


class Etcd(MemoryKV):
    """A store that says which one it is."""

    async def list(self, prefix: str) -> Listing:
        listing = await super().list(prefix)
        return Listing(listing.entries, listing.revision, 77)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "SAVE_AFTER_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "mesh" / "shared"


def make(tables: Tables, kv: MemoryKV, path: Path, **settings: object) -> MeshSource:
    return MeshSource(tables, kv, cluster_name="east", cluster_id=1, keep=path, **settings)  # type: ignore[arg-type]


async def filled() -> Etcd:
    kv = Etcd()
    node = wire.Node("w1", "west", (wire.NodeAddress("InternalIP", "192.168.5.1"),), cluster_id=2)
    entries = {
        wire.config_key("west"): wire.encode_config(wire.ClusterConfig(2, synced_canaries=True)),
        **{wire.canary_key("west", one): b"" for one in (wire.NODES, wire.IDENTITIES, wire.IPS)},
        wire.node_key("west", "w1"): wire.encode_node(node),
        wire.identity_key(WEB): wire.encode_identity(["k8s:app=web"], "west"),
    }
    for number in range(1, 30):
        text = f"10.2.0.{number}"
        entries[wire.ip_key(text)] = wire.encode_ip(wire.ip_entry(text, WEB, "192.168.5.1", "prod", "web"))
    entries[wire.ip_key("10.2.9.0/24")] = wire.encode_ip(wire.ip_entry("10.2.9.0/24", WEB))
    entries[wire.ip_key("10.2.0.1/32")] = wire.encode_ip(wire.ip_entry("10.2.0.1/32", WEB))
    for key, value in entries.items():
        await kv.put(key, value)
    return kv


async def kept(kv: MemoryKV, path: Path, running, until) -> Tables:
    """Follow a store until what it says is on disk."""
    tables = Tables()
    async with running(make(tables, kv, path)):
        await until(path.exists)
    return tables


async def test_a_start_without_the_store_knows_what_was_last_known(path: Path, running, until) -> None:
    kv = await filled()
    before = await kept(kv, path, running, until)
    assert path.stat().st_mode & 0o777 == 0o600
    kv.cut()
    tables = Tables()
    async with running(make(tables, kv, path)):
        await until(lambda: tables.ips.synced)
        assert {one: tables.ips[one] for one in tables.ips} == {one: before.ips[one] for one in before.ips}
        assert len(tables.ips) == 30
        assert dict(tables.identities.rows) == dict(before.identities.rows)
        assert dict(tables.nodes.rows) == dict(before.nodes.rows)
        assert tables.ips.stale_since["mesh:west"] == pytest.approx(time.time(), abs=5)
        await until(lambda: "stale" in tables.status["mesh:west"].text)


async def test_when_the_store_is_back_only_the_difference_happens(path: Path, running, until) -> None:
    kv = await filled()
    await kept(kv, path, running, until)
    await kv.delete(wire.ip_key("10.2.0.7"))
    await kv.put(wire.ip_key("10.2.0.77"), wire.encode_ip(wire.ip_entry("10.2.0.77", WEB)))
    kv.cut()
    tables = Tables()
    source = make(tables, kv, path)
    async with running(source):
        await until(lambda: tables.ips.synced)
        revision = tables.ips.revision
        kv.heal()
        await until(lambda: source.follower.connected)
        assert tables.ips.revision == revision + 2
        assert {str(key.prefix) for key in tables.ips} >= {"10.2.0.77", "10.2.0.1"}
        assert tables.ips.stale_since == {}


async def test_a_store_that_was_wiped_while_we_were_down_is_not_believed(path: Path, running, until) -> None:
    await kept(await filled(), path, running, until)
    tables, wiped = Tables(), Etcd()
    await wiped.put(wire.config_key("west"), wire.encode_config(wire.ClusterConfig(2)))
    source = make(tables, wiped, path)
    async with running(source):
        await until(lambda: source.follower.connected)
        assert len(tables.ips) == 30
        assert "held" in tables.status["mesh:west"].text
        assert await source.accept("west") == 33
        assert len(tables.ips) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "format"])
async def test_a_damaged_file_counts_as_absent_and_is_said(path: Path, damage: str, running, until) -> None:
    kv = await filled()
    await kept(kv, path, running, until)
    whole = path.read_bytes()
    damaged = {
        "flip": whole.replace(b"10,", b"11,", 1) if b"10," in whole else whole[:50] + b"x" + whole[51:],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "format": whole.replace(b'"format":1', b'"format":9'),
    }[damage]
    path.write_bytes(damaged)
    kv.cut()
    tables = Tables()
    async with running(make(tables, kv, path, sync_wait_s=0.05)):
        await until(lambda: tables.ips.synced)
        assert len(tables.ips) == 0
        assert any(str(path) in one for one in tables.status["mesh"].details["warnings"])  # type: ignore[attr-defined]


async def test_what_was_kept_is_checked_against_todays_trust(path: Path, running, until) -> None:
    await kept(await filled(), path, running, until)
    cut = Etcd()
    cut.cut()
    tables = Tables()
    async with running(make(tables, cut, path, prefixes={"west": ["10.2.9.0/24"]})):
        await until(lambda: tables.ips.synced)
        assert {str(key.prefix) for key in tables.ips} == {"10.2.9.0/24"}
    tables = Tables()
    async with running(make(tables, cut, path, clusters={"west": 7}, sync_wait_s=0.05)):
        await until(lambda: tables.ips.synced)
        assert len(tables.ips) == 0


async def test_with_an_age_limit_an_old_file_and_a_long_outage_expire(path: Path, running, until) -> None:
    kv = await filled()
    await kept(kv, path, running, until)
    tables = Tables()
    source = make(tables, kv, path, stale_after_s=0.2)
    async with running(source):
        await until(lambda: source.follower.connected)
        kv.cut()
        await until(lambda: not source.follower.connected)
        assert len(tables.ips) == 30
        await until(lambda: not tables.ips)
        kv.heal()
        await until(lambda: len(tables.ips) == 30)
    os.utime(path, (0, time.time() - 3600))
    kv.cut()
    tables = Tables()
    async with running(make(tables, kv, path, stale_after_s=600, sync_wait_s=0.05)):
        await until(lambda: tables.ips.synced)
        assert len(tables.ips) == 0


async def test_a_full_disk_changes_nothing_and_leaves_no_half_file(
    path: Path, running, until, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = await filled()
    await kept(kv, path, running, until)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keep.os, "fsync", full)
    tables = Tables()
    source = make(tables, kv, path)
    async with running(source):
        await until(lambda: source.follower.connected)
        await kv.delete(wire.ip_key("10.2.0.7"))
        await until(lambda: "No space" in source._kept)
        assert len(tables.ips) == 29
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


async def test_changes_that_come_while_it_is_written_are_written_later(path: Path, running, until) -> None:
    kv, tables = await filled(), Tables()
    async with running(make(tables, kv, path)):
        await until(path.exists)
        await kv.delete(wire.ip_key("10.2.0.7"))
        await until(lambda: len(tables.ips) == 29)
        stamp = path.stat().st_mtime_ns
        await until(lambda: path.stat().st_mtime_ns > stamp)
        await asyncio.sleep(0.05)
    again = Tables()
    kv.cut()
    async with running(make(again, kv, path)):
        await until(lambda: again.ips.synced)
        assert len(again.ips) == 29
        assert Identity(WEB) in again.identities
