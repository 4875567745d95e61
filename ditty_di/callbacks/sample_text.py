"""What the model writes by now."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditty_di.callbacks.base import Callback
from ditty_di.generation.sampling import continuations, logits_of, prompt_ids
from ditty_di.metrics.validation import evaluating, preserved_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ditty_di.protocols import Training


class SampleText(Callback):
    """Continues `prompts` after every validation, for the metrics' writers.

    `report` shows the first texts beside the last. Every rank runs the same `max_new_tokens`
    forward passes with the same seed, so that sharded models stay in step; text ends at the first
    EOS. The model sees at most the last `tokenizer.model_max_length` tokens. `logits_of` takes
    logits `[batch, seq, vocab]` out of what the model returns. Texts repeat the whole prompt, or
    with `echo=False` its first line alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
        echo: bool = True,
        logits_of: Callable[[Any], Tensor] = logits_of,
    ) -> None:
        self.tokenizer, self.prompts = tokenizer, list(prompts)
        self.max_new_tokens, self.temperature, self.top_k = max_new_tokens, temperature, top_k
        self.seed, self.echo, self.logits_of = seed, echo, logits_of
        self._said: list[tuple[int, dict[str, str]]] = []

    def __call__(
        self, *, forward: Callable[[dict[str, Tensor]], Any], device: torch.device
    ) -> dict[str, str]:
        """`{"sample/0": prompt and continuation, ...}`, the same on every rank."""
        rows = continuations(
            forward,
            [prompt_ids(self.tokenizer, prompt) for prompt in self.prompts],
            device=device,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            max_length=self.tokenizer.model_max_length,
            eos_token_id=self.tokenizer.eos_token_id,
            logits_of=self.logits_of,
        )
        shown = [
            p if self.echo else f"{p.lstrip().partition(chr(10))[0]} -> " for p in self.prompts
        ]
        return {
            f"sample/{i}": f"{prompt}{self.tokenizer.decode(row, skip_special_tokens=True)}"
            for i, (prompt, row) in enumerate(zip(shown, rows, strict=True))
        }

    def validation_end(self, trainer: Training) -> None:
        """Training flags, sharding and random numbers are left as they are found."""
        with torch.no_grad(), evaluating(trainer.model_parts), preserved_rng(trainer.device):
            texts = self(forward=trainer.forward, device=trainer.device)
        for name, text in texts.items():
            trainer.metrics_processor.text(trainer.step, name, text)
        self._said = [*self._said[:1], (trainer.step, texts)]

    def report(self) -> str:
        """The texts of this process's first and last validation; empty if they are one."""
        if len(self._said) < 2:
            return ""
        return "\n".join(
            f"{name} at step {step}: {textwrap.shorten(texts[name], 200)}"
            for name in self._said[0][1]
            for step, texts in self._said
        )
