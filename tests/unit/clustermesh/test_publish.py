"""What a host keeps in the store, over outages, lost leases and restarts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from clustermesh import wire
from clustermesh.follow import Backoff
from clustermesh.kv import Committed, Compare, Entry, MemoryKV, Put
from clustermesh.paced import Paced
from clustermesh.publish import Address, Host, Member, Publisher, publishable

MEMBER = Member("alpha", 1, "a1")
HOST = Host("alpha", 1, "a1", publishable(["10.0.0.1", "fd00::1"]), {"role": "infra"})
WEB = wire.encode_identity(["k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod"], "alpha").decode()
WORKLOADS = (Address("10.1.0.5", WEB, "prod", "web-0"), Address("10.1.2.0/24", WEB, "prod", "web-0"))
FIRST, LAST = wire.identity_range(1)


class Disk:
    """Where a publisher remembers its keys."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    async def save(self, keys: Mapping[str, str]) -> None:
        self.keys = dict(keys)


def make(
    store: MemoryKV, disk: Disk, member: Member = MEMBER, expect: Sequence[str] = ("workloads",)
) -> Publisher:
    publisher = Publisher(
        store, member, remembered=disk.keys, remember=disk.save, expect=expect,
        backoff=Backoff(0.001, 0.005), recheck_s=0.05, heartbeat_s=0.05,
    )  # fmt: skip
    publisher._kv._spread_s = 0.0
    publisher._kv._every_s = 0.0001
    return publisher


@asynccontextmanager
async def running(*publishers: Publisher) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one.run()) for one in publishers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def ip(store: MemoryKV, prefix: str) -> wire.IpEntry | None:
    found = store._entries.get(wire.ip_key(prefix))
    return None if found is None else wire.decode_ip(prefix, found.value)


async def test_host_and_workloads_are_written_with_identities_of_the_clusters_range() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
        number = publisher.allocator.number(WEB)
        assert number is not None
        entry = store._entries[wire.ip_key("10.1.0.5")]
        assert (
            entry.value
            == (
                f'{{"IP":"10.1.0.5","Mask":null,"HostIP":"10.0.0.1","ID":{number},"Key":0,"Metadata":"",'
                '"K8sNamespace":"prod","K8sPodName":"web-0"}'
            ).encode()
        )
        assert b'"Mask":"////AA=="' in store._entries[wire.ip_key("10.1.2.0/24")].value
        host = ip(store, "10.0.0.1")
        assert host is not None
        said = store._entries[wire.identity_key(host.identity)]
        assert said.value == b"k8s:io.cilium.k8s.policy.cluster=alpha;node:role=infra;"
        unleased = [key for key, one in store._entries.items() if not one.lease]
        assert sorted(unleased) == sorted([wire.identity_key(number), wire.identity_key(host.identity)])


async def test_configuration_comes_first_and_markers_come_last() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
    order = {entry.key: entry.create_revision for entry in store._entries.values()}
    config = order[wire.config_key("alpha")]
    markers = [at for key, at in order.items() if key.startswith(wire.SYNCED)]
    entries = [at for key, at in order.items() if key.startswith("cilium/state/")]
    assert len(markers) == 5
    assert config < min(entries)
    assert max(entries) < min(markers)


async def test_nothing_is_written_before_all_sources_have_spoken() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    async with running(publisher):
        await asyncio.sleep(0.02)
        assert not store._entries
        publisher.want("workloads")
        await eventually(lambda: publisher.ok)


async def test_everything_is_back_after_a_lost_lease_an_empty_store_and_a_vandal() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
        before = {key: one.value for key, one in store._entries.items() if "state/" in key}

        def whole() -> bool:
            now = {key: one.value for key, one in store._entries.items() if "state/" in key}
            return now == before and publisher.ok and wire.canary_key("alpha", wire.IPS) in store._entries

        for lease in publisher.leases.all:
            store.expire(lease)
        await eventually(whole)
        store.cut()
        for key in list(store._entries):
            del store._entries[key]
        store.heal()
        await eventually(whole)
        await store.delete(wire.ip_key("10.1.0.5"))
        await store.put(wire.node_key("alpha", "a1"), b"vandal")
        await eventually(whole)


