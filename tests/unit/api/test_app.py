"""The API over a real unix socket, on tables that a test has filled."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bpf.layout import CtFlag
from daemon.api import resources, status
from daemon.api.app import Api, ApiError, stream_rows
from daemon.datapath.conntrack import CtRow
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, parse_prefix
from daemon.model.problem import Problem
from daemon.model.rule import RuleOrigin
from daemon.policy.ccnp import parse_documents
from daemon.runtime.loopwatch import Stalls
from daemon.sources.holding import key_of
from daemon.state.audit import Audited
from daemon.state.tables import HostRow, IdentityRow, IpKey, IpRow, StatusRow, Tables

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: NAME}
spec:
  nodeSelector: {matchLabels: {role: ROLE}}
  ingress:
  - fromEntities: [remote-node]
    toPorts: [{ports: [{port: "80", endPort: 90, protocol: TCP}]}]
"""


@pytest.fixture
def tables() -> Tables:
    found = Tables()
    for name, role in (("here", "edge"), ("elsewhere", "core")):
        for one in parse_documents(POLICY.replace("NAME", name).replace("ROLE", role), "f.yaml").policies:
            found.policies.put(key_of(one), one)
    labels = parse_labels(["reserved:host", "k8s:role=edge"])
    found.host.put("host", HostRow("t1", "alpha", 1, labels, frozenset()))
    found.identities.put(Identity(70000), IdentityRow(parse_labels(["k8s:app=web"]), "mesh:alpha"))
    for text in ("10.0.0.5", "10.0.0.0/24", "fd00::5"):
        found.ips.put(IpKey(parse_prefix(text), "mesh:alpha"), IpRow(Identity(70000), "web", "shop"))
    found.status.put("datapath", StatusRow(ok=True, text="enforcing", details={"generation": 3}))
    return found


Ask = Callable[..., Any]


@asynccontextmanager
async def serving(path: Path, routes: list[web.RouteDef]) -> AsyncIterator[Ask]:
    api = Api(path, "no-such-group", routes)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(api.run())
        await api.listening.wait()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:

            async def ask(target: str, method: str = "GET") -> tuple[int, Any]:
                async with session.request(method, f"http://x{target}") as answer:
                    return answer.status, json.loads(await answer.text())

            yield ask
        task.cancel()


@pytest.fixture
async def ask(tables: Tables, tmp_path: Path) -> AsyncIterator[Ask]:
    async def accept() -> bool:
        return True

    glance = status.StatusSource(
        tables=tables,
        pins=tmp_path,
        failsafe=["ingress TCP/22"],
        stalls=Stalls(),
        mode="default",
    )
    routes = [*resources.routes(tables, tmp_path, accept), *status.routes(glance)]
    async with serving(tmp_path / "sock", routes) as found:
        yield found


async def test_policies_say_what_became_of_them(ask: Ask, tables: Tables) -> None:
    code, found = await ask("/v1/policies")
    assert code == 200
    assert {one["name"]: one["state"] for one in found["policies"]} == {
        "here": "enforced",
        "elsewhere": "selects nothing",
    }
    tables.status.put("datapath", StatusRow(ok=False, text="not loaded"))
    _, found = await ask("/v1/policies/here")
    assert (found["state"], found["reason"]) == ("waiting", "not loaded")
    assert found["rules"][0]["ports"] == ["80-90/TCP"]
    tables.host.delete("host")
    _, found = await ask("/v1/policies/here")
    assert found["state"] == "waiting"


async def test_audited_policies_are_not_called_enforced(tables: Tables) -> None:
    policy = next(one for one in tables.policies.rows.values() if one.name == "here")
    for audit in (Audited(host=True), Audited(policies=frozenset({"here"}))):
        assert resources.policy_state(tables, audit, policy)[0] == "audit"


async def test_addresses_are_found_by_address_prefix_and_identity(ask: Ask) -> None:
    async def cidrs(query: str) -> list[str]:
        _, found = await ask(f"/v1/ips{query}")
        return [one["cidr"] for one in found["ips"]]

    assert await cidrs("") == ["10.0.0.0/24", "10.0.0.5/32", "fd00::5/128"]
    assert await cidrs("?address=10.0.0.5") == ["10.0.0.0/24", "10.0.0.5/32"]
    assert await cidrs("?address=10.0.0.9") == ["10.0.0.0/24"]
    assert await cidrs("?address=fd00::/8") == ["fd00::5/128"]
    assert await cidrs("?identity=1") == []
    assert (await ask("/v1/ips?address=nowhere"))[0] == 400


async def test_identities_are_found_by_number_and_name(ask: Ask) -> None:
    _, found = await ask("/v1/identities?label=k8s:app=web")
    assert [one["id"] for one in found["identities"]] == [70000]
    _, found = await ask("/v1/identities/70000")
    assert len(found["ips"]) == 3
    _, found = await ask("/v1/identities/world")
    assert found["labels"] == ["reserved:world"]
    for nobody in ("99", "nobody"):
        assert (await ask(f"/v1/identities/{nobody}"))[0] in (400, 404)


