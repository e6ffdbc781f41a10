"""The golden cases: the full set where it is at hand, otherwise the small copy that comes with the sources."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("MESHWALL_VECTORS", ROOT.parent / "shared" / "vectors")) / "policy"
FILES = ("kubelet-and-pods", "examples", "targeted", "random", "validation")


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location(
        "policy_vectors", ROOT / "tests" / "vectors" / "policy_vectors.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_small_copy_has_no_wrong_answer(runner, capsys):
    assert runner.main([str(ROOT / "tests" / "vectors" / "policy.jsonl")]) == 0
    assert " 0 wrong" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the full set of vectors is not on this machine")
@pytest.mark.parametrize("name", FILES)
def test_the_full_set_has_no_wrong_answer(runner, capsys, name):
    assert runner.main([str(SHARED / f"{name}.jsonl")]) == 0


def test_a_wrong_answer_is_printed_and_fails(runner, tmp_path, capsys):
    lines = (ROOT / "tests" / "vectors" / "policy.jsonl").read_text(encoding="utf-8").splitlines()
    case = next(line for line in lines if '"verdict":"deny","why":"default-deny"' in line)
    (tmp_path / "wrong.jsonl").write_text(
        case.replace('"verdict":"deny"', '"verdict":"allow"', 1), encoding="utf-8"
    )
    assert runner.main([str(tmp_path / "wrong.jsonl")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert shown[1].endswith(" 1 wrong; 0 documents, 0 wrong")
