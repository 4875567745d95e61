"""The benchmark that needs a GPU, tried at toy size without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_its_cases_at_toy_size(tmp_path):
    command = [sys.executable, "launch/benchmarks/gpu.py", "--tiny", "--steps", "3"]
    more = [
        "--warmup",
        "1",
        "--only",
        "QLoRA 2 x 2048",
        "full",
        "--json",
        str(tmp_path / "gpu.json"),
    ]
    # An environment of its own: what it compiles was once linked otherwise after other tests, and
    # was then found in a cache that all share.
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [*command, *more],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["cases"]) == {"QLoRA 2 x 2048", "full, 8-bit AdamW 2 x 2048"}
    for case in report["cases"].values():
        assert case["tokens_per_second"] > 0 and case["tflops"] > 0 and case["loss"] < 7
