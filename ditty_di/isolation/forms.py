"""Inputs that can make a model keep the documents of a packed row apart, and what adds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.isolation.positions import document_index

if TYPE_CHECKING:
    Form = Callable[[Tensor, Any], dict[str, Any] | None]


def _block_mask(position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return the causal block-diagonal mask, bool `[rows, 1, length, length]`; True is visible."""
    document = document_index(position_ids)
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = at[:, None] - at
    visible = (document[:, :, None] == document[:, None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return visible[:, None]


def _additive(mask: Tensor) -> Tensor:
    """Return 0 where the mask is True and -inf elsewhere, in torch's default dtype.

    Each row sees itself, so softmax never gets -inf alone.
    """
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _additive_by_layer(position_ids: Tensor, config: Any) -> dict[str, Any] | None:
    """One additive mask for each kind of layer, for models whose windows differ by layer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    if window is None or not kinds <= windows.keys():
        return None
    masks = {kind: _additive(_block_mask(position_ids, windows[kind])) for kind in sorted(kinds)}
    return {"attention_mask": masks}


def _sequence_index(position_ids: Tensor) -> Tensor:
    return document_index(position_ids).to(torch.int32)


#: What each batch gets beside `position_ids`, in the order in which it is tried; None: not for
#: this configuration.
FORMS: dict[str, Form] = {
    "position_ids alone": lambda positions, config: {},
    "use_cache=False": lambda positions, config: {"use_cache": False},
    "a 4-D boolean attention_mask": lambda positions, config: {
        "attention_mask": _block_mask(positions)
    },
    "a 4-D additive attention_mask": lambda positions, config: {
        "attention_mask": _additive(_block_mask(positions))
    },
    "a 4-D attention_mask for each kind of layer": _additive_by_layer,
    "seq_idx": lambda positions, config: {"seq_idx": _sequence_index(positions)},
    "seq_idx and a 4-D boolean attention_mask": lambda positions, config: {
        "seq_idx": _sequence_index(positions),
        "attention_mask": _block_mask(positions),
    },
    "seq_idx and a 4-D additive attention_mask": lambda positions, config: {
        "seq_idx": _sequence_index(positions),
        "attention_mask": _additive(_block_mask(positions)),
    },
}


class DocumentInputs:
    """A forward pre-hook that adds what keeps documents apart to each call with `position_ids`.

    Calls with an `attention_mask` or a key-value cache, as in generation, are left alone.
    """

    def __init__(self, form: Form, config: Any) -> None:
        self.form, self.config = form, config

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        taken = (kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if positions is None or positions.dim() != 2 or any(taken):
            return None
        return args, {**kwargs, **(self.form(positions, self.config) or {})}
