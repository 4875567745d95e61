"""Compare the logits of two models on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ditty_di.models.evaluation import evaluating

#: A model's inputs without the batch dimension: `{"input": int64 [seq], ...}`.
Row = dict[str, Tensor]


def rows_of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: Any, max_tokens: int
) -> list[Row]:
    """Return the texts as inputs of a causal model, or of a seq2seq model that repeats them.

    Args:
        texts: one a row.
        tokenizer: the model's.
        config: the model's configuration.
        max_tokens: of a row.
    """
    limit = min(max_tokens, tokenizer.model_max_length)
    encoded = [torch.tensor(tokenizer(text)["input_ids"][:limit]) for text in texts]
    return [_row({"input": ids}, ids, config, limit) for ids in encoded]


def rows_of_dataset(dataset: Any, count: int, config: Any, max_tokens: int) -> list[Row]:
    """Return the beginnings of the first rows of a dataset of `(inputs, labels)`.

    Images are left out: the tokens that stand for them are then as any others.

    Args:
        dataset: indexable.
        count: number of rows.
        config: the model's configuration.
        max_tokens: of a row.
    """
    rows = [dataset[index] for index in range(min(count, len(dataset)))]
    return [_row(inputs, torch.as_tensor(labels), config, max_tokens) for inputs, labels in rows]


def _row(inputs: dict[str, Any], targets: Tensor, config: Any, max_tokens: int) -> Row:
    row = {
        name: torch.as_tensor(value)[:max_tokens]
        for name, value in inputs.items()
        if name != "images"
    }
    if config.is_encoder_decoder and "decoder_input_ids" not in row:
        shifted = targets[: max_tokens - 1]
        shifted = torch.where(shifted < 0, config.pad_token_id, shifted)
        start = torch.tensor([config.decoder_start_token_id])
        row["decoder_input_ids"] = torch.cat([start, shifted])
    return row


@torch.no_grad()
def logits_on(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Return the logits `[seq, vocab]` of each row in evaluation mode, float32 on the CPU.

    All ranks of a sharded model must call it.
    """
    device = next(model.parameters()).device
    found = []
    with evaluating([model]):
        for row in rows:
            inputs = {name: value[None].to(device) for name, value in row.items()}  # [1, seq]
            # With a key-value cache the documents of a packed row would see each other.
            output = model(inputs.pop("input"), use_cache=False, **inputs)
            found.append(getattr(output, "logits", output)[0].float().cpu())
    return found


def difference(those: Sequence[Tensor], these: Sequence[Tensor]) -> dict[str, float]:
    """Return how far logits are apart: `max_abs`, `mean_abs`, and `kl`.

    Args:
        those: logits `[seq, vocab]` of one model.
        these: logits of the other; `kl` is KL(those || these), the mean in nats per token.
    """
    gap_sum, kl_sum, largest, tokens, elements = 0.0, 0.0, 0.0, 0, 0
    for a, b in zip(those, these, strict=True):
        vocab = min(a.shape[-1], b.shape[-1])  # one of them may have unused rows at its end
        a, b = a[:, :vocab].double(), b[:, :vocab].double()  # [seq, vocab]
        gap = (a - b).abs()
        largest = max(largest, float(gap.max()))
        gap_sum, elements = gap_sum + float(gap.sum()), elements + gap.numel()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl_sum, tokens = kl_sum + float((p.exp() * (p - q)).sum()), tokens + len(a)
    return {"max_abs": largest, "mean_abs": gap_sum / elements, "kl": kl_sum / tokens}
