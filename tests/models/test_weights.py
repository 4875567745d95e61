from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from ditty_di.models import masked_lm
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import (
    hugging_face,
    initialize,
    is_meta,
    materialize,
    uninitialized,
)

CPU = torch.device("cpu")
SMALL = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}

NO_TOKENS = dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))


def llama(tie: bool = False, **changes):
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    return LlamaConfig(tie_word_embeddings=tie, **{**SMALL, **options, **changes})


def filled(model, **options):
    materialize(model, CPU)
    initialize(model, device=CPU, **options)
    return model


def test_a_model_from_a_config_has_no_memory_and_no_cache():
    config = llama()
    model = from_config(config)
    assert is_meta(model)
    assert model.config.use_cache is False
    assert config.use_cache is True, "the injected config is not changed"


def test_tied_parameters_stay_tied():
    model = filled(from_config(llama(tie=True)), init=hugging_face)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not uninitialized(model)


def test_values_depend_on_the_seed_and_the_name_only():
    def embedding(seed, layers):
        model = from_config(llama(num_hidden_layers=layers))
        return filled(model, seed=seed, init=hugging_face).model.embed_tokens.weight

    assert torch.equal(embedding(0, 2), embedding(0, 1))
    assert not torch.equal(embedding(0, 2), embedding(1, 2))


def test_every_layer_gets_its_own_values_of_the_right_scale():
    model = filled(from_config(llama()), init=hugging_face)
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_parents_that_initialise_their_children_have_the_last_word():
    """GPT-2 scales the output projections by the depth, from the block above them."""
    config = GPT2Config(n_embd=32, n_layer=8, n_head=4, n_positions=32, **SMALL)
    model = filled(from_config(config), init=hugging_face)
    projection = model.transformer.h[0].attn.c_proj.weight
    assert projection.std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.1)


def test_a_head_that_is_tied_begins_as_the_embedding():
    """ModernBERT's initialization writes smaller values into the head, and then ties it."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2}
    config = ModernBertConfig(vocab_size=500, num_hidden_layers=8, **sizes, **NO_TOKENS)
    model = masked_lm.from_config(config)
    materialize(model, torch.device("cpu"))
    model.default_weights(model, device=torch.device("cpu"))
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    stock = ModernBertForMaskedLM(config)
    for path in ("decoder", "head.dense"):
        found, expected = (m.get_submodule(path).weight.std().item() for m in (model, stock))
        assert found == pytest.approx(expected, rel=0.05)


def test_rotary_frequencies_are_those_of_a_model_made_the_usual_way():
    model = filled(from_config(llama()), init=hugging_face)
    usual = LlamaForCausalLM(llama())
    assert torch.equal(model.model.rotary_emb.inv_freq, usual.model.rotary_emb.inv_freq)


def test_the_global_random_stream_is_left_alone():
    state = torch.get_rng_state()
    filled(from_config(llama()), init=hugging_face)
    assert torch.equal(state, torch.get_rng_state())


def test_a_module_that_does_not_initialise_itself_is_found():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.inner = nn.Linear(3, 3)

    with torch.device("meta"):
        model = Forgetful()
    assert uninitialized(filled(model)) == ["scale"]


def test_a_model_that_is_half_on_meta_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="some of its tensors are on the meta device"):
        materialize(model, CPU)
