"""Workloads from files: what is taken, what is refused and where, and the rows and keys that come of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clustermesh import wire
from clustermesh.kv import MemoryKV
from clustermesh.publish import Member
from daemon.api.resources import with_nodes
from daemon.model.identity import Identity
from daemon.model.labels import format_labels
from daemon.model.net import parse_prefix
from daemon.sources.publisher import MeshPublisher
from daemon.sources.workloads import Workload, WorkloadFiles, claims, parse_workloads
from daemon.state.tables import LOCAL, IdentityRow, IpKey, Tables

WEB = """\
name: web-0
namespace: prod
labels: {app: web, app.kubernetes.io/part-of: shop}
serviceAccount: web
namespaceLabels: {team: shop}
addresses: [10.1.0.5, "fd00:1::5", 10.1.2.0/24]
"""
LABELS = (
    "k8s:app=web;k8s:app.kubernetes.io/part-of=shop;k8s:io.cilium.k8s.namespace.labels.team=shop;"
    "k8s:io.cilium.k8s.policy.cluster=alpha;k8s:io.cilium.k8s.policy.serviceaccount=web;"
    "k8s:io.kubernetes.pod.namespace=prod;"
)


def test_a_workload_has_the_label_set_of_a_pod() -> None:
    found, problems = parse_workloads(WEB, "w.yaml", "alpha")
    assert not problems
    assert found == (
        Workload("web-0", "prod", LABELS, ("10.1.0.5", "fd00:1::5", "10.1.2.0/24"), "w.yaml", 1),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name: web-0\n", ""), "w.yaml:1:1: error: name: required, but missing"),
        (("app: web,", "app: 5,"), "w.yaml:3:15: error: labels.app: expected a string, found the number 5"),
        (("app: web,", "app: 'a;b',"), "w.yaml:3:10: error: labels.app: 'a;b' is not a label value"),
        (("app: web,", "a b: web,"), "labels.a b: 'a b' is not a label key"),
        (("app: web,", "io.kubernetes.pod.namespace: x,"), "is a label that is added"),
        (("prod", "../prod"), "w.yaml:2:12: error: namespace: '../prod' is not a name"),
        (("10.1.0.5", "10.1.0.300"), "w.yaml:6:13: error: addresses[0]: '10.1.0.300' is not an address"),
        (("10.1.2.0/24", "10.1.2.7/24"), "addresses[2]: '10.1.2.7/24' has bits set after its length"),
        (("10.1.2.0/24", "127.0.0.0/24"), "is loopback, link-local or multicast"),
        (("10.1.2.0/24", "0.0.0.0/0"), "is shorter than /8"),
        (("addresses:", "address:"), "unknown field 'address' (did you mean addresses?)"),
        (("labels: {", "labels: {" + ", ".join(f"l{one}: v" for one in range(60)) + ", "), "at most 60"),
    ],
)
def test_a_mistake_names_its_place_and_takes_nothing(change: tuple[str, str], says: str) -> None:
    found, problems = parse_workloads(WEB.replace(*change), "w.yaml", "alpha")
    assert not found
    assert any(says in str(one).replace('"', "'") for one in problems), problems


def test_one_bad_document_does_not_take_the_good_one_with_it() -> None:
    found, problems = parse_workloads(
        WEB + "---\nname: x\n---\n" + WEB.replace("web-0", "web-1"), "w", "alpha"
    )
    assert [one.name for one in found] == ["web-0", "web-1"]
    assert problems


def test_an_address_of_two_workloads_with_other_labels_is_the_firsts() -> None:
    one = Workload("a", "x", "k8s:a=1;", ("10.1.0.5",), "a.yaml", 1)
    two = Workload("b", "x", "k8s:a=2;", ("10.1.0.5", "10.1.0.6"), "b.yaml", 7)
    found, problems = claims([one, two])
    assert [entry.labels for entry in found.values()] == ["k8s:a=1;", "k8s:a=2;"]
    assert problems == ("b.yaml line 7: 10.1.0.5 belongs to a (a.yaml line 1)",)


class Site:
    """A host without etcd: tables, the embedded store, the two sources."""

    def __init__(self, root: Path, store: MemoryKV) -> None:
        self.root = root
        self.tables = Tables()
        self.store = store
        self.directory = root / "workloads.d"
        self.state = root / "state"
        self.directory.mkdir(exist_ok=True, mode=0o755)
        self.state.mkdir(exist_ok=True, mode=0o700)
        member = Member("alpha", 1, "a1", announce=False)
        self.publisher = MeshPublisher(
            self.tables, store, member, state_dir=self.state, expect=("workloads",)
        )
        self.files = WorkloadFiles(
            self.tables, self.publisher.publisher, self.directory, self.state, cluster="alpha"
        )
        self.publisher.on_numbers(self.files.numbers_changed)

    @property
    def addresses(self) -> dict[str, int]:
        found = {key: self.tables.ips[key] for key in self.tables.ips if key.source == LOCAL}
        return {key.prefix.cidr: row.identity for key, row in found.items()}

    @property
    def status(self) -> str:
        row = self.tables.status.get("workload files")
        return row.text if row else ""

    def write(self, name: str, text: str) -> None:
        (self.root / "new").write_text(text)
        (self.root / "new").rename(self.directory / name)


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[Site]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(site.files.run()), group.create_task(site.publisher.run())]
        try:
            yield site
        finally:
            for task in tasks:
                task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_files_become_rows_and_keys_and_go_with_the_file(tmp_path: Path) -> None:
    store = MemoryKV()
    async with running(Site(tmp_path, store)) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: len(site.addresses) == 3)
        number = site.addresses["10.1.0.5/32"]
        assert set(site.addresses) == {"10.1.0.5/32", "fd00:1::5/128", "10.1.2.0/24"}
        row = site.tables.identities[Identity(number)]
        assert row.source == LOCAL
        assert "k8s:io.cilium.k8s.policy.cluster=alpha" in format_labels(row.labels)
        entry = site.tables.ips[IpKey(parse_prefix("10.1.0.5"), LOCAL)]
        assert (entry.name, entry.namespace) == ("web-0", "prod")
        await eventually(lambda: wire.ip_key("10.1.2.0/24") in store._entries)
        site.write("web.yaml", WEB.replace(', "fd00:1::5"', ""))
        await eventually(lambda: wire.ip_key("fd00:1::5") not in store._entries and len(site.addresses) == 2)
        (site.directory / "web.yaml").unlink()
        await eventually(lambda: not site.addresses and wire.ip_key("10.1.0.5") not in store._entries)
        await eventually(
            lambda: not [one for one in store._entries if one.startswith(wire.IDENTITY_REFERENCES)]
        )


async def test_a_broken_file_stays_what_it_was_also_over_a_restart(tmp_path: Path) -> None:
    async with running(Site(tmp_path, MemoryKV())) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: len(site.addresses) == 3)
        number = site.addresses["10.1.0.5/32"]
        site.write("web.yaml", WEB.replace("prod", "5"))
        await eventually(lambda: "expected a string" in site.status)
        assert len(site.addresses) == 3
        await asyncio.sleep(0.05)
    async with running(Site(tmp_path, MemoryKV())) as site:
        await eventually(lambda: len(site.addresses) == 3)
        assert site.addresses["10.1.0.5/32"] == number
        assert "expected a string" in site.status


async def test_rows_are_there_before_the_store_is(tmp_path: Path) -> None:
    store = MemoryKV()
    async with running(Site(tmp_path, store)) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: len(site.addresses) == 3 and site.publisher.publisher.ok)
        before = site.addresses
    store.cut()
    async with running(Site(tmp_path, store)) as site:
        await eventually(lambda: site.addresses == before)


async def test_an_identity_that_is_left_here_but_in_the_store_stays_as_the_stores(tmp_path: Path) -> None:
    async with running(Site(tmp_path, MemoryKV())) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: site.publisher.publisher.ok and len(site.addresses) == 3)
        number = Identity(site.addresses["10.1.0.5/32"])
        labels = site.tables.identities[number].labels
        (site.directory / "web.yaml").unlink()
        await eventually(lambda: not site.addresses)
        assert site.tables.identities[number] == IdentityRow(labels, "mesh:alpha")


async def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    async with running(Site(tmp_path, MemoryKV())) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: len(site.addresses) == 3)
        (site.directory / "web.yaml").chmod(0o666)
        await eventually(lambda: "may be written by group or others" in site.status)
        assert len(site.addresses) == 3


async def test_who_uses_an_identity_is_what_the_store_says(tmp_path: Path) -> None:
    store = MemoryKV()
    async with running(Site(tmp_path, store)) as site:
        site.write("web.yaml", WEB)
        await eventually(lambda: site.publisher.publisher.ok and len(site.addresses) == 3)
        number = site.addresses["10.1.0.5/32"]
        await store.put(wire.identity_value_key(LABELS, "a2"), str(number).encode())
        assert await site.publisher.users() == {number: ["a1", "a2"]}
        rows = [{"id": 1, "source": "local"}, {"id": number, "source": "local"}]
        assert list(with_nodes(rows, await site.publisher.users())) == [
            {"id": number, "source": "local", "nodes": ["a1", "a2"]}
        ]
        store.cut("gone")
        with pytest.raises(OSError, match="gone"):
            await site.publisher.users()
