"""Benchmarks tried at toy size: of GPUs, of layouts, of starts, of widths."""

import os

import pytest

from tests.toy import measured


@pytest.mark.slow
def test_the_gpu_benchmark_runs_its_cases_at_toy_size(tmp_path):
    few = ["--tiny", "--steps", "3", "--warmup", "1", "--only", "QLoRA 2 x 2048", "full"]
    # An environment of its own, where torchao's step is not compiled, which takes a minute.
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env |= {"TORCHDYNAMO_DISABLE": "1"}
    found = measured("gpu", *few, report=tmp_path / "gpu.json", env=env)
    assert set(found["cases"]) == {"QLoRA 2 x 2048", "full, 8-bit AdamW 2 x 2048"}
    for case in found["cases"].values():
        assert case["tokens_per_second"] > 0 and case["tflops"] > 0 and case["loss"] < 7


@pytest.mark.slow
def test_the_benchmark_of_layouts_trains_all_of_them_alike(tmp_path):
    tiny = ["--tiny", "--ranks", "2", "4", "--steps", "4", "--warm-up", "1", "--rounds", "1"]
    found = measured("layouts", *tiny, report=tmp_path / "layouts.json")
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
    found = measured("startup", "--rounds", "1", report=tmp_path / "startup.json")["cases"]
    assert [*found] == ["help", "cfg_job", "check", "first_step", "resume"]
    for case in found.values():
        assert min(case[kind]["cpu_seconds"] for kind in ("command", "imports")) > 0
    assert found["help"]["command"]["cpu_seconds"] > found["help"]["imports"]["cpu_seconds"]


@pytest.mark.slow
def test_the_benchmark_of_mup_compares_widths_with_and_without(tmp_path):
    tiny = ["--widths", "32", "64", "--rates", "-9", "-7", "-5", "--steps", "10"]
    found = measured("mup", *tiny, report=tmp_path / "mup.json")
    assert found["losses"]["muP"]["32"] == found["losses"]["without"]["32"], "the base is a Llama"
    assert found["losses"]["muP"]["64"] != found["losses"]["without"]["64"]
    assert found["muP"]["cost_of_transfer"]["32"] == 0
