"""Continuing prompts with transformers' generate."""

import pytest
import torch

from ditty_di.generation import decoding
from ditty_di.models import causal_lm
from ditty_di.models.weights import hugging_face, initialize, materialize
from tests.models.families import CAUSAL, config
from tests.models.tiny import CPU


@pytest.mark.parametrize("name", ["rwkv", "mamba2", "llama"])
def test_other_prompts_do_not_change_an_answer(name):
    """RWKV reads the padding, and its cache of several rows is wrong in transformers 5.23."""
    model = causal_lm.from_config(config(name, CAUSAL[name]))
    materialize(model, CPU)
    initialize(model, device=CPU, init=hugging_face)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prompts = [[5, 9, 11, 3], [7, 4], [8, 8, 8, 1, 2, 3, 4, 5], [6, 1]]
    options = decoding.Options(max_new_tokens=6)
    together = decoding.hugging_face(model.eval(), prompts, options=options)
    assert together == [decoding.hugging_face(model, [p], options=options)[0] for p in prompts]
