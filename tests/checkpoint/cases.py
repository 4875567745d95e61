"""What the tests here save and load: imported by the ranks' server before it forks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch._dynamo  # imported by the first DTensor operation otherwise, in every rank
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchao.optim import AdamW8bit

import ditty_di.checkpoint.load  # noqa: F401
from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.folder import MANIFEST
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.states import OptimizerState, RNGState, SchedulerState

ROWS = 8


class Box:
    """A state that is what it is given."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        self.state = state_dict


def checkpointer(folder, states, rank_states=None, **options) -> Checkpointer:
    return Checkpointer(folder, states=states, rank_states=rank_states or {}, **options)


def without_digests(checkpoint):
    """Makes it a checkpoint of an earlier version."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["digests"], manifest["digest"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


class Model(nn.Module):
    """Shards evenly, unevenly (5 rows) and into nothing on the last ranks (1 row)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))
        self.head = nn.Linear(128, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x) * self.scale


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "sgd": partial(torch.optim.SGD, lr=1e-1),
    "momentum": partial(torch.optim.SGD, lr=1e-1, momentum=0.9),
    "adamw8bit": partial(AdamW8bit, lr=1e-2),
}


class Run:
    """A small training run on all ranks: `fsdp` shards, `hsdp` shards pairs and replicates them,
    `ddp` replicates."""

    def __init__(self, optimizer: str = "adamw", layout: str = "fsdp", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        ranks = dist.get_world_size()
        shape = {"fsdp": (1, ranks), "hsdp": (ranks // 2, 2), "ddp": (ranks, 1)}[layout]
        if ranks > 1:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
        self.optimizer = OPTIMIZERS[optimizer](self.model.named_parameters())
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.step = Box({"step": 0})

    def train(self, steps: Iterable[int]) -> list[float]:
        """The losses of these steps: each sees its own rows, whatever the number of ranks."""
        losses = []
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for step in steps:
            ids = torch.randint(16, (ROWS, 2), generator=torch.Generator().manual_seed(step))
            output = self.model(ids[rank::ranks, 0])
            loss = nn.functional.cross_entropy(output, ids[rank::ranks, 1] % 5, reduction="sum")
            (loss / ROWS).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.model.seen += ROWS
            total = loss.detach() / ROWS
            dist.all_reduce(total)
            losses.append(total.item())
            self.step.state = {"step": step}
        return losses

    def checkpointer(self, folder, **options) -> Checkpointer:
        states = {
            "model": ModelState([self.model]),
            "optimizer": OptimizerState(self.optimizer),
            "lr_scheduler": SchedulerState(self.scheduler),
            "train_state": self.step,
        }
        return checkpointer(folder, states, {"rng": RNGState()}, **options)

    def content(self) -> dict[str, Any]:
        """Everything that a checkpoint must bring back, unsharded, without torch's types."""
        named = {name: p for name, p in self.model.named_parameters()}
        values: dict[str, Any] = dict(self.model.state_dict())
        for name, parameter in named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                values[f"{name}.{key}"] = value
        plain: dict[str, Any] = {name: _plain(value) for name, value in values.items()}
        plain["rates"] = [float(group["lr"]) for group in self.optimizer.param_groups]
        plain["epoch"] = self.scheduler.last_epoch
        plain["step"] = self.step.state["step"]
        return plain


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if hasattr(value, "dequantize") and type(value) is not torch.Tensor:
        value = value.dequantize()
    return value.detach().tolist()
