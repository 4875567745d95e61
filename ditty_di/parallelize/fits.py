"""Whether a run fits its layout: known from its parts and its degrees, before anything is sharded.

A function for the trainer's `parallelize_fn` or `pipeline_fn`, or a loss, brings rules in its
attribute `fits` (`ditty_di.protocols.early_checks`). Each is called with the `Parts` of a run and
the `Degrees` of a layout, and returns one sentence for each thing that does not fit, which begins
with the key (`runtime.tp=3: `) and says what would.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.messages import refuse
from ditty_di.models.towers import towers


@dataclass(frozen=True)
class Degrees:
    """Numbers of ranks by kind of parallelism, as in `ditty_di.Runtime`; -1 is not known yet."""

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, runtime: Any) -> Degrees:
        """Return the degrees that an object with these attributes has.

        Args:
            runtime: torchtitan's `ParallelDims`, or another such object.
        """
        return cls(**{field.name: getattr(runtime, field.name) for field in fields(cls)})

    @property
    def split_the_model(self) -> bool:
        """Whether anything but the data is split."""
        return max(self.cp, self.tp, self.pp, self.ep) > 1


@dataclass(frozen=True)
class Parts:
    """Parts of a run that the rules check, before any is parallelized.

    Attributes:
        model: the model, on meta or with values.
        loss_fn: the loss.
        parallelize_fn: of the trainer's slot.
        pipeline_fn: of the trainer's slot.
        collate_fn: of the training loader.
    """

    model: nn.Module
    loss_fn: Any = None
    parallelize_fn: Any = None
    pipeline_fn: Any = None
    collate_fn: Any = None


def fits(parts: Parts, degrees: Degrees) -> list[str]:
    """Return what does not fit, one sentence each; empty if everything does.

    Args:
        parts: the parts of the run.
        degrees: its layout.
    """
    problems: list[str] = []
    for slot in (parts.parallelize_fn, parts.pipeline_fn, parts.loss_fn):
        for rule in getattr(getattr(slot, "func", slot), "fits", ()):
            problems += rule(parts, degrees)
    return problems


def towers_fit(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why a model with a tower beside its language model does not fit: a rule of `fits`."""
    split = [name for name in ("cp", "tp") if getattr(degrees, name) > 1]
    if not split or not towers(parts.model):
        return []
    return [
        f"runtime.{name}={getattr(degrees, name)}: the tower of a model that reads images "
        f"cannot be split; write runtime.{name}=1"
        for name in split
    ]


def require_fit(parts: Parts, parallel_dims: ParallelDims) -> None:
    """Raise ValueError unless the parts fit a layout.

    Args:
        parts: the parts of the run.
        parallel_dims: its layout.
    """
    refuse(fits(parts, Degrees.of(parallel_dims)))
