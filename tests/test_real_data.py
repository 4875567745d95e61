"""launch/real-data at the size of a megabyte: every step that the how-to shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_real_text_is_tokenized_looked_at_and_trained_on(tmp_path):
    report = tmp_path / "report.json"
    small = "--megabytes 0.6 --vocab-size 500 --steps 3 --rows 100 --workers 1"
    command = [sys.executable, "launch/benchmarks/real_data.py", *small.split()]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "work"), "--json", str(report)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())["results"]
    assert sum(found["text"][name]["bytes"] for name in ("debian", "manual", "python")) >= 600_000
    assert found["text"]["python"]["documents"] > 0
    steps = {row["step"]: row for row in found["steps"]}
    assert all(row["tokens_per_second"] > 0 for row in steps.values()), steps
    assert steps["tokenize"]["tokens"] > 100_000 and steps["stats"]["rows"] == 100
    assert 0 <= steps["train a model"]["data_loading_share"] < 1
    two = found["two_namespaces"]
    if "skipped" in two:
        pytest.skip(two["skipped"])
    assert len(two["sha256"]) == 64  # compared by the script
