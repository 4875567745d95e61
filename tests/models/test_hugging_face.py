"""What `causal_lm` and `seq2seq` build: configuration, vocabulary, the order of the transforms."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from ditty_di import adapters
from ditty_di.config import Graph
from ditty_di.config.errors import ConfigError
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.weights import is_meta, materialize, uninitialized
from ditty_di.runtime import Runtime
from tests.models.tiny import CPU, TOKENS, llama, save_llama


def tokenizer(size, **special):
    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("tie", [True, False])
def test_the_vocabulary_grows_to_the_tokenizers(tie):
    special = {"eos_token": "w1", "pad_token": "w3"}
    model = causal_lm.from_config(
        llama(tie_word_embeddings=tie), tokenizer=tokenizer(65, **special)
    )
    assert is_meta(model)
    assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (65, 64)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (65, 1, 3)
    assert config.bos_token_id is None


def test_a_smaller_tokenizer_and_ids_that_are_set_change_nothing():
    model = causal_lm.from_config(
        llama(eos_token_id=7), tokenizer=tokenizer(10, eos_token="w1", pad_token="w3")
    )
    assert (model.config.vocab_size, model.config.eos_token_id) == (61, 7)


@pytest.mark.parametrize("size, vocabulary", [(10, 64), (65, 96), (None, 64)])
def test_the_vocabulary_is_rounded_up(size, vocabulary):
    model = causal_lm.from_config(
        llama(), tokenizer=size and tokenizer(size), pad_vocab_to_multiple_of=32
    )
    assert model.config.vocab_size == model.lm_head.out_features == vocabulary


def test_a_decoder_without_a_start_token_starts_with_padding():
    options = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    config = T5Config(**options, num_heads=4, pad_token_id=None, decoder_start_token_id=None)
    model = seq2seq.from_config(config, tokenizer=tokenizer(65, pad_token="w3"))
    assert model.config.decoder_start_token_id == 3
    assert model.shared.weight.shape == (65, 32) and model.config.use_cache is False


def test_transforms_are_applied_in_their_order_on_meta():
    seen = []

    def transform(name):
        def apply(model, /):
            assert is_meta(model) and model.config.use_cache is False
            seen.append(name)
            return model

        return apply

    order = ["quantize", "adapter", "convert", "neftune", "head"]
    causal_lm.from_config(llama(), **{name: transform(name) for name in reversed(order)})
    assert seen == order


def test_what_a_transform_returns_is_the_model():
    wrapped = causal_lm.from_config(llama(), adapter=torch.nn.Sequential)
    assert isinstance(wrapped, torch.nn.Sequential)


def test_the_configuration_of_a_folder_can_be_changed_and_keeps_its_path(tmp_path):
    save_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    model = causal_lm.from_pretrained(
        tmp_path, attention_dropout=0.25, attn_implementation="eager", dtype="bfloat16"
    )
    assert model.config.attention_dropout == 0.25 and model.name_or_path == str(tmp_path)
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [5, 6]


def test_weights_that_are_quantised_already_are_refused(tmp_path):
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(ValueError, match="quantized already"):
        causal_lm.from_pretrained(tmp_path)


def test_a_dtype_that_torch_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"model\.dtype=bf16: not a dtype; write float32"):
        causal_lm.from_config(LlamaConfig(), dtype="bf16")


# -- what a configuration leaves out --------------------------------------------------------------

SPECIAL = {"eos_token": "w1", "pad_token": "w3", "model_max_length": 48}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "config",
    [
        partial(LlamaConfig, **SMALL, num_attention_heads=4),
        {"model_type": "llama", **SMALL, "num_attention_heads": 4},
    ],
)
def test_what_a_configuration_leaves_out_is_the_tokenizer_s(config):
    found = causal_lm.from_config(config, tokenizer=tokenizer(65, **SPECIAL)).config
    assert isinstance(found, LlamaConfig) and found.hidden_size == 32
    assert (found.vocab_size, found.eos_token_id, found.pad_token_id) == (65, 1, 3)
    assert found.bos_token_id is None and found.max_position_embeddings == 48


def test_what_a_configuration_says_is_kept_and_other_names_of_it_are_known():
    config = partial(GPT2Config, n_embd=32, n_layer=1, n_head=4, eos_token_id=7, vocab_size=99)
    found = causal_lm.from_config(config, tokenizer=tokenizer(65, **SPECIAL)).config
    assert (found.n_positions, found.vocab_size, found.eos_token_id) == (48, 99, 7)
    config = partial(T5Config, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    found = seq2seq.from_config(config, tokenizer=tokenizer(65, **SPECIAL)).config
    assert (found.vocab_size, found.decoder_start_token_id) == (65, 3)
    assert not hasattr(found, "max_position_embeddings")


def test_without_a_limit_or_a_tokenizer_the_defaults_stay():
    config = partial(LlamaConfig, **SMALL, num_attention_heads=4)
    assert causal_lm.from_config(config).config.vocab_size == LlamaConfig().vocab_size
    limitless = causal_lm.from_config(config, tokenizer=tokenizer(65))
    assert limitless.config.max_position_embeddings == LlamaConfig().max_position_embeddings
    with pytest.raises(ValueError, match=r"needs model_type"):
        causal_lm.from_config({"vocab_size": 61})


# -- what a model carries -------------------------------------------------------------------------


def test_a_model_carries_its_contract_and_its_weights(tmp_path):
    for module, contract in (
        (causal_lm, "0:2:i64 -> logits:3:f"),
        (seq2seq, "0:2:i64, attention_mask:2:i64, decoder_input_ids:2:i64 -> logits:3:f"),
    ):
        assert module.from_config.contract == module.from_pretrained.contract == contract
    saved = save_llama(tmp_path)
    model = causal_lm.from_pretrained(
        tmp_path, adapter=partial(adapters.apply_adapter, config=LoraConfig())
    )
    assert model.contract == "0:2:i64 -> logits:3:f"
    assert model.default_weights.identity()["path"] == str(tmp_path)
    materialize(model, CPU)
    model.default_weights(model, device=CPU)
    assert not uninitialized(model) and torch.equal(
        model.eval()(TOKENS).logits, saved(TOKENS).logits
    )


def test_default_values_follow_the_seed_of_the_run():
    def embedding(seed=None):
        runtime = None if seed is None else Runtime(seed=seed)
        model = causal_lm.from_config(llama())
        materialize(model, CPU)
        model.default_weights(model, device=CPU)
        if runtime is not None:
            runtime.close()
        return model.model.embed_tokens.weight

    torch.manual_seed(4)
    alone = embedding()
    assert torch.equal(alone, embedding(4)) and not torch.equal(alone, embedding(5))


def test_what_a_transform_changes_of_the_contract_is_kept():
    def deferred(model, /):
        model.contract = "0:2:i64 -> logits:*"
        return torch.nn.Sequential(model) if model.config.vocab_size > 61 else model

    assert causal_lm.from_config(llama(), head=deferred).contract == "0:2:i64 -> logits:*"
    around = causal_lm.from_config(llama(vocab_size=62), head=deferred)
    assert around.contract == "0:2:i64 -> logits:3:f" and callable(around.default_weights)


# -- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen, taken", [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_what_is_asked_for_or_what_transformers_takes(chosen, taken):
    model = causal_lm.from_config(llama(), attn_implementation=chosen)
    assert model.config._attn_implementation == taken


def test_a_model_without_sdpa_takes_eager_and_says_so_when_sdpa_is_asked_for():
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    assert causal_lm.from_config(config).config._attn_implementation == "eager"
    for wrong in ("sdpa", "flash", "flash_attention_2"):
        with pytest.raises(ValueError) as error:
            causal_lm.from_config(config, attn_implementation=wrong)
        assert f"attn_implementation={wrong}: BloomForCausalLM" in str(error.value)
        assert "write model.attn_implementation=null, with which" in str(error.value)
        assert "takes eager" in str(error.value) and len(str(error.value)) < 500


def test_a_configuration_without_such_a_model_is_named():
    with pytest.raises(ValueError, match=r"no model of type 't5' for its AutoModelForCausalLM"):
        causal_lm.from_config(T5Config())


@pytest.mark.parametrize("dtype, wide", [("bfloat16", False), ("float16", True)])
def test_what_transformers_keeps_in_32_bits_is_kept_in_them(dtype, wide):
    """T5's output projections overflow in float16."""
    options = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    model = seq2seq.from_config(T5Config(**options, num_heads=4), dtype=dtype)
    assert is_meta(model) and model.lm_head.weight is model.shared.weight
    found = model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
    assert found == (torch.float32 if wide else torch.bfloat16)
    assert model.shared.weight.dtype == getattr(torch, dtype)


