"""What the tests here train, on every rank of a process group."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.batch import Batch
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.optim.schedules import constant
from ditty_di.parallelize.activation_checkpointing import full, selective
from ditty_di.parallelize.data_parallel import shard
from ditty_di.precision import float8
from ditty_di.runtime import Runtime
from tests.distributed.cases import RESUME_AT, Recorder, make_trainer, tiny_llama

BF16 = {"param_dtype": "bfloat16", "reduce_dtype": "float32"}
FP16 = {"param_dtype": "float16", "reduce_dtype": "float32"}
STEPS = 6


def llama(dtype: str = "float32", **transforms: Any) -> nn.Module:
    return from_config(tiny_llama().config, dtype=dtype, **transforms)


def lora(model: nn.Module, rank: int = 16) -> nn.Module:
    """Adapters of float32 on all linear layers, whatever the base is."""
    import peft
    from peft.tuners.lora.layer import Linear

    from ditty_di.quantization.int8_linear import Int8Linear
    from ditty_di.quantization.nf4_linear import NF4Linear

    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, target_modules=targets, lora_alpha=32)
    config._register_custom_module({NF4Linear: Linear, Int8Linear: Linear})
    return peft.get_peft_model(model, config)


def training(options: dict[str, Any], max_steps: int = STEPS, **slots: Any) -> tuple[Any, Recorder]:
    """A trainer of the tiny Llama with these `options` of `shard`, and its records."""
    folder = slots.pop("folder", None)
    return make_trainer(
        folder, max_steps=max_steps, parallelize_fn=partial(shard, **options), **slots
    )


def losses(options: dict[str, Any] | None = None, **slots: Any) -> list[float]:
    trainer, recorder = training(options or {}, **slots)
    trainer.train()
    trainer.close()
    return trainer.runtime.broadcast(recorder.losses())


def whole(trainer: Any) -> list[Tensor]:
    parameters = [p.detach() for p in trainer.model_parts[0].parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


def precisions(names: list[str] | None = None) -> dict[str, list[float]]:
    """The losses of each precision, of the whole model and of adapters on a frozen base."""
    from ditty_di.quantization import int8, nf4

    to_float8 = partial(float8.torchao, emulate=True)
    variants: dict[str, Callable[[], list[float]]] = {
        "fp32": losses,
        "bf16": partial(losses, BF16),
        "pure_bf16": lambda: losses(model=llama("bfloat16")),
        "fp16": lambda: losses(FP16, grad_scaler=scaler()),
        "fp8": lambda: losses(BF16, model=llama(convert=to_float8)),
        "fp8_rowwise": lambda: losses(
            BF16, model=llama(convert=partial(to_float8, recipe="rowwise"))
        ),
        "lora": lambda: losses(model=llama(adapter=lora)),
        "lora_bf16": lambda: losses(BF16, model=llama("bfloat16", adapter=lora)),
        "lora_fp8": lambda: losses(BF16, model=llama("bfloat16", adapter=lora, convert=to_float8)),
        "nf4": lambda: losses(model=llama(quantize=nf4, adapter=lora)),
        "nf4_bf16": lambda: losses(BF16, model=llama("bfloat16", quantize=nf4, adapter=lora)),
        "int8": lambda: losses(model=llama(quantize=int8, adapter=lora)),
        "int8_bf16": lambda: losses(BF16, model=llama("bfloat16", quantize=int8, adapter=lora)),
    }
    return {name: run() for name, run in variants.items() if names is None or name in names}


def combinations(*names: str) -> dict[str, list[float]]:
    """Losses of adapters on a bfloat16 base, with recomputation and compiled."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "full": {"activation_checkpointing": full},
        "selective": {"activation_checkpointing": selective},
        "compiled": {"compile": {}, "activation_checkpointing": full},
    }
    return {
        name: losses(BF16 | variants[name], model=llama("bfloat16", adapter=lora), max_steps=3)
        for name in names
    }


