"""The store over a real etcd."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from clustermesh.etcd import EtcdKV
from clustermesh.kv import KV, Compacted, Compare, ConnectionLost, Event, LeaseLost, MemoryKV, Put
from clustermesh.settings import EtcdSettings, EtcdSettingsError


@pytest.fixture(params=["etcd", "memory"])
def store(request: pytest.FixtureRequest) -> KV:
    """What holds for the real store holds for the embedded one."""
    if request.param == "memory":
        return MemoryKV()
    real: EtcdKV = request.getfixturevalue("kv")
    return real


async def first(kv: KV, prefix: str, revision: int) -> Sequence[Event]:
    async with asyncio.timeout(5):
        async for events in kv.watch(prefix, revision):
            return events
    raise AssertionError("the watch ended")


async def test_what_was_put_is_found_by_key_and_by_prefix(store: KV) -> None:
    await store.put("a/1", b"one")
    await store.put("a/2", b"two")
    revision = await store.put("ab", b"other")
    entry = await store.get("a/1")
    assert entry is not None
    assert entry.value == b"one"
    assert await store.get("a/3") is None
    listing = await store.list("a/")
    assert [(one.key, one.value) for one in listing.entries] == [("a/1", b"one"), ("a/2", b"two")]
    assert listing.revision == revision
    assert (await store.list("nothing/")).entries == ()


async def test_a_watch_tells_what_happened_since_its_revision_and_what_happens_later(store: KV) -> None:
    revision = await store.put("a/1", b"one")
    await store.put("b/1", b"elsewhere")
    await store.put("a/1", b"two")
    assert [(one.key, one.value) for one in await first(store, "a/", revision + 1)] == [("a/1", b"two")]
    later = (await store.list("a/")).revision + 1
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(first(store, "a/", later))
        await asyncio.sleep(0.1)
        await store.delete("a/1")
    assert [(one.key, one.value) for one in waiting.result()] == [("a/1", None)]


async def test_an_old_revision_is_refused_as_compacted(store: KV) -> None:
    revision = await store.put("a/1", b"one")
    last = await store.put("a/1", b"two")
    if isinstance(store, MemoryKV):
        store.compact()
    else:
        assert isinstance(store, EtcdKV)
        await store.compact(last)
    with pytest.raises(Compacted):
        await first(store, "a/", revision)


async def test_create_does_not_overwrite(store: KV) -> None:
    assert await store.create("a", b"one")
    assert not await store.create("a", b"two")
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"one"


async def test_a_transaction_writes_everything_or_nothing(store: KV) -> None:
    first = await store.commit(
        (Compare("a", "version", 0), Compare("d/", "version", 0, prefix=True)),
        (Put("a", b"1"), Put("d/1", b"1")),
    )
    entry = await store.get("a")
    assert first.done
    assert entry is not None
    assert (entry.create_revision, entry.mod_revision) == (first.revision, first.revision)
    held = (Compare("a", "create_revision", first.revision), Compare("a", "mod_revision", first.revision))
    again = await store.commit(held, (Put("a", b"2"), Put("d/1", None)))
    assert again.done
    assert again.revision > first.revision
    assert (await store.list("d/")).entries == ()
    for wrong in (held[1], Compare("a", "version", 0), Compare("a", "version", 1, prefix=True)):
        assert not (await store.commit((held[0], wrong), (Put("a", b"3"), Put("e", b"3")))).done
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.version, await store.get("e")) == (b"2", 2, None)
    with pytest.raises(LeaseLost):
        await store.commit((), (Put("f", b""), Put("g", b"", lease=4711)))
    assert await store.get("f") is None


async def test_keys_go_with_their_lease(store: KV) -> None:
    lease = await store.grant(60)
    await store.put("a", b"one", lease)
    entry = await store.get("a")
    assert entry is not None
    assert entry.lease == lease
    await store.revoke(lease)
    assert await store.get("a") is None
    with pytest.raises(LeaseLost):
        await store.put("a", b"two", lease)
    with pytest.raises(LeaseLost):
        await store.keep_alive(lease, 60)


@pytest.mark.slow
async def test_a_lease_that_is_kept_alive_outlives_its_time(kv: EtcdKV) -> None:
    lease = await kv.grant(2)
    await kv.put("a", b"one", lease)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(4):
            await kv.keep_alive(lease, 2)
    assert await kv.get("a") is not None


async def test_long_lists_come_in_pages_of_one_revision(live, kv: EtcdKV) -> None:
    for number in range(25):
        await kv.put(f"a/{number:02}", b"x")
    paged = EtcdKV(EtcdSettings((live.endpoint,), page=10))
    listing = await paged.list("a/")
    await paged.close()
    assert [one.key for one in listing.entries] == [f"a/{number:02}" for number in range(25)]


async def test_a_batch_of_more_than_four_megabytes_arrives(kv: EtcdKV) -> None:
    revision = (await kv.list("a/")).revision
    for number in range(6):
        await kv.put(f"a/{number}", bytes(1_000_000))
    seen: list[Event] = []
    async with asyncio.timeout(10):
        async for events in kv.watch("a/", revision + 1):
            seen += events
            if len(seen) == 6:
                break
    assert [one.key for one in seen] == [f"a/{number}" for number in range(6)]


async def test_a_stopped_store_is_lost_and_found_again(etcd, kv: EtcdKV) -> None:
    revision = await kv.put("a", b"one")

    async def watch() -> None:
        async for _ in kv.watch("a", revision + 1):
            pass

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_outcome(watch()))
        await asyncio.sleep(0.2)
        etcd.stop()
    assert isinstance(watching.result(), ConnectionLost)
    with pytest.raises(ConnectionLost, match="refused"):
        await kv.get("a")
    etcd.start()
    assert await kv.get("a") is not None


async def test_a_hung_member_is_left_within_five_seconds(etcd, kv: EtcdKV) -> None:
    revision = await kv.put("a", b"one")

    async def watch() -> None:
        async for _ in kv.watch("a", revision + 1):
            pass

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_outcome(watch()))
        await asyncio.sleep(0.3)
        start = time.monotonic()
        etcd.hang()
    assert isinstance(watching.result(), ConnectionLost)
    assert time.monotonic() - start < 5
    etcd.resume()


async def test_the_next_endpoint_is_taken_when_one_is_out(live) -> None:
    kv = EtcdKV(EtcdSettings(("http://127.0.0.1:9", live.endpoint)))
    for _ in range(2):
        await kv.put("a", b"one")
        await kv.close()
        kv = EtcdKV(EtcdSettings((live.endpoint, "http://127.0.0.1:9")))
    await kv.close()


async def test_cancelling_a_watch_ends_it_at_once(kv: EtcdKV) -> None:
    revision = await kv.put("a", b"one")

    async def watch() -> None:
        async for _ in kv.watch("a", revision + 1):
            pass

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await watch()
    assert time.monotonic() - start < 0.6
    await kv.put("a", b"still works")


async def test_nobody_there_is_one_line_that_names_the_endpoint() -> None:
    kv = EtcdKV(EtcdSettings(("http://127.0.0.1:9",)))
    with pytest.raises(ConnectionLost) as found:
        await kv.get("a")
    await kv.close()
    assert str(found.value).startswith("http://127.0.0.1:9: ")
    assert "refused" in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoints": ()}, "etcd.endpoints"),
        ({"endpoints": ("localhost:2379",)}, "not like https"),
        ({"endpoints": ("https://host:99999",)}, "not like https"),
        ({"endpoints": ("https://host:1",), "cert": "/x"}, "etcd.key"),
        ({"endpoints": ("http://host:1",), "ca": "/x"}, "https"),
        ({"endpoints": ("https://host:1",), "password": "x"}, "etcd.username"),
        ({"endpoints": ("http://host:1",)}, "not encrypted"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(EtcdSettingsError, match=message):
        EtcdSettings(**settings)  # type: ignore[arg-type]


async def test_a_missing_tls_file_is_named(tmp_path: Path) -> None:
    kv = EtcdKV(EtcdSettings(("https://127.0.0.1:9",), ca=str(tmp_path / "ca.crt")))
    with pytest.raises(ConnectionLost, match=r"etcd.ca: .*/ca.crt: No such file"):
        await kv.get("a")


async def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    kv = EtcdKV(EtcdSettings(("https://127.0.0.1:9",), ca=str(tmp_path / "ca.crt")))
    with pytest.raises(ConnectionLost, match=r"etcd.ca: .*/ca.crt: not a PEM certificate"):
        await kv.get("a")


async def _outcome(work) -> BaseException | None:
    try:
        async with asyncio.timeout(10):
            await work
    except Exception as error:  # noqa: BLE001 - the error is the result
        return error
    return None


async def test_a_watch_that_falls_behind_what_the_members_agree_on_is_left(live, monkeypatch) -> None:
    kv = EtcdKV(EtcdSettings((live.endpoint,), progress_s=0.05, stall_s=0.2))
    asked: list[int] = []

    async def ahead(session: object, prefix: str) -> int:
        asked.append(len(asked))
        return 1 << 40 if len(asked) > 2 else 0

    monkeypatch.setattr(kv, "_agreed", ahead)
    revision = (await kv.list("x/")).revision
    with pytest.raises(ConnectionLost, match="stands still"):
        await asyncio.wait_for(anext(kv.watch("x/", revision + 1)), 5)
    assert len(asked) >= 3, "it was asked every time nothing had moved for long, and left only when behind"
    await kv.close()
