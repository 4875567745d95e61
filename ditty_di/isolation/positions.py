"""Positions of tokens in their documents, and the positions that a model has a table for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def document_index(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document within its row; both `[rows, length]`.

    A document begins wherever a position is not the one before plus 1.
    """
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts.cumsum(1)


def positions_of(sample: Mapping[str, Any]) -> Tensor:
    """Return the position of each token in its document, `[rows, length]`, from what is there.

    `position_ids`, else the borders `cu_seq_lens_q`, else the numbers `seq_idx`; without any of
    them each row is one document.
    """
    rows, length = sample["input"].shape[:2]
    given, borders, index = (sample.get(k) for k in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.expand(rows, length).contiguous()
    at = torch.arange(rows * length)
    if isinstance(borders, Tensor):
        starts = borders.cpu().long()
        return (at - starts[torch.searchsorted(starts, at, right=True) - 1]).view(rows, length)
    at = at[:length].expand(rows, length)
    if isinstance(index, Tensor) and index.shape == (rows, length):
        new = torch.ones_like(index, dtype=torch.bool)
        new[:, 1:] = index.diff(dim=1) != 0
        return at - torch.where(new, at, 0).cummax(1).values
    return at.contiguous()


def holds_several(sample: Mapping[str, Any]) -> bool:
    """Whether some row of a micro-batch's inputs holds more than one document."""
    given = sample.get("input")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return False
    return bool((positions_of(sample).diff(dim=1) != 1).any())


def position_limit(module: nn.Module, config: Any) -> int | None:
    """Return how many positions the model has a table for; None where it has none, as with RoPE.

    A table is an embedding that is not that of tokens, or a buffer made anew with each model, of as
    many rows as the configuration has positions (up to 8 more: OPT and its kin keep an offset).
    """
    positions = configured_positions(config)
    if positions is None:
        return None
    tokens = {id(embedding) for embedding in _token_embeddings(module)}
    for part in module.modules():
        more = part.num_embeddings - positions if isinstance(part, nn.Embedding) else -1
        if 0 <= more <= 8 and id(part) not in tokens:
            return positions
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if (
                buffer is not None
                and buffer.dim() >= 2
                and positions
                in (
                    buffer.shape[0] if buffer.dim() == 2 else None,
                    buffer.shape[-1] if buffer.shape[-1] == buffer.shape[-2] else None,
                )
            ):
                return positions
    return None


def configured_positions(config: Any) -> int | None:
    """Return the positions that a configuration of transformers names; None without."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _token_embeddings(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                yield getattr(part, getter)()
            except (AttributeError, NotImplementedError, TypeError):
                continue


def check_positions(
    module: nn.Module, config: Any, dataset: Any, sample: Mapping[str, Any], *, name: str
) -> None:
    """Compare the longest row of a data set with the positions that the model has.

    Raises:
        ValueError: the model has a table of positions, and rows are longer.
    """
    positions = configured_positions(config)
    longest = _longest(config, dataset, sample)
    if positions is None or longest <= positions:
        return
    if position_limit(module, config) is not None:
        raise ValueError(
            f"{name}: rows of up to {longest} tokens, the model has {positions} positions: cut "
            f"them with data.seq_len={positions}, or take a model with more positions"
        )
    log.warning(
        "%s: rows of up to %d tokens, beyond the %d that its configuration names "
        "(max_position_embeddings); positions are computed, so it runs",
        *(name, longest, positions),
    )


def _longest(config: Any, dataset: Any, sample: Mapping[str, Any]) -> int:
    """The largest number of positions in a row: as the data set knows it, or as in the sample."""
    if not getattr(config, "is_encoder_decoder", False):
        for name in ("longest", "lengths", "seq_len"):
            found: Any = getattr(dataset, name, None)
            if isinstance(found, int):
                return found
            if getattr(found, "ndim", 0) == 1 and len(found):
                return int(max(found))
    return int(positions_of(sample).max()) + 1
