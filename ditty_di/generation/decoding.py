"""Continuing prompts of token ids, in batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ditty_di.models.tokenizer import end_of_turn_ids

# torch is imported when something is generated: the command line must answer without it.
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """How to continue; `temperature` 0 is greedy. Random numbers are torch's global ones.

    `repetition_penalty` and `num_beams` that are None are the model's own. `eos_token_id` is one
    token that ends a text, or several. A prompt and its continuation have at most `max_length`
    tokens, the tokenizer's limit, and `positions`, the model's (None: no limit).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int | None = None
    max_length: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    positions: int | None = None

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text."""
        ends = self.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    @property
    def limit(self) -> int | None:
        """Tokens of a prompt and its continuation together; None: any number."""
        return min((n for n in (self.max_length, self.positions) if n is not None), default=None)

    def check(self) -> None:
        """Raise ValueError for what is out of range, naming it."""
        limit, penalty, beams = self.max_length, self.repetition_penalty, self.num_beams
        new, positions = self.max_new_tokens, self.positions
        for wrong, what in (
            (new < 1, f"max_new_tokens={new} must be at least 1"),
            (
                limit is not None and new >= limit,
                f"max_new_tokens={new} leaves no room for a prompt: the tokenizer's "
                f"model_max_length is {limit}",
            ),
            (
                positions is not None and new >= positions,
                f"max_new_tokens={new} leaves no room for a prompt: the model has {positions} "
                f"positions",
            ),
            (
                self.temperature < 0,
                f"temperature={self.temperature} must not be negative; 0 is greedy",
            ),
            (
                self.top_k is not None and self.top_k < 1,
                f"top_k={self.top_k} must be at least 1, or null",
            ),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"top_p={self.top_p} must be above 0 and at most 1, or null",
            ),
            (
                penalty is not None and penalty <= 0,
                f"repetition_penalty={penalty} must be above 0; 1 is none",
            ),
            (beams is not None and beams < 1, f"num_beams={beams} must be at least 1, or null"),
        ):
            if wrong:
                raise ValueError(what)


class Decode(Protocol):
    """Continues prompts of token ids: the new ids, up to the first EOS (left out)."""

    def __call__(
        self, model: Any, prompts: Sequence[list[int]], /, *, options: Options
    ) -> list[list[int]]: ...


def is_seq2seq(model: Any) -> bool:
    """Whether prompts are an encoder's, and answers a decoder's."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def positions(model: Any) -> int | None:
    """Return how many positions a transformers model has by its configuration; None: no limit."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def end_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: EOS, and what ends a turn in the chat template."""
    return sorted({*end_of_turn_ids(tokenizer)} | ({tokenizer.eos_token_id} - {None}))


def hugging_face(
    model: Any, prompts: Sequence[list[int]], /, *, options: Options
) -> list[list[int]]:
    """transformers' `generate` (key-value cache), also of seq2seq models; pads are never attended.

    The model's own `generation_config` holds for what `options` do not say; its end tokens count.
    """
    import torch

    own = model.generation_config.eos_token_id
    ends = ({own} if isinstance(own, int) else set(own or ())) | options.ends
    pad = options.pad_token_id or 0  # whatever it is: masked by length, not by id
    config = _generation_config(model, options, ends, pad)
    seq2seq = is_seq2seq(model)
    ids, mask = _padded(prompts, pad, left=not seq2seq)
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    # A decoder's answer begins with its start token, that of a causal model with the prompt.
    new = rows[:, 1:] if seq2seq else rows[:, ids.shape[1] :]
    return [_up_to(ends, row) for row in new.tolist()]


def _generation_config(model: Any, options: Options, ends: set[int], pad: int) -> Any:
    config = copy.deepcopy(model.generation_config)
    sampling: dict[str, Any] = {"temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k or 0,
            "top_p": 1.0 if options.top_p is None else options.top_p,
        }
    asked = {"repetition_penalty": options.repetition_penalty, "num_beams": options.num_beams}
    config.update(
        max_new_tokens=options.max_new_tokens,
        max_length=None,
        do_sample=options.temperature > 0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
        **{name: value for name, value in asked.items() if value is not None},
    )
    return config


def _padded(prompts: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask `[prompts, longest]`."""
    import torch

    ids, mask = [], []
    width = max(map(len, prompts))
    for prompt in prompts:
        fill = [pad] * (width - len(prompt))
        unseen, seen = [0] * len(fill), [1] * len(prompt)
        ids.append(fill + prompt if left else prompt + fill)
        mask.append(unseen + seen if left else seen + unseen)
    return torch.tensor(ids), torch.tensor(mask)


def _up_to(ends: set[int], row: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def plain(model: Any, prompts: Sequence[list[int]], /, *, options: Options) -> list[list[int]]:
    """Any causal model whose forward pass takes ids `[batch, seq]` and gives logits.

    Raises:
        ValueError: options that only `hugging_face` has.
    """
    import torch

    from ditty_di.generation.sampling import continuations

    if (options.repetition_penalty or 1) != 1 or (options.num_beams or 1) != 1:
        raise ValueError(
            "repetition_penalty and num_beams need a model with transformers' generate"
        )
    return continuations(
        lambda inputs: model(inputs["input"]),
        prompts,
        device=next(model.parameters()).device,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=int(torch.randint(2**31, ())),
        max_length=options.limit,
        eos_token_id=options.ends,
    )
