"""Rates by width: which parameter has which, on one rank and in checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon
from transformers import LlamaConfig

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)

from ditty_di.config import ConfigError
from ditty_di.models.causal_lm import from_config
from ditty_di.optim import build_optimizer, trial
from ditty_di.optim.mup import by_width
from tests.adapters.cases import lora
from tests.models.test_mup import config, filled
from tests.optim.test_groups import by_name
from tests.test_conf import composed, hydra  # noqa: F401

DECAY = partial(AdamW, lr=1e-2, weight_decay=0.1)


def factory(model, **options):
    options = {"optimizer": DECAY, "groups": [{"max_ndim": 1, "weight_decay": 0.0}], **options}
    return partial(by_width, model=model, **options)


def test_rates_fall_and_their_product_with_the_decay_does_not():
    model = filled(config(4))
    optimizer = build_optimizer(factory(model), [model])
    rates, decay = by_name(optimizer, "lr"), by_name(optimizer, "weight_decay")
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "embed" not in name
        assert rates[name] == pytest.approx(1e-2 / 4 if hidden else 1e-2), name
        assert rates[name] * decay[name] == pytest.approx(1e-3 if parameter.ndim == 2 else 0.0)
    assert optimizer.param_groups[0]["lr"] == 1e-2, "the first group's is what is logged as lr"


def test_a_rate_of_a_rule_is_scaled_too_and_a_loss_keeps_its_own():
    model, weight = filled(config(2)), nn.Parameter(torch.zeros(3))
    rules = factory(model, groups=[{"match": "o_proj", "lr": 1.0}])
    rates = by_name(build_optimizer(rules, [model], [("loss.weight", weight)]), "lr")
    assert rates["model.layers.0.self_attn.o_proj.weight"] == 0.5
    assert rates["model.layers.0.self_attn.q_proj.weight"] == 0.5e-2
    assert rates["loss.weight"] == 1e-2


def test_training_goes_on_from_a_checkpoint():
    def train(model, optimizer, steps):
        for step in steps:
            tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()

    whole = filled(config(2))
    straight = build_optimizer(factory(whole), [whole])
    train(whole, straight, range(4))

    first, second = filled(config(2)), filled(config(2), seed=1)
    before = build_optimizer(factory(first), [first])
    train(first, before, range(2))
    second.load_state_dict(first.state_dict())
    after = build_optimizer(factory(second), [second])
    init_optim_state(after)
    load_flat_optim_state_dict(after, get_flat_optim_state_dict(before))
    train(second, after, range(2, 4))
    for name, value in whole.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name


@pytest.mark.parametrize(
    ("make", "normalized"),
    [
        (AdamW, True),
        (torch.optim.Adam, True),
        (torch.optim.RMSprop, True),
        (SGD, False),
        (partial(SGD, lr=0.1, momentum=0.9), False),
        (Muon, False),
        (torch.optim.Adafactor, False),
    ],
)
def test_optimizers_like_adam_are_told_by_what_they_do(make, normalized):
    assert trial.is_normalized(make) is normalized


def test_what_has_no_rates_by_width_is_refused():
    model = filled(config(2))
    with pytest.raises(ValueError, match=r"optimizer: SGD updates by the size of a gradient"):
        build_optimizer(factory(model, optimizer=partial(SGD, lr=0.1)), [model])
    with pytest.raises(ValueError, match=r"has no mup_base"):
        factory(from_config(LlamaConfig(num_hidden_layers=1)))([])
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the base of muP has no extra\.weight, extra\.bias"):
        build_optimizer(factory(model), [model])


def test_adapters_do_not_hide_the_widths_and_are_not_trained_by_them():
    adapted = filled(config(4), adapter=lora())
    layers = {n: p for n, p in adapted.named_parameters() if n.endswith("base_layer.weight")}
    assert len(layers) == 14
    for name, parameter in layers.items():
        assert parameter.std().item() == pytest.approx(0.01, rel=0.03), name
    with pytest.raises(ValueError, match=r"the base of muP has no .*lora_A"):
        build_optimizer(factory(adapted), [adapted])


def test_the_command_line_finds_it_early():
    ready = composed("model=llama_mup", "optimizer=mup")
    ready.check("trainer")
    ready.rehearse("optimizer")
    with pytest.raises(ConfigError, match=r"optimizer.*SGD updates by the size of a gradient"):
        composed("model=llama_mup", "optimizer=mup", "optimizer.optimizer._target_=torch.optim.SGD",
                 "~optimizer.optimizer.betas").check("trainer")  # fmt: skip
    with pytest.raises(ConfigError, match=r"no mup_base.*use model=llama_mup"):
        composed("optimizer=mup").rehearse("optimizer")
    with pytest.raises(ConfigError, match=r"base\.vocab_size: a base differs"):
        composed("model=llama_mup", "+model.config.base.vocab_size=8").check("trainer")
