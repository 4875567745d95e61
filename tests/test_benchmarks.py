"""Benchmarks tried at toy size: of GPUs, of layouts, of starts, of widths."""

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
    # An environment of its own, where torchao's step is not compiled, which takes a minute.
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [*command, *more],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
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


@pytest.mark.slow
def test_the_benchmark_of_layouts_trains_all_of_them_alike(tmp_path):
    report = tmp_path / "layouts.json"
    tiny = ["--tiny", "--ranks", "2", "4", "--steps", "4", "--warm-up", "1", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "launch/benchmarks/layouts.py", *tiny, "--json", str(report)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    losses: dict[str, list[float]] = {}
    for of_ranks in found["results"].values():
        for name, case in of_ranks.items():
            assert case["tokens_per_second"] > 0
            losses.setdefault(name.split(",")[0], []).append(case["last_loss"])
    for model in ("Llama", "Qwen3-MoE", "titan Llama"):
        assert losses[model] == pytest.approx([losses[model][0]] * len(losses[model]), abs=1e-5)
    assert found["ratios"]["2"].keys() == {"titan Llama, fsdp 2", "titan Llama, tp 2"}


@pytest.mark.slow
def test_the_benchmark_of_starts_measures_commands_beside_their_imports(tmp_path):
    report = tmp_path / "startup.json"
    done = subprocess.run(
        [sys.executable, "launch/benchmarks/startup.py", "--rounds", "1", "--json", str(report)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())["cases"]
    assert [*found] == ["help", "cfg_job", "check", "first_step", "resume"]
    for case in found.values():
        assert min(case[kind]["cpu_seconds"] for kind in ("command", "imports")) > 0
    assert found["help"]["command"]["cpu_seconds"] > found["help"]["imports"]["cpu_seconds"]


@pytest.mark.slow
def test_the_benchmark_of_mup_compares_widths_with_and_without(tmp_path):
    report = tmp_path / "mup.json"
    tiny = ["--widths", "32", "64", "--rates", "-9", "-7", "-5", "--steps", "10"]
    done = subprocess.run(
        [sys.executable, "launch/benchmarks/mup.py", *tiny, "--json", str(report)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["losses"]["muP"]["32"] == found["losses"]["without"]["32"], "the base is a Llama"
    assert found["losses"]["muP"]["64"] != found["losses"]["without"]["64"]
    assert found["muP"]["cost_of_transfer"]["32"] == 0
