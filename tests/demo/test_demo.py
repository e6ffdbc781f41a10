"""The demo as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).with_name("demo.py")

pytestmark = pytest.mark.demo


def left_behind() -> list[str]:
    """Namespaces, mounts and directories with the demo's name."""
    found = [path.name for path in Path("/run/netns").glob("mwdemo-*")]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if "/run/mwdemo" in line]
    return found + [str(path) for path in [Path("/run/mwdemo")] if path.exists()]


def test_every_expectation_of_the_demo_holds_and_nothing_is_left_behind() -> None:
    done = subprocess.run(
        [sys.executable, DEMO], capture_output=True, text=True, timeout=180, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every expectation held." in done.stdout
    assert left_behind() == []
