"""Text from a trained model: prompts in, continuations or answers out."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ditty_di.data.options import at_least
from ditty_di.generation.decoding import (
    Decode,
    Options,
    end_ids,
    hugging_face,
    is_seq2seq,
    plain,
    positions,
    textless,
)
from ditty_di.generation.prompts import PromptRenderer, Prompts, read_prompts
from ditty_di.io import is_first_rank, replacing
from ditty_di.protocols import ModelTransform, WeightsFn, early_checks
from ditty_di.tasks.loading import ready

log = logging.getLogger(__name__)

_CHAT = """\
a prompt that is plain text is sent as a turn of the user, by the chat template; chat=false uses \
it as it is"""
_NO_CHAT = """\
a prompt that is plain text is used as it is, without the chat template that the tokenizer has; \
chat=true sends it as a turn of the user"""
_NO_TEXT = """\
generate: the run trained a {kind}, which gives no text; task=evaluate measures it, and its export \
opens in transformers"""
_CUT = """\
%d of %d prompts are longer than %d tokens and lose their beginning: with max_new_tokens they \
would not fit the limit of the tokenizer and of the positions of the model, %d tokens"""


def _validate(
    *,
    prompt: Any = ...,
    prompts: Any = ...,
    batch_size: int = 1,
    max_new_tokens: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int | None = None,
) -> None:
    """Raise ValueError for arguments that are known to be wrong; `...` is not known."""
    if ... not in (prompt, prompts) and (prompt is None) == (prompts is None):
        raise ValueError('prompt: give either prompt="..." or prompts=FILE.jsonl')
    if isinstance(prompts, str) and not Path(prompts).expanduser().is_file():
        raise ValueError(f"prompts={prompts}: no such file")
    at_least(1, batch_size=batch_size)
    Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
    ).check()


@early_checks(validate=_validate)
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weights: WeightsFn | None = None,
    *,
    convert: ModelTransform | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    renderer: PromptRenderer | None = None,
    input_format: str | Sequence[str] | None = None,
    chat: bool | None = None,
    about: str | None = None,
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
    """Continue, or answer, one `prompt`, or every line of the file `prompts`.

    An answer repeats its record and adds `text` and `tokens`, in the order of the prompts; `input`
    and `id` (its position) are added where there are none. Of a conversation `input` is the text
    that the template made of it. `tokens` counts the generated tokens of `text`, without EOS. EOS
    is that of the model, of the tokenizer, and what ends a turn in the chat template. A prompt that
    leaves no room for `max_new_tokens` under the tokenizer's `model_max_length`, or the positions
    of the model, loses its beginning; its answer has the number of lost tokens in `cut`.

    Sampling depends on the seed and the batch size, greedy answers on neither. Of several ranks
    only the first does the work.

    Args:
        model: The model, on meta (then `weights` fills it) or with its values.
        convert: Replaces layers of the model, as in training.
        tokenizer: The tokenizer.
        weights: Fills a model on meta, usually from a checkpoint.
        prompt: A prompt; a number is used as its text.
        prompts: A file of objects with the text under `prompt` or `input`, with `messages` (or
            under the keys that `renderer` has for conversations), or with the fields that the
            format needs; or a text file with a prompt a line. See `ditty_di.generation.prompts`.
        output: A .jsonl file for the answers, which appears when all are there; None prints them.
        renderer: Makes the prompt of a record; see `Prompts`.
        input_format: Makes the prompt of a record instead; see `Prompts`.
        chat: Make a text the turn of a user in a conversation, which the tokenizer's chat template
            renders. None: with a `renderer`, if `about` says that training used conversations;
            else if there is a template and no `input_format`. A log line says so.
        about: The file that `ditty_di.tasks.train` wrote about the training; it may be missing.
        max_new_tokens: Limit of an answer, in tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_k: Sample from the k most likely tokens; None: all.
        top_p: Sample from the most likely tokens of this total probability; None: all.
        repetition_penalty: None: as the model's own generation_config.
        num_beams: Beams of beam search; None: as the model's own generation_config.
        batch_size: Prompts at a time.
        seed: Seed of the sampling.
        device: Device of the model; None: the accelerator, if there is one.
        decode: None: the model's own `generate` where it has one (`hugging_face`), else `plain`,
            which needs only the forward pass.

    Raises:
        ValueError: Not exactly one of `prompt` and `prompts`; lines that are not prompts (file,
            number, reason); options out of range; a model of transformers that gives no text.
    """
    if not is_first_rank():
        return {}
    _validate(prompt=prompt, prompts=prompts, batch_size=batch_size)
    if kind := textless(model):
        raise ValueError(_NO_TEXT.format(kind=kind))
    seq2seq = is_seq2seq(model)
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        max_length=tokenizer.model_max_length,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        positions=positions(model),
    )
    options.check()
    chosen = chat
    if chat is None and not seq2seq and input_format is None and tokenizer.chat_template:
        chosen = renderer is None or _used_conversations(about)
    making = Prompts(
        tokenizer,
        renderer=renderer,
        input_format=input_format,
        seq2seq=seq2seq,
        chat=bool(chosen),
    )
    asked = read_prompts(prompts, making) if prompts is not None else [_typed(prompt, making)]
    if chosen is not chat and making.texts:
        log.info("%s", _CHAT if chosen else _NO_CHAT)
    room = (options.limit or 0) - (0 if seq2seq else max_new_tokens)
    if longer := sum(len(ids) > room for _, ids in asked):
        log.warning(_CUT, longer, len(asked), room, options.limit)

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = convert(model) if convert is not None else model
    ready(model, weights, torch.device(device or found or "cpu"))
    decode = decode or (hugging_face if hasattr(model, "generate") else plain)
    started, tokens, answer = time.perf_counter(), 0, dict[str, Any]()
    torch.manual_seed(seed)
    with _written_whole(output) as file:
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            for answer in _answers(batch, model, making, decode, options, room):
                tokens += answer["tokens"]
                line = json.dumps(answer, ensure_ascii=False)
                print(making.shown(answer) if output is prompts is None else line, file=file)
    if output is not None:
        answers = f"{len(asked)} answer{'s' * (len(asked) != 1)}"
        print(f"{answers}, {tokens} token{'s' * (tokens != 1)}: {output}")
    result = {"prompts": len(asked), "tokens": tokens, "output": output}
    speed = {"tokens_per_second": tokens / (time.perf_counter() - started)}
    return result | speed | ({} if prompt is None else {"text": answer["text"]})


def _used_conversations(about: str | None) -> bool:
    """Return whether the training's examples were conversations; False if it is unknown."""
    try:
        return bool(json.loads(Path(about or "").read_text(encoding="utf-8"))["conversations"])
    except (OSError, ValueError, KeyError, TypeError):  # of a run that wrote none
        return False


