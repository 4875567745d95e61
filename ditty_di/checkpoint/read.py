"""Reading a model out of a checkpoint, without the run that wrote it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.checkpoint.folder import (
    MANIFEST,
    CheckpointError,
    latest,
    latest_intact,
    read_manifest,
    verify,
)

# torch is imported when a model is read: the command line must answer without it.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from ditty_di.checkpoint.restricted import Reader
    from ditty_di.protocols import WeightsFn

__all__ = ["from_checkpoint", "latest", "load_averages", "load_loss", "load_model", "read_base"]

log = logging.getLogger(__name__)


def load_model(path: str | Path, model: nn.Module) -> int:
    """Reads the model's tensors in place, of any layout and into any layout.

    No process group is needed; with several ranks each reads its own shards.

    Args:
        path: one checkpoint (`.../step-00000100`), or a folder of them: then the newest whole one.
        model: its parameters have memory. What a checkpoint of a whole model has beyond them is
            logged. From a checkpoint of adapters only these are read, and all of them: the frozen
            parameters must have the base's values already.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: no whole checkpoint, one that lacks something of the model or has it in
            another shape, or adapters that the model does not have.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from ditty_di.checkpoint.entries import saved_entries, shown, unpack
    from ditty_di.checkpoint.restricted import Reader
    from ditty_di.checkpoint.states import ModelState

    checkpoint = _find(Path(path).expanduser())
    manifest = read_manifest(checkpoint)
    reader = Reader(checkpoint)
    try:
        entries = saved_entries(checkpoint)
        saved = entries.get("model", {})
        state = ModelState([model], frozen="base" not in entries)
        whole = ModelState([model]).state_dict()
        beyond = [key for key in saved if key not in whole]
        if beyond and "base" in entries:
            raise ValueError(
                f"it has adapters that the model does not: {shown(beyond)}; build the model with "
                f"the same `adapter`"
            )
        state.prepare_load(saved)
        live = state.state_dict()
        read = {key: None if saved[key] is None else value for key, value in live.items()}
        _read(reader, {"model": read})
        state.load_state_dict(
            {k: unpack(v)[1] if isinstance(v, bytes) else v for k, v in read.items()}
        )
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{checkpoint} cannot be read: {reason}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint} does not fit the model: {error}") from error
    if beyond:
        log.warning("%s has what the model does not: %s", checkpoint, shown(beyond))
    return manifest.step


def load_loss(loss_fn: Any, /, path: str | Path) -> None:
    """Reads the parameters and buffers of a loss in place; of one that has none, nothing.

    Args:
        path: see `load_model`.

    Raises:
        CheckpointError: no whole checkpoint, or one of a training with another loss.
    """
    from torch import nn

    from ditty_di.checkpoint.entries import saved_entries
    from ditty_di.checkpoint.restricted import Reader
    from ditty_di.checkpoint.states import ModelState

    if not (isinstance(loss_fn, nn.Module) and loss_fn.state_dict()):
        return
    checkpoint = _find(Path(path).expanduser())
    read_manifest(checkpoint)
    state = ModelState([loss_fn])
    try:
        state.prepare_load(saved_entries(checkpoint).get("loss", {}))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} does not fit the loss: {error}") from error
    read = state.state_dict()
    _read(Reader(checkpoint), {"loss": read})
    state.load_state_dict(read)


def from_checkpoint(
    model: nn.Module,
    /,
    *,
    device: torch.device,
    path: str | Path,
    initialize: WeightsFn | None = None,
    check_base: bool = True,
    averages: str | None = None,
) -> None:
    """Fills a model from a checkpoint: for the `weights` slot.

    Args:
        path: see `load_model`.
        initialize: called first, for what no checkpoint has (buffers that are not saved, such as
            rotary frequencies), and for the base of a checkpoint that holds adapters only. None is
            the model's own `default_weights`, if it has them.
        check_base: refuse adapters of another base than `initialize` reads.
        averages: the name of a callback that averaged weights (`ditty_di.callbacks.EMA`), whose
            averages are taken instead of the weights.

    Raises:
        CheckpointError: see `load_model`; another base, or none that says what it is; no averages.
    """
    initialize = initialize or getattr(model, "default_weights", None)
    there = read_base(path)
    if there is not None and check_base:
        _require_base(path, there, getattr(initialize, "identity", None))
    if initialize is not None:
        initialize(model, device=device)
    load_model(path, model)
    if averages is not None:
        load_averages(path, model, callback=averages)


