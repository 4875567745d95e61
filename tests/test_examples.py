"""The examples run as they stand, and stay as short as they promise."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, below", [("inject_from_python.py", 1.0), ("titan_llama.py", 8.0)])
def test_an_example_trains(name, below, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = ast.literal_eval(done.stdout.splitlines()[-1])
    assert result["status"] == "finished"
    assert result["objective"] < below


def test_injecting_from_python_takes_forty_lines_at_most():
    lines = (ROOT / "examples" / "inject_from_python.py").read_text().splitlines()
    assert len(lines) <= 40
