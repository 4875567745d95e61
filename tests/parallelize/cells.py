"""What the ranks of the layout matrix do: train cells, resume checkpoints, export."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.export import SafetensorsExport
from ditty_di.export.gather import whole_models
from ditty_di.fqn import canonical_fqn
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.optim.schedules import constant
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from tests.distributed.cases import Recorder
from tests.parallelize.matrix import LAYOUTS, MODELS, VARIANTS, Layout, Variant

ROWS, SAVED_AT = 8, 3


class Rows(torch.utils.data.Dataset):
    """Token rows with ragged masks; packed ones have two documents."""

    def __init__(self, variant: Variant, vocab: int) -> None:
        self.length, self.packed = variant.length, variant.packed
        steps = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
        self.stream = steps.cumsum(0) % vocab

    def __len__(self) -> int:
        return len(self.stream) // self.length - 1

    def __getitem__(self, i: int) -> Any:
        row = self.stream[i * self.length : (i + 1) * self.length + 1]
        labels = row[1:].clone()
        labels[: i % 23] = -100
        if not self.packed:
            return {"input": row[:-1]}, labels
        cut = 5 + i % 20
        labels[cut - 1] = -100
        positions = torch.cat((torch.arange(cut), torch.arange(self.length - cut)))
        return {"input": row[:-1], "position_ids": positions}, labels


@dataclass
class Result:
    """Losses and gradient norms by step, and the gradients of the first step, clipped and whole."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def _recording(named: Any, gradients: dict[str, Tensor]) -> torch.optim.Optimizer:
    """AdamW that notes the gradients of its first step."""
    optimizer = torch.optim.AdamW(named, lr=3e-3)

    def note(*ignored: Any) -> None:
        if gradients:
            return
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                    gradients[canonical_fqn(name)] = whole.clone()

    optimizer.register_step_pre_hook(note)
    return optimizer


@functools.cache
def _runtime_of(layout: str) -> tuple[Runtime, Tensor]:
    """The runtime of a layout, and torch's generator after its seeds.

    Each makes process groups, whose threads take time from all that follows.
    """
    runtime = Runtime(seed=1, **LAYOUTS.get(layout, Layout(1)).degrees)
    return runtime, torch.get_rng_state()


def train(
    folder: Path,
    model: str,
    variant: str = "",
    layout: str = "one",
    *,
    steps: int | None = None,
    checkpoints: Path | None = None,
    export: Path | None = None,
) -> Result:
    """Train a cell on this process's ranks; pretrained models are in `folder`."""
    chosen, how, where = MODELS[model], VARIANTS[variant], LAYOUTS.get(layout, Layout(1))
    runtime, seeded = _runtime_of(layout)
    torch.set_rng_state(seeded)
    recorder, gradients = Recorder(), {}
    built = chosen.build(how.transforms, folder / model if how.pretrained else None)
    vocab: int = built.config.vocab_size  # type: ignore[union-attr, assignment]
    micro_batches = max(how.accumulation, where.micro_batches)
    on_rank = ROWS // micro_batches // runtime.dp_world_size
    weights = partial(initialize, seed=3, init=hugging_face)
    trainer = Trainer(
        runtime=runtime,
        model=built,
        weights=None if how.pretrained or chosen.output is None else weights,
        loss_fn=how.loss(output=chosen.output),
        optimizer=partial(_recording, gradients=gradients),
        lr_scheduler=partial(constant, max_steps=how.steps),
        dataloader=partial(Loader, Rows(how, vocab), micro_batch_size=on_rank, seed=1),
        parallelize_fn=partial(chosen.parallelize, **where.options, **how.options),
        pipeline_fn=partial(chosen.pipeline, schedule=where.schedule),
        checkpointer=checkpoints
        and partial(Checkpointer, str(checkpoints), save_interval=SAVED_AT, keep_latest_k=None),
        logger=MetricsProcessor([recorder], log_interval=1),
        global_batch_size=ROWS,
        max_grad_norm=0.5,
        max_steps=steps or how.steps,
        **where.slots,
    )
    trainer.train()
    trainer.close()
    if export is not None:
        for modules in whole_models(trainer.parts):
            SafetensorsExport(str(export))(modules)
    rows = runtime.broadcast([row for row in recorder.rows if "grad_norm" in row])
    if runtime.parallel_dims.pp_enabled:  # each stage has its own, and both ends a tied embedding
        of_ranks: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(of_ranks, gradients)
        gradients = {name: g for one in of_ranks for name, g in one.items()}
        assert all(torch.equal(g, gradients[name]) for one in of_ranks for name, g in one.items())
    return Result([r["loss"] for r in rows], [r["grad_norm"] for r in rows], gradients)


# -- jobs: (name, arguments), done one after another in one process group -------------------------


def serve(folder: str, jobs: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Do all jobs on these ranks; what each returned."""
    known: dict[str, Callable[..., Any]] = {
        job.__name__: job for job in (reference, compared, save, resume)
    }
    return [known[name](Path(folder), *arguments) for name, arguments in jobs]


def reference(folder: Path, model: str, variant: str) -> None:
    """Train on one rank, for `compared`."""
    torch.save(vars(train(folder, model, variant)), folder / f"{model}-{variant}.pt")


def compared(folder: Path, *cell: str) -> dict[str, Any]:
    """The largest differences of a cell to one rank, or the sentence that refuses it."""
    model, variant, layout = cell
    try:
        many = train(folder, model, variant, layout)
    except ValueError as error:
        return {"refused": str(error)}
    return difference(Result(**torch.load(folder / f"{model}-{variant}.pt")), many)


def difference(one: Result, many: Result) -> dict[str, Any]:
    """Absolute of the losses; relative of norms, and of the gradient that differs most."""
    assert one.gradients.keys() == many.gradients.keys()
    gradients = {
        name: float((many.gradients[name] - g).norm() / g.norm().clamp_min(1e-6))
        for name, g in one.gradients.items()
    }
    worst = max(gradients, key=gradients.__getitem__)
    return {
        "loss": max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True)),
        "norm": max(abs(a - b) / a for a, b in zip(one.norms, many.norms, strict=True)),
        "gradient": gradients[worst],
        "of": worst,
        "learned": one.losses[0] - one.losses[-1],
    }


def save(folder: Path, model: str, layout: str) -> None:
    """Train to the checkpoint in a layout."""
    checkpoints = folder / "saved" / model / layout
    train(folder, model, layout=layout, steps=SAVED_AT, checkpoints=checkpoints)


def resume(folder: Path, model: str, source: str, layout: str) -> dict[str, Any]:
    """Train from another layout's checkpoint to the end, and export; differences to one rank."""
    resumed = folder / "resumed" / model
    copy = resumed / f"{source} by {layout}"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "saved" / model / source, copy)
    dist.barrier()
    exported = copy / "export"
    rest = train(folder, model, layout=layout, checkpoints=copy, export=exported)
    whole = torch.load(folder / f"{model}-.pt")["losses"]
    dist.barrier()
    of_one = resumed / "one by one" / "export" / "model.safetensors"
    tensors, others = load_file(exported / "model.safetensors"), load_file(of_one)
    return {
        "steps": len(rest.losses),
        "loss": max(abs(a - b) / a for a, b in zip(whole[SAVED_AT:], rest.losses, strict=False)),
        "names": tensors.keys() == others.keys(),
        "weights": max(float((tensors[name] - t).abs().max()) for name, t in others.items()),
    }
