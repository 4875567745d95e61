"""Reading files into a model of any shape: names, dtypes, ties, new rows, what is missing."""

from __future__ import annotations

import json
import logging
import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ditty_di.export import HuggingFaceExport
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize, uninitialized
from tests.checkpoint import ranks
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, TOKENS, fill, logits, save_llama


class Missing:
    """Zeros where the files have nothing, and which names these were."""

    def __call__(self, model, names, /, *, device):
        self.names = names
        for name in names:
            nn.init.zeros_(model.get_parameter(name))


def lora(model, /, **options):
    config = LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    with torch.device("meta"):
        return get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_is_read_back_with_its_logits(tmp_path, tie):
    usual = save_llama(tmp_path, tie_word_embeddings=tie)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    assert torch.equal(logits(model), logits(usual))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


ENCODER_DECODERS = {
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
        ),
    ),
    "bart": (
        BartForConditionalGeneration,
        BartConfig(
            vocab_size=61,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=32,
        ),
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_is_read_back_with_its_logits(tmp_path, name):
    make, config = ENCODER_DECODERS[name]
    usual = make(config).eval()
    usual.save_pretrained(tmp_path)
    model = fill(seq2seq.from_pretrained(tmp_path), tmp_path)
    decoded = {"decoder_input_ids": TOKENS}
    assert torch.equal(logits(model, **decoded), logits(usual, **decoded))


def test_names_of_older_versions_are_read_and_exported_as_they_are(tmp_path):
    """Layer norms had a gamma and a beta once; transformers keeps such names when it saves."""
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "base")
    file, old = tmp_path / "base" / "model.safetensors", {"weight": "gamma", "bias": "beta"}
    tensors = {
        re.sub(r"(?<=LayerNorm\.)(weight|bias)", lambda m: old[m[0]], name): torch.randn_like(t)
        for name, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    usual = BertLMHeadModel.from_pretrained(tmp_path / "base").eval()
    model = fill(causal_lm.from_pretrained(tmp_path / "base"), tmp_path / "base")
    assert torch.equal(logits(model), logits(usual))
    HuggingFaceExport(tokenizer(61), str(tmp_path / "export"))([model])
    usual.save_pretrained(tmp_path / "again")
    export, again = (load_file(tmp_path / f / "model.safetensors") for f in ("export", "again"))
    assert export.keys() == again.keys()
    assert "bert.embeddings.LayerNorm.gamma" in export


@pytest.mark.parametrize("sharded", [True, False])
def test_a_folder_of_torchs_files_is_read(tmp_path, sharded):
    usual = save_llama(tmp_path, tie_word_embeddings=True)
    for file in tmp_path.glob("model*.safetensors*"):
        file.unlink()
    state = usual.state_dict()  # with both names of the tied tensor
    if sharded:
        index = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(state)}
        for i in range(2):
            part = {n: t for n, t in state.items() if index[n].endswith(f"{i}.bin")}
            torch.save(part, tmp_path / f"pytorch_model-{i}.bin")
        text = json.dumps({"weight_map": index})
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    model = fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    assert torch.equal(logits(model), logits(usual))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = Pretrained(tmp_path).identity()["hash"]
    file = next(tmp_path.glob("*.bin"))
    torch.save({n: t + 1 for n, t in torch.load(file).items()}, file)
    assert Pretrained(tmp_path).identity()["hash"] != before


# -- ties: the configuration's and the files' -----------------------------------------------------


