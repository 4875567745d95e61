"""Check a loader's rows against the model before training: documents apart, length of rows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ditty_di.batch import Batch
from ditty_di.data.rendering.images import Images
from ditty_di.isolation.copies import copy_of_each_kind, fill_randomly
from ditty_di.isolation.positions import check_positions, holds_several, position_limit
from ditty_di.isolation.probe import Isolation, NotIsolated
from ditty_di.losses.plain import PlainLoss, as_loss
from ditty_di.models.weights import is_meta
from ditty_di.parallelize.context import SequenceSplit
from ditty_di.processors.workflow import Processors
from ditty_di.protocols import DataLoader, DataLoaderFactory
from ditty_di.runtime import Runtime
from ditty_di.seed import preserved_rng

log = logging.getLogger(__name__)

#: Parameters of the largest model that `rehearse` builds, without layers that repeat.
REHEARSED = 50_000_000


def check_rows(
    loader: DataLoaderFactory | DataLoader | None,
    *,
    isolation: Isolation,
    runtime: Runtime,
) -> None:
    """Compare the first rows of a loader with the model, before anything is trained on them.

    Rows that hold several documents are probed (`Isolation.ensure`), and no row may be longer than
    the model's table of positions. A loader without `dataset` and `collate_fn` is not checked.

    Args:
        loader: or what makes it for a data-parallel rank; None is not checked.
        isolation: the probe of the model.
        runtime: this process's.

    Raises:
        ValueError: rows that are too long, or documents that the model cannot keep apart.
    """
    if loader is None:
        return
    if callable(loader):
        loader = loader(dp_rank=runtime.dp_rank, dp_world_size=runtime.dp_world_size)
    with preserved_rng(runtime.device):
        sample = _sample(loader)
    if sample is None:
        return
    dataset = getattr(loader, "dataset", None)
    check_positions(isolation.module, isolation.config, dataset, sample, name=isolation.name)
    collate = getattr(loader, "collate_fn", None)
    if getattr(collate, "packs_documents", False) or holds_several(sample):
        split = SequenceSplit.of([isolation.module])
        if runtime.parallel_dims.cp_enabled and split is None:
            raise NotIsolated(
                f"{isolation.name}: packed rows cannot be split over ranks (runtime.cp > 1) by "
                f"this parallelize function; write parallelize=fsdp, or batching=padded"
            )
        if runtime.parallel_dims.pp_enabled:
            _ensure_of_stages(isolation, sample)
        else:
            isolation.ensure(sample)
            images: Images | None = getattr(collate, "images", None)
            if images is not None:
                isolation.ensure_images(images)
        if split is not None and isolation.added is not None:
            raise NotIsolated(
                f"{isolation.name}: the documents of a packed row see each other without "
                f"{isolation.added}, which cannot be split over ranks (runtime.cp > 1); use "
                f"batching=padded or length_grouped, or runtime.cp=1"
            )


def _ensure_of_stages(isolation: Isolation, sample: dict[str, Any]) -> None:
    """Probe the copy of a model that is split into stages, whose inputs nothing can be added to."""
    try:
        with preserved_rng(isolation.device):
            fill_randomly(isolation.module, isolation.device)
        isolation.ensure(sample)
    except NotIsolated:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotIsolated(
            f"{isolation.name}: whether the documents of a packed row see each other cannot be "
            f"probed with runtime.pp > 1 ({reason}); use batching=padded or length_grouped"
        ) from error
    if isolation.added is not None:
        raise NotIsolated(
            f"{isolation.name}: the documents of a packed row see each other without "
            f"{isolation.added}, which pipeline stages do not get; use batching=padded or "
            f"length_grouped, or runtime.pp=1"
        )


def _sample(loader: Any) -> dict[str, Any] | None:
    """Return the inputs of up to 8 rows of a loader's dataset, collated; None without them.

    Errors are left to the loader's first batch, where they are reported with their cause.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    if dataset is None or not hasattr(dataset, "__getitem__"):
        return None
    collate = torch.utils.data.default_collate if collate is None else collate
    collate = getattr(collate, "without_images", collate)
    try:
        rows = min(8, getattr(loader, "batch_size", 1) or 1, len(dataset))
        first = Batch.of(collate([dataset[0]])).inputs
        if not (isinstance(first, dict) and isinstance(first.get("input"), torch.Tensor)):
            return None
        if first["input"].dim() < 2 or len(first) == 1 or rows == 1:
            return first if first["input"].dim() >= 2 else None
        found = Batch.of(collate([dataset[n] for n in range(rows)])).inputs
    except Exception as error:
        log.debug("no sample of the loader's rows: %r", error)
        return None
    return found if isinstance(found, dict) else None


