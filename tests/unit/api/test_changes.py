"""What is recorded of policy changes and of requests."""

import asyncio
import os

import pytest
from aiohttp import ClientSession, UnixConnector, web

from daemon.api.app import Api
from daemon.api.changes import PolicyChanges, routes
from daemon.model.labels import parse_labels
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import CompileSettings
from daemon.runtime import auditlog
from daemon.runtime.auditlog import AuditLog
from daemon.sources.holding import key_of
from daemon.state.tables import HostRow, Tables

HOST = HostRow("a1", "alpha", 1, parse_labels(("reserved:host",)), frozenset())
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: kubelet}
spec:
  nodeSelector: {}
  ingress: [{fromCIDR: [10.0.0.0/8], toPorts: [{ports: [{port: "10250", protocol: TCP}]}]}]
"""


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(auditlog, "JOURNAL", tmp_path / "no-journal")
    return AuditLog(tmp_path / "audit", 10)


def put(tables, text):
    (policy,) = parse_documents(text, "/p/k.yaml").policies
    tables.policies.put(key_of(policy), policy)


async def records(log, count):
    for _ in range(500):
        found = await asyncio.to_thread(lambda: list(log.read(0)))
        if len(found) >= count:
            return found
        await asyncio.sleep(0.01)
    raise TimeoutError(found)


@pytest.fixture
async def tables(log):
    tables = Tables()
    tables.host.put("host", HOST)
    tables.policies.synced = True
    put(tables, POLICY)
    task = asyncio.get_running_loop().create_task(PolicyChanges(tables, CompileSettings, log).run())
    yield tables
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_recorded_by_what_it_means(tables, log):
    (start,) = await records(log, 1)
    assert (start["act"], start["policies"]) == ("policy.start", ["kubelet"])
    put(tables, POLICY.replace("10.0.0.0/8", "10.0.0.0/9"))
    _, change = await records(log, 2)
    assert (change["act"], change["changed"], change["added"]) == ("policy.change", ["kubelet"], [])
    assert change["complete"]
    (line,) = change["meaning"]
    assert line.startswith("ingress from 10.0.0.0/8")
    assert line.endswith("10250/TCP: allow -> deny")


async def test_an_edit_without_a_meaning_says_so(tables, log):
    await records(log, 1)
    put(tables, POLICY.replace("[10.0.0.0/8]", "[10.0.0.0/9, 10.128.0.0/9]"))
    _, change = await records(log, 2)
    assert (change["changed"], change["meaning"]) == (["kubelet"], [])


async def test_a_removed_policy_is_named(tables, log):
    await records(log, 1)
    tables.policies.delete(next(iter(tables.policies)))
    _, change = await records(log, 2)
    assert change["removed"] == ["kubelet"]
    assert change["meaning"]


async def test_requests_that_change_something_are_recorded_with_their_user(log, tmp_path):
    async def change(_):
        return web.json_response({})

    api = Api(tmp_path / "s", "nobody-at-all", [web.post("/v1/x", change), *routes(log)], log)
    task = asyncio.get_running_loop().create_task(api.run())
    await api.listening.wait()
    async with ClientSession("http://x", connector=UnixConnector(str(tmp_path / "s"))) as session:
        await session.post("/v1/x", params={"a": "b"})
        await session.post("/v1/missing")
        async with session.get("/v1/changes") as answer:
            found = (await answer.json())["changes"]
        async with session.get("/v1/changes", params={"since": "yesterday"}) as answer:
            assert answer.status == 400
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(one["request"], one["status"], one["pid"]) for one in found] == [
        ("POST /v1/x?a=b", 200, os.getpid()),
        ("POST /v1/missing", 404, os.getpid()),
    ]