def gathered(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dtypes of what a block of adapters on a quantized base computes with, and of what is kept."""
    from ditty_di.quantization import int8, nf4

    out = {}
    for quantize in (nf4, int8):
        trainer, _ = training(options, 1, model=llama("bfloat16", quantize=quantize, adapter=lora))
        seen: dict[str, str] = {}

        def look(block: nn.Module, args: Any, output: Any, seen: dict[str, str] = seen) -> None:
            seen.update({name: str(p.dtype) for name, p in block.named_parameters()})
            seen["output"] = str(output.dtype)

        model = trainer.model_parts[0]
        (block,) = [m for name, m in model.named_modules() if name.endswith("layers.0")]
        block.register_forward_hook(look, prepend=True)
        trainer.train()
        out[quantize.__name__] = {
            "seen": seen,
            "kept": {name: str(p.dtype) for name, p in block.named_parameters()},
            "rotary": [str(b.dtype) for n, b in model.named_buffers() if n.endswith("inv_freq")],
        }
    return out


class Overflowing(CrossEntropyLoss):
    """Gradients of the given micro-batch overflow on the last rank, the loss does not."""

    def __init__(self, at: int | None) -> None:
        super().__init__(output="logits")
        self.at, self.calls = at, 0

    def forward(self, output: Any, batch: Batch, num_valid_global: Tensor, /) -> Any:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if self.calls == self.at and last:
            output.logits.register_hook(lambda grad: grad * float("inf"))
        self.calls += 1
        return super().forward(output, batch, num_valid_global)


def facts() -> dict[str, Any]:
    """Dtypes; clipping, and an overflow on one rank, with a loss scale that is known."""
    out: dict[str, Any] = {"gathered": gathered(BF16)}
    sgd = {
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "lr_scheduler": partial(constant, max_steps=9),
        "max_steps": 1,
    }
    for name, options, own in (
        ("fp32", {}, {}),
        ("fp16", FP16, {"grad_scaler": scaler(init_scale=2.0**10)}),
    ):
        trainer, recorder = training(options, **sgd, **own, max_grad_norm=0.01)
        before = whole(trainer)
        trainer.train()
        moved = [b - a for a, b in zip(before, whole(trainer), strict=True)]
        rows = trainer.runtime.broadcast(recorder.rows)
        out[f"{name}_norm"] = rows[0]["grad_norm"]
        out[f"{name}_moved"] = float(torch.stack([m.norm() for m in moved]).norm())

    def run(at: int | None, steps: int) -> Any:
        trainer, recorder = training(
            FP16,
            steps,
            loss_fn=Overflowing(at),
            grad_scaler=scaler(init_scale=2.0**10, growth_interval=100),
        )
        trainer.train()
        return trainer, recorder

    clean, _ = run(None, 2)
    overflowed, _ = run(2, 3)
    out["unmoved"] = [
        torch.equal(a, b) for a, b in zip(whole(clean), whole(overflowed), strict=True)
    ]
    later, _ = run(2, 5)
    out["moved_on"] = not torch.equal(whole(later)[0], whole(overflowed)[0])
    out["scale"], out["skipped"] = later.grad_scaler.get_scale(), later.guard.skipped
    return out


def resumed(folder: str, variant: str) -> dict[str, Any]:
    """Losses after the checkpoint, of the run that made it and of one that starts from it."""
    slots: dict[str, Any] = {}
    if variant == "fp16":
        options, make = FP16, llama
        slots["loss_fn"] = Overflowing(5)
    else:
        options = BF16
        make = partial(llama, convert=partial(float8.torchao, emulate=True))
    runtime, here = Runtime(), Path(folder)
    runs = []
    for name in ("first", "second"):
        if variant == "fp16":
            # It grows every third step, so its state is in the middle of something at RESUME_AT.
            slots["grad_scaler"] = scaler(init_scale=2.0**8, growth_interval=3)
        trainer, recorder = training(
            options, RESUME_AT + 3, folder=here / name, model=make(), **slots
        )
        trainer.train()
        trainer.close()
        runs.append(
            {
                "losses": runtime.broadcast(recorder.losses()),
                "scaler": trainer.grad_scaler.state_dict(),
                "weights": [float(p.double().abs().sum()) for p in whole(trainer)],
            }
        )
        if name == "first" and runtime.rank == 0:
            step = f"checkpoints/step-{RESUME_AT:08d}"
            shutil.copytree(here / "first" / step, here / "second" / step)
        runtime.any(False)  # a barrier: the copy is there
    first, second = runs
    first["losses"] = first["losses"][RESUME_AT:]
    return {"first": first, "second": second}
