"""Plain autoregressive sampling: with nothing but `forward`, and so under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Forward = Callable[[dict[str, Tensor]], Any]


def logits_of(output: Any) -> Tensor:
    """The output's `logits`, as Hugging Face models return them, or the output itself."""
    return getattr(output, "logits", output)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt that is to be continued: no EOS behind it, and never none at all.

    An empty prompt becomes the BOS token, or EOS, which separates documents in training.

    Raises:
        ValueError: an empty prompt, and a tokenizer that has neither token.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = ids or [token for token in starts if token is not None][:1]
    if not ids:
        raise ValueError("an empty prompt needs a tokenizer with a BOS or EOS token; write a word")
    return ids


@torch.no_grad()
def continuations(
    forward: Callable[[dict[str, Tensor]], Any],
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    max_length: int | None = None,
    eos_token_id: int | Collection[int] | None = None,
    logits_of: Callable[[Any], Tensor] = logits_of,
) -> list[list[int]]:
    """Return new tokens for each prompt, up to its first EOS (left out), of which there may be
    several. `temperature` 0 is greedy.

    For causal models: rows are padded on the right, where no earlier position looks. All forward
    passes have one shape `[prompts, width]`, so that a compiled model is compiled once.
    """
    if not prompts:
        return []
    rows = [list(prompt) for prompt in prompts]
    longest = max(len(row) for row in rows) + max_new_tokens
    width = min(longest, max_length or longest)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        windows = [row[-width:] for row in rows]
        ids = torch.tensor([w + [0] * (width - len(w)) for w in windows], device=device)
        last = torch.tensor([len(w) - 1 for w in windows], device=device)
        logits = logits_of(forward({"input": ids}))[torch.arange(len(rows), device=device), last]
        chosen = choose(logits.float().cpu(), temperature, top_k, top_p, generator)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in new]


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """One token a row from logits `[rows, vocab]`: `[rows]`.

    `top_k` keeps the k most likely; `top_p` the fewest whose probabilities reach p (Holtzman et
    al. 2020, arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
