"""Differentiable moves of activations between tensor-parallel ranks.

An activation is *whole* (`[batch, seq, hidden]`, equal on all ranks), a *partial sum* (the same
shape; the sum over the ranks is meant), or *split*: a rank has a part of every sequence,
`[batch, ceil(seq / tp), hidden]`, the last parts filled up with zeros. See Megatron-LM's sequence
parallelism (https://arxiv.org/abs/2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_leaves, tree_map_only


class Sequence:
    """Moves along the sequence dimension, between layers that a rank has parts of.

    Args:
        mesh: the tensor-parallel ranks.

    Attributes:
        length: tokens of a whole row in the forward pass that runs; `split` sets it.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.length = mesh, 0

    def split(self, x: Tensor) -> Tensor:
        """Split a whole activation; the gradient is gathered."""
        self.length = x.shape[1]
        return moved(self._filled_up(x), self.mesh, Replicate(), Shard(1))

    def join(self, x: Tensor) -> Tensor:
        """Make a split activation whole, for equal work on all ranks; the gradient is split."""
        return moved(x, self.mesh, Shard(1), Replicate())[:, : self.length]

    def gather(self, x: Tensor) -> Tensor:
        """Make a split activation whole, for layers that a rank has a part of.

        Their gradients are partial sums, which are summed and split.
        """
        x = moved(x, self.mesh, Shard(1), Replicate(), gradient=Partial())
        return x[:, : self.length]

    def reduce(self, x: Tensor) -> Tensor:
        """Sum up partial sums and split the result; the gradient is gathered."""
        return moved(self._filled_up(x), self.mesh, Partial(), Shard(1))

    def _filled_up(self, x: Tensor) -> Tensor:
        lacking = -x.shape[1] % self.mesh.size()
        return F.pad(x, (0, 0, 0, lacking)) if lacking else x


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the whole of partial sums; the gradient is the same on all ranks."""
    return moved(x, mesh, Partial(), Replicate())


def shared(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a whole activation for a layer that a rank has a part of: its gradient is summed."""
    return moved(x, mesh, Replicate(), Replicate(), gradient=Partial())


def moved(
    x: Tensor,
    mesh: DeviceMesh,
    source: Placement,
    target: Placement,
    *,
    gradient: Placement | None = None,
) -> Tensor:
    """Redistribute a local tensor.

    Args:
        x: this rank's tensor.
        mesh: of one dimension.
        source: what it is now.
        target: what it becomes.
        gradient: what the gradient of the result is on this rank; None is `target`.
    """
    distributed = DTensor.from_local(x, mesh, [source], run_check=False)
    return distributed.redistribute(placements=[target]).to_local(
        grad_placements=[target if gradient is None else gradient]
    )


def gather_output(output: Any) -> Any:
    """Return a model's output with plain tensors in place of `DTensor`s.

    Args:
        output: any output; all ranks use it in the same way.
    """
    if not any(isinstance(leaf, DTensor) for leaf in tree_leaves(output)):
        return output
    return tree_map_only(DTensor, DTensor.full_tensor, output)
