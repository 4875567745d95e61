"""Between backward pass and update: the gradients of a loss's own parameters, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ditty_di.compat import sum_gradients_on_gloo

# isort: split
import torchtitan.distributed.utils as dist_utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ditty_di.losses.plain import as_loss

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

    from ditty_di.protocols import Loss, LossFunction, ParallelizeFn
    from ditty_di.runtime import Runtime


def place_loss(
    loss_fn: Loss | LossFunction,
    runtime: Runtime,
    parallelize_fn: ParallelizeFn | None = None,
) -> Loss:
    """Moves a loss that is a module to the device, equal on all ranks, and sharded on request.

    Raises:
        TypeError: something that is neither a `ditty_di.protocols.Loss` nor another callable.
    """
    loss: Loss = as_loss(loss_fn)
    if not isinstance(loss, nn.Module):
        return loss
    loss.to(runtime.device)
    for tensor in (*loss.parameters(), *loss.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    if parallelize_fn is None:
        return loss
    placed: Any = parallelize_fn(loss, parallel_dims=runtime.parallel_dims)
    if runtime.device.type == "cpu":
        sum_gradients_on_gloo(placed)
    return placed  # type: ignore[no-any-return]


class LossParameters:
    """The trainable parameters of a loss beside those of a model, which may be sharded.

    The loss computes with plain tensors, which every rank has whole. Beside a sharded model the
    optimizer holds each as a replicated `DTensor` of the same memory instead: optimizers, and
    gradient scalers, cannot take the two kinds at once. Parameters that are the model's too, or
    sharded themselves, need none of it.

    `named` are those for the optimizer; their names begin with `loss.`, where the model's do not
    reach. `trained` are the same without names.
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
        dims = map(runtime.parallel_dims.get_optional_mesh, ("loss", "pp"))
        self._groups = [dim.get_group() for dim in dims if dim is not None]

    def reduce(self) -> None:
        """Sums the window's gradients over the ranks, and gives them to what the optimizer holds.

        A rank whose micro-batches did not reach a parameter takes part with zeros.
        """
        for own, held in self._pairs:
            gradient = torch.zeros_like(own) if own.grad is None else own.grad
            for group in self._groups:
                dist.all_reduce(gradient, group=group)
            own.grad = None
            held.grad = gradient if held is own else _replicated(gradient, self._mesh)


def _replicated(tensor: Tensor, mesh: DeviceMesh | Any) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def clip_grad_norm(
    model: Sequence[Tensor],
    loss: Sequence[Tensor],
    max_norm: float,
    *,
    pp_mesh: DeviceMesh | None,
    ep_enabled: bool,
) -> Tensor:
    """Clips the gradients of the model's and the loss's parameters to one global L2 norm.

    The model's are sharded and split into stages as they may be; the loss's are summed already and
    the same on all ranks, also on those of other stages.

    Returns:
        The norm before clipping, shape `[]`.
    """
    options: dict[str, Any] = {"foreach": True, "pp_mesh": pp_mesh, "ep_enabled": ep_enabled}
    if not loss:
        return dist_utils.clip_grad_norm_(model, max_norm, **options)
    # Clipped to infinity: measured over all shards and stages, and left as it is.
    norms = [dist_utils.clip_grad_norm_(model, float("inf"), **options)]
    norms.append(dist_utils.clip_grad_norm_(loss, float("inf"), foreach=True))
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    for parameters in (model, loss):
        # Apart, for foreach kernels cannot take sharded tensors of several meshes at once.
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach=True)
    return total


class Shares:
    """Numbers of which every rank adds up its share: the loss, and what losses report."""

    def __init__(self, runtime: Runtime) -> None:
        dims, self.device = runtime.parallel_dims, runtime.device
        meshes = (dims.get_optional_mesh("loss"), dims.get_optional_mesh("pp"))
        self._meshes = [mesh for mesh in meshes if mesh is not None]
        self._metrics: dict[str, Tensor | float] = {}

    def clear(self) -> None:
        self._metrics = {}

    def add(self, *metrics: dict[str, Tensor]) -> None:
        """Micro-batches' metrics; a name that others do not have counts as 0 there."""
        for name, value in (item for one in metrics for item in one.items()):
            self._metrics[name] = self._metrics.get(name, 0.0) + value.detach()

    def total(self, share: Tensor) -> float:
        """The sum over the ranks; collective."""
        return float(self._summed(share))

    def metrics(self) -> dict[str, float]:
        """What was added since `clear`, summed over the ranks; collective."""
        names = list(self._metrics)
        if (ranks := dist.get_world_size()) > 1:
            # Only a pipeline's last stage has a loss, and a loss may report what only some batches
            # have: summed position by position, numbers would get each other's names.
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, names)
            names = sorted(set().union(*gathered))
        if not names:
            return {}
        mine = [self._metrics.get(name, 0.0) for name in names]
        stacked = torch.stack([torch.as_tensor(v, device=self.device).float() for v in mine])
        return dict(zip(names, self._summed(stacked).tolist(), strict=True))

    def _summed(self, share: Tensor) -> Tensor:
        total = share.detach().to(self.device, torch.float32, copy=True)
        for mesh in self._meshes:
            dist.all_reduce(total, group=mesh.get_group())
        return total
