"""Prompts: a line typed or a .jsonl file, as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(Protocol):
    """Makes prompts of records as training did; `ditty_di.data.Encoder` is one."""

    def prompt(self, record: dict[str, Any], /) -> list[int]: ...


class Prompts:
    """Token ids of records.

    A conversation (`messages`) goes through the tokenizer's chat template, up to where the model is
    to answer: trailing turns of the assistant are left out. Anything else goes to `encoder`; where
    there is none, it is the text under `input`, or `input_format` with the record's fields in it
    (`ditty_di.data.rendering.Format`).

    Args:
        seq2seq: for an encoder: the text as the tokenizer ends it. Otherwise it is to be continued,
            so no EOS stands behind it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: Encoder | None = None,
        input_format: str | Sequence[str] | None = None,
        seq2seq: bool = False,
    ) -> None:
        from ditty_di.data.rendering import Format

        self.tokenizer, self.encoder, self.seq2seq = tokenizer, encoder, seq2seq
        self.continues = encoder is None and input_format is None and not seq2seq
        self.format: Callable[[dict[str, Any]], str] = _input
        if input_format is not None:
            self.format = Format(input_format, {})

    def ids(self, record: dict[str, Any]) -> list[int]:
        """Raises ValueError for a record that makes no prompt."""
        if "messages" in record:
            return self._conversation(record)
        if self.encoder is not None:
            return self.encoder.prompt(record)
        text = self.format(record)
        if self.seq2seq:
            return list(self.tokenizer(text)["input_ids"])
        from ditty_di.generation.sampling import prompt_ids

        return prompt_ids(self.tokenizer, text)

    def shown(self, answer: dict[str, Any]) -> str:
        """What somebody who typed a prompt wants to see: a text going on, or an answer alone."""
        return answer["input"] + answer["text"] if self.continues else answer["text"].strip()

    def _conversation(self, record: dict[str, Any]) -> list[int]:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError('"messages" needs a tokenizer with a chat template; this one has none')
        turns = record["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError('"messages" is no list of objects with role and content')
        asked = list(turns)
        while asked and asked[-1].get("role") == "assistant":
            asked.pop()
        if not asked:
            raise ValueError('"messages" has no turn that the assistant could answer')
        try:
            found: Any = self.tokenizer.apply_chat_template(
                asked, tools=record.get("tools"), add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:  # templates refuse, say, roles that do not alternate
            raise ValueError(f"the chat template refuses it: {error}") from error
        return list(found["input_ids"])


def _input(record: dict[str, Any]) -> str:
    if not isinstance(record.get("input"), str):
        raise ValueError('it has no text as "prompt" or "input", and no "messages"')
    return record["input"]


def read_prompts(path: str, prompts: Prompts) -> list[tuple[dict[str, Any], list[int]]]:
    """Records of a .jsonl file, and their ids; empty lines are passed over.

    A `prompt` is taken as the `input`; a record without `id` gets its place in the file, from 0.

    Raises:
        ValueError: lines that make no prompts, each with its number and the reason.
    """
    found: list[tuple[dict[str, Any], list[int]]] = []
    problems: list[str] = []
    with Path(path).expanduser().open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = {"id": len(found) + len(problems)} | _record(line)
                found.append((record, prompts.ids(record)))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{path} has lines that are no prompts:\n  " + "\n  ".join(problems[:10]) + more
        )
    if not found:
        raise ValueError(f'{path} has no prompts; write lines such as {{"prompt": "Once upon"}}')
    return found


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("no object")
    if "prompt" in record:
        record["input"] = record.pop("prompt")
    return record
