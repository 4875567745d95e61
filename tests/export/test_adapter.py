"""Adapters alone, and merged: what stock peft and transformers make of them."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ditty_di.adapters import apply_adapter, initialize
from ditty_di.export import AdapterExport, HuggingFaceExport, MergedExport
from ditty_di.export.load import open_model
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.pretrained import Pretrained
from ditty_di.tasks.loading import ready
from tests.export import cases

IDS = torch.arange(5, 25)[None]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base, auto=AutoModelForCausalLM, **config):
    """A model with adapters that do something."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    model = get_peft_model(auto.from_pretrained(base), LoraConfig(**(options | config)))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_stock_peft_gives_the_same_logits(llama, tokenizer, tmp_path, config):
    model = trained(llama, **config)
    AdapterExport(tokenizer, str(tmp_path / "export"))([model])
    opened = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama), tmp_path / "export"
    )
    with torch.no_grad():
        assert torch.equal(opened.eval()(IDS).logits, model(IDS).logits)
    assert {p.name for p in (tmp_path / "export").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
    }
    said = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == llama
    assert len(AutoTokenizer.from_pretrained(tmp_path / "export")) == len(tokenizer)
    size = sum(f.stat().st_size for f in (tmp_path / "export").glob("*.safetensors"))
    assert size < sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) + 20_000


def test_a_base_in_a_relative_folder_is_found_from_anywhere(
    llama, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "base").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    AdapterExport(tokenizer, "export", base="base")([trained(llama)])
    monkeypatch.chdir("/")
    said = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    (tmp_path / "base").unlink()
    with pytest.raises(FileNotFoundError, match="is not where it was"):
        open_model(str(tmp_path / "export"))
    assert open_model(str(tmp_path / "export"), base=llama)(IDS).logits.shape[1] == IDS.shape[1]


@pytest.mark.parametrize("base", ["llama", "untied", "padded"])
def test_new_tokens_travel_with_the_adapters(base, llama, tokenizer, tmp_path):
    if base == "untied":
        llama = cases.llama(tmp_path / "base", tokenizer, tie_word_embeddings=False)
    grown = AutoTokenizer.from_pretrained(llama)
    grown.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    lora = partial(apply_adapter, config=LoraConfig(r=4, target_modules="all-linear"))
    model = causal_lm.from_pretrained(
        llama,
        tokenizer=grown,
        adapter=lora,
        pad_vocab_to_multiple_of=64 if base == "padded" else None,
    )
    ready(model, Pretrained(llama, init_missing=initialize), torch.device("cpu"))
    ids = torch.tensor([[len(grown) - 2, 7, len(grown) - 1, 9]])
    with torch.no_grad():
        wanted = model(ids).logits
        AdapterExport(grown, str(tmp_path / "adapter"))([model])
        assert torch.equal(open_model(str(tmp_path / "adapter"))(ids).logits, wanted)
        MergedExport(grown, str(tmp_path / "merged"), dtype="float32")([model])
        merged = open_model(str(tmp_path / "merged"))
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-5)
    assert merged.config.vocab_size == wanted.shape[-1] >= len(grown)


def test_merged_opens_as_a_plain_model_and_the_logit_difference_is_told(
    tokenizer, tmp_path, capsys
):
    llama = cases.llama(tmp_path / "base", tokenizer, initializer_range=0.05)
    model = trained(llama)
    path = tmp_path / "export"
    MergedExport(tokenizer, str(path), max_shard_size="60KB")([model])
    assert not (path / "adapter_config.json").exists()
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1
    opened = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.config.use_cache and opened.generation_config.repetition_penalty == 1.25
    base = AutoModelForCausalLM.from_pretrained(llama)
    weight = model.base_model.model.model.layers[1].mlp.up_proj
    delta = 2.0 * weight.lora_B.default.weight @ weight.lora_A.default.weight
    start = base.model.layers[1].mlp.up_proj.weight.bfloat16().float()
    assert torch.equal(opened.model.layers[1].mlp.up_proj.weight, (start + delta).bfloat16())

    logit_diff = json.loads((path / "export.json").read_text())["logit_diff"]
    assert logit_diff["rows"] == 4 and logit_diff["tokens"] > 40
    unmerged, training = logit_diff["from"]["unmerged"], logit_diff["from"]["training"]
    assert 0 < unmerged["mean_abs"] < unmerged["max_abs"] < 0.05
    assert 0 < unmerged["kl"] < 1e-3 and training["max_abs"] > 0
    card = (path / "README.md").read_text()
    out = capsys.readouterr().out
    for one in (unmerged, training):
        assert f"{one['max_abs']:.2g}" in card and f"{one['max_abs']:.2g}" in out
    # The number is what somebody who opens both would measure.
    texts = MergedExport(tokenizer, str(path)).texts
    both = (opened.float(), model)
    with torch.no_grad():
        largest = max(
            (both[0](**x).logits - both[1](**x).logits).abs().max()
            for x in (tokenizer(t, return_tensors="pt", return_token_type_ids=False) for t in texts)
        )
    assert largest.item() == pytest.approx(training["max_abs"], rel=0.05)