def another_head(folder):
    """A folder whose configuration ties the head to the embedding, and whose files do not."""
    save_llama(folder, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return LlamaForCausalLM.from_pretrained(folder).eval()


def test_a_head_that_only_the_configuration_ties_is_kept_with_a_warning(tmp_path, caplog):
    usual = another_head(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        model = fill(causal_lm.from_pretrained(tmp_path / "base"), tmp_path / "base")
    assert "two different tensors: they are not tied" in caplog.text
    assert torch.equal(logits(model), logits(usual))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    HuggingFaceExport(tokenizer(61), str(tmp_path / "export"))([model])
    again = LlamaForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert torch.equal(logits(again), logits(usual))
    assert again.config.tie_word_embeddings is False


def test_a_head_that_cannot_be_tied_to_the_files_is_refused(tmp_path):
    """The model was built from a configuration alone, so nothing looked into the files."""
    usual = another_head(tmp_path)
    model = causal_lm.from_config(usual.config)
    materialize(model, CPU)
    with pytest.raises(ValueError, match=r"different in the files and tied in the model; build it"):
        Pretrained(tmp_path)(model, device=CPU)


def test_a_tied_model_of_which_the_files_have_the_head_alone_is_whole(tmp_path):
    usual = save_llama(tmp_path, tie_word_embeddings=True)
    state = {n: p for n, p in usual.named_parameters() if n != "model.embed_tokens.weight"}
    for file in tmp_path.glob("model*.safetensors*"):
        file.unlink()
    save_file({**state, "lm_head.weight": usual.lm_head.weight}, tmp_path / "model.safetensors")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(usual))
    model = fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    assert torch.equal(logits(model), logits(usual))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_neither_the_files_nor_a_tie_give_is_refused_with_the_remedy(tmp_path):
    """transformers draws it at random, with a warning."""
    usual = save_llama(tmp_path, tie_word_embeddings=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    model = causal_lm.from_pretrained(tmp_path)
    materialize(model, CPU)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*model\.tie_word_embeddings=true"):
        Pretrained(tmp_path)(model, device=CPU)
    model = causal_lm.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert torch.equal(logits(fill(model, tmp_path)), logits(usual))


def test_a_t5_of_version_1_1_keeps_its_head_and_its_scale(tmp_path):
    """Its configuration says untied, which transformers reads as a scale; two tables stay tied."""
    make, config = ENCODER_DECODERS["t5"]
    torch.manual_seed(1)
    make(config).save_pretrained(tmp_path / "base")
    file, head = tmp_path / "base" / "model.safetensors", torch.randn(61, 32)
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})
    there = json.loads((tmp_path / "base" / "config.json").read_text())
    there.pop("scale_decoder_outputs", None)
    there["tie_word_embeddings"] = False
    (tmp_path / "base" / "config.json").write_text(json.dumps(there))
    usual, decoded = make.from_pretrained(tmp_path / "base").eval(), {"decoder_input_ids": TOKENS}

    model = fill(seq2seq.from_pretrained(tmp_path / "base"), tmp_path / "base")
    assert torch.equal(model.lm_head.weight, head)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert torch.equal(logits(model, **decoded), logits(usual, **decoded))
    HuggingFaceExport(tokenizer(61), str(tmp_path / "export"))([model])
    again = make.from_pretrained(tmp_path / "export").eval()
    assert torch.equal(logits(again, **decoded), logits(usual, **decoded))


# -- what the files do not have -------------------------------------------------------------------


def test_buffers_of_modules_with_parameters_are_computed_too(tmp_path):
    """Gemma scales its embedding by a buffer that is not saved; two kinds of rotary frequencies."""
    config = Gemma3TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    usual = Gemma3ForCausalLM(config).eval()
    usual.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    model = fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    assert torch.equal(logits(model), logits(usual))
    assert torch.equal(state, torch.get_rng_state()), "the global random stream was used"


def test_rotary_frequencies_stay_in_float32(tmp_path):
    usual = save_llama(tmp_path)
    model = fill(causal_lm.from_pretrained(tmp_path, dtype="bfloat16"), tmp_path)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, usual.model.rotary_emb.inv_freq)


def test_files_of_the_bare_transformer_fit_the_model_with_a_head(tmp_path):
    """As the hub's gpt2: `h.0...` there, `transformer.h.0...` here."""
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 61}
    usual = GPT2LMHeadModel(GPT2Config(**options)).eval()
    usual.transformer.save_pretrained(tmp_path)
    assert torch.equal(logits(fill(causal_lm.from_pretrained(tmp_path), tmp_path)), logits(usual))


def test_adapters_are_missing_and_the_base_inside_is_read(tmp_path):
    usual, missing = save_llama(tmp_path), Missing()
    model = fill(causal_lm.from_pretrained(tmp_path, adapter=lora), tmp_path, init_missing=missing)
    assert torch.equal(logits(model), logits(usual))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(missing.names) == trained and len(trained) == 8


@pytest.mark.parametrize("tie", [True, False])
def test_a_trained_copy_of_a_module_starts_with_the_values_of_the_base(tmp_path, tie):
    """Of a tied head the files have no weight of its own name."""
    usual = save_llama(tmp_path, tie_word_embeddings=tie)
    adapter = partial(lora, modules_to_save=["lm_head"])
    model = causal_lm.from_pretrained(tmp_path, adapter=adapter)
    fill(model, tmp_path, init_missing=Missing())
    copy = model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight")
    assert copy.requires_grad and torch.equal(copy, usual.lm_head.weight)


def test_what_is_missing_is_named_when_nothing_makes_it(tmp_path):
    save_llama(tmp_path)
    model = causal_lm.from_pretrained(tmp_path, adapter=lora)
    materialize(model, CPU)
    with pytest.raises(ValueError, match=r"no values for 8 tensors.*lora_A.*`init_missing`"):
        Pretrained(tmp_path)(model, device=CPU)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, r"no values for 9 tensors.*model\.layers\.2"),
        ({"hidden_size": 32}, r"embed_tokens\.weight: \[61, 64\] there, \[61, 32\] in the model"),
        ({"vocab_size": 60}, r"embed_tokens\.weight: \[61, 64\] there, \[60, 64\] in the model"),
    ],
)
def test_files_that_do_not_fit_the_model_are_named(tmp_path, changes, message):
    config = {**save_llama(tmp_path).config.to_dict(), "head_dim": None, **changes}
    model = causal_lm.from_config(LlamaConfig(**config))
    materialize(model, CPU)
    with pytest.raises(ValueError, match=message):
        Pretrained(tmp_path)(model, device=CPU)


