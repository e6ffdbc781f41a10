"""Our answers to the golden cases."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
GOLDEN = Path(os.environ.get("MESHWALL_VECTORS", ROOT / "../shared/vectors")) / "clustermesh"


def test_no_golden_case_has_a_wrong_answer() -> None:
    files = sorted(GOLDEN.glob("*.jsonl")) or [ROOT / "tests/vectors/mesh.jsonl"]
    program = ROOT / "tests/vectors/mesh_vectors.py"
    run = subprocess.run([sys.executable, program, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 wrong, 0 skipped" in run.stdout.splitlines()[-1]