def isolation_of(
    module: nn.Module,
    *,
    config: Any,
    forward: Callable[[dict[str, Any]], Any] | None,
    processors: Processors,
    runtime: Runtime,
) -> Isolation:
    """Return the probe of a model as batches reach it: through its preprocessors.

    Args:
        module: what is called in training.
        config: its configuration, if it has one.
        forward: takes inputs on the CPU and returns the model's output; None calls the module.
        processors: of the trainer.
        runtime: this process's.
    """
    run = forward or (lambda inputs: _called(module, Batch(inputs, None).to(runtime.device).inputs))
    before = Processors(processors.preprocessors)
    own = {"original_batch", "target", "forward_kwargs", "model"}

    def prepared(inputs: dict[str, Any]) -> Any:
        if not before:
            return run(inputs)
        states = [(s, copy.deepcopy(s.state_dict())) for s in before.states().values()]
        given = before.prepare(
            Batch(inputs, inputs["input"]),
            epoch=0,
            step=0,
            total_steps=1,
            device=runtime.device,
            model=module,
        )
        for processor, state in states:
            processor.load_state_dict(state)
        if given is None:
            return {}
        written = {name: value for name, value in given.context.items() if name not in own}
        return {"output": run(given.inputs), **written}

    return Isolation(
        module,
        config=config,
        forward=prepared,
        device=runtime.device,
        agree=runtime.any,
        name=getattr(config, "model_type", None) or type(module).__name__,
        modules=processors.preprocessors,
    )


def rehearse(build: Callable[[str], Any]) -> list[str]:
    """Try early what can be tried: the loss, packed rows on a small model, the position table.

    Whether documents see each other follows from a model's structure, so random values are enough.

    Args:
        build: as in `ditty_di.protocols`.

    Returns:
        Warnings.

    Raises:
        ValueError: the model cannot keep the documents of a row apart.
    """
    warnings = []
    loss = as_loss(build("loss_fn"))
    if isinstance(loss, PlainLoss):
        warnings.append(
            f"loss_fn: {loss.name} has no num_valid(batch); it is taken as {loss.counted}"
        )
    collate, length = build("dataloader.collate_fn"), build("dataloader.dataset.seq_len")
    packs = getattr(collate, "packs_documents", False)
    images = getattr(collate, "images", None)
    collate = getattr(collate, "without_images", collate)
    if not packs and not isinstance(length, int):
        return warnings
    model = build("model")
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None) or type(model).__name__
    limit = position_limit(model, config)
    if isinstance(length, int) and limit is not None and length > limit:
        warnings.append(
            f"rows of up to {length} tokens, the model has {limit} positions: data.seq_len={limit}"
        )
    if not packs or not is_meta(model):
        return warnings
    model = copy_of_each_kind(model)
    if sum(p.numel() for p in model.parameters()) > REHEARSED:
        return [*warnings, f"{name}: packed rows are probed at the start, for the model is large"]
    cpu = torch.device("cpu")
    try:
        with preserved_rng(cpu):
            fill_randomly(model, cpu)
            ids = torch.arange(2, 18)
            sample, _ = collate([({"input": ids, "position_ids": torch.arange(16)}, ids)] * 2)
            isolation = Isolation(
                model,
                config=config,
                forward=lambda inputs: _called(model, inputs),
                device=cpu,
                agree=bool,
                name=name,
            )
            isolation.ensure(sample)
            if images is not None:
                isolation.ensure_images(images)
    except NotIsolated as error:
        if not torch.accelerator.is_available():
            raise
        return [*warnings, f"probed on the CPU: {error}"]  # other kernels may isolate documents
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [*warnings, f"{name}: packed rows are probed at the start ({reason})"]
    return warnings


def _called(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(inputs["input"], **{k: v for k, v in inputs.items() if k != "input"})
