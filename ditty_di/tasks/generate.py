"""Text from a trained model: prompts in, continuations out."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

# torch is imported when a task runs: the command line must answer without it.
if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ditty_di.protocols import WeightsFn


@dataclass(frozen=True)
class Options:
    """How to continue; `temperature` 0 is greedy. Random numbers are torch's global ones."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_length: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class Decode(Protocol):
    """Continues prompts of token ids: the new ids, up to the first EOS (left out)."""

    def __call__(
        self, model: Any, prompts: Sequence[list[int]], /, *, options: Options
    ) -> list[list[int]]: ...


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weights: WeightsFn | None = None,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    decode: Decode | None = None,
) -> dict[str, Any]:
    """Continues one `prompt`, or every line of the file `prompts`.

    Args:
        model: on meta (then `weights` fills it) or with its values.
        prompts: a .jsonl file of objects with the text under `prompt` or `input`; an `id` beside
            it is repeated in the answer.
        output: a .jsonl file for the answers, which appears when all are there; None prints them.
        device: None takes the accelerator, if there is one.
        decode: None takes the model's own `generate` where it has one (`hugging_face`), else
            `plain`, which needs nothing but the forward pass.

    An answer is `{"input", "text", "tokens"}`, in the order of the prompts. `tokens` counts the
    generated tokens that `text` is made of, so without EOS. A prompt that leaves no room for
    `max_new_tokens` under the tokenizer's `model_max_length` loses its beginning; its answer says
    how many tokens in `cut`. Of several ranks the first does the work, the others return at once.

    Raises:
        ValueError: not exactly one of `prompt` and `prompts`; lines that are no prompts (file,
            number, reason); options out of range.
    """
    if int(os.environ.get("RANK", "0")):
        return {}
    if (prompt is None) == (prompts is None):
        raise ValueError('generate: give either prompt="..." or prompts=FILE.jsonl')
    limit = tokenizer.model_max_length
    _check(max_new_tokens, limit, temperature, top_k, top_p, batch_size)
    asked = [{"input": prompt}] if prompts is None else read_prompts(prompts)

    import torch

    from ditty_di.tasks.loading import ready

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    ready(model, weights, torch.device(device or found or "cpu"))
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_length=limit,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    decode = decode or (hugging_face if hasattr(model, "generate") else plain)
    started, tokens, answer = time.perf_counter(), 0, dict[str, Any]()
    torch.manual_seed(seed)
    with _written_whole(output) as file:
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            for answer in _answers(batch, model, tokenizer, decode, options):
                tokens += answer["tokens"]
                if output is None and prompts is None:
                    print(answer["input"] + answer["text"], file=file)
                else:
                    print(json.dumps(answer, ensure_ascii=False), file=file)
    if output is not None:
        print(f"{len(asked)} answers, {tokens} tokens: {output}")
    result = {"prompts": len(asked), "tokens": tokens, "output": output}
    speed = {"tokens_per_second": tokens / (time.perf_counter() - started)}
    return result | speed | ({} if prompt is None else {"text": answer["text"]})


def read_prompts(path: str) -> list[dict[str, Any]]:
    """`[{"input": text, "id": ...}, ...]` of a .jsonl file; empty lines are passed over.

    Raises:
        ValueError: lines that are no prompts, each with its number and the reason.
    """
    found: list[dict[str, Any]] = []
    problems = []
    with Path(path).expanduser().open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry["prompt"] if "prompt" in entry else entry["input"]
                if not isinstance(text, str):
                    raise TypeError
                found.append({"input": text} | {k: entry[k] for k in ("id",) if k in entry})
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: no JSON: {error}")
            except (KeyError, TypeError):
                problems.append(f'line {number}: no object with a text as "prompt" or "input"')
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{path} has lines that are no prompts:\n  " + "\n  ".join(problems[:10]) + more
        )
    if not found:
        raise ValueError(f'{path} has no prompts; write lines such as {{"prompt": "Once upon"}}')
    return found


def _check(
    max_new_tokens: int,
    limit: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    batch_size: int,
) -> None:
    for wrong, what in (
        (max_new_tokens < 1, f"max_new_tokens={max_new_tokens} must be at least 1"),
        (
            max_new_tokens >= limit,
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the tokenizer's "
            f"model_max_length is {limit}",
        ),
        (temperature < 0, f"temperature={temperature} must not be negative; 0 is greedy"),
        (top_k is not None and top_k < 1, f"top_k={top_k} must be at least 1, or null"),
        (
            top_p is not None and not 0 < top_p <= 1,
            f"top_p={top_p} must be above 0 and at most 1, or null",
        ),
        (batch_size < 1, f"batch_size={batch_size} must be at least 1"),
    ):
        if wrong:
            raise ValueError(f"generate: {what}")


def _answers(
    batch: list[dict[str, Any]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    decode: Decode,
    options: Options,
) -> Iterator[dict[str, Any]]:
    from ditty_di.metrics.sample import prompt_ids

    ids = [prompt_ids(tokenizer, entry["input"]) for entry in batch]
    assert options.max_length is not None
    room = options.max_length - options.max_new_tokens
    rows = decode(model, [row[-room:] for row in ids], options=options)
    for entry, prompt, row in zip(batch, ids, rows, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        answer = entry | {"text": text, "tokens": len(row)}
        yield answer | ({"cut": len(prompt) - room} if len(prompt) > room else {})


def hugging_face(
    model: Any, prompts: Sequence[list[int]], /, *, options: Options
) -> list[list[int]]:
    """transformers' `generate` (key-value cache): prompts padded on the left, pads never attended.

    The model's own `generation_config` holds for what `options` do not say; its end tokens count.
    """
    import torch

    width = max(map(len, prompts))
    pad = options.pad_token_id or 0  # whatever it is: masked by length, not by id
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    config = copy.deepcopy(model.generation_config)
    own = config.eos_token_id
    ends = {own} if isinstance(own, int) else set(own or ())
    ends |= {options.eos_token_id} - {None}
    sampling: dict[str, Any] = {"temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k or 0,
            "top_p": 1.0 if options.top_p is None else options.top_p,
        }
    config.update(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    return [_up_to(ends, row) for row in rows.tolist()]


def _up_to(ends: set[int], row: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def plain(model: Any, prompts: Sequence[list[int]], /, *, options: Options) -> list[list[int]]:
    """Any causal model whose forward pass takes ids `[batch, seq]` and gives logits."""
    import torch

    from ditty_di.metrics.sample import continuations

    return continuations(
        lambda inputs: model(inputs["input"]),
        prompts,
        device=next(model.parameters()).device,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=int(torch.randint(2**31, ())),
        max_length=options.max_length,
        eos_token_id=options.eos_token_id,
    )


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