def test_merging_in_float32_changes_nothing_but_rounding(llama, tokenizer, tmp_path):
    model = trained(llama, use_dora=True)
    rows = [({"input": IDS[0]}, IDS[0]), ({"input": IDS[0, :7]}, IDS[0, :7])]
    MergedExport(tokenizer, str(tmp_path / "export"), dtype="float32", dataset=rows)([model])
    logit_diff = json.loads((tmp_path / "export" / "export.json").read_text())["logit_diff"]
    assert (logit_diff["rows"], logit_diff["tokens"]) == (2, 27)
    assert all(one["max_abs"] < 1e-4 for one in logit_diff["from"].values())


def test_seq2seq(t5, tokenizer, tmp_path):
    model = trained(
        t5, AutoModelForSeq2SeqLM, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"
    )
    AdapterExport(tokenizer, str(tmp_path / "adapter"))([model])
    MergedExport(tokenizer, str(tmp_path / "merged"), dtype="float32")([model])
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert torch.equal(open_model(str(tmp_path / "adapter"))(**inputs).logits, wanted)
        merged = open_model(str(tmp_path / "merged"))
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-4)
    assert merged.encoder.embed_tokens.weight is merged.shared.weight
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "adapter" / "README.md").read_text()
    assert "shared.weight" in load_file(tmp_path / "merged" / "model.safetensors")


def test_what_has_another_export_is_told_so(llama, tokenizer, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(ValueError, match="has no adapters"):
        AdapterExport(tokenizer, str(tmp_path / "export"))([whole])
    with pytest.raises(ValueError, match=r"adapters beside its base; .*export=adapter.*=merged"):
        HuggingFaceExport(tokenizer, str(tmp_path / "export"))([trained(llama)])
    layer = whole.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"base is quantized.*export=adapter.*export=merged"):
        HuggingFaceExport(tokenizer, str(tmp_path / "export"))([whole])
    model = trained(llama)
    model.peft_config["default"].base_model_name_or_path = None
    with pytest.raises(ValueError, match=r"which base .*write export\.base="):
        AdapterExport(tokenizer, str(tmp_path / "export"))([model])
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "config, tied",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, False),
        ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        (
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["lm_head"],
                "ensure_weight_tying": True,
            },
            True,
        ),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 12]}, True),
        ({"target_modules": ["lm_head"], "trainable_token_indices": [7, 12]}, False),
    ],
    ids=str,
)
def test_adapters_on_tied_weights(llama, tokenizer, tmp_path, config, tied):
    """Alone and merged, as stock reads them: the trained model's logits."""
    model = moved(causal_lm.from_pretrained(llama, adapter=lora(**config)), llama)
    AdapterExport(tokenizer, str(tmp_path / "adapter"))([model])
    MergedExport(tokenizer, str(tmp_path / "merged"), dtype="float32")([model])
    base = AutoModelForCausalLM.from_pretrained(llama)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted = model(IDS).logits
        near = {"rtol": 0, "atol": 3e-6 * float(wanted.abs().max())}
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(adapted(IDS).logits, wanted, **near)
        torch.testing.assert_close(merged(IDS).logits, wanted, **near)
    assert merged.config.tie_word_embeddings is tied
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied and "model.embed_tokens.weight" in stored


@pytest.mark.parametrize("target", ["lm_head", "shared"])
def test_a_tied_config_that_scales_the_output_is_kept(t5, tokenizer, tmp_path, target):
    """T5 reads an untied config as another scale; stock keeps apart what the files have apart."""
    model = moved(seq2seq.from_pretrained(t5, adapter=lora(target_modules=["q", target])), t5)
    MergedExport(tokenizer, str(tmp_path / "merged"), dtype="float32")([model])
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    with torch.no_grad():
        wanted = model(**inputs).logits
        merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")(**inputs).logits
    torch.testing.assert_close(merged, wanted, rtol=0, atol=3e-6 * float(wanted.abs().max()))


def lora(**config):
    return partial(apply_adapter, config=LoraConfig(**({"r": 4, "lora_alpha": 8} | config)))


def moved(model, base):
    """The model with the base's values and adapters that do something."""
    ready(model, Pretrained(base, init_missing=initialize), torch.device("cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "taken"}, r"export\.path=.*taken is a file"),
        ({"path": "taken/export"}, r"export\.path=.*cannot be written"),
        ({"dtype": "float3"}, r"^dtype=float3: not a dtype"),
        ({"base": "nowhere/at/all"}, "there is no folder"),
    ],
    ids=str,
)
def test_what_the_export_lacks_is_found_before_the_training(
    llama, tokenizer, tmp_path, change, message
):
    (tmp_path / "taken").write_text("")
    options = {"path": "export"} | change
    path = str(tmp_path / options.pop("path"))
    export = MergedExport(tokenizer, path, **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export.prepare([trained(llama)])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"], "nothing is left behind"


def test_prepared_exports_refuse_models_of_another_kind(llama, tokenizer, tmp_path):
    path = str(tmp_path / "export")
    whole = AutoModelForCausalLM.from_pretrained(llama)
    for export in (AdapterExport, MergedExport):
        with pytest.raises(ValueError, match="has no adapters"):
            export(tokenizer, path).prepare([whole])
        export(tokenizer, path).prepare([trained(llama)])
    with pytest.raises(ValueError, match="adapters beside its base"):
        HuggingFaceExport(tokenizer, path).prepare([trained(llama)])
    HuggingFaceExport(tokenizer, path).prepare([whole])
    assert not list(tmp_path.iterdir())
