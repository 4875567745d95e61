"""Log generated text after each validation."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.callbacks.base import Callback
from ditty_di.config.early import validated
from ditty_di.data.options import at_least
from ditty_di.generation.decoding import end_ids, is_seq2seq, positions
from ditty_di.generation.sampling import continuations, logits_of, prompt_ids
from ditty_di.models.evaluation import evaluating
from ditty_di.models.tokenizer import user_turn
from ditty_di.protocols import Training
from ditty_di.seed import preserved_rng

#: Stands for a line break in a text that is shown in one line.
LINE_BREAK = "\\n"
_LABEL_CHARS = 100


@validated
class SampleText(Callback):
    """Generate continuations of `prompts` after every validation, for the loggers.

    `report` compares the first texts with the last. Every rank runs the same `max_new_tokens`
    forward passes with the same seed, so that sharded models stay in step; a text ends at the first
    EOS or end of turn.

    Args:
        tokenizer: the model's; the model sees at most its last `model_max_length` tokens, and no
            more than it has positions.
        prompts: the texts to continue.
        max_new_tokens: number of tokens to generate for each prompt.
        temperature: of sampling; 0 takes the most probable token.
        top_k: sample among this many most probable tokens; None among all.
        seed: of sampling.
        echo: repeat the whole prompt before its continuation. False shows one line for each prompt:
            a label of it (`labels`) and its continuation (`one_line`).
        max_chars: number of characters of a continuation that are shown with `echo=False`.
        logits_of: extracts logits `[batch, seq, vocab]` from the model's output.
    """

    needs_forward = True

    @staticmethod
    def validate(
        *,
        max_new_tokens: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        max_chars: int = 1,
    ) -> None:
        """Raise ValueError for arguments out of range."""
        at_least(1, max_new_tokens=max_new_tokens, top_k=top_k, max_chars=max_chars)
        at_least(0, temperature=temperature)

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
        max_chars: int = 400,
        logits_of: Callable[[Any], Tensor] = logits_of,
    ) -> None:
        self.tokenizer, self.prompts = tokenizer, list(prompts)
        self.max_new_tokens, self.temperature, self.top_k = max_new_tokens, temperature, top_k
        self.seed, self.echo, self.logits_of = seed, echo, logits_of
        self.max_chars = max_chars
        self._labels = self.prompts if echo else labels(self.prompts, tokenizer)
        self._history: list[tuple[int, dict[str, str]]] = []

    def __call__(
        self,
        *,
        forward: Callable[[dict[str, Tensor]], Any],
        device: torch.device,
        max_length: int | None = None,
    ) -> dict[str, str]:
        """Return `{"sample/0": prompt and continuation, ...}`, the same on every rank.

        Args:
            forward: runs the model on a dict of inputs.
            device: of the inputs.
            max_length: number of tokens that the model can see, if fewer than the tokenizer says.
        """
        limits = filter(None, (self.tokenizer.model_max_length, max_length))
        rows = continuations(
            forward,
            [prompt_ids(self.tokenizer, prompt) for prompt in self.prompts],
            device=device,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            max_length=min(limits, default=None),
            eos_token_id=end_ids(self.tokenizer),
            logits_of=self.logits_of,
        )
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        if not self.echo:
            texts = [f" -> {one_line(text, self.max_chars)}" for text in texts]
        return {f"sample/{i}": f"{self._labels[i]}{text}" for i, text in enumerate(texts)}

    def on_validation_end(self, trainer: Training) -> None:
        """Generate and log texts; training flags, sharding and random numbers stay as they are.

        An encoder-decoder does not continue text: nothing is logged for it.

        Args:
            trainer: the trainer.
        """
        if is_seq2seq(trainer.model_parts[0]):
            return
        with torch.no_grad(), evaluating(trainer.model_parts), preserved_rng(trainer.device):
            limit = positions(trainer.model_parts[0])
            texts = self(forward=trainer.forward, device=trainer.device, max_length=limit)
        for name, text in texts.items():
            trainer.metrics_processor.text(trainer.step, name, text)
        self._history = [*self._history[:1], (trainer.step, texts)]

    def report(self) -> str:
        """Return the texts of this process's first and last validation; empty with only one."""
        if len(self._history) < 2:
            return ""
        return "\n".join(
            f"{name} at step {step}: {shortened(texts[name].replace(LINE_BREAK, ' '), 200)}"
            for name in self._history[0][1]
            for step, texts in self._history
        )


def one_line(text: str, max_chars: int) -> str:
    """Return a text in one line: line breaks escaped, blanks at its end counted, cut to fit.

    Args:
        text: the text.
        max_chars: number of characters that are kept.
    """
    stripped = text.rstrip()
    blanks = len(text) - len(stripped)
    shown = "".join(LINE_BREAK if c in "\n\x0b\x0c\r\x85\u2028\u2029" else c for c in stripped)
    if len(shown) > max_chars:
        shown = f"{shown[:max_chars]} [...]"
    return f"{shown} [{blanks} blank characters]".lstrip() if blanks > 1 else shown


def shortened(text: str, width: int) -> str:
    """Return a text with single blanks, cut to a width, at the end of a word if there is one.

    Args:
        text: the text.
        width: number of characters.
    """
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    cut = textwrap.shorten(flat, width, placeholder=" [...]")
    return cut if len(cut) > width // 2 else f"{flat[: width - 6]} [...]"


def labels(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a line for each prompt that identifies it to a reader.

    It is the first line that is not the same in all prompts: of the user's last turn in a
    conversation, of the whole text otherwise.

    Args:
        prompts: the prompts.
        tokenizer: its chat template tells where a turn begins and ends.
    """
    parts = [_last_turn(prompt, tokenizer).strip().splitlines() or [""] for prompt in prompts]
    same_lines = takewhile(lambda lines: len({*lines}) == 1, zip(*parts, strict=False))
    same = len(list(same_lines)) if len(parts) > 1 else 0
    found = [next((line for line in part[same:] if line.strip()), part[0]) for part in parts]
    return [shortened(line, _LABEL_CHARS) for line in found]


def _last_turn(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the user's last turn in a prompt that the chat template made, else the prompt."""
    opening, closing = user_turn(tokenizer)
    _, found, rest = prompt.rpartition(opening) if opening else ("", "", "")
    return rest.partition(closing)[0] if found and closing else rest or prompt
