"""Norms of gradients, relative size of updates and statistics of activations by block."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ditty_di.callbacks.base import Observer
from ditty_di.fqn import canonical_fqn
from ditty_di.models.weights import local
from ditty_di.parallelize.data_parallel import repeated_blocks
from ditty_di.protocols import Training
from ditty_di.runtime import gathered

log = logging.getLogger(__name__)


class BlockStatistics(Observer):
    """Log gradient norms, update ratios and activation statistics of each block, now and then.

    A block is one of the model's repeated blocks, as `parallelize` finds them, or else a module
    that has trainable parameters. The metrics, over all ranks and any layout:

    - `blocks/NAME/grad_norm`: L2 norm of its gradients, after clipping.
    - `blocks/NAME/update_ratio`: L2 norm of the update of its weights, divided by theirs.
    - `blocks/NAME/activation_mean_abs`, `..._std`, `..._max` (of the absolute value) and
      `..._zeros` (share of exact zeros) of its output in the forward passes of the step; only of
      repeated blocks, and not of compiled ones, which would be compiled again.

    Nothing runs in other steps; the first step of a process is never one. A step that is one needs
    a copy of the trainable weights (this rank's shards).

    Args:
        interval: optimizer steps between two reports.
        updates: also log update ratios, which need the copy.

    Raises:
        ValueError: `interval` is below 1.
    """

    @staticmethod
    def validate(*, interval: int = 1) -> None:
        """Raise ValueError for an interval below 1."""
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 optimizer step")

    def __init__(self, interval: int = 100, *, updates: bool = True) -> None:
        self.validate(interval=interval)
        super().__init__()
        self.interval, self.updates = interval, updates
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._before: dict[str, list[Tensor]] = {}
        #: By block, then statistic: sums over this rank's shards or batches, shapes [].
        self._sums: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def on_step_end(self, trainer: Training) -> None:
        """Report the step if it was observed; observe the next one if it is due.

        Args:
            trainer: the trainer.
        """
        if self._hooks:
            self._remove_hooks()
            trainer.metrics_processor.log(trainer.step, self._gather())
        if (trainer.step + 1) % self.interval == 0:
            self._observe(trainer)

    def _observe(self, trainer: Training) -> None:
        self._parameters, self._sums = defaultdict(list), defaultdict(dict)
        stages = trainer.runtime.parallel_dims.pp
        ranks = trainer.runtime.world_size // stages
        for part in trainer.model_parts:
            blocks = dict(_blocks(part))
            for name, block in blocks.items():
                if getattr(block, "_compiled_call_impl", None) is None:
                    self._hooks.append(block.register_forward_hook(self._activation_of(name)))
            for name, p in part.named_parameters():
                if p.requires_grad:
                    self._parameters[_block_of(canonical_fqn(name), blocks)].append(p)

        def before(*ignored: Any) -> None:
            self._before = {}
            for name, parameters in self._parameters.items():
                gradients = [(p, p.grad) for p in parameters if p.grad is not None]
                self._sums[name]["grad"] = _squares(gradients, ranks)
                self._sums[name]["weight"] = _squares([(p, p) for p in parameters], ranks)
                if self.updates:
                    self._before[name] = [local(p.detach()).clone() for p in parameters]

        def after(*ignored: Any) -> None:
            for name, weights in self._before.items():
                parameters = self._parameters[name]
                changes = [
                    (p, local(p.detach()) - w) for p, w in zip(parameters, weights, strict=True)
                ]
                self._sums[name]["update"] = _squares(changes, ranks)
            self._before = {}

        self._hooks.append(trainer.optimizer.register_step_pre_hook(before))
        self._hooks.append(trainer.optimizer.register_step_post_hook(after))

    def _activation_of(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled():  # a validation
                return
            tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            floating = next((x for x in tensors if x.is_floating_point()), None)
            if floating is None:
                return
            x, sums = local(floating.detach()), self._sums[name]
            for key, value in (
                ("abs", x.abs().sum(dtype=torch.float64)),
                ("sum", x.sum(dtype=torch.float64)),
                ("squares", torch.linalg.vector_norm(x, dtype=torch.float64).square()),
                ("zeros", (x == 0).sum(dtype=torch.float64)),
                ("count", torch.tensor(float(x.numel()), dtype=torch.float64)),
            ):
                sums[key] = sums[key] + value if key in sums else value
            largest = x.abs().max().double()
            sums["max"] = torch.maximum(sums["max"], largest) if "max" in sums else largest

        return note

    def _gather(self) -> dict[str, float]:
        """Return the metrics over all ranks; collective."""
        mine = {name: {k: float(v) for k, v in one.items()} for name, one in self._sums.items()}
        self._sums = defaultdict(dict)
        total: dict[str, dict[str, float]] = {}
        for of_rank in gathered(mine):
            for name, sums in of_rank.items():
                into = total.setdefault(name, {})
                for key, value in sums.items():
                    before = into.get(key, 0.0)
                    into[key] = max(before, value) if key == "max" else before + value
        return {
            f"blocks/{name}/{statistic}": value
            for name, sums in total.items()
            for statistic, value in _statistics(sums).items()
        }


def _statistics(sums: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "grad" in sums:
        found["grad_norm"] = math.sqrt(sums["grad"])
    if "update" in sums and sums["weight"]:
        found["update_ratio"] = math.sqrt(sums["update"] / sums["weight"])
    if n := sums.get("count"):
        mean = sums["sum"] / n
        found |= {
            "activation_mean_abs": sums["abs"] / n,
            "activation_std": math.sqrt(max(sums["squares"] / n - mean**2, 0.0)),
            "activation_max": sums["max"],
            "activation_zeros": sums["zeros"] / n,
        }
    return found


def _blocks(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    names = {id(module): name for name, module in part.named_modules()}
    for block in repeated_blocks(part).children():
        yield canonical_fqn(names[id(block)]), block


def _block_of(parameter: str, blocks: dict[str, nn.Module]) -> str:
    """Return the block of a parameter, else its module."""
    found = (name for name in blocks if parameter.startswith(f"{name}."))
    return next(found, parameter.rpartition(".")[0] or "model")


def _squares(tensors: Sequence[tuple[Tensor, Tensor]], ranks: int) -> Tensor:
    """Return this rank's part of a sum of squares, such that those of all ranks add up to it.

    What several ranks hold alike is divided by their number.

    Args:
        tensors: a parameter, and the tensor sharded like it (or this rank's part of that).
        ranks: that have a part of the parameter: all, or those of a pipeline stage.
    """
    total = torch.zeros((), dtype=torch.float64)
    for parameter, tensor in tensors:
        holders = ranks
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            split = [mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate()]
            holders = ranks // math.prod(split)
        square = torch.linalg.vector_norm(local(tensor.detach()), dtype=torch.float64).square()
        total = total.to(square.device) + square / holders
    return total
