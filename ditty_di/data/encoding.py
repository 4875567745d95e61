"""From records to token ids: formats or chat template, special tokens, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ditty_di.data.audit import Note, refusal
from ditty_di.data.cache import fingerprint
from ditty_di.data.conversations import Conversation, Turns, holds, is_turns
from ditty_di.data.given_tokens import (
    LEARNT_KEYS,
    SEGMENTS_KEY,
    TOKENIZED_KEYS,
    labelled,
    segmented,
)
from ditty_di.data.rendering import ASSISTANT_TURNS, ChatRenderer, Format
from ditty_di.data.token_spans import Markers, TokenSpans
from ditty_di.data.tokens import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it when the same records and options would give other ids.
_FORMAT = 3
#: Which tokens of an input that is too long stay, named by the side where it is cut.
TRUNCATIONS = {
    "left": lambda ids, count: ids[len(ids) - count :],
    "right": lambda ids, count: ids[:count],
}

AUDITS = ("warn", "refuse")
_DEFAULT_FORMATS = ("__input__", "__output__")
_PROMPT_COMPLETION = ("prompt", "completion")
# Characters on each side that decide whether a token spans the border of input and output.
_BORDER = 32

NO_EOS = """\
the tokenizer {name!r} has no EOS token to end outputs with: set its `eos_token` (in YAML: \
`eos_token: <token>` in the tokenizer node)"""


class Encoded(NamedTuple):
    """One example: its ids, which of them are output, and whether it was cut to fit.

    The first `inputs` ids are the input; -1 for a conversation, which has several. `notes` say what
    may not be meant as it is.
    """

    ids: list[int]
    output: list[bool]
    inputs: int
    cut: bool
    notes: frozenset[Note] = frozenset()


class Encoder:
    """Makes token ids of records, and knows which of them are output.

    A record with `messages_key` is a conversation: the tokenizer's chat template renders it
    (`ChatRenderer`), and what the assistant says is output, its end-of-turn tokens included. Turns
    have `role_key` and `content_key` (text, or a list of parts of text); `roles` maps names of
    roles to the template's, and `assistant_turns` is `all`, `each` or `last`. A turn with `weight`
    0, `train` or `loss` false is not learnt. Beside the turns `tools` (a list of schemas, or JSON
    text), `system` (for the turn before the first, if the template takes one) and
    `chat_template_kwargs` are read. `prompt` and `completion`, both lists of turns, are a
    conversation of which the completion is learnt.

    A record with `input_ids` and `labels` is taken as it is: labels are the ids themselves, -100
    where they are not learnt; positions whose `attention_mask` is 0 are left out, those whose
    `completion_mask` or `assistant_masks` is 0 are not learnt. Without labels and masks all tokens
    are learnt, if the record has nothing else to read. Taken as they are, too, are `segments`, a
    list of objects with a `text` and a `label`, true where it is learnt.

    Any other record has an input and an output, formatted by `input_format` and `output_format`
    (`Format`: placeholders `__input__`, `__output__` or `__any_field__`) and tokenized apart; the
    default formats take `prompt` and `completion` where there is neither. The input begins with
    what the tokenizer puts before a text by itself (BOS, if it does) unless the format spells it,
    the output ends with EOS; there are no other special tokens. A field that holds a list of
    integers is taken as token ids. `end_input` adds what the tokenizer puts after a text, as
    encoders expect it (T5).

    Longer inputs lose their first tokens (`truncate_input="right"`: their last), so that the
    question and the end of the format stay; longer outputs and examples lose their last ones, and
    with them EOS: only a whole output teaches where to stop. All limits are in tokens, special ones
    included; `max_tokens` is that of a row, so it may be the model's maximum length, and the only
    one for conversations.

    `audit`: what becomes of an example that is probably not what its author meant, such as one
    whose fields nothing reads (but `ignored_fields`), whose tools the template does not render, or
    whose answers have no end to learn. `warn` keeps it with `Encoded.notes`, `refuse` makes it an
    error. `ditty_di.data.audit.KINDS` lists what is looked for, and what is only ever told.

    Raises `ValueError` for an option out of range; for a tokenizer that cannot do what the first
    record of a kind needs (EOS, a chat template).
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
        self.validate(
            assistant_turns=assistant_turns,
            truncate_input=truncate_input,
            audit=audit,
            max_input_tokens=max_input_tokens,
            max_output_tokens=max_output_tokens,
            max_tokens=max_tokens,
            input_format=input_format,
            output_format=output_format,
        )
        options: dict[str, Any] = {
            "formats": [input_format, output_format],
            "keys": [input_key, output_key, messages_key, role_key, content_key],
            "roles": dict(roles or {}),
            "assistant_turns": assistant_turns,
            "limits": [max_input_tokens, max_output_tokens, max_tokens],
            "truncate_input": truncate_input,
            "end_input": end_input,
            "audit": [audit, list(ignored_fields)],
        }
        aliases = {"input": input_key, "output": output_key}
        self.tokenizer = tokenizer
        self._keys = (input_key, output_key)
        self._formats = (Format(input_format, aliases), Format(output_format, aliases))
        self._defaults = (input_format, output_format) == _DEFAULT_FORMATS
        self._prompt_completion = (Format("__prompt__", {}), Format("__completion__", {}))
        self.turns = Turns(messages_key, role_key, content_key, roles)
        self._assistant_turns = assistant_turns
        self._refuses = audit == "refuse"
        self._ignored = {ignored_fields} if isinstance(ignored_fields, str) else set(ignored_fields)
        self._max_input, self._max_output = max_input_tokens, max_output_tokens
        # Rows lack the last token, which is only a label.
        self._max_ids = None if max_tokens is None else max_tokens + 1
        self._truncate = TRUNCATIONS[truncate_input]
        self._before, after = special_tokens_around(tokenizer)
        self._after = after if end_input else []
        self._tokens = TokenSpans(tokenizer)
        self._options = json.dumps({**options, "format": _FORMAT}, sort_keys=True)

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
                Format(text or "__any__", {})
            except ValueError as error:
                raise ValueError(f"{name}={text!r}: {error}") from None
        for name, value, known in (
            ("assistant_turns", assistant_turns, ASSISTANT_TURNS),
            ("truncate_input", truncate_input, TRUNCATIONS),
            ("audit", audit, AUDITS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        for name, limit in (
            ("max_input_tokens", max_input_tokens),
            ("max_output_tokens", max_output_tokens),
            ("max_tokens", max_tokens),
        ):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be at least 1")

    def fingerprint(self) -> str:
        """Changes with whatever would give other ids."""
        return fingerprint(tokenizer_fingerprint(self.tokenizer), self._options)

    def __call__(self, records: Sequence[Any]) -> list[list[Encoded | ValueError]]:
        """The examples of each record; in place of a bad one's, what is wrong with it."""
        found: list[list[Encoded | ValueError]] = [[] for _ in records]
        pairs: dict[int, tuple[str | list[int], str | list[int]]] = {}
        if any(not isinstance(r, ValueError) and self.turns.keys_of(r) for r in records):
            _ = (
                self._renderer
            )  # the error of a tokenizer without a chat template is raised, not a record's
        for i, record in enumerate(records):
            try:
                if isinstance(record, ValueError):
                    raise record
                if self.turns.keys_of(record):
                    found[i] = self._conversation(record)
                elif self._is_tokenized(record):
                    found[i] = [self._tokenized(record)]
                elif self._is_segmented(record):
                    found[i] = [self._segmented(record)]
                else:
                    pairs[i] = (self._part(record, 0), self._part(record, 1))
            except ValueError as error:
                found[i] = [error]
        for i, example in zip(pairs, self._joined(list(pairs.values())), strict=True):
            notes = {Note("unread", key) for key in self.unread(records[i])}
            found[i] = [example._replace(notes=example.notes | notes)]
        return [[self._audited(example) for example in examples] for examples in found]

    def unread(self, record: Mapping[str, Any]) -> set[str]:
        """Return the record's fields that hold something and that nothing reads.

        Those of `ignored_fields` are left out. Keys within turns are not looked at.

        Raises `ValueError` for a field that a format cannot read.
        """
        if keys := self.turns.keys_of(record):
            read = {*keys, "tools", "system", "chat_template_kwargs"}
        elif self._is_tokenized(record):
            read = set(TOKENIZED_KEYS)
        elif self._is_segmented(record):
            read = {SEGMENTS_KEY}
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
        """The ids of a record's input, as it stands before the output in training.

        Of a conversation (`messages_key`, or `prompt` as a list of turns) that is everything but
        the assistant's last turns, with the generation prompt.

        Raises `ValueError` for a record that has none.
        """
        if record.get(self.turns.key) is not None or is_turns(record.get("prompt")):
            return self._asked(record)
        if self._defaults and self._keys[0] not in record and "prompt" in record:
            part: str | list[int] = self._prompt_completion[0](record)
        else:
            part = self._part(record, 0)
        ids = self._tokenize([part])[0] if isinstance(part, str) else part
        return self._input(ids)[0]

    def prompt_text(self, example: Encoded) -> str:
        """What stands before the first output, without what the tokenizer puts there by itself."""
        start = example.output.index(True) if True in example.output else len(example.ids)
        ids = example.ids[:start]
        if self._before and ids[: len(self._before)] == self._before:
            ids = ids[len(self._before) :]
        return str(self.tokenizer.decode(ids))

    def _formats_for(self, record: Mapping[str, Any]) -> tuple[Format, Format]:
        neither = self._defaults and all(record.get(key) is None for key in self._keys)
        if neither and all(record.get(key) is not None for key in _PROMPT_COMPLETION):
            return self._prompt_completion
        return self._formats

    def _part(self, record: Mapping[str, Any], which: int) -> str | list[int]:
        key = self._keys[which]
        ids = record.get(key)
        if isinstance(ids, list):
            return self._checked_ids(ids, key)
        formats = self._formats_for(record)
        if which and key in record and ids is None and formats is self._formats:
            raise ValueError(f'"{key}" is null: there is no output to learn')
        return formats[which](record)

    def _checked_ids(self, ids: Any, key: str) -> list[int]:
        size = len(self.tokenizer)
        if isinstance(ids, list) and all(_is_int(i) and 0 <= i < size for i in ids):
            return ids
        raise ValueError(f'"{key}" holds a list, but not of token ids below {size}')

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in found["input_ids"]]

    def _input(self, ids: list[int]) -> tuple[list[int], bool]:
        # A format may spell what the tokenizer puts around a text by itself.
        if self._before and ids[: len(self._before)] == self._before:
            ids = ids[len(self._before) :]
        if self._after and ids[-len(self._after) :] == self._after:
            ids = ids[: -len(self._after)]
        if self._max_input is None:
            return [*self._before, *ids, *self._after], False
        room = max(0, self._max_input - len(self._before) - len(self._after))
        kept = ids if len(ids) <= room else self._truncate(ids, room)
        return [*self._before, *kept, *self._after], len(kept) < len(ids)

    def _joined(self, pairs: list[tuple[str | list[int], str | list[int]]]) -> list[Encoded]:
        if not pairs:
            return []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(NO_EOS.format(name=self.tokenizer.name_or_path))
        tokenized = iter(self._tokenize([p for pair in pairs for p in pair if isinstance(p, str)]))
        found = []
        for pair in pairs:
            inputs, outputs = (next(tokenized) if isinstance(p, str) else p for p in pair)
            inputs, cut = self._input(inputs)
            outputs = outputs if outputs[-1:] == [eos] else [*outputs, eos]
            kept = outputs[: self._max_output]
            is_output = [False] * len(inputs) + [True] * len(kept)
            cut = cut or len(kept) < len(outputs)
            notes = frozenset({Note("border")} if self._border_in_token(*pair) else ())
            found.append(self._limited(Encoded(inputs + kept, is_output, len(inputs), cut, notes)))
        return found

    def _border_in_token(self, inputs: str | list[int], outputs: str | list[int]) -> bool:
        if not isinstance(inputs, str) or not isinstance(outputs, str) or self._after:
            return False
        before = inputs[-_BORDER:]
        return self._tokens.differs(before + outputs[:_BORDER], len(before))

    def _limited(self, whole: Encoded) -> Encoded:
        if self._max_ids is None or len(whole.ids) <= self._max_ids:
            return whole
        ids, is_output = whole.ids[: self._max_ids], whole.output[: self._max_ids]
        inputs = min(whole.inputs, len(ids))
        return whole._replace(ids=ids, output=is_output, inputs=inputs, cut=True)

    # --- records that are tokens, or segments, already -------------------------------------------

    def _is_tokenized(self, record: Mapping[str, Any]) -> bool:
        if record.get("input_ids") is None or {"input_ids", "labels"} & set(self._keys):
            return False
        if any(record.get(key) is not None for key in LEARNT_KEYS):
            return True
        others = (*self._keys, *_PROMPT_COMPLETION)
        return self._defaults and all(record.get(key) is None for key in others)

    def _is_segmented(self, record: Mapping[str, Any]) -> bool:
        return record.get(SEGMENTS_KEY) is not None and record.get(self._keys[0]) is None

    def _tokenized(self, record: Mapping[str, Any]) -> Encoded:
        ids = self._checked_ids(record["input_ids"], "input_ids")
        return self._as_it_is(record, *labelled(ids, record))

    def _segmented(self, record: Mapping[str, Any]) -> Encoded:
        return self._as_it_is(record, *segmented(record, self._tokenize))

    def _as_it_is(self, record: Mapping[str, Any], ids: list[int], output: list[bool]) -> Encoded:
        inputs = output.index(True) if True in output else len(output)
        inputs = inputs if all(output[inputs:]) else -1
        notes = {Note("unread", key) for key in self.unread(record)}
        if self._is_tokenized(record) and all(record.get(key) is None for key in LEARNT_KEYS):
            notes.add(Note("all_learnt"))
        learnt = [i for i, it in zip(ids, output, strict=True) if it]
        if learnt and not self._markers.ends(learnt):
            notes.add(Note("no_end_text"))
        return self._limited(Encoded(ids, output, inputs, False, frozenset(notes)))

    # --- conversations ---------------------------------------------------------------------------

    @cached_property
    def _markers(self) -> Markers:
        return Markers(self.tokenizer)

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self._assistant_turns)

    def _conversation(self, record: Mapping[str, Any]) -> list[Encoded | ValueError]:
        renderer = self._renderer
        chat, unread = self._read(record, self.turns.of(record))
        notes = frozenset(
            {
                *chat.notes,
                *(Note("unread_beside_turns", key) for key in unread),
                *renderer.template.unread(chat, self._ignored),
            }
        )
        found: list[Encoded | ValueError] = []
        for ids, mask, own in renderer(chat):
            found.append(self._limited(Encoded(ids, mask, -1, False, notes | own)))
            notes = frozenset()
        return found

    def _read(self, record: Mapping[str, Any], chat: Conversation) -> tuple[Conversation, set[str]]:
        """Return the conversation as the template takes it, and fields that were not read."""
        unread = self.unread(record)
        system = record.get("system")
        if holds(system) and "system" not in self._ignored:
            with_system = None
            if isinstance(system, str):
                with_system = self._renderer.template.with_system(chat, system)
            if with_system is not None:
                chat = with_system
            elif chat.messages[0] != {"role": "system", "content": system}:
                unread.add("system")
        return self._renderer.template.fitted(chat), unread

    def _asked(self, record: Mapping[str, Any]) -> list[int]:
        chat = self.turns.of(record, answered=False)
        messages = list(chat.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f'"{self.turns.key}" has no turn that the assistant could answer')
        chat, _ = self._read(record, chat.with_messages(messages))
        return self._tokens.ids(self._renderer.template.render(chat, prompt=True))


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself, such as BOS, or T5's EOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
