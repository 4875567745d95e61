"""Read prompts, typed or from a file, and encode them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.data.reading.files import READERS, kind_of, looks_like_json, read_lines, read_values
from ditty_di.data.rendering.conversations import ChatFormat, is_turns
from ditty_di.data.rendering.renderer import Renderer
from ditty_di.data.rendering.templates import PromptTemplate
from ditty_di.generation.sampling import prompt_ids


class PromptRenderer(Protocol):
    """Encode prompts as training did; `ditty_di.data.Renderer` is one."""

    def prompt(self, record: dict[str, Any], /) -> list[int]:
        """Return the token ids of a record up to where the model is to answer.

        Args:
            record: of a file of prompts.
        """


class Prompts:
    """Encode records as prompts.

    A conversation goes through the tokenizer's chat template, up to where the model is to answer:
    trailing turns of the assistant are left out. Its turns are under the keys of `renderer`, such
    as
    `messages`, with the roles that it maps. Any other record goes to `renderer`; without one, the
    prompt is the text under `input`, or `input_format` with the record's fields in it
    (`ditty_di.data.rendering.templates.PromptTemplate`).

    Args:
        tokenizer: of the model.
        renderer: the one of the training.
        input_format: a format string, or several.
        seq2seq: the text is for an encoder, as the tokenizer ends it. Otherwise it is to be
            continued, so without EOS at its end.
        chat: make the text of a record without a conversation the turn of a user in one.

    Raises:
        ValueError: `chat` with a tokenizer that has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        renderer: PromptRenderer | None = None,
        input_format: str | Sequence[str] | None = None,
        seq2seq: bool = False,
        chat: bool = False,
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "chat=true needs a tokenizer with a chat template; this one has none: give one as "
                "tokenizer.chat_template, or take chat=false"
            )
        self.tokenizer, self.renderer = tokenizer, renderer
        self.seq2seq, self.chat = seq2seq, chat
        self.texts = 0  # records so far that were not conversations
        self.chat_format: ChatFormat = getattr(renderer, "chat_format", None) or ChatFormat()
        self.continues = renderer is None and input_format is None and not seq2seq and not chat
        self.format: Callable[[dict[str, Any]], str] = (
            _input if input_format is None else PromptTemplate(input_format, {})
        )

    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record as it is prompted: with `chat`, a text as a conversation of one turn.

        Args:
            record: of a file of prompts.

        Raises:
            ValueError: the record has no text.
        """
        if record.get(self.chat_format.key) is not None:
            return record
        self.texts += 1
        # Other fields than these are the renderer's to read, if there is one.
        if not self.chat or (self.renderer and not isinstance(record.get("input"), str)):
            return record
        turn = {
            self.chat_format.role_key: "user",
            self.chat_format.content_key: self.format(record),
        }
        rest = {key: value for key, value in record.items() if key != "input"}
        return rest | {self.chat_format.key: [turn]}

    def ids(self, record: dict[str, Any]) -> list[int]:
        """Return the token ids of a record.

        Args:
            record: as `record` returns it.

        Raises:
            ValueError: the record is not a prompt.
        """
        key, renderer = self.chat_format.key, self.renderer
        if record.get(key) is not None:
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f'"{key}" needs a tokenizer with a chat template; this one has none'
                )
            if not is_turns(record[key]):
                raise ValueError(f'"{key}" is not a list of objects with role and content')
            renderer = renderer or self._chat_renderer
        if renderer is not None:
            ids = renderer.prompt(record)
            if not ids:
                raise ValueError("the prompt has no token; write a word")
            return ids
        text = self.format(record)
        if self.seq2seq:
            return list(self.tokenizer(text)["input_ids"])
        return prompt_ids(self.tokenizer, text)

    def images(self, record: dict[str, Any]) -> list[str]:
        """Return the paths of the images in a record's prompt, in the order of their tokens.

        Args:
            record: as `record` returns it.
        """
        found: Callable[[Any], list[str]] | None = getattr(self.renderer, "prompt_images", None)
        return [] if found is None else found(record)

    def image_inputs(self, ids: Tensor, images: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs of images beside their tokens; the renderer has the processor.

        Args:
            ids: `[prompts, longest]`.
            images: paths.
        """
        made: dict[str, Tensor] = self.renderer.images.inputs(ids, images)  # type: ignore[union-attr]
        return made

    @cached_property
    def _chat_renderer(self) -> Renderer:
        return Renderer(self.tokenizer)

    def shown(self, answer: dict[str, Any]) -> str:
        """Return what to show who typed a prompt: the continued text, or the answer alone.

        Args:
            answer: the record with `input` and `text`.
        """
        return answer["input"] + answer["text"] if self.continues else answer["text"].strip()


def read_prompts(path: str, prompts: Prompts) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the records of a file as they are prompted, and their token ids.

    The file has JSON objects or a table (`ditty_di.data.reading.files.read_values`), or, with any
    other suffix and content, text: each line is a prompt. Blank lines are skipped. A `prompt` is
    taken as the `input`; a record without `id` gets its position in the file, from 0.

    Args:
        path: of the file.
        prompts: encodes the records.

    Raises:
        ValueError: lines that are not prompts, each with its number and the reason.
    """
    found: list[tuple[dict[str, Any], list[int]]] = []
    problems: list[str] = []
    file = Path(path).expanduser()
    resolved = getattr(prompts.renderer, "resolved", lambda record, folder: record)
    for where, value in _values(file):
        try:
            asked = resolved(_record(value), file.parent)
            record = prompts.record({"id": len(found) + len(problems)} | asked)
            found.append((record, prompts.ids(record)))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{path} has lines that are not prompts:\n  " + "\n  ".join(problems[:10]) + more
        )
    if not found:
        raise ValueError(f'{path} has no prompts; write lines such as {{"prompt": "Once upon"}}')
    return found


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    if kind_of(file) in READERS or looks_like_json(file):
        yield from read_values(file)
    else:
        for where, line in read_lines(file):
            yield where, {"prompt": line}


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, ValueError):
        raise ValueError(f"not JSON: {value}")
    if not isinstance(value, dict):
        raise ValueError('not an object such as {"prompt": "Once upon"}')
    record = dict(value)
    if isinstance(record.get("prompt"), str):
        record["input"] = record.pop("prompt")
    return record


def _input(record: dict[str, Any]) -> str:
    if not isinstance(record.get("input"), str):
        raise ValueError('it has no text as "prompt" or "input", and no "messages"')
    return record["input"]
