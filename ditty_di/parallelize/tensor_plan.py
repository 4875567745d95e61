"""Which layers of a model tensor parallelism splits, by the plan that the model brings.

Models of transformers say it in `tp_plan`: patterns of module paths, each with the name of a style.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ditty_di.messages import first_of
from ditty_di.models.weights import transformers_model
from ditty_di.parallelize.data_parallel import has_parameters, repeated_blocks

#: The styles of transformers that can be combined with sequence parallelism.
COLUMNS, ROWS, HEAD = "colwise", "rowwise", "colwise_gather_output"
EMBEDDING, PARTIAL = "embedding_rowwise", "replicated_with_grad_allreduce"

#: Styles of experts: these are split over ranks one by one instead (`runtime.ep`).
EXPERTS = ("moe_tp_experts", "packed_colwise", "packed_rowwise", "moe_identity_expert")


@dataclass
class TensorPlan:
    """How the layers of a model are split.

    Attributes:
        blocks: the repeated blocks that have parameters; activations between them are split along
            the sequence.
        regions: modules in the blocks that need the whole sequence, such as attention: they begin
            with layers in `columns` and end with one in `rows`.
        columns: layers of which a rank computes some of the outputs, by path.
        rows: layers of which a rank has some of the inputs.
        heads: output projections of which a rank computes some of the logits.
        embeddings: tables of which a rank has some of the rows.
        partial: modules in the regions whose gradients are partial sums over the ranks.
        experts: modules that are not touched.
        problems: why the model cannot be split by this plan.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    regions: dict[str, nn.Module] = field(default_factory=dict)
    columns: dict[str, nn.Module] = field(default_factory=dict)
    rows: dict[str, nn.Module] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    partial: list[nn.Module] = field(default_factory=list)
    experts: dict[str, nn.Module] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_plan(model: nn.Module, *, expert_parallel: bool = False) -> TensorPlan:
    """Return the plan of a model, with all problems that do not depend on the number of ranks.

    Args:
        model: of transformers, or one with such a model inside, such as peft's.
        expert_parallel: whether expert parallelism splits the experts.
    """
    plan = TensorPlan()
    styles = _styles(model)
    if not styles:
        plan.problems.append(
            f"{type(transformers_model(model)[1] or model).__name__} has no tensor-parallel plan "
            f"(tp_plan), which says how layers are split"
        )
        return plan
    plan.blocks = [b for b in repeated_blocks(model).children() if has_parameters(b)]
    in_blocks = {id(m) for block in plan.blocks for m in block.modules()}
    unknown: dict[str, str] = {}
    for path, (style, module) in styles.items():
        inside = id(module) in in_blocks
        if style in EXPERTS:
            plan.experts[path] = module
        elif style in (COLUMNS, ROWS) and inside:
            (plan.columns if style == COLUMNS else plan.rows)[path] = module
            above = path.rpartition(".")[0]
            plan.regions[above] = model.get_submodule(above)
        elif style == HEAD and not inside:
            plan.heads[path] = module
        elif style == EMBEDDING and not inside:
            plan.embeddings[path] = module
        elif style == PARTIAL and inside:
            plan.partial.append(module)
        else:
            unknown.setdefault(style, _pattern(path))
    if plan.experts and not expert_parallel:
        plan.problems.append(
            f"tensor parallelism does not split experts ({_pattern(next(iter(plan.experts)))}), "
            f"whose rows on a rank are not one piece of the checkpoint's: runtime.ep splits them"
        )
    plan.problems += [
        f"the model's plan has {style} for {where}, which is not supported together with sequence "
        f"parallelism"
        for style, where in unknown.items()
    ]
    plan.problems += _unsplittable(plan)
    if not plan.problems:
        plan.problems += dict.fromkeys(_gaps(plan, model))
    return plan


