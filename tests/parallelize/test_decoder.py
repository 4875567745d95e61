"""Models are cut where nothing but the hidden states goes from block to block, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import materialize
from ditty_di.parallelize.decoder import read_decoder
from ditty_di.parallelize.schedule import shares_of
from ditty_di.parallelize.stages import cut, take_output

SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**SIZE, **NO_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2}
#: What is special about them, as far as pipeline stages are concerned.
CONFIGS = {
    "plain": lambda: T.LlamaConfig(**LLAMA),
    "tied": lambda: T.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "scaled embeddings and logits": lambda: T.GraniteConfig(
        **LLAMA, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
    "scaled embeddings, windows": lambda: T.Gemma3TextConfig(
        **LLAMA,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "learned positions": lambda: T.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=64, **NO_TOKENS
    ),
    "a norm of the embeddings, tuples": lambda: T.BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=4, n_head=4, **NO_TOKENS
    ),
    "narrow embeddings, a norm before the blocks by name": lambda: T.OPTConfig(
        **SIZE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=1
    ),
    "state spaces": lambda: T.MambaConfig(
        **{**SIZE, **NO_TOKENS}, state_size=4, expand=1, time_step_rank=4
    ),
    "experts": lambda: T.Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "a rotation in each block": lambda: T.GPTJConfig(
        vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4, **NO_TOKENS
    ),
}


def model_of(config):
    """With random values, to be run on the CPU."""
    model = from_config(config)
    torch.manual_seed(0)
    materialize(model, torch.device("cpu"))
    for module in model.modules():
        model._init_weights(module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_one_after_the_other_are_the_model(name):
    model = model_of(CONFIGS[name]())
    ids = torch.arange(24).reshape(2, 12) % 60
    kwargs = {} if "state" in name else {"attention_mask": torch.ones_like(ids)}
    whole = model(ids, **kwargs).logits
    whole.square().mean().backward()
    decoder = read_decoder(model)
    assert decoder.problems == []
    stages = [cut(model, decoder, share) for share in shares_of(4, 3)]
    hidden = ids
    for stage in stages:
        stage.zero_grad()
        hidden = stage(hidden, **kwargs)
    assert torch.equal(take_output(stages[-1], hidden).logits, whole)
    hidden[0].square().mean().backward()
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for parameter_name, parameter in stage.named_parameters():
            total = gradients.get(parameter_name, 0.0)
            gradients[parameter_name] = (
                total + parameter.grad
            )  # both ends have a part of a tied one
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for parameter_name, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter_name], gradient, rtol=1e-5, atol=1e-7)


REFUSED = {
    "blocks get argument 2": lambda: T.Zamba2Config(
        **{**SIZE, **NO_TOKENS}, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2
    ),
    "cannot be followed": lambda: T.RobertaConfig(**SIZE, intermediate_size=48, is_decoder=True),
    "output_router_logits=true needs outputs of all blocks": lambda: T.Qwen3MoeConfig(
        **LLAMA, num_experts=4, moe_intermediate_size=16, output_router_logits=True
    ),
    "output_hidden_states=true": lambda: T.LlamaConfig(**LLAMA, output_hidden_states=True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_stages_would_compute_otherwise_is_refused_by_name(words):
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(REFUSED[words]())
    (problem,) = read_decoder(model).problems
    assert words in problem


def test_other_models_are_refused():
    with torch.device("meta"):
        two = T.T5ForConditionalGeneration(T.T5Config(vocab_size=60, d_model=32, num_layers=2))
    assert "an encoder and a decoder" in read_decoder(two).problems[0]
    assert "not a model of transformers" in read_decoder(nn.Linear(2, 2)).problems[0]


def test_a_parameter_beside_the_blocks_is_refused():
    model = from_config(T.LlamaConfig(**LLAMA))
    model.model.register_parameter("scale", nn.Parameter(torch.empty(1, device="meta")))
    assert read_decoder(model).problems == [
        "the parameter model.scale is neither in a block nor in a module"
    ]


@given(st.integers(1, 12), st.integers(0, 60))
def test_stages_share_the_blocks_evenly(stages, more):
    shares = shares_of(stages + more, stages)
    assert [i for share in shares for i in share] == list(range(stages + more))
    loads = [len(s) + (i == 0) + (i == stages - 1) for i, s in enumerate(shares)]
    assert min(map(len, shares)) >= 1
    middle = loads[1:-1] or loads
    assert (
        max(loads) - min(middle) <= 1 or max(loads) <= 3
    )  # the ends cannot have less than a block


def test_numbers_of_layers_can_be_given():
    assert shares_of(7, 3, [1, 4, 2]) == [range(0, 1), range(1, 5), range(5, 7)]
