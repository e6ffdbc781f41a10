"""A service from a file of one cluster to the merged view of another, through a real etcd."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from clustermesh.etcd import EtcdKV
from clustermesh.publish import Host, Member, Publisher, publishable
from clustermesh.services import Port, Service
from clustermesh.settings import EtcdSettings
from daemon.sources.mesh import MeshSource
from daemon.sources.services import ServiceFiles
from daemon.state.services import merged
from daemon.state.tables import LOCAL, ServiceKey, ServiceRow, Tables

WEB = """\
name: web
namespace: prod
annotations: {service.cilium.io/global: "true"}
ports: [{name: http, port: 80}]
backends: [10.1.0.5, 10.1.0.6]
---
{kind: ServiceExport, name: web, namespace: prod, created: 2026-11-23T12:00:00Z}
"""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_service_of_a_file_reaches_another_cluster_and_leaves_it(live, tmp_path: Path) -> None:
    directory = tmp_path / "services.d"
    directory.mkdir(mode=0o755)
    file = directory / "web.yaml"
    file.write_text(WEB)
    file.chmod(0o644)
    west, east = (EtcdKV(EtcdSettings((live.endpoint,))) for _ in range(2))
    publisher = Publisher(west, Member("west", 2, "w1"), expect=("services",))
    publisher.publish(Host("west", 2, "w1", publishable(["192.168.5.1"])))
    files = ServiceFiles(Tables(), publisher, directory, tmp_path, cluster="west", cluster_id=2)
    tables = Tables()
    source = MeshSource(tables, east, cluster_name="east", cluster_id=1)
    here, there = ServiceKey("prod", "web", LOCAL), ServiceKey("prod", "web", "mesh:west")
    ours = Service("east", "prod", "web", backends={"10.0.0.5": {"http": Port("TCP", 80)}}, cluster_id=1)
    tables.services.put(here, ServiceRow(ours))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one.run()) for one in (publisher, files, source)]
        await until(lambda: there in tables.services and there in tables.exports)
        rows = {key.source: row for key, row in tables.services.rows.items()}
        seen = merged("prod", "web", rows, "east")
        assert [(one.address, one.chosen) for one in seen.backends] == [
            ("10.0.0.5", True), ("10.1.0.5", True), ("10.1.0.6", True),
        ]  # fmt: skip
        file.unlink()
        await until(lambda: there not in tables.services and there not in tables.exports)
        assert here in tables.services
        for one in tasks:
            one.cancel()
    await west.close()
    await east.close()