def is_packed(layer: nn.Module) -> bool:
    """Return whether a linear layer keeps its weight packed, in tensors that can be split."""
    return hasattr(layer, "qweight")


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer that an adapter is around, or a layer without one itself."""
    return getattr(layer, "base_layer", layer)


def lora_pairs(layer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the two matrices of each LoRA on a layer: into the rank's dimension, and out of it."""
    into: Any = getattr(layer, "lora_A", {})
    out_of: Any = getattr(layer, "lora_B", {})
    yield from ((into[name], out_of[name]) for name in into)


def _styles(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return style and module by path, for the modules that have parameters.

    The style of a parameter, such as one of fused experts, counts for the module that has it.
    """
    prefix, base = transformers_model(model)
    patterns: dict[str, str] = getattr(base, "tp_plan", None) or {}
    found = {}
    for path, module in () if base is None else base.named_modules(remove_duplicate=False):
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        style = next((patterns[p] for p in map(_pattern, (path, *own)) if p in patterns), None)
        if style is not None and has_parameters(module):
            found[f"{prefix}.{path}" if prefix else path] = (style, module)
    return found


def _unsplittable(plan: TensorPlan) -> Iterator[str]:
    """Yield which layers are of a kind that cannot be split."""
    found: dict[str, dict[str, None]] = {}
    for path, layer in (*plan.columns.items(), *plan.rows.items(), *plan.heads.items()):
        if (reason := _why_not(layer)) is not None:
            found.setdefault(reason, {})[_pattern(path)] = None
    for path, module in plan.embeddings.items():
        if not isinstance(module, nn.Embedding):
            reason = (
                f"an embedding of the kind {type(module).__name__} is not split, a plain one is"
            )
            found.setdefault(reason, {})[_pattern(path)] = None
    for reason, paths in found.items():
        yield f"{reason} ({first_of(paths, 1)})"


def _why_not(layer: Any) -> str | None:
    """Return why a linear layer, with or without an adapter, cannot be split; None if it can."""
    base: Any = base_layer(layer)
    plain = isinstance(base, nn.Linear) and base.weight.shape == (
        base.out_features,
        base.in_features,
    )
    if not (plain or is_packed(base)):
        return (
            f"a layer of the kind {type(base).__name__} is not split; plain linear layers and "
            f"those of quantize=nf4 and quantize=int8 are"
        )
    if base is layer:
        return None
    adapter = f"an adapter of the kind {type(layer).__name__}"
    if hasattr(layer, "lora_A"):
        dora, bias = len(layer.lora_magnitude_vector), any(layer.lora_bias.values())
        adapter = "DoRA, which needs norms of whole rows," if dora else "LoRA with lora_bias"
        if not (dora or bias):
            return None
    return f"{adapter} is not split; plain LoRA is (adapter=lora)"


def _gaps(plan: TensorPlan, model: nn.Module) -> Iterator[str]:
    """Yield what the plan does not tell, without which splitting would be silently wrong.

    Outside of the regions a rank has a part of the sequence. What works token by token may be
    there, such as a norm, whose parameters have one dimension, and a router beside its experts.
    """
    layers = (*plan.columns.values(), *plan.rows.values(), *plan.partial)
    known = {id(p) for module in layers for p in module.parameters()}
    in_regions = {id(p) for module in plan.regions.values() for p in module.parameters()}
    routed = [model.get_submodule(path.rpartition(".")[0]) for path in plan.experts]
    known |= {id(p) for module in routed for p in module.parameters()} - in_regions
    unknown = {
        name: None
        for block in plan.blocks
        for name, p in block.named_parameters()
        if id(p) not in known and (p.dim() > 1 or id(p) in in_regions)
    }
    if unknown:
        yield f"the model's plan does not tell how {first_of(unknown)} of a block can be split"
    for style, split in ((COLUMNS, plan.columns), (ROWS, plan.rows)):
        around = {path.rpartition(".")[0] for path in split}
        for path in plan.regions.keys() - around:
            yield f"the model's plan has no {style} layer in {_pattern(path)}"


def _pattern(path: str) -> str:
    """Return a path with * for the number of a block, as plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
