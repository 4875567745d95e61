"""An export is whole, says what it is, and opens in stock transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ditty_di
from ditty_di.tasks.export import HuggingFaceExport, SafetensorsExport, export
from ditty_di.tasks.loading import ready


@pytest.fixture
def model(build, checkpoint):
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    return model


def test_opens_in_transformers_with_the_same_values(build, tokenizer, checkpoint, model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "deep" / "export"
    assert export(build(), tokenizer, checkpoint, path=str(path)) == {"path": str(path)}
    opened, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(opened(ids).logits, model(ids).logits)
    assert opened.config.use_cache and opened.generation_config.use_cache is not False
    assert opened.config.architectures == ["LlamaForCausalLM"]
    assert opened.lm_head.weight is opened.model.embed_tokens.weight, "still tied"
    words = AutoTokenizer.from_pretrained(path)
    assert words("Document 3")["input_ids"] == tokenizer("Document 3")["input_ids"]
    assert words.model_max_length == tokenizer.model_max_length
    assert (words.eos_token_id, words.pad_token_id) == (0, 1)
    assert [p.name for p in path.parent.iterdir()] == ["export"]


def test_dtype_and_shards(tokenizer, model, tmp_path):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "export"
    HuggingFaceExport(tokenizer, str(path), dtype="bfloat16", max_shard_size="20KB")([model])
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    opened = AutoModelForCausalLM.from_pretrained(path)
    for ours, theirs in zip(model.parameters(), opened.parameters(), strict=True):
        assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, ours.bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model itself is as it was"
    assert model.config.use_cache is False


def test_an_export_is_replaced_by_a_whole_one_only(tokenizer, model, tmp_path):
    path = tmp_path / "export"
    path.mkdir()
    (path / "old.txt").write_text("an earlier export")

    class Failing:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        HuggingFaceExport(Failing(), str(path))([model])
    assert [p.name for p in path.iterdir()] == ["old.txt"]
    # A process killed between the two renames.
    path.rename(tmp_path / ".export.old")
    with pytest.raises(OSError, match="disk full"):
        HuggingFaceExport(Failing(), str(path))([model])
    assert [p.name for p in path.iterdir()] == ["old.txt"]
    HuggingFaceExport(tokenizer, str(path))([model])
    assert "old.txt" not in {p.name for p in path.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"export"}


def test_any_model_as_safetensors(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("steps", torch.tensor([3]))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    model = Tied()
    SafetensorsExport(str(tmp_path / "export"), dtype="float16")([model])
    saved = load_file(tmp_path / "export" / "model.safetensors")
    assert set(saved) == {"first.weight", "first.bias", "steps"}
    assert torch.equal(saved["first.weight"], model.first.weight.half())
    assert saved["steps"].dtype == torch.int64
    with pytest.raises(ValueError, match="split into 2 pipeline stages"):
        SafetensorsExport(str(tmp_path / "export"))([model, model])


def test_two_ranks_export_what_one_does(tmp_path):
    script = Path(__file__).parent / "ranks_export.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(ditty_di.__file__).parents[1])
    done = subprocess.run(
        [*command, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "sharded" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    sharded = load_file(tmp_path / "sharded" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert sharded.keys() == whole.keys() and "lm_head.weight" not in whole
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
