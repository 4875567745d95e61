"""An export is whole, says what it is, and opens in stock transformers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ditty_di.config import ConfigError, Graph
from ditty_di.export import AutoExport, HuggingFaceExport, MergedExport, SafetensorsExport
from ditty_di.tasks.export import export
from ditty_di.tasks.loading import ready
from tests import warm
from tests.export import ranks


@pytest.fixture
def model(build, checkpoint):
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    return model


def test_opens_in_transformers_with_the_same_values(build, tokenizer, checkpoint, model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "deep" / "export"
    export(build(), HuggingFaceExport(tokenizer, str(path)), checkpoint)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, r"dtype=bf16: not a dtype; write float32, bfloat16"),
        ({"max_shard_size": "5 gigs"}, r"max_shard_size=5 gigs: not a size; write a number and KB"),
        ({"max_shard_size": "0GB"}, r"max_shard_size=0GB: not a size"),
    ],
)
@pytest.mark.parametrize("kind", [HuggingFaceExport, MergedExport, AutoExport])
def test_a_wrong_dtype_or_size_of_files_is_found_before_the_training(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind.validate(**options)
    name = f"{kind.__module__}.{kind.__name__}"
    node = {"_target_": name, "tokenizer": None, "path": "export", **options}
    with pytest.raises(ConfigError, match=message):
        Graph({"export": node}).check("export")


def test_calls_of_the_tokenizer_leave_no_trace_in_its_export(tokenizer, model, tmp_path):
    """Data that were in the cache called no tokenizer: the exports of both runs are the same."""
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
    HuggingFaceExport(tokenizer, str(tmp_path / "export"))([model])
    written = json.loads((tmp_path / "export" / "tokenizer.json").read_text())
    assert (written["truncation"], written["padding"]) == (None, None)


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
    with pytest.raises(ValueError, match="split into pipeline stages"):
        SafetensorsExport(str(tmp_path / "export"))([model, model])


def test_what_training_put_into_a_model_is_not_exported(llama, tokenizer, tmp_path):
    """Float8 layers, noise on embeddings and a deferred head leave an ordinary Llama."""
    from transformers import AutoModelForCausalLM

    from ditty_di.losses import skip_lm_head
    from ditty_di.models import causal_lm
    from ditty_di.models.neftune import neftune
    from ditty_di.models.pretrained import Pretrained
    from ditty_di.precision import float8

    model = causal_lm.from_pretrained(
        llama,
        convert=partial(float8.torchao, recipe="tensorwise"),
        neftune=partial(neftune, alpha=5.0),
        head=skip_lm_head,
    )
    ready(model, Pretrained(llama), torch.device("cpu"))
    HuggingFaceExport(tokenizer, str(tmp_path / "export"))([model])
    opened, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    base = AutoModelForCausalLM.from_pretrained(llama)
    for ours, theirs in zip(opened.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_is_another_one_by_now_is_not_exported_as_its_class(
    model, tokenizer, tmp_path
):
    model.model.layers[0].extra = nn.Linear(2, 2, bias=False)
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(
        ValueError, match=r"no longer fits LlamaForCausalLM .*export=safetensors"
    ) as e:
        HuggingFaceExport(tokenizer, str(tmp_path / "export"))([model])
    assert "model.layers.0.extra.weight is not expected" in str(e.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(e.value)
    assert not list(tmp_path.glob("export*"))
    with pytest.raises(ValueError, match="Linear is not a transformers model; export=safetensors"):
        HuggingFaceExport(tokenizer, str(tmp_path / "export"))([nn.Linear(2, 2)])


def two_ranks(folder, bases):
    script = Path(__file__).parent / "ranks.py"
    return "".join(warm.ranks([script, folder, json.dumps(bases)]))


def test_two_ranks_export_what_one_does(llama, t5, tokenizer, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    bases = {"llama": llama, "t5": t5}
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.main(one, bases)
    for out in (capsys.readouterr().out, two_ranks(two, bases)):
        assert out.count("exported: ") == 4 and out.count("against training") == 1
    for kind in ("full", "t5", "merged", "adapter"):
        name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
        alone, shared = load_file(one / kind / name), load_file(two / kind / name)
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[name], shared[name]) for name in alone), kind
        for file in ("config.json", "export.json", "generation_config.json"):
            if kind != "adapter" or file == "export.json":
                found = [json.loads((f / kind / file).read_text()) for f in (one, two)]
                if file == "export.json" and kind == "merged":
                    found_means = [
                        f.pop("logit_diff")["from"]["training"]["mean_abs"] for f in found
                    ]
                    assert found_means[0] == pytest.approx(found_means[1], rel=1e-3)
                assert found[0] == found[1]

    # Grown, and with a deferred head in training: an ordinary Llama.
    opened = AutoModelForCausalLM.from_pretrained(two / "full")
    assert opened.config.vocab_size == len(tokenizer) + 3
    assert opened.config.architectures == ["LlamaForCausalLM"]
    assert opened.get_input_embeddings().weight.shape[0] == len(tokenizer) + 3
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.generation_config.repetition_penalty == 1.25
    assert "lm_head.weight" not in load_file(two / "full" / "model.safetensors")
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(two / "t5", output_loading_info=True)
    assert not any(info.values()), info
    assert opened.encoder.embed_tokens.weight is opened.shared.weight
    assert opened.decoder.embed_tokens.weight is opened.shared.weight
    logit_diff = json.loads((two / "merged" / "export.json").read_text())["logit_diff"]
    assert logit_diff["from"]["unmerged"]["max_abs"] > 0
