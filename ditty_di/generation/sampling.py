"""Autoregressive sampling by the forward pass alone, and so under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def logits_of(output: Any) -> Tensor:
    """Return the output's `logits`, as of Hugging Face models, or the output itself.

    Args:
        output: of a model.
    """
    return getattr(output, "logits", output)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a text to continue: without EOS at the end, and at least one.

    An empty prompt becomes the BOS token, or EOS, which separates documents in training.

    Args:
        tokenizer: of the model.
        prompt: the text.

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


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the ids up to and without the first one that ends a text.

    Args:
        ids: of a continuation.
        ends: tokens that end a text.
    """
    return list(takewhile(lambda token: token not in ends, ids))


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
    """Return new tokens for each prompt, up to and without its first EOS.

    For causal models: rows are padded on the right, which no earlier position attends to. All
    forward passes have one shape `[prompts, width]`, so that a compiled model is compiled once.

    Args:
        forward: the model; takes `{"input": ids}`.
        prompts: token ids.
        device: of the model.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        top_k: see `choose`.
        top_p: see `choose`.
        seed: of the sampling.
        max_length: tokens that the model can see; None is no limit.
        eos_token_id: one token that ends a text, or several.
        logits_of: takes logits `[batch, seq, vocab]` out of the model's output.
    """
    if not prompts:
        return []
    rows = [list(prompt) for prompt in prompts]
    longest = max(len(row) for row in rows) + max_new_tokens
    width = min(longest, max_length or longest)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        visible = [row[-width:] for row in rows]
        ids = torch.tensor([r + [0] * (width - len(r)) for r in visible], device=device)
        last = torch.tensor([len(r) - 1 for r in visible], device=device)
        logits = logits_of(forward({"input": ids}))[torch.arange(len(rows), device=device), last]
        chosen = choose(logits.float().cpu(), temperature, top_k, top_p, generator)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    return [until_end(row[len(p) :], ends) for row, p in zip(rows, prompts, strict=True)]


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Return one token for each row, int64 `[rows]`.

    Args:
        logits: `[rows, vocab]`.
        temperature: 0 is greedy.
        top_k: sample from the k most likely tokens; None from all.
        top_p: sample from the fewest tokens whose probabilities reach p (Holtzman et al. 2020,
            arXiv:1904.09751); None from all.
        generator: of random numbers.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]  # [rows, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