def _typed(prompt: Any, making: Prompts) -> tuple[dict[str, Any], list[int]]:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    try:
        record = making.record({"id": 0, "input": text})
        return record, making.ids(record)
    except ValueError as error:
        raise ValueError(
            f"generate: the prompt alone is not enough here: {error}; write what is needed into "
            f"prompts=FILE.jsonl"
        ) from error


def _answers(
    batch: list[tuple[dict[str, Any], list[int]]],
    model: nn.Module,
    making: Prompts,
    decode: Decode,
    options: Options,
    room: int,
) -> Iterator[dict[str, Any]]:
    images = [path for record, _ in batch for path in making.images(record)]
    if images:  # only a model's own generate reads them
        decode = partial(decode, inputs=partial(making.image_inputs, images=images))  # type: ignore[call-arg]
    rows = decode(model, [prompt[-room:] for _, prompt in batch], options=options)
    for (record, prompt), row in zip(batch, rows, strict=True):
        text = making.tokenizer.decode(row, skip_special_tokens=True)
        shown = {} if "input" in record else {"input": making.tokenizer.decode(prompt)}
        answer = record | shown | {"text": text, "tokens": len(row)}
        yield answer | ({"cut": len(prompt) - room} if len(prompt) > room else {})


@contextmanager
def _written_whole(path: str | None) -> Iterator[TextIO]:
    """Yield standard output, or a file that appears under its name when it is complete."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file
