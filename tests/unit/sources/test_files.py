"""The watched policy directory."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from daemon.sources.files import PolicyFiles
from daemon.state.tables import Tables

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: NAME}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [cluster]
"""


class Rig:
    """A directory, tables, and the source between them."""

    def __init__(self, root: Path, **settings: bool) -> None:
        self.directory = root / "policies.d"
        self.state = root / "state"
        self.directory.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        self.tables = Tables()
        self.source = PolicyFiles(self.tables, self.directory, self.state, **settings)

    def write(self, file: str, name: str = "", text: str = "") -> Path:
        path = self.directory / file
        path.write_text(text or POLICY.replace("NAME", name))
        return path

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.tables.policies}

    @property
    def problems(self) -> str:
        return "\n".join(str(one) for row in self.tables.problems.rows.values() for one in row)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.source.run())
            try:
                yield
            finally:
                task.cancel()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_files_are_followed_as_they_come_change_and_go(rig: Rig, until) -> None:
    rig.write("a.yaml", "one")
    async with rig.running():
        await until(lambda: rig.names == {"one"})
        assert rig.tables.policies.synced
        rig.write("b.yaml", "two")
        await until(lambda: rig.names == {"one", "two"})
        partial = rig.write(".c.partial", "three")
        partial.rename(rig.directory / "a.yaml")
        await until(lambda: rig.names == {"three", "two"})
        (rig.directory / "b.yaml").unlink()
        await until(lambda: rig.names == {"three"})
        assert rig.tables.status["policy files"].ok


async def test_a_broken_file_keeps_what_it_said_and_the_finding_has_its_line(rig: Rig, until) -> None:
    rig.write("a.yaml", "one")
    async with rig.running():
        await until(lambda: rig.names == {"one"})
        rig.write("a.yaml", text=POLICY.replace("NAME", "one").replace("ingress:", "ingres:"))
        await until(lambda: bool(rig.problems))
        assert rig.names == {"one"}
        assert f"{rig.directory}/a.yaml:7:" in rig.problems
        assert not rig.tables.status["policy files"].ok
        rig.write("a.yaml", "one")
        await until(lambda: not rig.problems)


async def test_the_last_good_version_survives_a_restart(rig: Rig, tmp_path: Path, until) -> None:
    rig.write("a.yaml", "one")
    async with rig.running():
        await until((rig.state / "last-good-policies" / "a.yaml").exists)
    rig.write("a.yaml", text="spec: [")
    again = Rig(tmp_path)
    async with again.running():
        await until(lambda: bool(again.problems))
        assert again.names == {"one"}


async def test_an_emptied_or_vanished_directory_enforces_until_it_is_accepted(rig: Rig, until) -> None:
    path = rig.write("a.yaml", "one")
    async with rig.running():
        await until(lambda: rig.names == {"one"})
        path.unlink()
        await until(lambda: not rig.tables.status["policy files"].ok)
        assert "accept-empty" in rig.tables.status["policy files"].hint
        rig.directory.rmdir()
        await until(lambda: "is not there" in rig.tables.status["policy files"].text)
        assert rig.names == {"one"}
        assert await rig.source.accept_empty()
        assert rig.names == set()
        assert not await rig.source.accept_empty()
        rig.directory.mkdir()
        rig.write("b.yaml", "two")
        await until(lambda: rig.names == {"two"})


async def test_an_emptied_directory_still_counts_after_a_restart(rig: Rig, tmp_path: Path, until) -> None:
    path = rig.write("a.yaml", "one")
    async with rig.running():
        await until((rig.state / "last-good-policies" / "a.yaml").exists)
    path.unlink()
    again = Rig(tmp_path)
    async with again.running():
        await until(lambda: again.tables.policies.synced)
        assert again.names == {"one"}


async def test_what_others_could_have_written_is_not_read(rig: Rig, until) -> None:
    rig.write("a.yaml", "one")
    rig.write("writable.yaml", "two").chmod(0o666)
    elsewhere = rig.state / "elsewhere.yaml"
    elsewhere.write_text(POLICY.replace("NAME", "three"))
    (rig.directory / "link.yaml").symlink_to(elsewhere)
    os.mkfifo(rig.directory / "pipe.yaml")
    (rig.directory / "big.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    (rig.directory / "binary.yaml").write_bytes(b"a: 1\nb: \xff\n")
    async with rig.running():
        await until(lambda: rig.tables.policies.synced)
        assert rig.names == {"one"}
        for told in (
            "writable.yaml: error: file may be written by group or others (mode 0666): chmod go-w",
            "link.yaml: error: is a symbolic link",
            "pipe.yaml: error: is not a regular file",
            "big.yaml: error: is larger than 1048576 bytes",
            "binary.yaml: error: is not UTF-8 text (line 2)",
        ):
            assert told in rig.problems


async def test_a_directory_that_others_may_write_changes_nothing(rig: Rig, until) -> None:
    rig.write("a.yaml", "one")
    async with rig.running():
        await until(lambda: rig.names == {"one"})
        rig.directory.chmod(0o777)
        rig.write("b.yaml", "two")
        await until(lambda: "may be written" in rig.tables.status["policy files"].text)
        assert rig.names == {"one"}


async def test_plain_lists_of_prefixes_are_groups(rig: Rig, until) -> None:
    rig.write("blocked.cidrs", text="10.0.0.0/8\n")
    async with rig.running():
        await until(lambda: "blocked" in rig.tables.cidr_groups)


async def test_a_disk_that_takes_nothing_does_not_stop_policy(rig: Rig, until, caplog) -> None:
    (rig.state / "last-good-policies").touch()
    rig.write("a.yaml", "one")
    async with rig.running():
        await until(lambda: rig.names == {"one"})
        rig.write("b.yaml", "two")
        await until(lambda: rig.names == {"one", "two"})
        await until(lambda: "are not saved" in caplog.text)
    assert caplog.text.count("are not saved") == 1
