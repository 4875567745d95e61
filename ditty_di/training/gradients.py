"""Between backward pass and update: gradients of the loss's parameters, clipping, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import ditty_di.compat  # noqa: F401

# isort: split
import torchtitan.distributed.utils as dist_utils
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime, gathered


class LossParameters:
    """The trainable parameters of a loss beside those of a model, which may be sharded.

    The loss computes with plain tensors, which every rank has whole. Beside a sharded model the
    optimizer holds each as a replicated `DTensor` of the same memory instead: optimizers and
    gradient scalers cannot take both kinds at once. Parameters that are also the model's, or
    sharded themselves, stay as they are.

    Args:
        loss_fn: the loss; one that is not a module has no parameters.
        model_parts: the modules as this rank trains them.
        runtime: mesh of the ranks.

    Attributes:
        named: name and parameter for the optimizer; names begin with `loss.`, unlike the model's.
        trained: the same parameters without names.
    """

    def __init__(self, loss_fn: Loss, model_parts: Iterable[nn.Module], runtime: Runtime) -> None:
        of_model = {id(p): p for part in model_parts for p in part.parameters()}
        meshes = (p.device_mesh for p in of_model.values() if isinstance(p, DTensor))
        self._mesh = mesh = next(meshes, None)
        self.named: list[tuple[str, nn.Parameter]] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        of_loss = loss_fn.named_parameters() if isinstance(loss_fn, nn.Module) else ()
        for name, own in of_loss:
            if not own.requires_grad or id(own) in of_model:
                continue
            held = own
            if not isinstance(own, DTensor):
                held = own if mesh is None else nn.Parameter(_replicated(own.detach(), mesh))
                self._pairs.append((own, held))
            self.named.append((f"loss.{name}", held))
        self.trained = [parameter for _, parameter in self.named]
        self._meshes = loss_meshes(runtime)

    def reduce(self) -> None:
        """Sum the gradients of the optimizer step over the ranks, for the optimizer's tensors.

        A rank whose micro-batches did not reach a parameter contributes zeros.
        """
        for own, held in self._pairs:
            gradient = torch.zeros_like(own) if own.grad is None else own.grad
            for mesh in self._meshes:
                dist.all_reduce(gradient, group=mesh.get_group())
            own.grad = None
            held.grad = gradient if held is own else _replicated(gradient, self._mesh)


def reduce_partial(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients that are `DTensor`s of partial sums, in one all-reduce for each dtype.

    Tensor-parallel ranks have a part of the gradient of a norm that each has whole. Under FSDP
    nothing is left to do: it sums them when it reduces gradients.

    Args:
        parameters: on the same mesh of one dimension, where they have such a gradient.
    """
    partial: dict[torch.dtype, list[Any]] = {}
    for p in parameters:
        if isinstance(p.grad, DTensor) and any(x.is_partial() for x in p.grad.placements):
            partial.setdefault(p.grad.dtype, []).append(p)
    for several in partial.values():
        mesh = several[0].grad.device_mesh
        gradients = [p.grad.to_local() for p in several]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=mesh.get_group())
        pieces = total.split([gradient.numel() for gradient in gradients])
        for p, gradient, piece in zip(several, gradients, pieces, strict=True):
            p.grad = _replicated(piece.view_as(gradient), mesh)


def loss_meshes(runtime: Runtime) -> list[DeviceMesh]:
    """Return the meshes over which a loss is summed: data-parallel and pipeline ranks.

    Args:
        runtime: the layout.
    """
    meshes = map(runtime.parallel_dims.get_optional_mesh, ("loss", "pp"))
    return [mesh for mesh in meshes if mesh is not None]


