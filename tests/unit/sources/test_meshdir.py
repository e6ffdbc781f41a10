"""A directory with a file for each remote cluster: clusters come, reconnect and go with their files."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clustermesh import wire
from clustermesh.follow import Backoff
from clustermesh.kv import MemoryKV
from clustermesh.settings import EtcdSettings
from daemon.model.problem import Problem
from daemon.sources.mesh import Arrival, MeshSource, Shared
from daemon.sources.meshdir import MeshDirectory, parse_remote
from daemon.state.tables import Tables

ORIGINAL = """endpoints:
- https://west.mesh.example:2379
trusted-ca-file: /path/ca.crt
cert-file: /path/client.crt
key-file: /path/client.key
"""


class Stores(dict[str, MemoryKV]):
    """Stores by their endpoint."""

    async def cluster(self, name: str, number: int, *addresses: str, cached: bool = False) -> None:
        kv = self.setdefault(name, MemoryKV())
        config = wire.ClusterConfig(number, cached=cached, max_clusters=255)
        await kv.put(wire.config_key(name), wire.encode_config(config))
        for text in addresses:
            key = f"{wire.CACHE_IPS}/{name}/{text}" if cached else wire.ip_key(text)
            await kv.put(key, wire.encode_ip(wire.ip_entry(text, (number << 16) + 1)))


@pytest.fixture
def stores() -> Stores:
    return Stores()


@pytest.fixture
def tables() -> Tables:
    return Tables()


def write(directory: Path, name: str, store: str = "", extra: str = "") -> None:
    text = (
        f"endpoints: ['http://127.0.0.1:1/']\n{extra}"
        if not store
        else f"endpoints:\n- https://{store}\n{extra}"
    )
    (directory / name).write_text(text)


@asynccontextmanager
async def following(directory: Path, stores: Stores, tables: Tables) -> AsyncIterator[MeshDirectory]:
    shared = Shared(Arrival(tables))

    def build(name: str, kv: MemoryKV) -> MeshSource:
        source = MeshSource(
            tables, kv, cluster_name="east", cluster_id=1, only=name, name=name, shared=shared
        )
        source.follower._backoff = Backoff(0.01, 0.05)
        return source

    def connect(settings: EtcdSettings) -> MemoryKV:
        return stores[settings.endpoints[0].removeprefix("https://")]

    async def took_over(_: str) -> None:
        pass

    meshes = MeshDirectory(
        tables, directory, own_cluster="east", shared=shared, build=build, connect=connect,
        took_over=took_over, gave_back=lambda: None,
    )  # fmt: skip
    async with asyncio.TaskGroup() as group:
        task = group.create_task(meshes.run())
        try:
            yield meshes
        finally:
            task.cancel()


def addresses(tables: Tables) -> set[str]:
    return {f"{key.source} {key.prefix}" for key in tables.ips}


def test_the_original_file_format_is_read() -> None:
    found = parse_remote(ORIGINAL, "west")
    assert found == EtcdSettings(
        ("https://west.mesh.example:2379",), "/path/ca.crt", "/path/client.crt", "/path/client.key"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("endpoints: []", "empty"),
        ("endpoints: [http://10.0.0.1:2379]", "insecure_transport"),
        (ORIGINAL + "insecure-skip-tls-verify: true\n", "not supported"),
        (ORIGINAL + "trusted-ca: x\n", "unknown field"),
        ("endpoints: &a [x]\nca-file: *a", "west:1"),
        (ORIGINAL.replace("key-file: /path/client.key\n", ""), "both or neither"),
    ],
)
def test_a_file_that_could_not_work_or_is_not_safe_is_refused_with_its_place(text: str, why: str) -> None:
    found = parse_remote(text, "west")
    assert isinstance(found, tuple)
    assert isinstance(found[0], Problem)
    assert why in str(found[0])


async def test_each_file_is_a_cluster_and_our_own_and_others_mean_nothing(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1")
    await stores.cluster("north", 3, "10.3.0.1", cached=True)
    write(tmp_path, "west", "west")
    write(tmp_path, "north", "north")
    write(tmp_path, "east", "east")
    (tmp_path / "README").write_text("no such word here")
    (tmp_path / "directory").mkdir()
    async with following(tmp_path, stores, tables):
        await until(lambda: addresses(tables) == {"mesh:west 10.2.0.1", "mesh:north 10.3.0.1"})
        await until(lambda: tables.ips.synced)
    assert tables.status["mesh:north"].details["cached"] is True
    assert tables.status["mesh files"].ok


async def test_a_file_that_goes_takes_its_cluster_along_and_no_other(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1")
    await stores.cluster("north", 3, "10.3.0.1")
    write(tmp_path, "west", "west")
    async with following(tmp_path, stores, tables) as meshes:
        await until(lambda: addresses(tables) == {"mesh:west 10.2.0.1"})
        write(tmp_path, "north", "north")
        await until(lambda: len(tables.ips) == 2)
        before = tables.ips.revision
        (tmp_path / "west").unlink()
        await until(lambda: addresses(tables) == {"mesh:north 10.3.0.1"})
        assert tables.ips.revision == before + 1
        assert "mesh:west" not in tables.status
        assert meshes._shared.ids == {3: "north"}
        (tmp_path / "north").write_text("no more")  # without the word
        await until(lambda: not tables.ips)


async def test_a_changed_file_means_another_connection_and_only_the_difference(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1", "10.2.0.2")
    write(tmp_path, "west", "west")
    async with following(tmp_path, stores, tables):
        await until(lambda: len(tables.ips) == 2)
        before = tables.ips.revision
        stores["moved"] = MemoryKV()
        for key, entry in stores["west"]._entries.items():
            if not key.endswith("10.2.0.2"):
                await stores["moved"].put(key, entry.value)
        write(tmp_path, "west", "moved")
        await until(lambda: addresses(tables) == {"mesh:west 10.2.0.1"})
        assert tables.ips.revision == before + 1


async def test_a_bad_file_leaves_its_cluster_and_the_others_alone(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1")
    write(tmp_path, "west", "west")
    write(tmp_path, "North", "west")
    async with following(tmp_path, stores, tables):
        await until(lambda: len(tables.ips) == 1)
        assert "North" in tables.status["mesh files"].text
        write(tmp_path, "west", "west", "no-such-key: 1\n")
        await until(lambda: "no-such-key" in tables.status["mesh files"].text)
        assert addresses(tables) == {"mesh:west 10.2.0.1"}
        await stores.cluster("west", 2, "10.2.0.3")  # it is still followed
        await until(lambda: len(tables.ips) == 2)


async def test_secrets_that_are_swapped_behind_a_link_are_noticed(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1")
    await stores.cluster("north", 3, "10.3.0.1")
    directory = tmp_path / "clustermesh"
    for number in ("1", "2"):
        (directory / f"..{number}").mkdir(parents=True)
    write(directory / "..1", "west", "west")
    write(directory / "..2", "north", "north")
    (directory / "..data").symlink_to("..1")
    for name in ("west", "north"):
        (directory / name).symlink_to(f"..data/{name}")
    async with following(directory, stores, tables):
        await until(lambda: addresses(tables) == {"mesh:west 10.2.0.1"})
        (directory / "..new").symlink_to("..2")
        (directory / "..new").rename(directory / "..data")
        await until(lambda: addresses(tables) == {"mesh:north 10.3.0.1"})


async def test_two_clusters_with_one_id_are_one_too_many(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    await stores.cluster("west", 2, "10.2.0.1")
    await stores.cluster("north", 2, "10.3.0.1")
    write(tmp_path, "west", "west")
    async with following(tmp_path, stores, tables):
        await until(lambda: len(tables.ips) == 1)
        write(tmp_path, "north", "north")
        await until(lambda: "cluster_id_taken" in getattr(tables.status.get("mesh:north"), "text", ""))
        assert addresses(tables) == {"mesh:west 10.2.0.1"}


async def test_a_store_without_the_clusters_configuration_is_said_and_asked_again(
    tmp_path: Path, stores: Stores, tables: Tables, until
) -> None:
    stores["west"] = MemoryKV()
    write(tmp_path, "west", "west")
    async with following(tmp_path, stores, tables):
        await until(lambda: "is not there" in getattr(tables.status.get("mesh:west"), "text", ""))
        await stores.cluster("west", 2, "10.2.0.1")
        await until(lambda: len(tables.ips) == 1)
