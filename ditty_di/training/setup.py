"""Validate injected components and set them up on the runtime's device and mesh.

No component is replaced: one that does not fit raises, and the message names its slot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ditty_di.checkpoint import states
from ditty_di.checkpoint.model_state import ModelState, model_states
from ditty_di.compat import sum_gradients_on_gloo
from ditty_di.contracts.stages import SPLIT_SEQUENCES
from ditty_di.data.content import DataContent
from ditty_di.losses.plain import as_loss
from ditty_di.losses.routing import warn_unused
from ditty_di.models.coverage import summary
from ditty_di.models.weights import is_meta, materialize, on_meta, uninitialized
from ditty_di.parallelize.pipeline import ModelParts, PipelineLoss, TorchSchedule
from ditty_di.processors.workflow import Processors
from ditty_di.protocols import (
    Checkpointer,
    CheckpointerFactory,
    DataLoader,
    DataLoaderFactory,
    Loss,
    LossFunction,
    ModelTransform,
    ParallelizeFn,
    PipelineFn,
    Stateful,
    WeightsFn,
)
from ditty_di.runtime import Runtime
from ditty_di.training.checks import CONTRACTS

log = logging.getLogger(__name__)


def weights_of(model: nn.Module, weights: WeightsFn | None) -> WeightsFn | None:
    """Return `weights`, or without any the model's own `default_weights` if it is on meta.

    Args:
        model: the model as injected.
        weights: of the trainer's slot.
    """
    if weights is None and is_meta(model):
        return getattr(model, "default_weights", None)
    return weights


def prepare_model(model: nn.Module, convert: ModelTransform | None, loss_fn: Any) -> nn.Module:
    """Return the model with converted layers, and as the loss needs it (`Loss.prepare_model`).

    Args:
        model: the model as injected.
        convert: replaces layers; None replaces none.
        loss_fn: a loss on hidden states skips the model's head.
    """
    if convert is not None:
        model = convert(model)
    prepare = getattr(loss_fn, "prepare_model", None)
    model = prepare(model) if prepare is not None else model
    warn_unused(model)
    return model  # type: ignore[no-any-return]


def setup_model(
    model: nn.Module,
    *,
    runtime: Runtime,
    weights: WeightsFn | None,
    parallelize_fn: ParallelizeFn | None,
    pipeline_fn: PipelineFn | None,
    processors: Processors | None = None,
) -> ModelParts:
    """Parallelize the model, then fill what is on the meta device.

    A model with values is moved to the device, and rank 0's values are broadcast.

    Args:
        model: the model as injected.
        runtime: device and layout.
        weights: fills a model on the meta device (see `weights_of`).
        parallelize_fn: shards, wraps or compiles; needed with several data-parallel ranks.
        pipeline_fn: splits the model into stages; needed with `runtime.pp > 1`.
        processors: their postprocessors run before the loss of a pipeline schedule.

    Raises:
        ValueError: a slot that this layout needs is missing, or a tensor has no value.
    """
    log.info("model: %s", summary(model))
    if not is_meta(model):
        broadcast(model.to(runtime.device))
    elif weights is None:
        raise ValueError(
            "weights: the model is on the meta device, so something must fill it; pass "
            "weights=partial(ditty_di.models.weights.initialize, ...), a model with values, or "
            "one whose attribute default_weights is such a function"
        )
    if runtime.parallel_dims.pp_enabled:
        if pipeline_fn is None:
            raise ValueError(
                "pipeline_fn: runtime.pp > 1 needs a function that splits the model, such as "
                "ditty_di.parallelize.stages.split (pipeline=stages)"
            )
        pipeline_loss = PipelineLoss((processors or Processors()).finish)
        whole = on_meta(model)
        schedule, modules, first, last = pipeline_fn(
            model,
            parallel_dims=runtime.parallel_dims,
            device=runtime.device,
            loss_fn=pipeline_loss,
            parallelize_fn=parallelize_fn or (lambda part, parallel_dims: part),
        )
        if schedule is not None and not hasattr(schedule, "run"):
            schedule = TorchSchedule(schedule, has_first_stage=first, has_last_stage=last)
        group = runtime.parallel_dims.get_mesh("pp").get_group()
        parts = ModelParts(modules, schedule, pipeline_loss, whole, group)
    elif parallelize_fn is not None:
        parts = ModelParts([parallelize_fn(model, parallel_dims=runtime.parallel_dims)])
    elif runtime.dp_world_size > 1:
        raise ValueError(
            f"parallelize_fn: {runtime.dp_world_size} data-parallel ranks need a function that "
            f"synchronizes gradients, such as ditty_di.parallelize.data_parallel.shard"
        )
    else:
        parts = ModelParts([model])
    for module in parts.modules:
        if runtime.device.type == "cpu":
            sum_gradients_on_gloo(module)
        if is_meta(module):
            materialize(module, runtime.device)
            weights(module, device=runtime.device)  # type: ignore[misc]
        if missing := uninitialized(module):
            raise ValueError(f"weights: these tensors have no value (meta or NaN): {missing[:5]}")
        module.train()
    return parts


def broadcast(module: nn.Module) -> None:
    """Give a module's parameters and buffers rank 0's values.

    Args:
        module: the same module on all ranks, with values.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)