def test_connections_to_forget_are_those_that_match_all_that_is_asked() -> None:
    rows = {
        "a": CtRow(4, "half-open", 6, "10.0.0.1", 22, "192.0.2.9", 4000, "in", CtFlag(0), 2, 1, 1),
        "b": CtRow(4, "established", 6, "10.0.0.1", 22, "192.0.2.9", 4001, "in", CtFlag(0), 2, 1, 1),
        "c": CtRow(6, "established", 17, "fd00::1", 53, "fd00::2", 22, "out", CtFlag(0), 2, 1, 1),
    }

    def forgets(**query: str) -> str:
        wanted = resources.connections_of(query)
        return "".join(name for name, row in rows.items() if wanted(row))

    assert forgets() == "abc"
    assert forgets(address="192.0.2.0/24") == "ab"
    assert forgets(address="fd00::2") == "c"
    assert forgets(port="22") == "abc"
    assert forgets(port="4001") == "b"
    assert forgets(port="22", state="established", address="10.0.0.1") == "b"
    for wrong in ({"port": "x"}, {"port": "65536"}, {"state": "open"}, {"address": "web"}, {"adress": "::"}):
        with pytest.raises(ApiError):
            resources.connections_of(wrong)


async def test_a_rule_in_force_is_traced_to_its_line(ask: Ask, tables: Tables) -> None:
    tables.rules.put(17, RuleOrigin("base", "CCNP", Direction.INGRESS, True, 0, 2, "p.yaml", 9))
    origin = {
        "number": 17,
        "name": "ingressDeny[2]",
        "policy": "base",
        "kind": "CCNP",
        "file": "p.yaml",
        "line": 9,
    }
    assert await ask("/v1/rules/17") == (200, origin)
    for unknown in ("18", "x"):
        assert (await ask(f"/v1/rules/{unknown}"))[0] == 404


async def test_the_status_lists_what_is_wrong_with_its_cure_first(ask: Ask, tables: Tables) -> None:
    _, found = await ask("/v1/status")
    assert found["ok"]
    assert found["enforcement"]["generation"] == 3
    assert found["policies"]["by_state"] == {"enforced": 1, "selects nothing": 1}
    assert found["addresses"] == {"total": 3, "by_source": {"mesh:alpha": 3}}
    assert found["memory"]["resident"] > 1 << 20
    tables.status.put("a part", StatusRow(ok=False, text="bad", hint="do this"))
    tables.status.put("datapath", StatusRow(ok=False, text="worse", hint="do that"))
    tables.problems.put("f.yaml", (Problem("f.yaml", 3, 1, "spec", "unknown field"),))
    _, found = await ask("/v1/status")
    assert not found["ok"]
    assert [one["part"] for one in found["problems"]] == ["datapath", "a part", "f.yaml:3"]
    assert all(one["hint"] for one in found["problems"])


async def test_mistakes_are_json_with_a_reason(ask: Ask) -> None:
    assert await ask("/v1/nothing") == (404, {"error": "GET /v1/nothing: Not Found"})
    assert (await ask("/v1/policies/none"))[1] == {
        "error": "no policy 'none'; `meshwall policy list` has the names"
    }
    code, found = await ask("/v1/ct")
    assert code == 503
    assert "no data path yet" in found["error"]
    assert await ask("/v1/policies/accept-empty", "POST") == (200, {"accepted": True})


async def test_a_handler_that_fails_tells_nothing_but_that(tmp_path: Path) -> None:
    async def broken(_: web.Request) -> web.StreamResponse:
        raise ValueError("secret")

    async def refused(_: web.Request) -> web.StreamResponse:
        raise ApiError(409, "not now")

    async with serving(tmp_path / "sock", [web.get("/broken", broken), web.get("/refused", refused)]) as ask:
        code, found = await ask("/broken")
        assert code == 500
        assert "secret" not in found["error"]
        assert await ask("/refused") == (409, {"error": "not now"})


async def test_many_rows_are_one_document(tmp_path: Path) -> None:
    async def rows(request: web.Request) -> web.StreamResponse:
        return await stream_rows(request, {"head": 1}, "rows", ({"n": n} for n in range(2000)))

    async def none(request: web.Request) -> web.StreamResponse:
        return await stream_rows(request, {}, "rows", ())

    async with serving(tmp_path / "sock", [web.get("/rows", rows), web.get("/none", none)]) as ask:
        _, found = await ask("/rows")
        assert found["head"] == 1
        assert [one["n"] for one in found["rows"]] == list(range(2000))
        assert await ask("/none") == (200, {"rows": []})


async def test_a_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        async with serving(tmp_path / "sock", []) as ask:
            assert (await ask("/"))[0] == 404
    assert (tmp_path / "sock").stat().st_mode & 0o777 == 0o660
