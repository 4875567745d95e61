"""From records to token ids and loss masks: prompt or chat templates, special tokens, limits."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.rendering import given_tokens
from ditty_di.data.rendering.audit import Encoded, Note, refusal
from ditty_di.data.rendering.conversations import ChatFormat, Conversation, holds, is_turns
from ditty_di.data.rendering.templates import ASSISTANT_TURNS, ChatRenderer, PromptTemplate
from ditty_di.data.rendering.token_spans import Markers, TokenSpans, special_tokens_around
from ditty_di.data.tokenizer import eos_id, tokenizer_fingerprint

# Raise it when the same records and options would give other ids.
_FORMAT = 4
_TRUNCATIONS = ("left", "right")
_AUDITS = ("warn", "refuse")
_DEFAULT_FORMATS = ("__input__", "__output__")
_PROMPT_COMPLETION = ("prompt", "completion")
_PROMPT_COMPLETION_FORMATS = [PromptTemplate(f"__{name}__", {}) for name in _PROMPT_COMPLETION]
# Characters on each side that decide whether a token spans the border of input and output.
_BORDER = 32


class Renderer:
    """Render and tokenize records, and mask what is not output.

    A record with `messages_key` is a conversation: the tokenizer's chat template renders it
    (`ChatRenderer`), and what the assistant says is output, its end-of-turn tokens included. A turn
    with `weight` 0, `train` or `loss` false is excluded. Beside the turns `tools` (a list of
    schemas, or JSON text), `system` (for the turn before the first, if the template accepts one)
    and `chat_template_kwargs` are read. `prompt` and `completion`, both lists of turns, are a
    conversation of which the completion is output.

    A record with `input_ids` and `labels` is used as it is: labels are the ids themselves, not
    shifted, or -100 where they are excluded from the loss; positions whose `attention_mask` is 0
    are left out, those whose `completion_mask` or `assistant_masks` is 0 are excluded. Without
    labels and masks all tokens are output, if the record has nothing else to read. Also used as
    they are: `segments`, a list of objects with a `text` and a `label`, true for output.

    Any other record has an input and an output, made by `input_format` and `output_format`
    (`PromptTemplate`: placeholders `__input__`, `__output__` or `__any_field__`) and tokenized
    apart; the default formats use `prompt` and `completion` where there is neither. The input
    begins with the special tokens that the tokenizer adds before a text (such as BOS) unless the
    format contains them, the output ends with EOS; no other special tokens are added. A field that
    holds a list of integers is used as token ids.

    Longer inputs lose their first tokens, so that the question and the end of the format stay;
    longer outputs and examples lose their last ones, and with them EOS: only a whole output teaches
    where to stop.

    Args:
        tokenizer: The tokenizer.
        input_format: PromptTemplate of inputs, or several (`PromptTemplate`).
        output_format: PromptTemplate of outputs, or several.
        input_key: Field for `__input__`.
        output_key: Field for `__output__`.
        messages_key: Field of a conversation's turns.
        role_key: Key of a turn's role.
        content_key: Key of a turn's content (text, or a list of parts of text).
        roles: Maps the records' names of roles to the template's.
        assistant_turns: `all` answers of a conversation in one example, `each` in an example of its
            own, or the `last` alone.
        max_input_tokens: Limit of inputs, in tokens, special ones included.
        max_output_tokens: Limit of outputs, in tokens, EOS included.
        max_tokens: Limit of a row, in tokens, so it may be the model's maximum length; the only
            limit of conversations.
        truncate_input: The side on which longer inputs lose tokens: `left` or `right`.
        end_input: Add the special tokens that the tokenizer adds after a text, as encoders (T5)
            expect it.
        audit: What happens to an example that is probably not as its author intended, such as one
            whose fields nothing reads, whose tools the template does not render, or whose answers
            have no end. `warn` keeps it with `Encoded.notes`, `refuse` makes it an error.
            `ditty_di.data.rendering.audit.KINDS` lists the findings, and which of them are never
            refused.
        ignored_fields: Fields of records and turns that may be left unread.

    Raises:
        ValueError: An option out of range. When called: a tokenizer without what the first record
            of a kind needs (EOS, a chat template).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        input_format: str | Sequence[str] = "__input__",
        output_format: str | Sequence[str] = "__output__",
        input_key: str = "input",
        output_key: str = "output",
        messages_key: str = "messages",
        role_key: str = "role",
        content_key: str = "content",
        roles: Mapping[str, str] | None = None,
        assistant_turns: str = "all",
        max_input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        max_tokens: int | None = None,
        truncate_input: str = "left",
        end_input: bool = False,
        audit: str = "warn",
        ignored_fields: Sequence[str] = (),
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "tokenizer")}
        checked = inspect.signature(self.validate).parameters
        self.validate(**{name: given[name] for name in checked})
        self._options = json.dumps({**given, "format": _FORMAT}, sort_keys=True, default=dict)
        aliases = {"input": input_key, "output": output_key}
        self.tokenizer = tokenizer
        self.chat_format = ChatFormat(messages_key, role_key, content_key, roles)
        self._keys = (input_key, output_key)
        self._formats = [PromptTemplate(text, aliases) for text in (input_format, output_format)]
        self._defaults = (input_format, output_format) == _DEFAULT_FORMATS
        self._assistant_turns = assistant_turns
        self._refuses = audit == "refuse"
        self._ignored = {ignored_fields} if isinstance(ignored_fields, str) else set(ignored_fields)
        self._max_input, self._max_output = max_input_tokens, max_output_tokens
        # A row lacks the last id, which is only a label.
        self._max_ids = None if max_tokens is None else max_tokens + 1
        self._keeps_end = truncate_input == "left"
        self._before, after = special_tokens_around(tokenizer)
        self._after = after if end_input else []
        self._tokens = TokenSpans(tokenizer)

    @staticmethod
    def validate(
        *,
        assistant_turns: str = "all",
        truncate_input: str = "left",
        audit: str = "warn",
        max_input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        max_tokens: int | None = None,
        input_format: str | Sequence[str] | None = None,
        output_format: str | Sequence[str] | None = None,
    ) -> None:
        """Raise `ValueError` for an option out of range, and for a format without a field."""
        for name, text in (("input_format", input_format), ("output_format", output_format)):
            try:
                PromptTemplate(text or "__any__", {})
            except ValueError as error:
                raise ValueError(f"{name}={text!r}: {error}") from None
        options.one_of(ASSISTANT_TURNS, assistant_turns=assistant_turns)
        options.one_of(_TRUNCATIONS, truncate_input=truncate_input)
        options.one_of(_AUDITS, audit=audit)
        options.at_least(
            1,
            max_input_tokens=max_input_tokens,
            max_output_tokens=max_output_tokens,
            max_tokens=max_tokens,
        )

    def fingerprint(self) -> str:
        """Return a digest of everything that decides about the ids."""
        return fingerprint(tokenizer_fingerprint(self.tokenizer), self._options)

    def __call__(self, records: Sequence[Any]) -> list[list[Encoded | ValueError]]:
        """Return the examples of each record; for a bad record the error in their place."""
        found: list[list[Encoded | ValueError]] = [[] for _ in records]
        pairs: dict[int, tuple[str | list[int], str | list[int]]] = {}
        if any(not isinstance(r, ValueError) and self.chat_format.keys_of(r) for r in records):
            _ = self._renderer  # raises here, not in a record's place, without a chat template
        for i, record in enumerate(records):
            try:
                if isinstance(record, ValueError):
                    raise record
                if self.chat_format.keys_of(record):
                    found[i] = self._conversation(record)
                elif self._is_tokenized(record):
                    ids = self._checked_ids(record["input_ids"], "input_ids")
                    found[i] = [self._masked(record, *given_tokens.labeled(ids, record))]
                elif self._is_segmented(record):
                    segments = given_tokens.segmented(record, self._tokenize)
                    found[i] = [self._masked(record, *segments)]
                else:
                    pairs[i] = (self._part(record, 0), self._part(record, 1))
            except ValueError as error:
                found[i] = [error]
        for i, example in zip(pairs, self._joined(list(pairs.values())), strict=True):
            notes = {Note("unread", key) for key in self.unread(records[i])}
            found[i] = [example._replace(notes=example.notes | notes)]
        return [[self._audited(example) for example in examples] for examples in found]

    #: Ids that are excluded from the loss wherever they are.
    never_learned: Sequence[int] = ()

    def resolved(self, record: Any, folder: Path | None) -> Any:
        """Return the record with the paths of its files; this renderer reads no files."""
        return record

    def origins(self, records: Iterable[tuple[str, Any]]) -> str:
        """Return what the examples depend on beside the records' content: nothing."""
        return ""

    def unread(self, record: Mapping[str, Any]) -> set[str]:
        """Return the record's fields that hold something and that nothing reads.

        Those of `ignored_fields` are left out. Keys within turns are not looked at.

        Raises:
            ValueError: A field that a format cannot read.
        """
        if keys := self.chat_format.keys_of(record):
            read = {*keys, "tools", "system", "chat_template_kwargs"}
        elif self._is_tokenized(record):
            read = set(given_tokens.TOKENIZED_KEYS)
        elif self._is_segmented(record):
            read = {given_tokens.SEGMENTS_KEY}
        else:
            read = set()
            for key, form in zip(self._keys, self._formats_for(record), strict=True):
                is_ids = isinstance(record.get(key), list)
                read |= {key} if is_ids else form.keys_read(record)
        return {k for k, v in record.items() if holds(v)} - read - self._ignored

    def _audited(self, example: Encoded | ValueError) -> Encoded | ValueError:
        if self._refuses and isinstance(example, Encoded) and (told := refusal(example.notes)):
            return ValueError(told)
        return example

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a record's input, as before the output in training.

        Of a conversation (`messages_key`, or `prompt` as a list of turns) that is everything but
        the assistant's last turns, with the generation prompt.

        Raises:
            ValueError: The record has no input.
        """
        if record.get(self.chat_format.key) is not None or is_turns(record.get("prompt")):
            return self._asked(record)
        if self._defaults and self._keys[0] not in record and "prompt" in record:
            part: str | list[int] = _PROMPT_COMPLETION_FORMATS[0](record)
        else:
            part = self._part(record, 0)
        ids = self._tokenize([part])[0] if isinstance(part, str) else part
        return self._input(ids)[0]

    def prompt_text(self, example: Encoded) -> str:
        """Return the text before the first output, without the tokenizer's special tokens."""
        start = example.output.index(True) if True in example.output else len(example.ids)
        return str(self.tokenizer.decode(self._without_start(example.ids[:start])))

    # --- inputs and outputs ----------------------------------------------------------------------

    def _formats_for(self, record: Mapping[str, Any]) -> list[PromptTemplate]:
        neither = self._defaults and lacks(record, self._keys)
        if neither and all(record.get(key) is not None for key in _PROMPT_COMPLETION):
            return _PROMPT_COMPLETION_FORMATS
        return self._formats

    def _part(self, record: Mapping[str, Any], which: int) -> str | list[int]:
        key, formats = self._keys[which], self._formats_for(record)
        ids = record.get(key)
        if isinstance(ids, list):
            return self._checked_ids(ids, key)
        if which and key in record and ids is None and formats is self._formats:
            raise ValueError(f'"{key}" is null: there is no output to learn')
        return formats[which](record)

    def _checked_ids(self, ids: Any, key: str) -> list[int]:
        size = len(self.tokenizer)
        if isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids):
            return ids
        raise ValueError(f'"{key}" holds a list, but not of token ids below {size}')

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in found["input_ids"]]

    def _without_start(self, ids: list[int]) -> list[int]:
        length = len(self._before)
        return ids[length:] if ids[:length] == self._before else ids

    def _input(self, ids: list[int]) -> tuple[list[int], bool]:
        # A format may contain the special tokens that the tokenizer adds to a text.
        ids = self._without_start(ids)
        if self._after and ids[-len(self._after) :] == self._after:
            ids = ids[: -len(self._after)]
        room = len(ids)
        if self._max_input is not None:
            room = max(0, self._max_input - len(self._before) - len(self._after))
        kept = ids[max(0, len(ids) - room) :] if self._keeps_end else ids[:room]
        return [*self._before, *kept, *self._after], len(kept) < len(ids)

    def _joined(self, pairs: list[tuple[str | list[int], str | list[int]]]) -> list[Encoded]:
        if not pairs:
            return []
        eos = eos_id(self.tokenizer, "outputs")
        tokenized = iter(self._tokenize([p for pair in pairs for p in pair if isinstance(p, str)]))
        found = []
        for pair in pairs:
            inputs, outputs = (next(tokenized) if isinstance(p, str) else p for p in pair)
            inputs, cut = self._input(inputs)
            outputs = outputs if outputs[-1:] == [eos] else [*outputs, eos]
            kept = outputs[: self._max_output]
            mask = [False] * len(inputs) + [True] * len(kept)
            notes = frozenset({Note("border")} if self._border_in_token(*pair) else ())
            cut = cut or len(kept) < len(outputs)
            found.append(self._limited(Encoded(inputs + kept, mask, len(inputs), cut, notes)))
        return found

    def _border_in_token(self, inputs: str | list[int], outputs: str | list[int]) -> bool:
        if not isinstance(inputs, str) or not isinstance(outputs, str) or self._after:
            return False
        before = inputs[-_BORDER:]
        return self._tokens.differs(before + outputs[:_BORDER], len(before))

    def _limited(self, whole: Encoded) -> Encoded:
        if self._max_ids is None or len(whole.ids) <= self._max_ids:
            return whole
        ids, mask = whole.ids[: self._max_ids], whole.output[: self._max_ids]
        return whole._replace(ids=ids, output=mask, inputs=min(whole.inputs, len(ids)), cut=True)

    # --- records with their own loss mask --------------------------------------------------------

    def _is_tokenized(self, record: Mapping[str, Any]) -> bool:
        if record.get("input_ids") is None or {"input_ids", "labels"} & set(self._keys):
            return False
        if not lacks(record, given_tokens.MASK_KEYS):
            return True
        return self._defaults and lacks(record, (*self._keys, *_PROMPT_COMPLETION))

    def _is_segmented(self, record: Mapping[str, Any]) -> bool:
        return not lacks(record, [given_tokens.SEGMENTS_KEY]) and lacks(record, self._keys[:1])

    def _masked(self, record: Mapping[str, Any], ids: list[int], mask: list[bool]) -> Encoded:
        inputs = mask.index(True) if True in mask else len(mask)
        inputs = inputs if all(mask[inputs:]) else -1
        notes = {Note("unread", key) for key in self.unread(record)}
        if self._is_tokenized(record) and lacks(record, given_tokens.MASK_KEYS):
            notes.add(Note("all_in_loss"))
        output = [i for i, is_output in zip(ids, mask, strict=True) if is_output]
        if output and not self._markers.ends(output):
            notes.add(Note("no_end_text"))
        return self._limited(Encoded(ids, mask, inputs, False, frozenset(notes)))

    # --- conversations ---------------------------------------------------------------------------

    @cached_property
    def _markers(self) -> Markers:
        return Markers(self.tokenizer)

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self._assistant_turns)

    def _conversation(self, record: Mapping[str, Any]) -> list[Encoded | ValueError]:
        chat, unread = self._read(record, self.chat_format.of(record))
        notes = {
            *chat.notes,
            *(Note("unread_beside_turns", key) for key in unread),
            *self._renderer.template.unread(chat, self._ignored),
        }
        found: list[Encoded | ValueError] = []
        for whole in self._renderer(chat):
            found.append(self._limited(whole._replace(notes=whole.notes | notes)))
            notes = set()  # once a record
        return found

    def _read(self, record: Mapping[str, Any], chat: Conversation) -> tuple[Conversation, set[str]]:
        """Return the conversation in the template's form, and fields that were not read."""
        template, unread = self._renderer.template, self.unread(record)
        system = record.get("system")
        if holds(system) and "system" not in self._ignored:
            with_system = template.with_system(chat, system) if isinstance(system, str) else None
            if with_system is None and chat.messages[0] != {"role": "system", "content": system}:
                unread.add("system")
            chat = with_system or chat
        return template.fitted(chat), unread

    def _asked(self, record: Mapping[str, Any]) -> list[int]:
        chat, _ = self._read(record, self.chat_format.asked(record))
        return self._tokens.ids(self._renderer.template.render(chat, prompt=True))


def lacks(record: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Return whether a record has none of the keys, or null there."""
    return all(record.get(key) is None for key in keys)
