"""What holds for all tests: those that need the kernel fail the run, loudly, where the kernel refuses BPF."""

import os
from pathlib import Path

import pytest

from bpf import features

# Dozens of tests load the programs: compiled once for all of them, and for the daemons that they start.
os.environ.setdefault("CACHE_DIRECTORY", str(Path(__file__).resolve().parents[1] / ".cache"))

NEEDS_BPF = ("kernel", "demo")


def refusal() -> str:
    """Why BPF cannot be used here, or an empty string."""
    try:
        features.probe()
    except (OSError, features.MissingFeatureError) as error:
        return str(error)
    return ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """A skip would look like success: the tests that matter most would never have run."""
    wanting = [item for item in session.items if any(item.get_closest_marker(name) for name in NEEDS_BPF)]
    if wanting and (why := refusal()):
        pytest.exit(
            f"{len(wanting)} of the selected tests load BPF programs and this kernel refuses: {why}. "
            "Run as root on Linux 5.10 or later, or choose others with -m 'not kernel and not demo'.",
            returncode=1,
        )
