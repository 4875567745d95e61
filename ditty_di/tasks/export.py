"""A trained model as a folder that other libraries can load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ditty_di.io import is_first_rank
from ditty_di.protocols import WeightsFn
from ditty_di.tasks.loading import ready


def export(
    model: nn.Module,
    export: Callable[[list[nn.Module]], None] | None,
    weights: WeightsFn | None = None,
) -> dict[str, Any]:
    """Export a model on the CPU, in one process: of several ranks only the first does the work.

    Args:
        model: The model, on meta (then `weights` fills it) or with its values.
        export: Called with `[model]`; writes the folder.
        weights: Fills a model on meta, usually from a checkpoint.

    Raises:
        ValueError: `export` is None, as in a run that trained without one.
    """
    if export is None:
        raise ValueError(
            "export: this run exports nothing; add export=hugging_face for a whole model, "
            "adapter or merged for one with adapters"
        )
    if is_first_rank():
        ready(model, weights, torch.device("cpu"))
        export([model])
    return {}
