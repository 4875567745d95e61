"""Text from a trained model: prompts in, continuations or answers out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ditty_di.generation.decoding import Decode, Options, hugging_face, is_seq2seq, plain
from ditty_di.generation.prompts import Encoder, Prompts, read_prompts

# torch is imported when a task runs: the command line must answer without it.
if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ditty_di.protocols import WeightsFn


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weights: WeightsFn | None = None,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    encoder: Encoder | None = None,
    input_format: str | Sequence[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    decode: Decode | None = None,
) -> dict[str, Any]:
    """Continues, or answers, one `prompt`, or every line of the file `prompts`.

    Args:
        model: on meta (then `weights` fills it) or with its values.
        prompts: a .jsonl file of objects with the text under `prompt` or `input`, with `messages`,
            or with the fields that the format needs.
        output: a .jsonl file for the answers, which appears when all are there; None prints them.
        encoder, input_format: how a record becomes a prompt; see `Prompts`.
        repetition_penalty, num_beams: None is what the model's own generation_config says.
        device: None takes the accelerator, if there is one.
        decode: None takes the model's own `generate` where it has one (`hugging_face`), else
            `plain`, which needs nothing but the forward pass.

    An answer repeats its record and adds `text` and `tokens`, in the order of the prompts; `input`
    and `id` (its place) are added where there are none. `tokens` counts the generated tokens that
    `text` is made of, so without EOS. A prompt that leaves no room for `max_new_tokens` under the
    tokenizer's `model_max_length` loses its beginning; its answer says how many tokens in `cut`.
    The seed and the batch size decide about what is sampled; greedy answers depend on neither. Of
    several ranks the first does the work, the others return at once.

    Raises:
        ValueError: not exactly one of `prompt` and `prompts`; lines that are no prompts (file,
            number, reason); options out of range.
    """
    if int(os.environ.get("RANK", "0")):
        return {}
    if (prompt is None) == (prompts is None):
        raise ValueError('generate: give either prompt="..." or prompts=FILE.jsonl')
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        max_length=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    options.check()
    if batch_size < 1:
        raise ValueError(f"generate: batch_size={batch_size} must be at least 1")
    making = Prompts(
        tokenizer, encoder=encoder, input_format=input_format, seq2seq=is_seq2seq(model)
    )
    asked = read_prompts(prompts, making) if prompts is not None else [_typed(prompt, making)]

    import torch

    from ditty_di.tasks.loading import ready

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    ready(model, weights, torch.device(device or found or "cpu"))
    decode = decode or (hugging_face if hasattr(model, "generate") else plain)
    started, tokens, answer = time.perf_counter(), 0, dict[str, Any]()
    torch.manual_seed(seed)
    with _written_whole(output) as file:
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            for answer in _answers(batch, model, tokenizer, decode, options):
                tokens += answer["tokens"]
                line = json.dumps(answer, ensure_ascii=False)
                print(making.shown(answer) if output is prompts is None else line, file=file)
    if output is not None:
        print(f"{len(asked)} answers, {tokens} tokens: {output}")
    result = {"prompts": len(asked), "tokens": tokens, "output": output}
    speed = {"tokens_per_second": tokens / (time.perf_counter() - started)}
    return result | speed | ({} if prompt is None else {"text": answer["text"]})


def _typed(prompt: str | None, making: Prompts) -> tuple[dict[str, Any], list[int]]:
    record = {"id": 0, "input": prompt}
    try:
        return record, making.ids(record)
    except ValueError as error:
        raise ValueError(
            f"generate: the prompt alone is not enough here: {error}; write what is needed into "
            f"prompts=FILE.jsonl"
        ) from error


def _answers(
    batch: list[tuple[dict[str, Any], list[int]]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    decode: Decode,
    options: Options,
) -> Iterator[dict[str, Any]]:
    assert options.max_length is not None
    room = options.max_length - (0 if is_seq2seq(model) else options.max_new_tokens)
    rows = decode(model, [prompt[-room:] for _, prompt in batch], options=options)
    for (record, prompt), row in zip(batch, rows, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        shown = {} if "input" in record else {"input": tokenizer.decode(prompt)}
        answer = record | shown | {"text": text, "tokens": len(row)}
        yield answer | ({"cut": len(prompt) - room} if len(prompt) > room else {})


@contextmanager
def _written_whole(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name when everything is in it."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        yield file
    os.replace(aside, target)
