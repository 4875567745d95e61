"""How far apart the logits of two models are, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.metrics.validation import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    #: A model's inputs, without their batch dimension: `{"input": int64 [seq], ...}`.
    Row = dict[str, Tensor]


def rows_of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: Any, max_tokens: int
) -> list[Row]:
    """The texts as inputs of a causal model, or of a seq2seq model that repeats them."""
    limit = min(max_tokens, tokenizer.model_max_length)
    encoded = [torch.tensor(tokenizer(text)["input_ids"][:limit]) for text in texts]
    return [_row({"input": ids}, ids, config, limit) for ids in encoded]


def rows_of_dataset(dataset: Any, count: int, config: Any, max_tokens: int) -> list[Row]:
    """The beginnings of the first rows of a data set of `(inputs, labels)`."""
    rows = [dataset[index] for index in range(min(count, len(dataset)))]
    return [_row(inputs, torch.as_tensor(labels), config, max_tokens) for inputs, labels in rows]


def _row(inputs: dict[str, Any], targets: Tensor, config: Any, max_tokens: int) -> Row:
    row = {name: torch.as_tensor(value)[:max_tokens] for name, value in inputs.items()}
    if config.is_encoder_decoder and "decoder_input_ids" not in row:
        said = targets[: max_tokens - 1]
        said = torch.where(said < 0, config.pad_token_id, said)
        row["decoder_input_ids"] = torch.cat([torch.tensor([config.decoder_start_token_id]), said])
    return row


@torch.no_grad()
def logits_on(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Logits `[seq, vocab]` of each row, float32 on the CPU; the model is in evaluation mode.

    Every rank of a sharded model must call it.
    """
    device = next(model.parameters()).device
    found = []
    with evaluating([model]):
        for row in rows:
            inputs = {name: value[None].to(device) for name, value in row.items()}
            # With a key-value cache the documents of a packed row would see each other.
            output = model(inputs.pop("input"), use_cache=False, **inputs)
            found.append(getattr(output, "logits", output)[0].float().cpu())
    return found


def difference(those: Sequence[Tensor], these: Sequence[Tensor]) -> dict[str, float]:
    """`max_abs`, `mean_abs` and `kl` (those over these, nats a position, mean) of logits."""
    apart, nats, largest, positions, numbers = 0.0, 0.0, 0.0, 0, 0
    for a, b in zip(those, these, strict=True):
        vocab = min(a.shape[-1], b.shape[-1])  # one of them may have unused rows at its end
        a, b = a[:, :vocab].double(), b[:, :vocab].double()
        gap = (a - b).abs()
        largest = max(largest, float(gap.max()))
        apart, numbers = apart + float(gap.sum()), numbers + gap.numel()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        nats, positions = nats + float((p.exp() * (p - q)).sum()), positions + len(a)
    return {"max_abs": largest, "mean_abs": apart / numbers, "kl": nats / positions}
