"""This host: labels from the node file, addresses as netlink lists them."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from daemon.model.labels import parse_labels
from daemon.model.net import parse_prefix
from daemon.sources.host import HostSource, own_addresses, parse_node_file
from daemon.state.tables import Tables


def source(tables: Tables, node_file: Path | None = None) -> HostSource:
    return HostSource(
        tables, name="t1", cluster="alpha", cluster_id=1, labels={"role": "edge"}, node_file=node_file
    )


@asynccontextmanager
async def _running(host: HostSource) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(host.run())
        yield
        task.cancel()


def test_loopback_is_nobodys_address_on_a_wire() -> None:
    found = own_addresses(map(parse_prefix, ("127.0.0.1", "127.9.9.9", "::1", "10.0.0.1", "fe80::1")))
    assert found == {parse_prefix("10.0.0.1"), parse_prefix("fe80::1")}


def test_a_node_file_has_labels_and_nothing_else() -> None:
    assert parse_node_file("labels: {zone: a}\n", "n")[0] == {"zone": "a"}
    for text, told in (
        ("labels: {zone: 1}\n", "n:1:16: error: labels.zone: expected a string, found the number 1"),
        ("label: {}\n", "unknown field"),
        ("labels: [a]\n", "labels: expected a mapping"),
        ("labels: {", "not valid YAML"),
    ):
        labels, problems = parse_node_file(text, "n")
        assert labels == {}
        assert told in "\n".join(map(str, problems))


async def test_devices_addresses_and_labels_become_the_host_row(until) -> None:
    tables = Tables()
    async with _running(source(tables)):
        await until(lambda: tables.host.synced)
    row = tables.host["host"]
    assert (row.name, row.cluster, row.cluster_id) == ("t1", "alpha", 1)
    assert row.labels == parse_labels(["reserved:host", "k8s:role=edge"])
    assert {one.name for one in tables.devices.rows.values()} == {name for _, name in socket.if_nameindex()}
    assert tables.identities[1].labels == row.labels


async def test_without_the_node_file_there_is_no_row_and_a_broken_one_changes_nothing(
    tmp_path: Path, until
) -> None:
    tables, file = Tables(), tmp_path / "node.yaml"
    host = source(tables, file)
    async with _running(host):
        await until(lambda: "host" in tables.status)
        assert not tables.status["host"].ok
        assert not tables.host.synced
    file.write_text("labels: {zone: a, role: core}\n")
    async with _running(host):
        await until(lambda: tables.host.synced)
        before = tables.host["host"].labels
        assert before == parse_labels(["reserved:host", "k8s:zone=a", "k8s:role=edge"])
        file.write_text("labels: [")
        host.reread()
        assert tables.problems[str(file)]
        assert tables.host["host"].labels == before
        file.write_text("labels: {zone: b}\n")
        host.reread()
        assert str(file) not in tables.problems
        assert tables.host["host"].labels != before
