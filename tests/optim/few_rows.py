"""Optimizers of conf/ on matrices with fewer rows than ranks: what `test_groups` runs on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ditty_di.optim.container import Optimizers

CONF = Path(__file__).parents[2] / "conf" / "optimizer"


class Model(nn.Module):
    """A regression: a head of one row and a bias of one number beside ordinary matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 8)
        self.column = nn.Linear(1, 16, bias=False)
        self.three = nn.Linear(8, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.three(self.body(self.column(x).tanh()).tanh()).tanh())


def train(name: str, steps: int = 4) -> dict[str, list[float]] | str:
    """Return the losses and the parameters at the end, or the error."""
    torch.manual_seed(0)
    model = Model()
    if dist.is_initialized():
        fully_shard(model)
        model.set_force_sum_reduction_for_comms(True)
    factory = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")
    try:
        optimizer = Optimizers(factory, [model])
        losses = []
        x = torch.linspace(-1, 1, 12)[:, None]
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - x.square()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found: dict[str, Any] = {"losses": losses}
    for parameter_name, parameter in model.named_parameters():
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found[parameter_name] = whole.flatten().tolist()
    return found


def train_all(names: list[str]) -> dict[str, Any]:
    import ditty_di.compat  # noqa: F401

    return {name: train(name) for name in names}
