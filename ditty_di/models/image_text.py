"""Hugging Face vision-language models, built on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ditty_di.models.modeling  # noqa: F401

# isort: split
from transformers import AutoModelForImageTextToText

from ditty_di.batch import document_index
from ditty_di.models.hugging_face import builders


def document_positions(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compute 3-D rotary positions for rows of several documents: a forward pre-hook.

    Models such as Qwen2.5-VL give an image's tokens positions of time, height and width, and count
    on behind them from the largest. They compute these themselves for rows of one document. With
    `position_ids` `[rows, length]`, which restart in each document, the hook computes them for each
    document, and passes them on as `[4, rows, length]`: the first of these is what was given, by
    which transformers keeps the documents apart.

    Args:
        model: has `get_rope_index`, as transformers calls it.
        args: of the call.
        kwargs: of the call.

    Returns:
        The arguments with other `position_ids`; None leaves them as they are.
    """
    positions, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    kinds, grids = kwargs.get("mm_token_type_ids"), kwargs.get("image_grid_thw")
    if positions is None or positions.dim() != 2 or ids is None:
        return None
    spread = positions.expand(3, -1, -1)  # [3, rows, length], right for text
    if kinds is not None and grids is not None:
        spread = _of_documents(model, ids, positions, kinds, grids)
    return args, {**kwargs, "position_ids": torch.cat([positions[None], spread])}


def _of_documents(
    model: Any, ids: Tensor, positions: Tensor, kinds: Tensor, grids: Tensor
) -> Tensor:
    """Return the rotary positions `[3, rows, length]` of each document by itself."""
    found: list[Tensor] = []
    image = 0
    for row, index in enumerate(document_index(positions)):
        parts: list[Tensor] = []
        for length in index.unique_consecutive(return_counts=True)[1].tolist():
            at = sum(part.shape[-1] for part in parts)
            own = kinds[row : row + 1, at : at + length]
            starts = torch.cat([own[:, :1], own.diff(dim=1)], dim=1) > 0
            end = image + int(starts.sum())
            parts.append(
                model.get_rope_index(
                    ids[row : row + 1, at : at + length],
                    mm_token_type_ids=own,
                    image_grid_thw=grids[image:end],
                )[0]
            )
            image = end
        found.append(torch.cat(parts, dim=-1))
    return torch.cat(found, dim=1)


def _with_document_positions(model: nn.Module, /) -> nn.Module:
    for part in model.modules():
        if hasattr(part, "get_rope_index"):
            part.register_forward_pre_hook(document_positions, with_kwargs=True)
    return model


# inputs [batch, seq], and what the processor makes of the images -> logits [batch, seq, vocab]
from_config, from_pretrained = builders(
    AutoModelForImageTextToText,
    contract="0:2:i64 -> logits:3:f",
    pipeline_tag="image-text-to-text",
    prepare=_with_document_positions,
)