def _replicated(tensor: Tensor, mesh: DeviceMesh | Any) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def clip_grad_norm(
    model: Sequence[Tensor],
    loss: Sequence[Tensor],
    max_grad_norm: float,
    *,
    duplicates: Sequence[Tensor] = (),
    pp_mesh: DeviceMesh | None,
    ep_enabled: bool,
) -> Tensor:
    """Clip the gradients of model and loss to one global L2 norm.

    Args:
        model: parameters of the model, sharded and split into stages or not.
        loss: parameters of the loss, whose gradients are the same on all ranks and stages.
        max_grad_norm: largest norm; `inf` only computes it.
        duplicates: those of `model` that another pipeline stage has as well: they are clipped, and
            do not count in the norm.
        pp_mesh: mesh of the pipeline stages, or None.
        ep_enabled: whether experts are split over ranks.

    Returns:
        The norm before clipping, shape `[]`.
    """
    options: dict[str, Any] = {"foreach": True, "pp_mesh": pp_mesh, "ep_enabled": ep_enabled}
    if not loss and not duplicates:
        return dist_utils.clip_grad_norm_(model, max_grad_norm, **options)
    # Clipping to infinity computes the norm over all shards and stages and changes nothing.
    elsewhere = {id(p) for p in duplicates}
    counted = [p for p in model if id(p) not in elsewhere]
    norms = [dist_utils.clip_grad_norm_(counted, float("inf"), **options)]
    if loss:
        norms.append(dist_utils.clip_grad_norm_(loss, float("inf"), foreach=True))
    total = norms[0]  # to the bit: on another rank of the pipeline it may clip the same parameters
    if loss:
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    for parameters in (model, loss):
        # Separately: foreach kernels cannot take sharded tensors of several meshes at once.
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total, foreach=True)
    return total


class MetricAccumulator:
    """Add up the parts of a loss and of its metrics over micro-batches and ranks.

    Args:
        runtime: device and layout.
        summarize: turns summed metrics into those to report, as `ditty_di.losses.Loss` may do; None
            reports the sums.
    """

    def __init__(
        self, runtime: Runtime, summarize: Callable[[dict[str, Tensor]], Any] | None = None
    ) -> None:
        self.device, self.summarize = runtime.device, summarize
        self._meshes = loss_meshes(runtime)
        self._metrics: dict[str, Tensor | float] = {}

    def clear(self) -> None:
        """Forget all metrics, before an optimizer step."""
        self._metrics = {}

    def add(self, *metrics: dict[str, Tensor]) -> None:
        """Add metrics of micro-batches; a name that others lack counts as 0 there.

        Args:
            metrics: name and value, of any shape that is the same in all micro-batches and ranks.
        """
        for name, value in (item for one in metrics for item in one.items()):
            self._metrics[name] = self._metrics.get(name, 0.0) + value.detach()

    def take(self, name: str) -> Tensor | None:
        """Remove a metric, and return what this rank has added; None without it.

        Args:
            name: its name.
        """
        found: Any = self._metrics.pop(name, None)
        return found  # type: ignore[no-any-return]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks in float32, on the device; collective.

        Args:
            value: this rank's part.
        """
        total = value.detach().to(self.device, torch.float32, copy=True)
        for mesh in self._meshes:
            dist.all_reduce(total, group=mesh.get_group())
        return total

    def metrics(self) -> dict[str, float]:
        """Return the metrics added since `clear`, summed over the ranks; collective."""
        shapes = {name: tuple(torch.as_tensor(v).shape) for name, v in self._metrics.items()}
        if dist.get_world_size() > 1:
            # Only the last pipeline stage has a loss, and a loss may report what only some batches
            # have: summed by position, numbers would get each other's names.
            shapes = dict(sorted(item for one in gathered(shapes) for item in one.items()))
        if not shapes:
            return {}
        names = list(shapes)
        mine = [self._metrics.get(name, torch.zeros(shapes[name])) for name in names]
        flat = [torch.as_tensor(v, device=self.device).float().flatten() for v in mine]
        parts = self.sum(torch.cat(flat)).cpu().split([len(one) for one in flat])
        summed = {n: p.view(shapes[n]) for n, p in zip(names, parts, strict=True)}
        reported = summed if self.summarize is None else self.summarize(summed)
        return {name: float(value) for name, value in reported.items()}
