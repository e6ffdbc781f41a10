"""A bare Debian root: does the repository need anything that it neither brings nor installs itself?"""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fresh_root.sh")

pytestmark = [pytest.mark.slow, pytest.mark.kernel]


@pytest.mark.parametrize("command", ["demo", "test"])
def test_a_newcomers_command_succeeds_on_a_fresh_root(command: str) -> None:
    done = subprocess.run(
        [SCRIPT, "./dev", command], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
