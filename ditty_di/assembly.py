"""Puts injected parts in their places on a runtime, and refuses what does not fit, by slot.

Nothing here replaces what was injected: a part that does not fit raises.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ditty_di.checks import CONTRACTS
from ditty_di.compat import sum_gradients_on_gloo
from ditty_di.models.weights import is_meta, materialize, unset
from ditty_di.parallelize.pipeline import Parts, WindowLoss
from ditty_di.processors.workflow import SPLIT_SEQUENCES, Processors

if TYPE_CHECKING:
    from ditty_di.callbacks import Callbacks
    from ditty_di.protocols import (
        Checkpointer,
        CheckpointerFactory,
        DataLoader,
        DataLoaderFactory,
        Loss,
        ModelTransform,
        ParallelizeFn,
        PipelineFn,
        Stateful,
        WeightsFn,
    )
    from ditty_di.runtime import Runtime
    from ditty_di.window import Windows

log = logging.getLogger(__name__)


def weights_of(model: nn.Module, weights: WeightsFn | None) -> WeightsFn | None:
    """Return `weights`, or without any the model's own `default_weights` if it is on meta."""
    if weights is None and is_meta(model):
        return getattr(model, "default_weights", None)
    return weights


def prepare_model(model: nn.Module, convert: ModelTransform | None, loss_fn: Any) -> nn.Module:
    """Return the model with converted layers, and as the loss needs it (`Loss.prepare_model`)."""
    if convert is not None:
        model = convert(model)
    prepare = getattr(loss_fn, "prepare_model", None)
    return prepare(model) if prepare is not None else model


def place_model(
    model: nn.Module,
    *,
    runtime: Runtime,
    loss_fn: Loss,
    weights: WeightsFn | None,
    parallelize_fn: ParallelizeFn | None,
    pipeline_fn: PipelineFn | None,
) -> Parts:
    """Parallelises the model, then fills what is on the meta device.

    A model that comes with values is moved to the device and made equal to rank 0's.

    Raises:
        ValueError: a slot that is missing for this layout, or a tensor left without a value.
    """
    weights = weights_of(model, weights)
    if is_meta(model):
        if weights is None:
            raise ValueError(
                "weights: the model is on the meta device, so something must fill it; pass "
                "weights=partial(ditty_di.models.weights.initialize, ...), a model with values, or "
                "one whose attribute default_weights is such a function"
            )
    else:
        model.to(runtime.device)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if runtime.parallel_dims.pp_enabled:
        parts = _split(model, runtime, loss_fn, parallelize_fn, pipeline_fn)
    elif parallelize_fn is not None:
        parts = Parts([parallelize_fn(model, parallel_dims=runtime.parallel_dims)])
    elif runtime.dp_world_size > 1:
        raise ValueError(
            f"parallelize_fn: {runtime.dp_world_size} data-parallel ranks need a function that "
            f"synchronises gradients, such as ditty_di.parallelize.data_parallel.shard"
        )
    else:
        parts = Parts([model])
    for module in parts.modules:
        if runtime.device.type == "cpu":
            sum_gradients_on_gloo(module)
        if is_meta(module):
            materialize(module, runtime.device)
            weights(module, device=runtime.device)  # type: ignore[misc]
        if missing := unset(module):
            raise ValueError(f"weights: these tensors have no value (meta or NaN): {missing[:5]}")
        module.train()
    return parts


def _split(
    model: nn.Module,
    runtime: Runtime,
    loss_fn: Loss,
    parallelize_fn: ParallelizeFn | None,
    pipeline_fn: PipelineFn | None,
) -> Parts:
    if pipeline_fn is None:
        raise ValueError("pipeline_fn: runtime.pp > 1 needs a function that splits the model")
    window_loss = WindowLoss(loss_fn)
    schedule, modules, first, last = pipeline_fn(
        model,
        parallel_dims=runtime.parallel_dims,
        device=runtime.device,
        loss_fn=window_loss,
        parallelize_fn=parallelize_fn or (lambda part, parallel_dims: part),
    )
    return Parts(modules, schedule, window_loss, first, last)


