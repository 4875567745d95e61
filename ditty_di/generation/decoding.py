"""Continue prompts of token ids, in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ditty_di.generation.sampling import continuations, until_end
from ditty_di.models.tokenizer import end_of_turn_ids

#: What an option has to satisfy if it is not None, and how an error says so.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "must be at least 1"),
    "temperature": (lambda value: value >= 0, "must not be negative; 0 is greedy"),
    "top_k": (lambda value: value >= 1, "must be at least 1, or null"),
    "top_p": (lambda value: 0 < value <= 1, "must be above 0 and at most 1, or null"),
    "repetition_penalty": (lambda value: value > 0, "must be above 0; 1 is none"),
    "num_beams": (lambda value: value >= 1, "must be at least 1, or null"),
}


@dataclass(frozen=True)
class Options:
    """How to continue prompts; random numbers come from torch's global generator.

    Args:
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        top_k: sample from the k most likely tokens; None from all.
        top_p: sample from the fewest tokens whose probabilities reach p; None from all.
        repetition_penalty: of tokens that occurred; None is the model's own.
        num_beams: of beam search; None is the model's own.
        max_length: the tokenizer's limit for a prompt and its continuation; None is no limit.
        eos_token_id: one token that ends a text, or several.
        pad_token_id: pads a batch; masked by position.
        positions: the model's limit for a prompt and its continuation; None is no limit.
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
        return _as_set(self.eos_token_id)

    @property
    def limit(self) -> int | None:
        """The limit for a prompt and its continuation in tokens; None is no limit."""
        return min((n for n in (self.max_length, self.positions) if n is not None), default=None)

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        for name, (fits, requirement) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name}={value} {requirement}")
        new = self.max_new_tokens
        for limit, reason in (
            (self.max_length, f"the tokenizer's model_max_length is {self.max_length}"),
            (self.positions, f"the model has {self.positions} positions"),
        ):
            if limit is not None and new >= limit:
                raise ValueError(f"max_new_tokens={new} leaves no room for a prompt: {reason}")


class Decode(Protocol):
    """Continue prompts of token ids."""

    def __call__(
        self, model: Any, prompts: Sequence[list[int]], /, *, options: Options
    ) -> list[list[int]]:
        """Return the new ids of each prompt, up to and without the first EOS.

        Args:
            model: with its values.
            prompts: token ids.
            options: how to continue.
        """


def textless(model: Any) -> str:
    """Return the class of a model of transformers that continues no text, of any other one ""."""
    stock: Any = getattr(model, "get_base_model", lambda: model)()
    return "" if getattr(stock, "can_generate", lambda: True)() else type(stock).__name__


def is_seq2seq(model: Any) -> bool:
    """Return whether prompts go to an encoder, and answers come from a decoder.

    Args:
        model: of transformers, or any other.
    """
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def positions(model: Any) -> int | None:
    """Return how many positions a transformers model has by its configuration; None is no limit.

    Args:
        model: of transformers, or any other.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def end_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: EOS, and the ends of a turn in the chat template.

    Args:
        tokenizer: of transformers.
    """
    return sorted({*end_of_turn_ids(tokenizer)} | ({tokenizer.eos_token_id} - {None}))


@torch.no_grad()
def hugging_face(
    model: Any,
    prompts: Sequence[list[int]],
    /,
    *,
    options: Options,
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> list[list[int]]:
    """Continue prompts by the model's own `generate` (key-value cache), also of seq2seq models.

    The model's `generation_config` has what `options` leave open; its EOS tokens count as well.
    Prompts are padded to one length and continued together, unless that changes what the model
    says: some with a recurrent state (RWKV, RecurrentGemma) read the padding, or mix up the rows of
    a batch. These get one prompt at a time.

    Args:
        model: of transformers.
        prompts: token ids.
        options: how to continue.
        inputs: makes further inputs of the padded ids `[prompts, longest]`, such as the pixels of
            images.
    """
    ends = _as_set(model.generation_config.eos_token_id) | options.ends
    pad = options.pad_token_id or 0  # masked by position, so any token will do
    sampling: dict[str, Any] = {"temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k or 0,
            "top_p": 1.0 if options.top_p is None else options.top_p,
        }
    own = {"repetition_penalty": options.repetition_penalty, "num_beams": options.num_beams}
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_new_tokens=options.max_new_tokens,
        max_length=None,
        do_sample=options.temperature > 0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
        **{name: value for name, value in own.items() if value is not None},
    )
    seq2seq = is_seq2seq(model)
    if not seq2seq and inputs is None and len(prompts) > 1 and _mixes_rows(model, prompts[0], pad):
        alone = (hugging_face(model, [prompt], options=options) for prompt in prompts)
        return [answer for (answer,) in alone]
    side, device = "right" if seq2seq else "left", next(model.parameters()).device
    padded = partial(pad_sequence, batch_first=True, padding_side=side)
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    ids = padded(rows, padding_value=pad)  # [prompts, longest]
    more = {} if inputs is None else {name: t.to(device) for name, t in inputs(ids).items()}
    ids = ids.to(device)
    mask = padded([torch.ones_like(row) for row in rows]).to(device)
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    # A decoder's answer begins with its start token, that of a causal model with the prompt.
    new = found[:, 1:] if seq2seq else found[:, ids.shape[1] :]
    return [until_end(row, ends) for row in new.tolist()]


#: What `_mixes_rows` has found, once for each model.
_MIXED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _mixes_rows(model: Any, prompt: list[int], pad: int) -> bool:
    """Return whether a prompt gets other logits beside a longer one than alone.

    Args:
        model: causal, of transformers.
        prompt: token ids, of which a few are tried, the first time that the model is asked.
        pad: the padding.
    """
    if model not in _MIXED:
        _MIXED[model] = _try_rows(model, prompt[:4], pad)
    return _MIXED[model]


def _try_rows(model: Any, prompt: list[int], pad: int) -> bool:
    device = next(model.parameters()).device
    longest = (prompt * 12)[:12]
    padding = len(longest) - len(prompt)
    ids = torch.tensor([[pad] * padding + prompt, longest], device=device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    alone, beside = (
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=2,
            min_new_tokens=2,
            max_length=None,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits
        for ids, mask in ((ids[:1, padding:], mask[:1, padding:]), (ids, mask))
    )  # of two tokens, [rows, vocab]
    for one, other in zip(alone, beside, strict=True):
        tolerance = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max())
        if float((one[0] - other[0]).abs().max()) > tolerance:
            return True
        if one[0].argmax() != other[0].argmax():  # a tie: the second tokens have other contexts
            return False
    return False


def plain(model: Any, prompts: Sequence[list[int]], /, *, options: Options) -> list[list[int]]:
    """Continue prompts by the forward pass alone.

    Args:
        model: causal; takes ids `[batch, seq]` and returns logits.
        prompts: token ids.
        options: how to continue.

    Raises:
        ValueError: options that only `hugging_face` has.
    """
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


def _as_set(ids: int | Sequence[int] | None) -> set[int]:
    return {ids} if isinstance(ids, int) else set(ids or ())
