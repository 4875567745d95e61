"""Whole training steps on a GPU, through the trainer: precision, quantized bases, optimizers."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ditty_di import adapters, quantization
from ditty_di.losses import LinearCrossEntropyLoss, skip_lm_head
from ditty_di.models.neftune import neftune
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.precision.autocast import autocast
from tests.distributed.cases import make_trainer, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 6
BF16 = partial(shard, param_dtype="bfloat16", reduce_dtype="float32")


def needs(module: str) -> Any:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def losses(**options: Any) -> list[float]:
    trainer, recorder = make_trainer(None, max_steps=STEPS, **options)
    trainer.train()
    assert all(p.device.type == "cuda" for p in trainer.model_parts[0].parameters())
    return recorder.losses()


def llama(*, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With values, equal each time, so that it can be quantized at once."""
    model = tiny_llama(tie=False)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05, generator=generator)
            else:
                parameter.fill_(1.0)
        for module in model.modules():
            if module._buffers:
                model._init_weights(module)
    return model.to(dtype)


def with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig

    # All of it starts away from zero, so that gradients go everywhere from the first step.
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    return adapters.apply_adapter(model, config=config)


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return losses(model=llama(), weights=None)


@pytest.mark.parametrize(
    "options",
    [
        {"parallelize_fn": BF16},
        {"parallelize_fn": partial(BF16, activation_checkpointing=full)},
        {"parallelize_fn": partial(BF16, compile={})},
        {"parallelize_fn": partial(BF16), "accumulation": 2},
    ],
    ids=["plain", "recomputed", "compiled", "accumulated"],
)
def test_bfloat16_follows_float32(exact, options):
    found = losses(model=llama(), weights=None, **options)
    assert found != exact
    assert found == pytest.approx(exact, abs=0.05)


def test_autocast_follows_float32_without_the_lm_head_too(exact):
    whole = losses(model=autocast(llama()), weights=None)
    assert whole == pytest.approx(exact, abs=0.05)
    chunked = losses(
        model=skip_lm_head(autocast(llama())),
        weights=None,
        loss_fn=LinearCrossEntropyLoss(chunk_tokens=100),
    )
    assert chunked == pytest.approx(whole, abs=0.01)


def test_float16_with_a_scaler(exact):
    found = losses(
        model=llama(),
        weights=None,
        parallelize_fn=partial(shard, param_dtype="float16", reduce_dtype="float32"),
        grad_scaler=torch.amp.GradScaler("cuda", init_scale=1024.0),
    )
    assert found == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_by_torchao_follows_float32(exact, recipe):
    from ditty_di.precision.float8 import torchao

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    found = losses(
        model=torchao(llama(), recipe=recipe, emulate=False),
        weights=None,
        parallelize_fn=partial(BF16, compile={}),
    )
    assert found == pytest.approx(exact, abs=0.2)


@needs("transformer_engine")
@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "DelayedScaling"])
def test_float8_by_transformer_engine_follows_float32(exact, recipe):
    from ditty_di.precision.transformer_engine import convert

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    found = losses(model=convert(llama(), recipe=recipe), weights=None, parallelize_fn=BF16)
    assert found == pytest.approx(exact, abs=0.2)


# -- quantized bases under adapters --------------------------------------------------------------


def qlora(quantize: Any, **options: Any) -> list[float]:
    model = with_lora(quantize(llama(dtype=torch.bfloat16)))
    return losses(model=model, weights=None, **options)


@needs("bitsandbytes")
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_by_bitsandbytes_kernels_is_nf4_by_torch(double_quant):
    nf4 = partial(quantization.nf4, double_quant=double_quant)
    torch_path = qlora(partial(nf4, kernels="torch"))
    assert qlora(partial(nf4, kernels="bitsandbytes")) == pytest.approx(torch_path, abs=2e-3)
    assert qlora(partial(nf4, kernels="auto")) == pytest.approx(torch_path, abs=2e-3)


@pytest.mark.parametrize(
    "quantize", [partial(quantization.nf4, kernels="torch"), quantization.int8]
)
def test_a_quantised_base_is_near_the_base(quantize):
    near = qlora(lambda model: model)
    found = qlora(quantize)
    assert found == pytest.approx(near, abs=0.2)
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    "quantize",
    [lambda model: model, partial(quantization.nf4, kernels="torch"), quantization.nf4],
    ids=["lora", "nf4 torch", "nf4 auto"],
)
def test_compiled_blocks_with_adapters(quantize):
    eager = qlora(quantize)
    assert qlora(quantize, parallelize_fn=partial(shard, compile={})) == pytest.approx(
        eager, abs=0.02
    )


def test_a_quantised_base_with_everything_at_once():
    model = with_lora(quantization.nf4(llama(dtype=torch.bfloat16)))
    found = losses(
        model=skip_lm_head(neftune(model, alpha=1.0)),
        weights=None,
        loss_fn=LinearCrossEntropyLoss(chunk_tokens=100),
        parallelize_fn=partial(shard, activation_checkpointing=full, compile={}),
        accumulation=2,
    )
    assert found == pytest.approx(qlora(quantization.nf4), abs=0.1)


# -- optimizers ----------------------------------------------------------------------------------


def test_eight_bit_adam_follows_adam(exact):
    found = losses(model=llama(), weights=None, optimizer_name="AdamW8bit")
    assert found == pytest.approx(exact, abs=0.05)


@needs("bitsandbytes")
def test_bitsandbytes_adam_follows_adam(exact):
    from ditty_di.optim.bitsandbytes import adamw

    found = losses(model=llama(), weights=None, optimizer=partial(adamw, lr=1e-2))
    assert found == pytest.approx(exact, abs=0.05)


# -- noise ---------------------------------------------------------------------------------------


def test_noise_of_a_gpu_has_the_paper_s_size_and_can_be_repeated():
    model = neftune(llama().cuda(), alpha=5.0).train()
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    ids = torch.randint(3, 64, (8, 64), device="cuda")
    state = torch.get_rng_state()
    for training in (True, False, True):
        torch.set_rng_state(state)
        model.train(training)(ids)
    noise = seen[0] - seen[1]
    assert torch.equal(seen[0], seen[2])
    assert float(noise.square().mean()) == pytest.approx(25 / (3 * 64 * 128), rel=0.02)
