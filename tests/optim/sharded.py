"""What `test_bitsandbytes` runs on every rank of a process group."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.states import OptimizerState
from ditty_di.optim import bitsandbytes as bnb
from ditty_di.optim import build_optimizer

#: Shards of them end where blocks of 256 elements do, on one, two and four ranks.
ALIGNED = {
    "square": (64, 64),  # 8 bits although a shard has fewer than 4,096 elements
    "uneven": (5, 1024),
    "one_row": (1, 8192),  # nothing of it on the other ranks
    "wide": (16, 96, 32),
    "vector": (8192,),
    "small": (7, 3),  # 32 bits
}
#: In the middle of blocks, on more than one rank.
ACROSS = {"across": (6, 1000), "odd_vector": (5000,)}


class Model(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], layout: str) -> None:
        super().__init__()
        ranks = dist.get_world_size()
        self.place = lambda tensor: tensor
        if ranks > 1:
            shape = (2, ranks // 2) if layout == "hsdp" else (1, ranks)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            self.place = partial(
                distribute_tensor, device_mesh=mesh, placements=[Replicate(), Shard(0)]
            )
        for i, (name, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(i)
            value = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(self.place(value)))

    def gradients(self, step: int) -> None:
        """The same on any layout; the small parameter has none in the second step."""
        for i, (name, parameter) in enumerate(self.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * step + i)
            value = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (name, step) == ("small", 1) else self.place(value)

    def whole(self) -> dict[str, Tensor]:
        return {
            name: p.full_tensor() if isinstance(p, DTensor) else p.clone()
            for name, p in self.detached()
        }

    def detached(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self.named_parameters()]


def train(
    shapes: dict[str, tuple[int, ...]],
    *,
    folder: Path | None = None,
    layout: str = "fsdp",
    optimizer: str = "adamw",
    save_at: int | None = None,
    start: bool = False,
    steps: int = 5,
) -> dict[str, Tensor]:
    """The parameters after `steps` steps, of which those before `start` were another's."""
    model = Model(shapes, layout)
    built = build_optimizer(partial(getattr(bnb, optimizer), lr=0.1, weight_decay=0.1), [model])
    checkpointer, first = None, 0
    if folder is not None:
        states = {"optimizer": OptimizerState(built), "model": model_state(model)}
        checkpointer = Checkpointer(str(folder), states=states, rank_states={}, save_interval=None)
    if start:
        assert checkpointer is not None
        loaded = checkpointer.load()
        assert loaded is not None
        first = loaded
    for step in range(first, steps):
        built.param_groups[0]["lr"] = 0.1 / (step + 1)
        model.gradients(step)
        built.step()
        if checkpointer is not None and step + 1 == save_at:
            checkpointer.save(step + 1, force=True)
    if checkpointer is not None:
        checkpointer.close()
    return model.whole()


def model_state(model: nn.Module) -> Any:
    from ditty_di.checkpoint.model_state import ModelState

    return ModelState([model])


def matrix(folder: str, source: str | None) -> dict[str, Any]:
    """Trained from the start with a checkpoint after three steps, or on from `source`'s."""
    out: dict[str, Any] = {}
    for optimizer in ("adamw", "lion"):
        here = Path(folder) / optimizer
        if source is not None and dist.get_rank() == 0:
            shutil.copytree(Path(source) / optimizer, here)
        dist.barrier()
        out[optimizer] = train(
            ALIGNED, folder=here, optimizer=optimizer, save_at=3, start=source is not None
        )
    if source is None:
        out["across"] = train(ACROSS, folder=Path(folder) / "across", save_at=3)
        out["hsdp"] = train(ALIGNED, layout="hsdp") if dist.get_world_size() == 4 else None
    else:
        here = Path(folder) / "across"
        if dist.get_rank() == 0:
            shutil.copytree(Path(source) / "across", here)
        dist.barrier()
        try:
            out["across"] = train(ACROSS, folder=here, start=True)
        except Exception as error:
            out["across"] = str(error)
    return out


def states() -> dict[str, Any]:
    """Global shapes and dtypes of the state, and how much of it this rank has."""
    model = Model({**ALIGNED, **ACROSS}, "fsdp")
    built = build_optimizer(partial(bnb.adamw, lr=0.1), [model])
    model.gradients(0)
    built.step()
    return {
        f"{name}.{key}": (list(value.shape), str(value.dtype))
        for name, parameter in model.named_parameters()
        for key, value in built.state[parameter].items()
        if isinstance(value, Tensor)
    }


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))
    messages = []
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        value = distribute_tensor(torch.zeros(8, 8), mesh, placements)
        try:
            bnb.adamw([("weight", nn.Parameter(value))])
        except ValueError as error:
            messages.append(str(error))
    return messages


def low_bit(folder: str) -> dict[str, list[list[float]]]:
    """Losses after a checkpoint, of the run that made it and of one that starts from it."""
    import torchao.optim

    from tests.distributed.cases import RESUME_AT, make_trainer
    from tests.precision.cases import llama, lora

    variants: dict[str, tuple[Any, Any]] = {
        # Adapters of 16 rows and 128 columns are below 4,096 elements, those of 64 are not.
        "adapters": (partial(torchao.optim.AdamW8bit, lr=1e-2), lora),
        "adapters_4bit": (partial(torchao.optim.AdamW4bit, lr=1e-2), partial(lora, rank=64)),
        "adapters_fp8": (partial(torchao.optim.AdamWFp8, lr=1e-2), partial(lora, rank=64)),
        "adapters_bnb": (partial(bnb.adamw, lr=1e-2), partial(lora, rank=64)),
        "bfloat16": (partial(torchao.optim.AdamW8bit, lr=1e-2), None),
        "bfloat16_bnb": (partial(bnb.adamw, lr=1e-2), None),
        "bfloat16_stochastic": (
            partial(torchao.optim.AdamW8bit, lr=1e-2, bf16_stochastic_round=True),
            None,
        ),
    }
    out = {}
    for name, (optimizer, adapter) in variants.items():
        runs = []
        for attempt in ("first", "second"):
            here = Path(folder) / name / attempt
            trainer, recorder = make_trainer(
                here,
                model=llama("bfloat16", adapter=adapter),
                optimizer=optimizer,
                max_steps=RESUME_AT + 3,
            )
            with torch.compiler.set_stance("force_eager"):  # torchao's: the same step, uncompiled
                trainer.train()
            trainer.close()
            runs.append(trainer.runtime.broadcast(recorder.losses()))
            if attempt == "first" and dist.get_rank() == 0:
                step = f"checkpoints/step-{RESUME_AT:08d}"
                shutil.copytree(here / step, here.parent / "second" / step)
            dist.barrier()
        out[name] = [runs[0][RESUME_AT:], runs[1], runs[0]]
    return out
