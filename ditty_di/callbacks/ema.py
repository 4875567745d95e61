"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ditty_di.callbacks.base import Callback
from ditty_di.models.weights import local
from ditty_di.names import canonical_fqn

if TYPE_CHECKING:
    from ditty_di.protocols import Training


class EMA(Callback):
    """Averages the trainable parameters after every step: average = d average + (1 - d) weights.

    Each rank averages its own shards; nothing is communicated. The averages are float32 whatever
    the weights are, because bfloat16 would round the small changes away.

    Args:
        decay: d; averages over about 1 / (1 - d) steps.
        warmup: d is min(decay, (1 + n) / (10 + n)) after n steps, so that the random weights of
            the beginning are soon forgotten (TensorFlow's ExponentialMovingAverage).
        apply_at_end: when training has ended and is saved, the model gets the averages for good:
            what is exported, or returned, are these. Validation is of the weights; `swap` lends
            the averages at any time.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    @staticmethod
    def validate(*, decay: float = 0.0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay={decay} must be at least 0 and below 1, such as 0.999")

    def __init__(
        self, decay: float = 0.999, *, warmup: bool = True, apply_at_end: bool = False
    ) -> None:
        self.validate(decay=decay)
        self.decay, self.warmup, self.apply_at_end = decay, warmup, apply_at_end
        self.updates = 0
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}
        self._modules: list[torch.nn.Module] = []

    def train_start(self, trainer: Training) -> None:
        self.start(trainer.model_parts)

    def step_end(self, trainer: Training) -> None:
        self.update()

    def train_end(self, trainer: Training) -> None:
        if self.apply_at_end:
            self._reshard()
            self._put({name: local(a) for name, a in self._started().items()})

    def start(self, model_parts: list[torch.nn.Module]) -> None:
        """Begins with the weights as they are."""
        self._modules = [m for part in model_parts for m in part.modules()]
        self._weights = {
            canonical_fqn(name): p
            for part in model_parts
            for name, p in part.named_parameters()
            if p.requires_grad
        }
        self.updates = 0
        self._averages = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of now into the averages."""
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(a) for a in self._started().values()]
        weights = [local(p).float() for p in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within it, the model has the averages as weights; afterwards its own are back.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        averages = self._started()
        self._reshard()
        own = {name: local(p).clone() for name, p in self._weights.items()}
        self._put({name: local(a) for name, a in averages.items()})
        try:
            yield
        finally:
            self._reshard()
            self._put(own)

    def _reshard(self) -> None:
        """What is gathered would be neither swapped nor kept."""
        for module in self._modules:
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            local(parameter).copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """`updates`, and `averages.<name>` for each weight: flat, so that each of them is a tensor
        of its own in a checkpoint, which fits any layout."""
        averages = {f"averages.{name}": a for name, a in self._started().items()}
        return {"updates": self.updates, **averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, average in self._started().items():
            local(average).copy_(local(state_dict[f"averages.{name}"]))
        self.updates = state_dict["updates"]

    def _started(self) -> dict[str, Tensor]:
        if not self._averages:
            raise RuntimeError(
                "EMA: there are no averages; they are made while a trainer trains that has it "
                "among its callbacks. Those of a checkpoint: task=export averages=ema "
                "export.ema=null"
            )
        return self._averages
