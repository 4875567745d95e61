"""Linear layers that multiply in float8, by NVIDIA's transformer-engine (2.x)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ditty_di.precision.context import forward_within
from ditty_di.precision.linears import replace, replaceable

MISSING = (
    "precision fp8_te needs transformer-engine, which runs on NVIDIA GPUs of compute capability "
    "8.9 or higher and is built against the CUDA toolkit: pip install 'ditty_di[fp8]' (or use "
    "precision=fp8, which needs neither)"
)


def convert(
    model: nn.Module,
    /,
    *,
    recipe: str | Any = "Float8CurrentScaling",
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Plain linear layers become `transformer_engine.pytorch.Linear`: same names and parameters.

    The model's forward runs within `transformer_engine.pytorch.autocast(recipe=...)`, validation
    included. Values come from a pretrained model, or from weights=torch: transformers' own
    initialization does not know these layers.

    Args:
        model: any module with linear layers.
        recipe: a class of `transformer_engine.common.recipe` by its name (`DelayedScaling`,
            `Float8CurrentScaling`, `MXFP8BlockScaling`, ...), or an object of one.
        skip: parts of the names of layers to leave as they are.

    Raises:
        ImportError: transformer-engine is not installed, or does not load here.
        ValueError: no recipe of that name; no layer to convert.
    """
    te, recipes = _imported()
    if isinstance(recipe, str):
        if not hasattr(recipes, recipe):
            raise ValueError(
                f"precision: transformer_engine.common.recipe has no {recipe!r}; use "
                f"Float8CurrentScaling or DelayedScaling"
            )
        recipe = getattr(recipes, recipe)()
    for name, linear in replaceable(model, skip=skip):
        layer = te.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=linear.weight.dtype,
            device="meta",
        )
        layer.weight = linear.weight  # tied, frozen and on its device as before
        if linear.bias is not None:
            layer.bias = linear.bias
        model = replace(model, name, layer)
    return forward_within(model, lambda module: _autocast(te, recipe))


def activation_checkpointing(block: nn.Module, /) -> nn.Module:
    """Checkpoint the activations of a block, for the node `activation_checkpointing`.

    torch's own function would recompute the block outside of the autocast, not in float8.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    te, _ = _imported()
    return checkpoint_wrapper(block, checkpoint_fn=te.checkpoint, use_reentrant=False)


def _autocast(te: ModuleType, recipe: Any) -> Any:
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe)
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)  # its name in earlier 2.x


def _imported() -> tuple[ModuleType, ModuleType]:
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:  # without CUDA its libraries do not load
        raise ImportError(f"{MISSING}: {error}") from error
    return te, recipes
