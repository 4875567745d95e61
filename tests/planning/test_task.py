"""`task=plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig

from tests import warm


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "swept/results.json").read_text())


def test_a_sweep_has_the_best_layout_first_and_the_sentence_of_those_that_do_not_fit(
    tmp_path: Path,
) -> None:
    layouts = ("world_size=4", "runtime.tp=4,2,1", "runtime.cp=1", "data.seq_len=64")
    done = warm.run(
        ["-m", "ditty_di", "--multirun", "hydra.sweep.dir=swept", "task=plan", *layouts],
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # one of the layouts is refused
    one, two, four = rows(tmp_path)
    assert [one["status"], two["status"], four["status"]] == ["finished", "finished", "failed"]
    assert one["objective"] <= two["objective"] and one["fits"] == "yes"
    assert "runtime.tp=4: 2 key-value heads; tp fits 1, 2" in four["error"]
    lines = [line.split() for line in done.stdout.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["job", "changed"])
    header, best = lines[start : start + 2]
    assert header[:5] == ["job", "changed", "status", "objective", "fits"]
    assert best[1].startswith("runtime.tp=")
    made = json.loads((tmp_path / "swept" / one["job"] / "plan.json").read_text())
    assert made["fits"] and made["positions"][0]["exact"]["optimizer"] > 0
    assert "Traceback" not in done.stdout + done.stderr


def test_a_pretrained_model_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=6, hidden_size=256, vocab_size=999).save_pretrained(tmp_path)
    shape = ("model.path=.", "data.seq_len=128", "world_size=8", "device=rtx4090-24gb")
    page = warm.ditty_di(tmp_path, "+experiment=qlora", "task=plan", "run=planned", *shape)
    assert "planned without the tokenizer" in page
    assert "8 x RTX 4090 24 GB, dp_shard 8" in page and "\nfits: " in page
    assert (tmp_path / "planned/plan.json").exists()


def test_what_cannot_be_planned_is_said_before_a_run_folder_is_made(tmp_path: Path) -> None:
    for typed, sentence in (
        ("device=h100", "did you mean 'h100-80gb'?"),
        ("world_size=0", "world_size=0: write a number of at least 1"),
    ):
        done = warm.run(["-m", "ditty_di", "task=plan", typed], cwd=tmp_path)
        assert done.returncode == 2 and sentence in done.stderr, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
