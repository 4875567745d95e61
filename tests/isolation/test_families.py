"""Packed rows of hybrid models and mixtures of experts: exact, or refused by name.

Each model is one of transformers with random values. A token of one document is changed: no logit
of another one may move, and each document's logits are those that it has alone.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ditty_di.data.collate import varlen_arguments
from ditty_di.isolation.probe import Isolation, NotIsolated
from ditty_di.models import causal_lm
from ditty_di.models.weights import hugging_face, initialize, materialize
from tests.models.families import CAUSAL, HYBRID, RARE, config
from tests.models.tiny import CPU

PLAIN = "position_ids alone"
SPLIT = "a row of its own for each document in recurrent layers"
EXPERTS = ("mixtral",)
LENGTHS = {"packed": [[5, 9, 1, 3], [11, 7]], "padding-free": [[6, 1, 9]]}


@cache
def model_of(name):
    changes = HYBRID.get(name, CAUSAL.get(name, RARE.get(name)))
    torch.manual_seed(0)
    model = causal_lm.from_config(config(name, changes))
    materialize(model, CPU)
    initialize(model, device=CPU, init=hugging_face)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