def load_averages(path: str | Path, model: nn.Module, *, callback: str = "ema") -> None:
    """Reads the averages that a callback made of the model's weights, in their place.

    Args:
        path: see `load_model`.
        model: its parameters have memory; frozen ones, which have no averages, stay as they are.
        callback: its name in the trainer's `callbacks`.

    Raises:
        CheckpointError: no whole checkpoint, or no averages of such a callback in it.
    """
    import torch

    from ditty_di.checkpoint.entries import saved_entries
    from ditty_di.checkpoint.restricted import Reader
    from ditty_di.models.weights import local
    from ditty_di.names import canonical_fqn

    checkpoint = _find(Path(path).expanduser())
    read_manifest(checkpoint)
    entries = saved_entries(checkpoint)
    saved = entries.get(f"callback_{callback}", {})
    weights = {f"averages.{canonical_fqn(name)}": p for name, p in model.named_parameters()}
    read: dict[str, Any] = {
        key: torch.empty_like(p, dtype=torch.float32) for key, p in weights.items() if key in saved
    }
    if not read:
        callbacks = [name.removeprefix("callback_") for name in entries if "callback_" in name]
        raise CheckpointError(
            f"{checkpoint} has no averages of a callback {callback!r}; of callbacks it has "
            f"{', '.join(callbacks) or 'nothing'}"
        )
    _read(Reader(checkpoint), {f"callback_{callback}": read})
    with torch.no_grad():
        for key, average in read.items():
            local(weights[key]).copy_(local(average))


def read_base(path: str | Path) -> dict[str, Any] | None:
    """Which base a checkpoint of adapters belongs to: path, revision, hash; None if to none.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    from ditty_di.checkpoint.entries import saved_entries
    from ditty_di.checkpoint.restricted import Reader

    checkpoint = _find(Path(path).expanduser())
    read_manifest(checkpoint)
    return _read_identity(Reader(checkpoint), saved_entries(checkpoint))


def _require_base(
    path: str | Path, there: dict[str, Any], identity: Callable[[], dict[str, Any]] | None
) -> None:
    from ditty_di.checkpoint.states import base_shown, require_base

    if identity is None:
        raise CheckpointError(
            f"{path} holds adapters for the base {base_shown(there)}, and not the base; pass "
            f"initialize=ditty_di.models.pretrained.Pretrained(...), or check_base=false if what "
            f"initialises the model is that base"
        )
    try:
        hint = "set model.path to the first, or check_base=false to use them nevertheless"
        require_base(there, identity(), hint=hint)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_identity(
    reader: Reader, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    from ditty_di.checkpoint.entries import unpack

    if "base" not in entries:
        return None
    read: dict[str, Any] = {"identity": None}
    _read(reader, {"base": read})
    return unpack(read["identity"])[1]


def _read(reader: Reader, targets: dict[str, Any]) -> None:
    """Fills `targets` in place, without a process group."""
    from torch.distributed.checkpoint.state_dict_loader import load

    from ditty_di.checkpoint.restricted import Planner

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(targets, storage_reader=reader, planner=Planner(), no_dist=True)


def _find(path: Path) -> Path:
    if (path / MANIFEST).exists():
        verify(path, read_manifest(path))
        return path
    checkpoint = latest_intact(path)
    if checkpoint is None:
        what = "holds no whole checkpoint" if path.is_dir() else "is no folder"
        raise CheckpointError(
            f"{path} {what}; give a folder with step-00000100/ and so on in it, or one of those"
        )
    return checkpoint
