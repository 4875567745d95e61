"""Pipeline parallelism for decoders of transformers: each stage has some of the blocks.

A stage is a copy of the model in which modules of other stages are replaced by stand-ins, so that
names and numbers stay those of the whole model: weights, checkpoints and exports know no stages.
Later stages run the model's own forward pass on the hidden states that they get, for masks and
rotary embeddings; their first block takes the hidden states themselves.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.fqn import canonical_fqn
from ditty_di.messages import refuse
from ditty_di.models.skipped import Skipped, first_argument
from ditty_di.models.weights import transformers_model
from ditty_di.parallelize.decoder import Decoder, instead_of, read_decoder
from ditty_di.parallelize.fits import Degrees, Parts
from ditty_di.parallelize.pipeline import WithLoss
from ditty_di.parallelize.schedule import (
    MICRO_BATCH,
    SCHEDULES,
    ZERO_BUBBLE,
    Stages,
    StageSchedule,
    several_stages_a_rank,
    shares_of,
    stages_of_rank,
)
from ditty_di.protocols import early_checks

# -- what fits ------------------------------------------------------------------------------------


def validate(
    *,
    schedule: str = "1F1B",
    stages_per_rank: int | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Raise ValueError for arguments of `split` that no model fits."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule}: write one of {', '.join(SCHEDULES)}")
    several = several_stages_a_rank(schedule)
    per_rank = 1 if not several else stages_per_rank
    if schedule == "ZBVZeroBubble" and stages_per_rank not in (None, 2):
        raise ValueError(f"stages_per_rank={stages_per_rank}: {schedule} has 2 on each rank")
    if stages_per_rank is not None and (stages_per_rank < 1 or stages_per_rank != per_rank):
        raise ValueError(
            f"stages_per_rank={stages_per_rank}: {schedule} has 1 on each rank; several are for "
            f"{', '.join(name for name in SCHEDULES if several_stages_a_rank(name))}"
        )
    if layers is not None and min(layers, default=0) < 1:
        raise ValueError(f"layers={list(layers)}: each stage needs at least 1")


def stages_fit(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why the parts of a run do not fit the degree of pipeline parallelism.

    Args:
        parts: model, and the functions that split and parallelize it.
        degrees: the layout.
    """
    if degrees.pp == 1:
        return []
    options = arguments(parts.pipeline_fn)
    schedule, decoder = options["schedule"], read_decoder(parts.model)
    problems = (
        decoder.problems
        or _too_few(decoder, options, degrees.pp)
        or _unfit_tie(parts.model, decoder, schedule) + _untrained(decoder, options, degrees.pp)
    )
    found = [f"runtime.pp={degrees.pp}: {problem}" for problem in problems]
    return found + unfit_degrees(schedule, parts, degrees)


def arguments(function: Any) -> dict[str, Any]:
    """Return the arguments of a partial by name, with the defaults of its function.

    Args:
        function: None has none.
    """
    if function is None:
        return {}
    known = inspect.signature(getattr(function, "func", function)).parameters.values()
    defaults = {p.name: p.default for p in known if p.default is not p.empty}
    return {**defaults, **getattr(function, "keywords", {})}


