"""Reading a model out of a checkpoint, without the run that wrote it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ditty_di.checkpoint.folder import MANIFEST, CheckpointError, latest, read_manifest

# torch is imported when a model is read: the command line must answer without it.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from ditty_di.protocols import WeightsFn

__all__ = ["from_checkpoint", "latest", "load_model"]

log = logging.getLogger(__name__)


def load_model(path: str | Path, model: nn.Module) -> int:
    """Reads the model's tensors in place, of any layout and into any layout.

    No process group is needed; with several ranks each reads its own shards.

    Args:
        path: one checkpoint (`.../step-00000100`), or a folder of them: then the newest whole one.
        model: its parameters have memory. What the checkpoint has beyond them is logged.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: no whole checkpoint, or one that lacks something of the model or has it
            in another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    from ditty_di.checkpoint.entries import saved_entries, shown, unpack
    from ditty_di.checkpoint.states import ModelState

    checkpoint = _find(Path(path).expanduser())
    manifest = read_manifest(checkpoint)
    state = ModelState([model])
    try:
        saved = saved_entries(checkpoint).get("model", {})
        state.prepare_load(saved)
        live = state.state_dict()
        read = {key: None if saved[key] is None else value for key, value in live.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = FileSystemReader(checkpoint)
            load({"model": read}, storage_reader=reader, no_dist=True)
        state.load_state_dict(
            {k: unpack(v)[1] if isinstance(v, bytes) else v for k, v in read.items()}
        )
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{checkpoint} cannot be read: {reason}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} does not fit the model: {error}") from error
    if beyond := [key for key in saved if key not in live]:
        log.warning("%s has what the model does not: %s", checkpoint, shown(beyond))
    return manifest.step


def from_checkpoint(
    model: nn.Module,
    /,
    *,
    device: torch.device,
    path: str | Path,
    initialize: WeightsFn | None = None,
) -> None:
    """Fills a model from a checkpoint: for the `weights` slot.

    Args:
        path: see `load_model`.
        initialize: called first, for what no checkpoint has (buffers that are not saved, such as
            rotary frequencies).

    Raises:
        CheckpointError: see `load_model`.
    """
    if initialize is not None:
        initialize(model, device=device)
    load_model(path, model)


def _find(path: Path) -> Path:
    if (path / MANIFEST).exists():
        return path
    checkpoint = latest(path)
    if checkpoint is None:
        what = "holds no whole checkpoint" if path.is_dir() else "is no folder"
        raise CheckpointError(
            f"{path} {what}; give a folder with step-00000100/ and so on in it, or one of those"
        )
    return checkpoint
