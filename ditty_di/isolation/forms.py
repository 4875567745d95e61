"""Inputs that can make a model keep the documents of a packed row apart, and a hook to add them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.batch import document_index
from ditty_di.isolation.documents import DocumentRows

#: Takes `position_ids` `[rows, length]` and a configuration; returns the inputs to add, or None
#: where the form does not apply to the configuration.
Inputs = Callable[[Tensor, Any], dict[str, Any] | None]


@dataclass(frozen=True)
class Form:
    """What is done for a batch of packed rows.

    Args:
        inputs: returns what the model gets beside `position_ids`.
        splits: recurrent layers get each document in a row of its own (`DocumentRows`).
    """

    inputs: Inputs
    splits: bool = False


def _visible(position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return the causal block-diagonal mask, bool `[rows, 1, length, length]`; True is visible."""
    document = document_index(position_ids)
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = at[:, None] - at  # [length, length]
    visible = (document[:, :, None] == document[:, None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return visible[:, None]


def _additive(visible: Tensor) -> Tensor:
    """Return 0 where the mask is True and -inf elsewhere, in torch's default dtype.

    Each token sees itself, so softmax never gets only -inf.
    """
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)


def _boolean_mask(position_ids: Tensor, config: Any) -> dict[str, Any]:
    return {"attention_mask": _visible(position_ids)}


def _additive_mask(position_ids: Tensor, config: Any) -> dict[str, Any]:
    return {"attention_mask": _additive(_visible(position_ids))}


def _mask_by_layer_type(position_ids: Tensor, config: Any) -> dict[str, Any] | None:
    """Return one additive mask for each type of layer, for models whose windows differ by layer."""
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    if window is None or not types <= windows.keys():
        return None
    masks = {kind: _additive(_visible(position_ids, windows[kind])) for kind in sorted(types)}
    return {"attention_mask": masks}


def _sequence_index(position_ids: Tensor, config: Any) -> dict[str, Any]:
    return {"seq_idx": document_index(position_ids).to(torch.int32)}


def _nothing(position_ids: Tensor, config: Any) -> dict[str, Any]:
    return {}


def _both(one: Inputs, other: Inputs) -> Inputs:
    return lambda positions, config: {
        **(one(positions, config) or {}),
        **(other(positions, config) or {}),
    }


_SPLIT = "a row of its own for each document in recurrent layers"
_BOOLEAN = "a 4-D boolean attention_mask"
_ADDITIVE = "a 4-D additive attention_mask"

#: What each batch gets beside `position_ids`, in the order in which it is tried.
FORMS: dict[str, Form] = {
    "position_ids alone": Form(_nothing),
    "use_cache=False": Form(lambda positions, config: {"use_cache": False}),
    _BOOLEAN: Form(_boolean_mask),
    _ADDITIVE: Form(_additive_mask),
    "a 4-D attention_mask for each kind of layer": Form(_mask_by_layer_type),
    "seq_idx": Form(_sequence_index),
    f"seq_idx and {_BOOLEAN}": Form(_both(_sequence_index, _boolean_mask)),
    f"seq_idx and {_ADDITIVE}": Form(_both(_sequence_index, _additive_mask)),
    _SPLIT: Form(_nothing, splits=True),
    f"{_SPLIT}, and {_BOOLEAN}": Form(_boolean_mask, splits=True),
    f"{_SPLIT}, and {_ADDITIVE}": Form(_additive_mask, splits=True),
}


class DocumentInputs:
    """A forward pre-hook that adds what keeps documents apart to each call with `position_ids`.

    Calls with an `attention_mask` or a key-value cache, as in generation, are not changed.

    Args:
        form: one of `FORMS`.
        config: the model's configuration.
    """

    def __init__(self, form: Form, config: Any) -> None:
        self.form, self.config = form, config
        self._rows = DocumentRows() if form.splits else None

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """Register the hook on a model; return what removes it."""
        detached = ExitStack()
        hook = module.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        detached.callback(hook.remove)
        if self._rows is not None:
            detached.callback(self._rows.attach(module))
        return detached.close

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Return the arguments with the form's inputs; None leaves them as they are."""
        positions = kwargs.get("position_ids")
        taken = (kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if positions is not None and (positions.dim() != 2 or any(taken)):
            positions = None
        if self._rows is not None:
            self._rows.follow(positions)
        if positions is None:
            return None
        return args, {**kwargs, **(self.form.inputs(positions, self.config) or {})}
