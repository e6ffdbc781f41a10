"""The identities file feeds the embedded store."""

from pathlib import Path

from clustermesh import wire
from clustermesh.kv import MemoryKV
from daemon.model.identity import Identity
from daemon.sources.mesh import MeshSource
from daemon.sources.static import IdentitiesFile, parse_static
from daemon.state.tables import Tables

TEXT = """
clusters: {beta: 2}
identities:
  - id: 131073
    labels: ["k8s:app=web"]
    addresses: [10.1.0.5, "fd00::5", 10.2.0.0/24]
  - id: 65537
    labels: ["k8s:app=own"]
    addresses: [10.0.0.5]
"""


def test_a_file_becomes_the_keys_that_the_mesh_reads() -> None:
    static = parse_static(TEXT, "ids.yaml", {"alpha": 1})
    assert not static.problems
    assert static.keys[wire.identity_key(131073)] == b"k8s:app=web;k8s:io.cilium.k8s.policy.cluster=beta;"
    assert wire.ip_key("10.2.0.0/24") in static.keys


def test_mistakes_are_named_with_line_and_field_and_nothing_is_taken() -> None:
    text = TEXT.replace("id: 65537", "id: 300000").replace("10.0.0.5", "10.0.0.500")
    static = parse_static(text, "ids.yaml", {"alpha": 1})
    assert not static.keys
    assert str(static.problems[0]).startswith(
        "ids.yaml:7:9: error: identities[1].id: 300000 is in the range of no"
    )
    bad = parse_static("identities: [{id: 65537, addresses: [10.0.0.500]}]", "f", {"alpha": 1})
    assert "identities[0].addresses[0]" in str(bad.problems[0])


async def test_the_file_reaches_the_tables_and_an_error_in_it_takes_nothing_away(
    tmp_path: Path, running, until
) -> None:
    path, kv, tables = tmp_path / "ids.yaml", MemoryKV(), Tables()
    path.write_text(TEXT)
    file = IdentitiesFile(path, kv, tables, cluster_name="alpha", cluster_id=1)
    await file.look()
    async with running(MeshSource(tables, kv, cluster_name="alpha", cluster_id=1)):
        await until(lambda: len(tables.ips) == 4)
        assert tables.identities[Identity(65537)].source == "mesh:alpha"
        path.write_text("identities: [")
        await file.look()
        assert tables.problems[str(path)]
        path.write_text(TEXT.replace(", 10.2.0.0/24", ""))
        await file.look()
        await until(lambda: len(tables.ips) == 3)
        assert not tables.problems[str(path)]


async def test_a_host_that_is_in_no_mesh_can_use_it_too(tmp_path: Path, running, until):
    path, kv, tables = tmp_path / "ids.yaml", MemoryKV(), Tables()
    path.write_text("identities: [{id: 1000, labels: ['k8s:app=x'], addresses: [10.0.0.5]}]")
    await IdentitiesFile(path, kv, tables, cluster_name="default", cluster_id=0).look()
    async with running(MeshSource(tables, kv, cluster_name="default", cluster_id=0)):
        await until(lambda: len(tables.ips) == 1)
    assert Identity(1000) in tables.identities