def _too_few(decoder: Decoder, options: dict[str, Any], pp: int) -> list[str]:
    """Return whether blocks and stages do not match in number."""
    blocks, per_rank = len(decoder.blocks), _per_rank(options)
    layers, total = options["layers"], pp * per_rank
    if layers is not None and (len(layers) != total or sum(layers) != blocks):
        return [
            f"pipeline.layers={list(layers)} has {sum(layers)} layers in {len(layers)} stages, and "
            f"the model {blocks} layers in {total} stages"
        ]
    if total > blocks:
        each = f" ({per_rank} a rank)" if per_rank > 1 else ""
        works = ", ".join(map(str, range(1, blocks // per_rank + 1))) or "1"
        return [f"{blocks} layers do not fill {total} stages{each}; pp fits {works}"]
    return []


def _unfit_tie(model: nn.Module, decoder: Decoder, schedule: str) -> list[str]:
    """Return why embeddings that are tied to the head cannot be on both ends."""
    after = {id(p) for module in decoder.after.values() for p in module.parameters()}
    found = []
    for path in decoder.tied():
        own = model.get_submodule(path).named_parameters()
        if alone := [name for name, p in own if p.requires_grad and id(p) not in after]:
            found.append(
                f"{path} is tied to the head and has {alone[0]}, which only the first stage would "
                f"train; leave {path.rpartition('.')[2]} out of the adapter's target_modules"
            )
        elif schedule == "ZBVZeroBubble":
            found.append(
                f"{path} is tied to the head, and with schedule={schedule} one rank has both ends; "
                f"write pipeline.schedule=InterleavedZeroBubble, or 1F1B"
            )
    return found


def _untrained(decoder: Decoder, options: dict[str, Any], pp: int) -> list[str]:
    """Return which ranks would have nothing to train."""
    per_rank = _per_rank(options)
    shares = shares_of(len(decoder.blocks), pp * per_rank, options["layers"])
    for rank in range(pp):
        stages = stages_of_rank(options["schedule"], rank, pp, pp * per_rank)
        blocks = [i for stage in stages for i in shares[stage]]
        modules = [decoder.blocks[i] for i in blocks]
        modules += decoder.before.values() if 0 in stages else []
        modules += decoder.after.values() if pp * per_rank - 1 in stages else []
        if not any(p.requires_grad for module in modules for p in module.parameters()):
            return [
                f"nothing is trained in the layers {blocks} of pipeline rank {rank}; write "
                f"pipeline.layers, the numbers of layers of all stages, so that each rank trains "
                f"some"
            ]
    return []


def unfit_degrees(schedule: str, parts: Parts, degrees: Degrees) -> list[str]:
    """Return what pipeline stages, or a schedule of them, cannot be combined with.

    Args:
        schedule: one of `SCHEDULES`.
        parts: of the run.
        degrees: the layout.
    """
    found = [
        f"runtime.pp={degrees.pp}: stages are not split along the {what}; write runtime.{name}=1, "
        f"or runtime.pp=1"
        for name, what, n in (("cp", "sequence", degrees.cp), ("ep", "experts", degrees.ep))
        if n > 1
    ]
    collate = parts.collate_fn
    if getattr(collate, "packs_documents", False) and getattr(collate, "pads_rows", False):
        found.append(
            f"runtime.pp={degrees.pp}: stages pass on micro-batches of one shape, and rows without "
            "padding are as long as their documents; write batching=packed, or runtime.pp=1"
        )
    if schedule in ZERO_BUBBLE:
        found += [
            f"pipeline.schedule={schedule}: {problem}, or pipeline.schedule=Interleaved1F1B"
            for problem in _unfit_zero_bubble(arguments(parts.parallelize_fn), degrees)
        ]
    return found


def _unfit_zero_bubble(options: dict[str, Any], degrees: Degrees) -> list[str]:
    """Return what a split backward pass cannot be combined with.

    The weights' half of the backward pass runs after FSDP has freed the parameters and reduced the
    gradients: losses were wrong then, without an error.
    """
    others = {name: getattr(degrees, name) for name in ("dp_replicate", "dp_shard", "tp")}
    found = [f"it fits runtime.{name}=1, and not {n}" for name, n in others.items() if n > 1]
    if options.get("param_dtype") or options.get("cpu_offload"):
        found.append(
            "FSDP casts or moves parameters between the two halves of the backward pass; write "
            "precision=fp32 and parallelize.cpu_offload=false"
        )
    recompute = options.get("activation_checkpointing")
    if getattr(getattr(recompute, "func", recompute), "one_backward_pass", False):
        found.append("selective checkpointing allows one backward pass; write full, or null")
    if options.get("compile") is not None:
        found.append("torch cannot split the backward pass of compiled blocks; write compile=null")
    return found


def _per_rank(options: dict[str, Any]) -> int:
    return (options["stages_per_rank"] or 2) if several_stages_a_rank(options["schedule"]) else 1


# -- split ----------------------------------------------------------------------------------------


@early_checks(validate=validate, fits=[stages_fit])
def split(
    model: nn.Module,
    /,
    *,
    parallel_dims: ParallelDims,
    device: torch.device,
    loss_fn: Callable[..., Tensor],
    parallelize_fn: Callable[..., nn.Module],
    schedule: str = "1F1B",
    stages_per_rank: int | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[StageSchedule, list[nn.Module], bool, bool]:
    """Split a decoder of transformers into pipeline stages, by its list of blocks.

    An optimizer step's micro-batches are those of gradient accumulation. Embeddings that are tied
    to the head are on the first and on the last stage; their gradients are summed after each step.

    Args:
        model: on meta or with values; it may have LoRA and quantized layers.
        parallel_dims: the layout.
        device: of the stages.
        loss_fn: called with the model's output and the number of the micro-batch.
        parallelize_fn: parallelizes a stage.
        schedule: name of torch's pipeline schedule: `1F1B`, `GPipe`; with several stages a rank
            `Interleaved1F1B`; with a split backward pass `InterleavedZeroBubble`,
            `ZBVZeroBubble`.
        stages_per_rank: stages of a rank; None: 1, and 2 with schedules for several.
        layers: number of blocks of each stage; None shares them evenly, where embeddings and head
            count as a block each.

    Returns:
        The schedule, this rank's stages, and whether the first and the last stage are among them.

    Raises:
        ValueError: the model cannot be split like this.
    """
    options = {"schedule": schedule, "stages_per_rank": stages_per_rank, "layers": layers}
    mesh, decoder = parallel_dims.get_mesh("pp"), read_decoder(model)
    problems = decoder.problems or _too_few(decoder, options, mesh.size())
    refuse(f"runtime.pp={mesh.size()}: {problem}" for problem in problems)
    total = mesh.size() * _per_rank(options)
    shares = shares_of(len(decoder.blocks), total, layers)
    mine = stages_of_rank(schedule, mesh.get_local_rank(), mesh.size(), total)
    modules = {
        n: parallelize_fn(
            cut(model, decoder, shares[n], getattr(loss_fn, "stage_part", None)),
            parallel_dims=parallel_dims,
        )
        for n in mine
    }
    stages = Stages(
        modules,
        total,
        output=take_output,
        tied=[
            canonical_fqn(f"{path}.{name}")
            for path in decoder.tied()
            for name, _ in decoder.before[path].named_parameters()
        ],
        numbered=True,
    )
    made = StageSchedule(schedule, stages, group=mesh.get_group(), device=device, loss_fn=loss_fn)
    return made, list(modules.values()), 0 in modules, total - 1 in modules


#: Its stages compute their parts of a loss (`ditty_di.losses.Loss.of_stage`).
vars(split)["stage_losses"] = True


# -- one stage ------------------------------------------------------------------------------------

#: Attribute of a stage: its `_Ends`.
_ENDS = "_ends"


class _Ends:
    """Hidden states into and out of a stage, beside the model's own arguments and output."""

    def __init__(self) -> None:
        self.hidden: Any = None
        self.output: Any = None
        self.part: Callable[[int], Tensor | None] | None = None

    def take_output(self) -> Any:
        """Return the model's output of the micro-batch that ran last, once."""
        output, self.output = self.output, None
        return output


class _End(Skipped):
    """In place of a block beside a stage."""

    def __init__(self, ends: _Ends, values: int) -> None:
        super().__init__(values)
        self.ends = ends


class _Entry(_End):
    """In place of the block before a stage: return the hidden states that the stage got."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, self.ends.hidden = self.ends.hidden, None
        return self.wrapped(hidden)


class _Exit(_End):
    """In place of the block after a stage: keep the hidden states that the stage made."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.ends.output = first_argument(args, kwargs)
        return self.wrapped(self.ends.output)


def cut(
    model: nn.Module,
    decoder: Decoder,
    blocks: range,
    stage_part: Callable[[int, int], Tensor | None] | None = None,
) -> nn.Module:
    """Return a copy of the model with some of its blocks, and a forward pass of its own.

    It takes the model's input, or the hidden states of the stage before it, and returns hidden
    states; that of the last blocks returns the tensors of the model's output.

    Args:
        model: the whole model; it is not changed.
        decoder: its parts.
        blocks: the numbers of the stage's blocks.
        stage_part: returns the part of the loss of a stage, by its first block and the number of
            the micro-batch that it ran last.
    """
    ends = _Ends()
    first, last = blocks.start == 0, blocks.stop == len(decoder.blocks)
    if stage_part is not None and not last:
        ends.part = partial(stage_part, blocks.start)
    skipped = {i: Skipped(decoder.values) for i in range(len(decoder.blocks)) if i not in blocks}
    if not first:
        skipped[blocks.start - 1] = _Entry(ends, decoder.values)
    if not last:
        skipped[blocks.stop] = _Exit(ends, decoder.values)
    stand_ins: dict[int, Any] = {
        id(decoder.blocks[i]): stand_in.like(decoder.blocks[i]) for i, stand_in in skipped.items()
    }
    if not first:
        kept = decoder.tied() if last else []
        stand_ins |= {id(m): instead_of(m) for p, m in decoder.before.items() if p not in kept}
    if not last:
        stand_ins |= {id(m): instead_of(m) for m in decoder.after.values()}
    stage = copy.deepcopy(model, stand_ins)  # which returns them for these modules
    body = transformers_model(stage)[1].base_model
    run = stage.forward if last or body is stage else body
    # No closure, so that a deep copy of the stage runs its own modules.
    stage.forward = partial(_run, run, ends, first, last)  # type: ignore[method-assign]
    vars(stage)[_ENDS] = ends
    return stage


def _run(
    run: Callable[..., Any], ends: _Ends, first: bool, last: bool, x: Tensor, /, **kwargs: Any
) -> Any:
    """Run a stage: the forward pass of its model, from what goes into it to what goes out of it."""
    number = kwargs.pop(MICRO_BATCH, None)
    if first:
        output = run(x, **kwargs)
    else:
        ends.hidden = x
        output = run(inputs_embeds=x, **kwargs)
    if last:
        # Schedules and FSDP's hooks need this tensor; the loss gets all of the output.
        ends.output = output
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    hidden = ends.take_output().contiguous()
    part = ends.part(number) if ends.part is not None and number is not None else None
    if part is not None:
        return WithLoss.apply(hidden, part)  # type: ignore[no-untyped-call]
    return hidden.clone() if hidden._is_view() else hidden  # views cannot be detached in place


def take_output(stage: nn.Module, returned: Any) -> Any:
    """Return the model's output of the micro-batch that the last stage ran last, once.

    Args:
        stage: the last stage, as it is trained.
        returned: what it returned; the output has it, too.
    """
    ends: _Ends = next(vars(module)[_ENDS] for module in stage.modules() if _ENDS in vars(module))
    return ends.take_output()