def test_what_quantization_and_adapters_leave_out_is_told_before_anything_is_built(caplog):
    """As `task=check` does it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = {"_target_": "transformers.MixtralConfig", "num_attention_heads": 4}
    lora = {"_target_": "peft.LoraConfig", "target_modules": "all-linear", "lora_dropout": 0.1}
    nf4 = {"_target_": "ditty_di.quantization.nf4", "_partial_": True, "block_size": 16}
    node = {
        "_target_": "ditty_di.models.causal_lm.from_config",
        "config": {**config, **sizes, **experts, "vocab_size": 61},
        "quantize": {**nf4, "skip": ["experts"]},
        "adapter": {
            "_target_": "ditty_di.adapters.apply_adapter",
            "_partial_": True,
            "config": lora,
        },
    }
    with caplog.at_level("INFO", logger="ditty_di"):
        Graph({"model": node}).rehearse("model")
    quantized, adapted = (m for m in caplog.messages if "mlp.experts.gate_up_proj" in m)
    assert "skipped ['experts']; left out:" in quantized
    assert "LoRA adapts them without lora_dropout" in adapted
    lora["target_modules"] = ["q_porj"]
    with pytest.raises(ConfigError, match=r"q_porj"):
        Graph({"model": node}).rehearse("model")
    for number in (0, 5):
        node["config"]["num_experts_per_tok"] = number
        message = rf"num_experts_per_tok={number} is not possible with 4 experts; write 1 to 4"
        with pytest.raises(ConfigError, match=message):
            Graph({"model": node}).rehearse("model")


def test_a_model_that_cannot_be_built_is_told_before_anything_is(tmp_path):
    """As `task=check` does it."""
    BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4).save_pretrained(tmp_path)
    node = {"_target_": "ditty_di.models.causal_lm.from_pretrained", "path": str(tmp_path)}
    Graph({"model": node}).rehearse("model")
    for changes, message in (
        ({"path": "/nowhere/at/all"}, r"model\.path.*there is no folder /nowhere/at/all"),
        ({"attn_implementation": "sdpa"}, r"model\.attn_implementation.*Bloom.*=null"),
        ({"revision": "v1"}, r"a folder and has no revisions"),
        ({"freeze": ["tower"]}, r"model\.freeze has 'tower', but no parameter .* its parts are"),
        (
            {"_target_": "ditty_di.models.masked_lm.from_pretrained"},
            r"'bloom' for its AutoModelForMaskedLM; .* build this one with model=hf_causal_lm",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Graph({"model": {**node, **changes}}).rehearse("model")
    for changes, message in (
        ({"dtype": "float33"}, r"model\.dtype.*write float32, bfloat16 or float16"),
        ({"pad_vocab_to_multiple_of": 0}, r"a number of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Graph({"model": {**node, **changes}}).check("model")
