"""From one layout of the maps to the next under traffic, counted at sockets; and never back."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from bpf import layout

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSED = 7000, 7001
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{toPorts: [{{ports: [{{port: "{OPEN}", protocol: ANY}}]}}]}}]
"""
ROUNDS = 5


def release(place: Path, version: int) -> Path:
    """This tree as a later release has it: another layout, in which a fragment's entry is of another shape."""
    tree = place / f"release{version}"
    for name in ("bpf", "daemon", "clustermesh"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    more = version - layout.LAYOUT_VERSION
    edit(
        tree / "bpf" / "layout.py", f"LAYOUT_VERSION = {layout.LAYOUT_VERSION}", f"LAYOUT_VERSION = {version}"
    )
    edit(tree / "bpf" / "layout.py", '("pass_", "I")))', f'("pass_", "I"), ("more", "{8 * more}s")))')
    edit(
        tree / "bpf" / "src" / "maps.h",
        "__u32 rule, pass_; };",
        f"__u32 rule, pass_; __u64 more[{more}]; }};",
    )
    return tree


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


@pytest.fixture
def node(machine, tmp_path):
    """Enforcing, with nothing of other layouts."""
    machine.stop()
    machine.meshwall("cleanup", "--yes", "--pins", str(machine.home / "bpf"))
    machine.tree = ROOT
    machine.enforce(POLICY)
    machine.until(lambda: machine.connects(CLOSED) is False)
    yield machine
    machine.stop()
    machine.tree = ROOT
    machine.settings.pop("map_sizes", None)


def versions(machine) -> list[str]:
    return sorted(one.name for one in (machine.home / "bpf").iterdir() if one.name.startswith("v"))


def upgraded(machine, version: int) -> bool:
    return versions(machine) == [f"v{version}"] and machine.status().get("enforcement", {}).get("ok") is True


@pytest.mark.parametrize("rounds", [2, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_upgrades_under_traffic_leak_nothing_and_cut_nothing(node, tmp_path, rounds):
    first = layout.LAYOUT_VERSION
    with node.traffic(OPEN, CLOSED) as seen:
        for version in range(first + 1, first + 1 + rounds):
            node.stop(signal.SIGTERM)
            node.tree = release(tmp_path, version)
            if (
                version % 2
            ):  # tables of another size cannot be kept: connections are found again by their sockets
                sizes = node.sizes | {"conntrack": 4096 + version}
                node.start(map_sizes=sizes)
            else:
                node.start()
            node.until(lambda: upgraded(node, version), 90)  # noqa: B023 - called at once
    assert seen.sent > 1_000
    assert seen.echoed > 100
    assert (seen.leaked, seen.sent - seen.arrived, seen.cut) == (0, 0, "")


def test_an_upgrade_that_is_killed_anywhere_is_completed_by_the_next_start(node, tmp_path):
    chance = random.Random(4)  # noqa: S311 - the same in every run
    node.stop(signal.SIGTERM)
    version = layout.LAYOUT_VERSION + 1
    node.tree = release(tmp_path, version)
    with node.traffic(OPEN, CLOSED) as seen:
        for _ in range(4):
            node.start()
            time.sleep(chance.uniform(0.3, 4))
            node.stop(signal.SIGKILL)
        node.start()
        node.until(lambda: upgraded(node, version), 90)
    assert (seen.leaked, seen.sent - seen.arrived, seen.cut) == (0, 0, "")
    assert seen.echoed > 100


def test_a_release_that_is_too_old_touches_nothing_and_says_what_to_do(node, tmp_path):
    node.stop(signal.SIGTERM)
    version = layout.LAYOUT_VERSION + 1
    node.tree = release(tmp_path, version)
    node.start()
    node.until(lambda: upgraded(node, version), 90)
    node.stop(signal.SIGTERM)
    before = pinned(node)
    node.tree = ROOT
    with node.traffic(OPEN, CLOSED) as seen:
        node.start()
        node.until(lambda: "newer release" in str(node.status()["parts"].get("datapath")), 20)
        time.sleep(0.5)
    assert (seen.leaked, seen.sent - seen.arrived, seen.cut) == (0, 0, "")
    assert pinned(node) == before
    assert f"layout {version}" in node.log()


def pinned(machine) -> list[str]:
    return sorted(str(one) for one in (machine.home / "bpf").rglob("*"))


def test_cleanup_removes_what_every_layout_has_left(node, tmp_path):
    node.stop(signal.SIGKILL)
    node.tree = release(tmp_path, layout.LAYOUT_VERSION + 1)
    node.start()
    node.until(lambda: len(versions(node)) == 2, 20)
    node.stop(signal.SIGKILL)
    done = node.meshwall("cleanup", "--yes", "--pins", str(node.home / "bpf"))
    assert done.returncode == 0, done.stderr
    assert not (node.home / "bpf").exists() or not any((node.home / "bpf").iterdir())
    with node.listener(node.us, node.node, CLOSED):
        assert node.connects(CLOSED)
