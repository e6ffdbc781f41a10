"""What `meshwall mesh status` and `node list` show."""

from clustermesh import wire
from clustermesh.kv import MemoryKV
from daemon.api.mesh import mesh_json, nodes_json
from daemon.cli.mesh import mesh_lines, node_lines
from daemon.sources.mesh import MeshSource
from daemon.state.tables import Tables


async def filled() -> Tables:
    tables, kv = Tables(), MemoryKV()
    source = MeshSource(tables, kv, cluster_name="east", cluster_id=1)
    node = wire.Node("w1", "west", (wire.NodeAddress("InternalIP", "192.168.5.1"),), cluster_id=2)
    entries = {
        wire.config_key("west"): wire.encode_config(wire.ClusterConfig(2)),
        wire.node_key("west", "w1"): wire.encode_node(node),
        wire.identity_key(131073): b"k8s:app=\x1b[31mweb;k8s:io.cilium.k8s.policy.cluster=west;",
    }
    for key, value in entries.items():
        await kv.put(key, value)
    for part in source.mesh.parts:
        for batch in source.mesh.listed(part, (await kv.list(part.prefix)).entries, 0.0):
            source._apply(batch)
    source._connection()
    return tables


async def test_status_shows_each_cluster_and_why_entries_were_refused() -> None:
    lines = mesh_lines(mesh_json(await filled()))
    assert any(line.split()[:4] == ["west", "2", "synced,", "stale"] for line in lines)
    text = "\n".join(lines)
    assert "control_character" in text
    assert "\x1b" not in text


async def test_nodes_are_listed_with_their_addresses() -> None:
    tables = await filled()
    assert node_lines(nodes_json(tables))[1].split()[:3] == ["west", "w1", "192.168.5.1"]
    assert nodes_json(tables, "north") == {"nodes": []}


def test_without_a_store_that_is_what_is_said() -> None:
    assert mesh_lines(mesh_json(Tables()))[0] == "store      none: identities come from files"
