"""torchao's float8: which layers are converted, and that a run resumes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torchao.float8.float8_linear import Float8Linear

from ditty_di.precision.float8 import torchao
from tests.checkpoint.ranks import run
from tests.precision import cases


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}


def test_layers_keep_their_names_and_tensors():
    plain = cases.llama()
    before = dict(plain.named_parameters())
    model = torchao(plain, emulate=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    names = converted(model)
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)


def test_only_what_the_kernels_take_is_converted():
    class Quantised(nn.Linear):
        """Another's linear layer, whose forward is its own."""

    model = nn.ModuleDict(
        {
            "even": nn.Linear(32, 16),
            "odd": nn.Linear(32, 17),
            "quantized": Quantised(32, 16),
            "head": nn.ModuleDict({"proj": nn.Linear(16, 16), "project": nn.Linear(16, 16)}),
        }
    )
    assert converted(torchao(model, emulate=True, skip=("proj",))) == {"even", "head.project"}


def test_the_adapters_of_a_frozen_base_are_not_converted():
    names = converted(torchao(cases.lora(cases.llama()), emulate=True))
    assert sum(name.endswith(".base_layer") for name in names) == 2 * 5
    assert sum(name.endswith(("k_proj", "gate_proj")) for name in names) == 2 * 2
    assert len(names) == 2 * 7


def test_emulation_is_chosen_by_the_hardware_and_said(caplog):
    hardware = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        model = torchao(nn.Sequential(nn.Linear(16, 16)))
    assert model[0].config.emulate is not hardware
    assert ("float8 is emulated" in caplog.text) is not hardware
    assert torchao(nn.Sequential(nn.Linear(16, 16)), emulate=False)[0].config.emulate is False


def test_a_token_count_that_is_no_multiple_of_16():
    model = torchao(nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16)), emulate=False)
    assert model[0].config.pad_inner_dim
    exact = torchao(nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16)), emulate=True)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    for one in (model, exact):
        one(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, exact[0].weight.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(16, 16)), {"recipe": "tensor"}, r"recipe='tensor' is none of"),
        (nn.Sequential(nn.Linear(16, 15)), {}, r"none of the model's 1 .*multiples of 16"),
        (nn.Sequential(nn.Linear(16, 16)), {"skip": ("0",)}, r"skip=\['0'\] leaves some out"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        torchao(model, emulate=True, **options)


@pytest.mark.slow
def test_it_resumes_exactly_under_fsdp(tmp_path):
    for rank in run(cases.resumed, 2, str(tmp_path), "fp8", timeout=300):
        assert rank["second"] == rank["first"]