def place_dataloader(dataloader: DataLoaderFactory | DataLoader, runtime: Runtime) -> DataLoader:
    """Completes a partial with this rank's place, and verifies the place of any loader.

    Raises:
        ValueError: the loader was made for another rank or number of ranks.
    """
    place = {"dp_rank": runtime.dp_rank, "dp_world_size": runtime.dp_world_size}
    loader = dataloader(**place) if callable(dataloader) else dataloader
    alone = {"dp_rank": 0, "dp_world_size": 1}
    has = {name: getattr(loader, name, alone[name]) for name in place}
    if has != place:
        raise ValueError(
            f"dataloader: it was made for {has}, but this rank is {place}; pass a partial that "
            f"takes dp_rank and dp_world_size"
        )
    return loader


def accumulation_steps(
    global_batch_size: int | None, *, dataloader: DataLoader, runtime: Runtime
) -> int:
    """Micro-batches a rank and step: `global_batch_size` rows over all ranks, or one each.

    Raises:
        ValueError: the rows do not divide.
    """
    if global_batch_size is None:
        return 1
    rows = dataloader.batch_size * runtime.dp_world_size
    if global_batch_size < 1 or global_batch_size % rows:
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} is no multiple of {rows} = "
            f"dataloader.batch_size ({dataloader.batch_size}) x data-parallel ranks "
            f"({runtime.dp_world_size}); change one of them"
        )
    return global_batch_size // rows


def place_checkpointer(
    checkpointer: CheckpointerFactory,
    *,
    model_parts: list[nn.Module],
    weights: WeightsFn | None,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    dataloader: DataLoader,
    grad_scaler: torch.amp.GradScaler,
    callbacks: Callbacks,
    processors: Processors,
    windows: Windows,
    train_state: Stateful,
) -> Checkpointer:
    """Completes the checkpointer with all that a resumed run needs.

    Raises:
        ValueError: the loader cannot say where in the data it is.
    """
    from ditty_di.checkpoint import states
    from ditty_di.data.content import DataContent

    require_state(dataloader)
    holds: dict[str, Any] = {
        **states.model_states(model_parts, weights),
        "optimizer": states.OptimizerState(optimizer),
        "lr_scheduler": states.SchedulerState(lr_scheduler),
        "data": dataloader,
        "content": DataContent(dataloader),
        "train_state": train_state,
    }
    if isinstance(loss_fn, nn.Module) and loss_fn.state_dict():
        holds["loss"] = states.ModelState([loss_fn])
    if grad_scaler.is_enabled():
        holds["grad_scaler"] = grad_scaler
    holds |= {"windows": windows, **callbacks.states(), **processors.states()}
    return checkpointer(states=holds, rank_states={"rng": states.RNGState()})


def place_processors(
    processors: Processors,
    *,
    runtime: Runtime,
    contracts: str,
    around: dict[str, Any],
) -> Processors:
    """Verifies the contracts from the loader to the loss; what is a module goes to the device.

    Args:
        around: loader, model and loss, as `Processors.validate` takes them.

    Raises:
        ContractError: the contracts do not fit.
        ValueError: an unknown `contracts`; processors where sequences are split over ranks, or
            with parameters that want to be trained.
    """
    if contracts not in CONTRACTS:
        raise ValueError(f"trainer.contracts={contracts}: write static, runtime or every_batch")
    report = processors.validate(**around)
    if contracts != "static":
        processors.check_tensors(every=contracts == "every_batch", **around)
    if not processors:
        return processors
    if runtime.parallel_dims.cp_enabled:
        raise ValueError(f"preprocessors, postprocessors: {SPLIT_SEQUENCES}")
    for processor in (*processors.preprocessors, *processors.postprocessors):
        if isinstance(processor, nn.Module):
            if any(p.requires_grad for p in processor.parameters()):
                raise ValueError(
                    f"{processor.name}: nothing would train its parameters; let the model or the "
                    f"loss have them, or freeze them by requires_grad_(False)"
                )
            processor.to(runtime.device)
    if report.unchecked and "loader" in around and runtime.rank == 0:
        stages = ", ".join(map(str, report.unchecked))
        log.info("not checked, for they have no contract: %s (task=check draws them all)", stages)
    return processors


def require_state(dataloader: DataLoader) -> None:
    """A checkpoint must be able to say where in the data it was taken.

    Raises:
        ValueError: the loader has no state.
    """
    if not (hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")):
        raise ValueError(
            "dataloader: it has no state_dict and load_state_dict, so a resumed run could not "
            "find its place in the data; use ditty_di.data.Loader, or train without a checkpointer"
        )


def to_device(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with their tensors on the device, and anything else as it is."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