def setup_loss(
    loss_fn: Loss | LossFunction, runtime: Runtime, parallelize_fn: ParallelizeFn | None = None
) -> Loss:
    """Move a loss that is a module to the device, equal on all ranks, and shard it on request.

    A loss, or a part of one, that compares rows of all ranks gets them by its `use_ranks(mesh)`.

    Args:
        loss_fn: a loss, or any callable of output and labels.
        runtime: device and layout.
        parallelize_fn: shards its parameters; None keeps all of them on every rank.

    Raises:
        TypeError: something that is not callable.
    """
    loss: Any = as_loss(loss_fn)
    if not isinstance(loss, nn.Module):
        return loss  # type: ignore[no-any-return]
    broadcast(loss.to(runtime.device))
    for part in loss.modules() if runtime.dp_world_size > 1 else ():
        if (use_ranks := getattr(part, "use_ranks", None)) is not None:
            use_ranks(runtime.parallel_dims.get_mesh("batch"))
    if parallelize_fn is not None:
        loss = parallelize_fn(loss, parallel_dims=runtime.parallel_dims)
        if runtime.device.type == "cpu":
            sum_gradients_on_gloo(loss)
    return loss  # type: ignore[no-any-return]


def setup_dataloader(dataloader: DataLoaderFactory | DataLoader, runtime: Runtime) -> DataLoader:
    """Complete a partial with this rank's coordinates, and verify those of any loader.

    Args:
        dataloader: a loader, or a factory that takes `dp_rank` and `dp_world_size`.
        runtime: the data-parallel rank.

    Raises:
        ValueError: the loader was made for another rank or number of ranks.
    """
    expected = {"dp_rank": runtime.dp_rank, "dp_world_size": runtime.dp_world_size}
    loader = dataloader(**expected) if callable(dataloader) else dataloader
    alone = {"dp_rank": 0, "dp_world_size": 1}
    has = {name: getattr(loader, name, alone[name]) for name in expected}
    if has != expected:
        raise ValueError(
            f"dataloader: it was made for {has}, but this rank is {expected}; pass a partial that "
            f"takes dp_rank and dp_world_size"
        )
    return loader


def accumulation_steps(
    global_batch_size: int | None, *, dataloader: DataLoader, runtime: Runtime
) -> int:
    """Return the number of micro-batches per rank and optimizer step.

    Args:
        global_batch_size: rows per optimizer step over all ranks; None is one micro-batch a rank.
        dataloader: its `batch_size` is in rows per micro-batch.
        runtime: the number of data-parallel ranks.

    Raises:
        ValueError: the rows do not divide.
    """
    if global_batch_size is None:
        return 1
    rows = dataloader.batch_size * runtime.dp_world_size
    if global_batch_size < 1 or global_batch_size % rows:
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} is not a multiple of {rows} = "
            f"dataloader.batch_size ({dataloader.batch_size}) x data-parallel ranks "
            f"({runtime.dp_world_size}); change one of them"
        )
    return global_batch_size // rows


def setup_checkpointer(
    checkpointer: CheckpointerFactory,
    *,
    model_parts: list[nn.Module],
    weights: WeightsFn | None,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    dataloader: DataLoader,
    grad_scaler: torch.amp.GradScaler,
    others: Mapping[str, Stateful],
) -> Checkpointer:
    """Complete the checkpointer with the states that a resumed run needs.

    Args:
        checkpointer: the factory.
        model_parts: the modules as this rank trains them.
        weights: function that can fill frozen parameters again, which are then not saved.
        loss_fn: saved if it has a state.
        optimizer: saved by parameter name.
        lr_scheduler: saved whole.
        dataloader: its position and a digest of its data are saved.
        grad_scaler: saved if it is enabled.
        others: further states by key.
    """
    saved: dict[str, Any] = {
        **model_states(model_parts, weights),
        "optimizer": states.OptimizerState(optimizer),
        "lr_scheduler": states.SchedulerState(lr_scheduler),
        "data": dataloader,
        "content": DataContent(dataloader),
        **others,
    }
    if isinstance(loss_fn, nn.Module) and loss_fn.state_dict():
        saved["loss"] = ModelState([loss_fn])
    if grad_scaler.is_enabled():
        saved["grad_scaler"] = grad_scaler
    return checkpointer(states=saved, rank_states={"rng": states.RNGState()})


def setup_processors(
    processors: Processors, *, runtime: Runtime, contracts: str, around: dict[str, Any]
) -> Processors:
    """Check the contracts from loader to loss; move processors that are modules to the device.

    Args:
        processors: preprocessors and postprocessors.
        runtime: the device.
        contracts: `static`, `runtime` or `every_batch`.
        around: loader, model and loss, as `Processors.validate` takes them.

    Raises:
        ContractError: the contracts do not fit.
        ValueError: an unknown `contracts`; processors together with context parallelism, or with
            trainable parameters.
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
                    f"{processor.name}: nothing would train its parameters; move them to the model "
                    f"or the loss, or freeze them by requires_grad_(False)"
                )
            processor.to(runtime.device)
    if report.unchecked and "loader" in around and runtime.rank == 0:
        stages = ", ".join(map(str, report.unchecked))
        log.info("not checked, without a contract: %s (task=check draws all stages)", stages)
    return processors


def require_state(dataloader: DataLoader) -> None:
    """Raise unless a checkpoint can save the loader's position in the data.

    Args:
        dataloader: the loader.

    Raises:
        ValueError: the loader has no state.
    """
    if not (hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")):
        raise ValueError(
            "dataloader: it has no state_dict and load_state_dict, so a resumed run could not "
            "find its position in the data; use ditty_di.data.Loader, or train without a "
            "checkpointer"
        )