def test_tensors_that_the_model_does_not_use_are_logged(tmp_path, caplog):
    usual = save_llama(tmp_path, tie_word_embeddings=True)
    (first, *_) = sorted(tmp_path.glob("*.safetensors"))
    # A tied head may be saved under both of its names; that is no tensor too many.
    tensors = load_file(first)
    extra = {"model.extra.weight": torch.zeros(2), "lm_head.weight": usual.lm_head.weight}
    save_file({**tensors, **extra}, first)
    with caplog.at_level(logging.WARNING):
        fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    (record,) = caplog.records
    assert "1 tensors that the model does not: ['model.extra.weight']" in record.getMessage()


def test_a_tensor_that_nothing_fills_is_found_whatever_its_type():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
            self.register_buffer("positions", torch.arange(3), persistent=False)

    with torch.device("meta"):
        model = Forgetful()
    materialize(model, CPU)
    assert uninitialized(model) == ["codes", "positions"]
    model.positions.copy_(torch.arange(3))
    model.codes.data.copy_(torch.tensor([-128, 0, -128]))
    assert not uninitialized(model)


# -- a larger vocabulary --------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_with_a_little_noise(tmp_path, tie):
    usual = save_llama(tmp_path, tie_word_embeddings=tie)
    model = causal_lm.from_pretrained(tmp_path, vocab_size=64)
    fill(model, tmp_path)
    for ours, theirs in (
        (model.model.embed_tokens.weight, usual.model.embed_tokens.weight),
        (model.lm_head.weight, usual.lm_head.weight),
    ):
        assert ours.shape == (64, 64) and torch.equal(ours[:61], theirs)
        new, mean, std = ours[61:], theirs.mean(0), theirs.std(0)
        assert ((new - mean).abs() < 0.06 * std).all()
        assert not torch.equal(new[0], new[1])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_a_bias_of_the_logits_grows_with_zeros(tmp_path):
    """As `resize_token_embeddings` does it; the bias is `[1, vocab]`."""
    make, config = ENCODER_DECODERS["bart"]
    usual = make(config)
    usual.final_logits_bias.normal_()
    usual.save_pretrained(tmp_path)
    model = fill(seq2seq.from_pretrained(tmp_path, tokenizer=tokenizer(65)), tmp_path)
    expected = torch.cat([usual.final_logits_bias, torch.zeros(1, 4)], dim=1)
    assert torch.equal(model.final_logits_bias, expected)


def grown(path):
    """The embedding and the head with 9 new rows, read by each rank for its shard."""
    from ditty_di.parallelize.data_parallel import shard
    from ditty_di.runtime import Runtime
    from ditty_di.training.setup import setup_model

    runtime = Runtime()
    (model,) = setup_model(
        causal_lm.from_pretrained(path, vocab_size=70),
        runtime=runtime,
        weights=Pretrained(path, seed=0),
        parallelize_fn=shard,
        pipeline_fn=None,
    ).modules
    weights = (model.model.embed_tokens.weight, model.lm_head.weight)
    assert all(w.to_local().shape[0] == 35 for w in weights)
    whole = [w.full_tensor().tolist() for w in weights]
    runtime.close()
    return whole


def test_new_rows_are_the_same_on_any_number_of_ranks(tmp_path):
    save_llama(tmp_path)
    model = fill(causal_lm.from_pretrained(tmp_path, vocab_size=70), tmp_path, seed=0)
    alone = [model.model.embed_tokens.weight.tolist(), model.lm_head.weight.tolist()]
    assert ranks.run(grown, 2, tmp_path) == [alone, alone]


# -- which base ------------------------------------------------------------------------------------


def test_the_identity_tells_bases_apart(tmp_path):
    save_llama(tmp_path / "a")
    save_llama(tmp_path / "b")
    save_llama(tmp_path / "c", vocab_size=62)
    a, b, c = (Pretrained(tmp_path / name).identity() for name in "abc")
    assert a == {"path": str(tmp_path / "a"), "revision": None, "hash": a["hash"]}
    assert a["hash"] == b["hash"] != c["hash"]


def test_a_model_that_is_not_of_transformers_is_read_by_its_names(tmp_path):
    save_file({"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
    assert torch.equal(fill(model, tmp_path)(torch.ones(1, 3)), torch.full((1, 2), 3.0))


def test_the_usual_loader_agrees_on_dtypes(tmp_path):
    """Saved in bfloat16 and trained in float32: cast once, value by value."""
    save_llama(tmp_path, dtype=torch.bfloat16)
    model = fill(causal_lm.from_pretrained(tmp_path), tmp_path)
    usual = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(usual))