async def test_an_empty_store_is_filled_at_once_and_not_at_the_next_look() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher._recheck_s = publisher.allocator._reassert_s = 60
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
        store.cut()
        await eventually(lambda: not publisher.ok)
        store._entries.clear()
        store.heal()
        await eventually(lambda: publisher.ok and ip(store, "10.1.0.5") is not None)


async def test_nothing_is_deleted_while_a_restart_or_an_outage_makes_numbers_uncertain() -> None:
    store, disk = MemoryKV(), Disk()
    for _ in range(2):
        publisher = make(store, disk)
        publisher.publish(HOST)
        async with running(publisher):
            await asyncio.sleep(0.01)
            publisher.want("workloads", addresses=WORKLOADS)
            await eventually(lambda: publisher.ok)  # noqa: B023
            store.cut()
            await eventually(lambda: not publisher.ok)  # noqa: B023
            store.heal()
            await eventually(lambda: publisher.ok)  # noqa: B023
    deleted = [one.key for one in store._events if one.value is None]
    assert not [key for key in deleted if not key.startswith(wire.IDENTITY_LOCKS)]


async def test_what_an_earlier_run_left_and_nobody_wants_is_removed_and_numbers_stay() -> None:
    store, disk = MemoryKV(), Disk()
    first = make(store, disk)
    first.publish(HOST)
    db = wire.encode_identity(["k8s:app=db"], "alpha").decode()
    first.want("workloads", addresses=(*WORKLOADS, Address("10.1.0.6", db)))
    async with running(first):
        await eventually(lambda: first.ok)
        numbers = first.allocator.numbers
        assert disk.keys[wire.identity_value_key(WEB, "a1")] == str(numbers[WEB])
    theirs = wire.encode_ip(wire.ip_entry("10.1.0.6", FIRST + 77, "10.0.0.9"))
    second = make(store, disk)
    second.publish(replace(HOST, addresses=publishable(["10.0.0.1"])))
    second.want("workloads", addresses=WORKLOADS[:1])
    await store.put(wire.ip_key("10.1.0.6"), theirs)  # moved to another host meanwhile
    async with running(second):
        await eventually(lambda: second.ok and second.allocator.settled)
        assert ip(store, "10.1.2.0/24") is None
        assert ip(store, "fd00::1") is None
        assert store._entries[wire.ip_key("10.1.0.6")].value == theirs
        assert wire.identity_value_key(db, "a1") not in store._entries
        assert second.allocator.number(WEB) == numbers[WEB]
        leases = {store._entries[wire.ip_key(one)].lease for one in ("10.0.0.1", "10.1.0.5")}
        assert leases == set(second.leases.all)


async def test_a_number_that_changed_while_we_were_away_is_changed_in_the_addresses() -> None:
    store, disk = MemoryKV(), Disk()
    first = make(store, disk)
    first.publish(HOST)
    first.want("workloads", addresses=WORKLOADS)
    async with running(first):
        await eventually(lambda: first.ok)
        old = first.allocator.number(WEB)
        assert old is not None
        store.cut()
        for key in list(store._entries):
            del store._entries[key]
        key = wire.identity_key(old)
        store._entries[key] = Entry(key, b"k8s:other=thing;", 999, 999)
        store.heal()
        await eventually(lambda: first.ok and first.allocator.number(WEB) not in {None, old})
        await eventually(lambda: (found := ip(store, "10.1.0.5")) is not None and found.identity != old)


async def test_an_address_of_somebody_else_is_left_to_him_and_taken_when_he_is_gone() -> None:
    store = MemoryKV()
    theirs = wire.encode_ip(wire.ip_entry("10.1.0.5", FIRST + 77, "10.0.0.9"))
    await store.put(wire.ip_key("10.1.0.5"), theirs)
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: "held by others" in publisher.text)
        assert publisher.conflicts == {wire.ip_key("10.1.0.5"): "10.0.0.9"}
        assert store._entries[wire.ip_key("10.1.0.5")].value == theirs
        await store.delete(wire.ip_key("10.1.0.5"))
        await eventually(lambda: publisher.ok and ip(store, "10.1.0.5") is not None)


