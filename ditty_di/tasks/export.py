"""A trained model as a folder that others can open."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ditty_di.io import is_first_rank

# torch is imported when a task runs: the command line must answer without it.
if TYPE_CHECKING:
    from torch import nn

    from ditty_di.protocols import WeightsFn


def export(
    model: nn.Module,
    export: Callable[[list[nn.Module]], None] | None,
    weights: WeightsFn | None = None,
) -> dict[str, Any]:
    """Calls `export([model])`, which writes, on the CPU in one process.

    `weights` fills a model that is on meta, usually from a checkpoint. Of several ranks the first
    does the work, the others return at once.

    Raises:
        ValueError: `export` is None, as in a run that trained without one.
    """
    if export is None:
        raise ValueError(
            "export: this run exports nothing; add export=hugging_face for a whole model, "
            "adapter or merged for one with adapters"
        )
    if not is_first_rank():
        return {}
    import torch

    from ditty_di.tasks.loading import ready

    ready(model, weights, torch.device("cpu"))
    export([model])
    return {}
