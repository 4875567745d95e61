"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ditty_di.callbacks.base import Callback
from ditty_di.fqn import canonical_fqn
from ditty_di.models.weights import local
from ditty_di.protocols import Training


class EMA(Callback):
    """Average the trainable parameters after every step: average = d average + (1 - d) weights.

    Each rank averages its own shards; nothing is communicated. The averages are float32 whatever
    the weights are, because bfloat16 would round the small changes away.

    Args:
        decay: d; averages over about 1 / (1 - d) steps.
        warmup: d is min(decay, (1 + n) / (10 + n)) after n steps, so that the random weights of
            the beginning are soon forgotten (TensorFlow's ExponentialMovingAverage).
        apply_at_end: replace the model's weights by the averages once training has ended and is
            saved: these are exported, or returned. Validation uses the weights; `swap` gives the
            averages at any time.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    @staticmethod
    def validate(*, decay: float = 0.0) -> None:
        """Check the arguments; see the class.

        Args:
            decay: d.
        """
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

    def on_train_start(self, trainer: Training) -> None:
        """Start with the weights as they are.

        Args:
            trainer: the trainer.
        """
        self.start(trainer.model_parts)

    def on_step_end(self, trainer: Training) -> None:
        """Update the averages.

        Args:
            trainer: the trainer.
        """
        self.update()

    def on_train_end(self, trainer: Training) -> None:
        """Replace the weights with `apply_at_end`.

        Args:
            trainer: the trainer.
        """
        if self.apply_at_end:
            self._set_weights(self._started())

    def start(self, model_parts: list[torch.nn.Module]) -> None:
        """Set the averages to the weights as they are.

        Args:
            model_parts: the model, or the pipeline stages of it that this rank has.
        """
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
        """Update the averages with the current weights."""
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(a) for a in self._started().values()]
        weights = [local(p).float() for p in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Use the averages as the model's weights inside the block.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        averages = self._started()
        own = {name: local(p).clone() for name, p in self._sharded().items()}
        self._set_weights(averages)
        try:
            yield
        finally:
            self._set_weights(own)

    def _sharded(self) -> dict[str, Tensor]:
        """Return the weights, after freeing the gathered copies that FSDP may hold."""
        for module in self._modules:
            if isinstance(module, FSDPModule):
                module.reshard()
        return self._weights

    @torch.no_grad()
    def _set_weights(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._sharded().items():
            local(parameter).copy_(local(values[name]))

    def state_dict(self) -> dict[str, Any]:
        """Return `updates`, and `averages.<name>` for each weight.

        It is flat, so that each average is a tensor of its own in a checkpoint and fits any layout.
        """
        averages = {f"averages.{name}": a for name, a in self._started().items()}
        return {"updates": self.updates, **averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages.

        Args:
            state_dict: as `state_dict` returned it.
        """
        for name, average in self._started().items():
            local(average).copy_(local(state_dict[f"averages.{name}"]))
        self.updates = state_dict["updates"]

    def _started(self) -> dict[str, Tensor]:
        if not self._averages:
            raise RuntimeError(
                "EMA: there are no averages; they are made while a trainer trains that has it "
                "among its callbacks. Those of a checkpoint: task=export averages=ema"
            )
        return self._averages
