"""Positions of tokens in their documents, and the number of positions that a model has."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def positions_of(sample: Mapping[str, Any]) -> Tensor:
    """Return the position of each token in its document, `[rows, length]`.

    Taken from `position_ids` (torchtitan: `positions`), else from the borders `cu_seq_lens_q`,
    else from the document numbers `seq_idx`; without any of them each row is one document.

    Args:
        sample: the inputs of a micro-batch.
    """
    rows, length = sample["input"].shape[:2]
    given, borders, index = (sample.get(k) for k in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    given = sample.get("positions") if given is None else given
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
    """Return whether any row of a micro-batch's inputs holds more than one document."""
    given = sample.get("input")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return False
    return bool((positions_of(sample).diff(dim=1) != 1).any())


def position_limit(module: nn.Module, config: Any) -> int | None:
    """Return the size of the model's table of positions; None without a table, as with RoPE.

    A table is an embedding other than those of tokens, or a non-persistent buffer, with as many
    rows as the configuration has positions (up to 8 more: OPT and its kin have an offset).

    Args:
        module: the model.
        config: its configuration.
    """
    positions = configured_positions(config)
    if positions is None:
        return None
    tokens = {id(embedding) for embedding in _token_embeddings(module)}
    for part in module.modules():
        more = part.num_embeddings - positions if isinstance(part, nn.Embedding) else -1
        if 0 <= more <= 8 and id(part) not in tokens:
            return positions
        buffers = (part._buffers.get(name) for name in part._non_persistent_buffers_set)
        for shape in (b.shape for b in buffers if b is not None and b.dim() >= 2):
            is_square = shape[-1] == shape[-2]  # such as a causal mask
            if (len(shape) == 2 and shape[0] == positions) or (
                is_square and shape[-1] == positions
            ):
                return positions
    return None


def configured_positions(config: Any) -> int | None:
    """Return the number of positions in a configuration of transformers; None without one."""
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
    """Compare the longest row of a dataset with the number of positions that the model has.

    Args:
        module: the model.
        config: its configuration.
        dataset: may have `longest`, `lengths` or `seq_len`, in tokens.
        sample: the inputs of a micro-batch.
        name: of the model, for messages.

    Raises:
        ValueError: rows are longer than the model's table of positions.
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
    """Return the tokens of the longest row, as the dataset knows it, else as in the sample."""
    if not getattr(config, "is_encoder_decoder", False):
        for name in ("longest", "lengths", "seq_len"):
            found: Any = getattr(dataset, name, None)
            if isinstance(found, int):
                return found
            if getattr(found, "ndim", 0) == 1 and len(found):
                return int(max(found))
    return int(positions_of(sample).max()) + 1
