"""The examples run as they stand, and stay as short as they promise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, below", [("inject_from_python.py", 1.0), ("titan_llama.py", 8.0)])
def test_an_example_trains(name, below, tmp_path):
    done = warm.run([ROOT / "examples" / name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = ast.literal_eval(done.stdout.splitlines()[-1])
    assert result["status"] == "finished"
    assert result["objective"] < below


def test_injecting_from_python_takes_forty_lines_at_most():
    lines = (ROOT / "examples" / "inject_from_python.py").read_text().splitlines()
    assert len(lines) <= 40
