"""Autocast around a model's forward pass."""

from functools import partial

import torch
from transformers import LlamaConfig

from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.precision.autocast import autocast


def llama(**options):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = from_config(config, **options)
    materialize(model, torch.device("cpu"))
    initialize(model, device=torch.device("cpu"), init=hugging_face)
    return model


def test_products_are_in_bfloat16_and_parameters_and_their_gradients_are_not():
    ids = torch.arange(8)[None]
    exact = llama()(ids).logits
    model = llama(convert=autocast)
    dtypes = set()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    logits = model(ids).logits
    assert dtypes == {torch.bfloat16}
    assert not torch.equal(logits.float(), exact)
    torch.testing.assert_close(logits.float(), exact, atol=0.02, rtol=0.02)
    logits.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_float16_is_a_choice():
    model = llama(convert=partial(autocast, dtype="float16"))
    assert model.lm_head(torch.ones(1, 32)).dtype == torch.float32
    assert model(torch.arange(4)[None]).logits.dtype == torch.float16