async def test_an_address_that_somebody_writes_in_the_middle_is_not_overwritten() -> None:
    theirs = wire.encode_ip(wire.ip_entry("10.1.0.5", FIRST + 77, "10.0.0.9"))

    class Raced(MemoryKV):
        async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
            if any(one.key == wire.ip_key("10.1.0.5") for one in puts):
                await super().commit(
                    (Compare(wire.ip_key("10.1.0.5"), "version", 0),), (Put(wire.ip_key("10.1.0.5"), theirs),)
                )
            return await super().commit(compares, puts)

    store = Raced()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: bool(publisher.conflicts))
        assert store._entries[wire.ip_key("10.1.0.5")].value == theirs


async def test_no_lease_has_more_than_a_thousand_keys() -> None:
    store = MemoryKV()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    many = [Address(f"10.2.{number >> 8}.{number & 255}", WEB) for number in range(2500)]
    publisher.want("workloads", addresses=many)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
    held: dict[int, int] = {}
    for entry in store._entries.values():
        held[entry.lease] = held.get(entry.lease, 0) + 1
    held.pop(0)
    assert max(held.values()) <= 1000
    assert len(held) == 3


async def test_another_clusters_id_in_the_configuration_stops_everything() -> None:
    store = MemoryKV()
    await store.put(wire.config_key("alpha"), wire.encode_config(wire.ClusterConfig(7)))
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: "says id 7" in publisher.text)
        await asyncio.sleep(0.02)
        assert not [key for key in store._entries if key.startswith("cilium/state/")]


async def test_in_a_mesh_of_511_clusters_numbers_come_from_the_smaller_range() -> None:
    store = MemoryKV()
    publisher = make(store, Disk(), Member("beta", 2, "b1", max_clusters=511))
    publisher.publish(replace(HOST, cluster="beta", cluster_id=2, name="b1"))
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
    assert all(65536 <= number <= 98303 for number in publisher.allocator.numbers.values())
    assert b'"maxConnectedClusters":511' in store._entries[wire.config_key("beta")].value


async def test_without_a_shared_store_only_workloads_are_written() -> None:
    store = MemoryKV()
    publisher = make(store, Disk(), replace(MEMBER, announce=False))
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
    kinds = {key.rsplit("/v1/")[0] for key in store._entries}
    assert kinds == {"cilium/state/identities", "cilium/state/ip"}


@pytest.mark.parametrize("call", range(1, 40, 3))
async def test_an_outage_at_any_moment_ends_with_everything_written_once(call: int) -> None:
    class Breaks(MemoryKV):
        left = call

        async def commit(self, compares: Sequence[Compare], puts: Sequence[Put] = ()) -> Committed:
            self.left -= 1
            done = await super().commit(compares, puts)
            if self.left == 0:
                self.cut("broke")  # done, but nobody hears of it
                asyncio.get_running_loop().call_later(0.005, self.heal)
                self._check()
            return done

    store = Breaks()
    publisher = make(store, Disk())
    publisher.publish(HOST)
    publisher.want("workloads", addresses=WORKLOADS)
    async with running(publisher):
        await eventually(lambda: publisher.ok)
        if store.left <= 0:
            await eventually(lambda: publisher.ok and store._cut is None)
        assert len([key for key in store._entries if key.startswith(wire.IDENTITY_MASTERS)]) == 2
        assert ip(store, "10.1.0.5") is not None


async def test_after_an_outage_requests_come_at_the_steady_rate_and_not_at_once() -> None:
    now = 100.0
    paced = Paced(MemoryKV(), rate=20, burst=20, spread_s=0, clock=lambda: now)
    slept: list[float] = []

    async def wait(seconds: float) -> None:
        slept.append(seconds)

    real, asyncio.sleep = asyncio.sleep, wait  # type: ignore[assignment]
    try:
        for _ in range(100):
            await paced.get("a")
        assert slept == []
        paced.limit()
        for _ in range(20):
            await paced.get("a")
        assert slept == []
        paced.outage()
        for _ in range(5):
            await paced.get("a")
    finally:
        asyncio.sleep = real
    assert [round(one, 3) for one in slept] == [0.05, 0.1, 0.15, 0.2]
