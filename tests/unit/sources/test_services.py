"""Services from files: what is taken, what is refused and where, and the rows, checks and keys that come of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clustermesh import wire
from clustermesh.kv import MemoryKV
from clustermesh.publish import Member, Publisher, _Written
from clustermesh.services import ExportPort, Port, decode_service, decode_service_export
from daemon.sources.servicefiles import Check, LocalExport, LocalService, parse_services
from daemon.sources.services import Health, ServiceFiles, probe, unique
from daemon.state.tables import LOCAL, ServiceKey, Tables

WEB = """\
name: web
namespace: prod
annotations: {service.cilium.io/global: "true", service.cilium.io/affinity: local}
frontends: [10.97.0.10]
ports:
- {name: http, port: 80, targetPort: 8080}
backends: [10.0.0.5, "fd00::5"]
"""
EXPORT = "---\nkind: ServiceExport\nname: web\nnamespace: prod\ncreated: 2026-11-23T12:00:00Z\n"
KEY = ServiceKey("prod", "web", LOCAL)
ON_WIRE = wire.service_key("alpha", "prod", "web")
NOTHING = _Written(b"10.0.0.5", 0, 0)
CHECK = Check(80, rise=2, fall=3)


def parse(text: str):  # type: ignore[no-untyped-def]
    return parse_services(text, "s.yaml", "alpha", 1)


def test_a_service_is_what_its_file_says() -> None:
    (found, export), problems = parse(WEB + EXPORT)
    assert not problems
    assert isinstance(found, LocalService)
    assert found.service.frontends == {"10.97.0.10": {"http": Port("TCP", 80)}}
    assert found.service.backends == {one: {"http": Port("TCP", 8080)} for one in ("10.0.0.5", "fd00::5")}
    assert found.wanted == (True, True, "local")
    assert isinstance(export, LocalExport)
    assert export.export.created == "2026-11-23T12:00:00Z"


def test_old_names_of_annotations_are_understood() -> None:
    text = WEB.replace("service.cilium.io/global", "io.cilium/global-service")
    [found], problems = parse(
        text.replace("service.cilium.io/affinity: local", 'io.cilium/shared-service: "false"')
    )
    assert not problems
    assert found.wanted == (True, False, "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name: web\n", ""), "s.yaml:1:1: error: name: required, but missing"),
        (("prod", "a/b"), "s.yaml:2:12: error: namespace: 'a/b' is not a name"),
        (("10.0.0.5", "10.0.0.500"), "s.yaml:7:12: error: backends[0]: '10.0.0.500' is not an address"),
        (("10.0.0.5", "127.0.0.1"), "is loopback, link-local or multicast"),
        (("fd00::5", "10.0.0.5"), "backends[1]: 10.0.0.5 is there twice"),
        (
            ("port: 80,", "port: 70000,"),
            "s.yaml:6:22: error: ports[0].port: 70000 is not a number from 1 to 65535",
        ),
        (("affinity: local", "affinity: near"), "'near' is not one of local, remote, none"),
        (('global: "true"', 'global: "yes"'), "'yes' is neither 'true' nor 'false'"),
        (("io/global:", "io/globl:"), "is not one of service.cilium.io/global"),
        (("backends", "backend"), "unknown field 'backend' (did you mean backends?)"),
        (("frontends: [10.97.0.10]", "check: {}"), "check: expected either `tcp: true` or `http: /path`"),
        (("frontends: [10.97.0.10]", "check: {http: x}"), "check.http: 'x' is not a path like /healthz"),
        (("frontends: [10.97.0.10]", "check: {tcp: true, port: dns}"), "'dns' is not the name of a TCP port"),
        (
            ("frontends: [10.97.0.10]", "check: {tcp: true, interval: 0}"),
            "check.interval: 0 is not a number from 0.5",
        ),
        (("name: web\n", "name: web\nkind: Servce\n"), "'Servce' is not one of Service, ServiceExport"),
    ],
)
def test_a_mistake_names_its_place_and_takes_nothing(change: tuple[str, str], says: str) -> None:
    found, problems = parse(WEB.replace(*change))
    assert not found
    assert any(says in str(one).replace('"', "'") for one in problems), problems


def test_an_export_needs_a_time_that_is_one() -> None:
    found, problems = parse(EXPORT.replace("2026-11-23T12:00:00Z", "yesterday"))
    assert not found
    assert "s.yaml:5:10: error: created: " in str(problems[0])


def test_of_two_services_of_one_name_the_first_file_has_it() -> None:
    one, _ = parse_services(WEB, "a.yaml", "alpha", 1)
    two, _ = parse_services(WEB, "b.yaml", "alpha", 1)
    services, _, problems = unique([*one, *two])
    assert services["prod", "web"].file == "a.yaml"
    assert problems == ("b.yaml line 1: prod/web is in a.yaml line 1 already",)


def test_the_first_answer_counts_at_once_and_later_ones_only_in_a_row() -> None:
    assert Health().healthy, "a restart takes nobody out before it was asked"
    assert not Health().after("refused", CHECK).healthy
    well = Health().after("", CHECK)
    for answers, healthy in (
        ("xx.xx", True),
        ("xxx", False),
        ("xxx.", False),
        ("xxx..", True),
        ("xxx.x.", False),
    ):
        now = well
        for one in answers:
            now = now.after("" if one == "." else "refused", CHECK)
        assert now.healthy is healthy, answers


async def test_a_probe_tells_what_is_wrong() -> None:
    answers = {b"GET /ok": b"HTTP/1.1 204 No Content\r\n\r\n", b"GET /no": b"HTTP/1.1 503 Busy\r\n\r\n"}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        writer.write(answers.get(b" ".join(line.split()[:2]), b"SSH-2.0\r\n"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        assert await probe("127.0.0.1", Check(port)) == ""
        assert await probe("127.0.0.1", Check(port, "/ok")) == ""
        assert await probe("127.0.0.1", Check(port, "/no")) == "HTTP status 503"
        assert await probe("127.0.0.1", Check(port, "/else")) == "the answer is not HTTP"
    assert "refused" in (await probe("127.0.0.1", Check(port))).lower()


class Site:
    """A host with a store: tables, publisher, the source."""

    def __init__(self, root: Path, kv: MemoryKV) -> None:
        self.tables, self.kv = Tables(), kv
        self.directory = root / "services.d"
        self.directory.mkdir(mode=0o755)
        self.publisher = Publisher(kv, Member("alpha", 1, "a1"), expect=("services",))
        self.files = ServiceFiles(
            self.tables, self.publisher, self.directory, root, cluster="alpha", cluster_id=1
        )

    def write(self, text: str, name: str = "web.yaml") -> None:
        fresh = self.directory / ".new"
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.rename(self.directory / name)

    async def value(self, key: str = ON_WIRE) -> bytes:
        entry = await self.kv.get(key)
        return entry.value if entry else b""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.files.run()), group.create_task(self.publisher.run())]
            try:
                yield
            finally:
                for one in tasks:
                    one.cancel()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    tmp_path.chmod(0o755)
    return Site(tmp_path, MemoryKV())


async def appears(site: Site, key: str = ON_WIRE, *, gone: bool = False) -> None:
    async with asyncio.timeout(3):
        while bool(await site.value(key)) is gone:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_global_service_is_published_and_taken_back_with_its_file(site: Site, until) -> None:
    export = wire.service_export_key("alpha", "prod", "web")
    async with site.running():
        site.write(WEB + EXPORT)
        await appears(site)
        told = decode_service("prod/web", await site.value())
        assert (told.cluster, told.cluster_id, told.shared) == ("alpha", 1, True)
        await appears(site, export)
        said = decode_service_export("prod/web", await site.value(export))
        assert said.ports == (ExportPort("http", "TCP", None, 80),)
        assert KEY in site.tables.services
        assert site.tables.exports[KEY] == said
        site.write(WEB.replace('global: "true"', 'global: "false"'))
        await appears(site, gone=True)
        await appears(site, export, gone=True)
        assert KEY in site.tables.services, "it is still a service of this host"
        (site.directory / "web.yaml").unlink()
        await until(lambda: KEY not in site.tables.services)


async def test_a_service_that_is_not_shared_stays_here(site: Site, until) -> None:
    async with site.running():
        site.write(WEB.replace("affinity: local", 'shared: "false"'))
        await until(lambda: KEY in site.tables.services)
        await until(lambda: site.publisher.ok)
        assert await site.value() == b""


async def test_a_file_with_a_mistake_keeps_its_last_good_version(site: Site, until) -> None:
    async with site.running():
        site.write(WEB)
        await appears(site)
        site.write(WEB.replace("10.0.0.5", "nowhere"))
        await until(lambda: not site.tables.status["service files"].ok)
        assert "10.0.0.5" in (site.tables.services[KEY].service.backends or {})
        assert await site.value()


async def test_an_unhealthy_backend_leaves_what_is_published_and_returns(
    site: Site, until, monkeypatch
) -> None:
    sick = {"10.0.0.5"}

    async def asked(address: str, _: Check) -> str:
        return "refused" if address in sick else ""

    monkeypatch.setattr("daemon.sources.services.probe", asked)
    async with site.running():
        site.write(WEB + "check: {tcp: true, interval: 0.5, rise: 1}\n")
        await until(lambda: KEY in site.tables.services and bool(site.tables.services[KEY].unhealthy))
        await until(lambda: b"10.0.0.5" not in site.publisher.written.get(ON_WIRE, NOTHING).value)
        assert "10.0.0.5" in (site.tables.services[KEY].service.backends or {})
        assert site.tables.status["services"].warn
        sick.clear()
        await until(lambda: b"10.0.0.5" in site.publisher.written[ON_WIRE].value)


async def test_another_hosts_service_of_the_same_name_is_not_overwritten(site: Site, until) -> None:
    lease = await site.kv.grant(900)
    await site.kv.put(ON_WIRE, b"theirs", lease)
    async with site.running():
        site.write(WEB)
        await until(lambda: ON_WIRE in site.publisher.conflicts)
        assert await site.value() == b"theirs"
        await site.kv.delete(ON_WIRE)
        site.write(WEB.replace("10.0.0.5", "10.0.0.6"))
        await until(lambda: ON_WIRE in site.publisher.written)
