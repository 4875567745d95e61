"""Read a model, a loss or averages out of a checkpoint, without the run that wrote it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.manifest import CheckpointError
from ditty_di.checkpoint.model_state import ModelState, base_shown, require_base
from ditty_di.checkpoint.restricted import loads
from ditty_di.fqn import canonical_fqn
from ditty_di.messages import first_of
from ditty_di.models.skipped import skipped_paths
from ditty_di.models.weights import local
from ditty_di.protocols import WeightsFn

log = logging.getLogger(__name__)


def load_model(path: str | Path, model: nn.Module) -> int:
    """Load the model's tensors in place, of any layout and into any layout.

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
    checkpoint = Checkpoint.find(path)
    has_base = "base" in checkpoint.entries
    whole = ModelState([model]).state_dict()
    elsewhere = tuple(f"{canonical_fqn(path)}." for path in skipped_paths(model))
    beyond = [
        key
        for key in checkpoint.entries.get("model", {})
        if key not in whole and not key.startswith(elsewhere)
    ]
    if beyond and has_base:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: it has adapters that the model does not: "
            f"{first_of(beyond, 5)}; build the model with the same `adapter`"
        )
    _load_state(checkpoint, "model", ModelState([model], frozen=not has_base))
    if beyond:
        log.warning("%s has what the model does not: %s", checkpoint.path, first_of(beyond, 5))
    return checkpoint.step


def load_loss(loss_fn: Any, /, path: str | Path) -> None:
    """Load the parameters and buffers of a loss in place; without any, nothing.

    Args:
        loss_fn: the loss.
        path: see `load_model`.

    Raises:
        CheckpointError: no whole checkpoint, or one of a training with another loss.
    """
    if isinstance(loss_fn, nn.Module) and loss_fn.state_dict():
        _load_state(Checkpoint.find(path), "loss", ModelState([loss_fn]))


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
    """Fill a model from a checkpoint: for the `weights` slot.

    Args:
        model: its parameters have memory.
        device: passed to `initialize`.
        path: see `load_model`.
        initialize: called first, for what no checkpoint has (buffers that are not saved, such as
            rotary frequencies), and for the base of a checkpoint that holds adapters only. None is
            the model's own `default_weights`, if it has them.
        check_base: refuse adapters of another base than `initialize` reads.
        averages: the name of a callback that averaged weights (`ditty_di.callbacks.EMA`), whose
            averages are loaded instead of the weights.

    Raises:
        CheckpointError: see `load_model`; another base, or one without identity; no averages.
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
    """Load the averages that a callback made of the model's weights, in place of the weights.

    Args:
        path: see `load_model`.
        model: its parameters have memory; frozen ones, which have no averages, stay as they are.
        callback: its name in the trainer's `callbacks`.

    Raises:
        CheckpointError: no whole checkpoint, or no averages of such a callback in it.
    """
    checkpoint = Checkpoint.find(path)
    state = f"callback_{callback}"
    saved = checkpoint.entries.get(state, {})
    weights = {f"averages.{canonical_fqn(name)}": p for name, p in model.named_parameters()}
    averages: dict[str, Any] = {
        key: torch.empty_like(p, dtype=torch.float32) for key, p in weights.items() if key in saved
    }
    if not averages:
        names = [n.removeprefix("callback_") for n in checkpoint.entries if "callback_" in n]
        raise CheckpointError(
            f"{checkpoint.path} has no averages of a callback {callback!r}; of callbacks it has "
            f"{', '.join(names) or 'nothing'}"
        )
    checkpoint.read({state: averages})
    with torch.no_grad():
        for key, average in averages.items():
            local(weights[key]).copy_(local(average))


def read_base(path: str | Path) -> dict[str, Any] | None:
    """Return the base of a checkpoint of adapters: path, revision, hash; None for other ones.

    Args:
        path: see `load_model`.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    checkpoint = Checkpoint.find(path)
    if "base" not in checkpoint.entries:
        return None
    base: dict[str, Any] = {"identity": None}
    checkpoint.read({"base": base})
    return loads(base["identity"])[1]


def _require_base(
    path: str | Path, there: dict[str, Any], identity: Callable[[], dict[str, Any]] | None
) -> None:
    if identity is None:
        raise CheckpointError(
            f"{path} holds adapters for the base {base_shown(there)}, and not the base; pass "
            f"initialize=ditty_di.models.pretrained.Pretrained(...), or check_base=false if what "
            f"initializes the model is that base"
        )
    try:
        hint = "set model.path to the first, or check_base=false to use them nevertheless"
        require_base(there, identity(), hint=hint)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _load_state(checkpoint: Checkpoint, name: str, state: ModelState) -> None:
    """Load one state of a checkpoint, without a process group."""
    saved = checkpoint.entries.get(name, {})
    try:
        state.prepare_load(saved)
        read = {
            key: None if saved[key] is None else value for key, value in state.state_dict().items()
        }
        checkpoint.read({name: read})
        state.load_state_dict(
            {key: loads(v)[1] if isinstance(v, bytes) else v for key, v in read.items()}
        )
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{checkpoint.path} cannot be read: {reason}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit the {name}: {error}") from error
