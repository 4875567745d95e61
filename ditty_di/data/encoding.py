"""From records to token ids: formats or chat template, special tokens, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ditty_di.data.cache import fingerprint
from ditty_di.data.rendering import ASSISTANT_TURNS, ChatRenderer, Format, Turns
from ditty_di.data.tokens import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it when the same records and options would give other ids.
_FORMAT = 1
#: Which tokens of an input that is too long stay, named by the side where it is cut.
TRUNCATIONS = {
    "left": lambda ids, count: ids[len(ids) - count :],
    "right": lambda ids, count: ids[:count],
}

NO_EOS = """\
the tokenizer {name!r} has no EOS token to end outputs with: set its `eos_token` (in YAML: \
`eos_token: <token>` in the tokenizer node)"""


class Encoded(NamedTuple):
    """One example: its ids, which of them are output, and whether it was cut to fit.

    The first `inputs` ids are the input; -1 for a conversation, which has several.
    """

    ids: list[int]
    output: list[bool]
    inputs: int
    cut: bool


class Encoder:
    """Makes token ids of records, and knows which of them are output.

    A record with `messages_key` is a conversation: the tokenizer's chat template renders it
    (`ChatRenderer`), and what the assistant says is output, its end-of-turn tokens included. Turns
    have `role_key` and `content_key`; `roles` maps names of roles to the template's, and
    `assistant_turns` is `all`, `each` or `last`.

    Any other record has an input and an output, formatted by `input_format` and `output_format`
    (`Format`: placeholders `__input__`, `__output__` or `__any_field__`) and tokenized apart. The
    input begins with what the tokenizer puts before a text by itself (BOS, if it does), the output
    ends with EOS; there are no other special tokens. A field that holds a list of integers is taken
    as token ids. `end_input` adds what the tokenizer puts after a text, as encoders expect it (T5).

    Longer inputs lose their first tokens (`truncate_input="right"`: their last), so that the
    question and the end of the format stay; longer outputs and examples lose their last ones, and
    with them EOS: only a whole output teaches where to stop. All limits are in tokens, special ones
    included; `max_tokens` is that of a row, so it may be the model's maximum length, and the only
    one for conversations.

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
    ) -> None:
        options: dict[str, Any] = {
            "formats": [input_format, output_format],
            "keys": [input_key, output_key, messages_key, role_key, content_key],
            "roles": dict(roles or {}),
            "assistant_turns": assistant_turns,
            "limits": [max_input_tokens, max_output_tokens, max_tokens],
            "truncate_input": truncate_input,
            "end_input": end_input,
        }
        for name, value, known in (
            ("assistant_turns", assistant_turns, ASSISTANT_TURNS),
            ("truncate_input", truncate_input, TRUNCATIONS),
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
        aliases = {"input": input_key, "output": output_key}
        self.tokenizer = tokenizer
        self._keys = (input_key, output_key)
        self._formats = (Format(input_format, aliases), Format(output_format, aliases))
        self._turns = Turns(messages_key, role_key, content_key, roles)
        self._assistant_turns = assistant_turns
        self._max_input, self._max_output = max_input_tokens, max_output_tokens
        # Rows lack the last token, which is only a label.
        self._max_ids = None if max_tokens is None else max_tokens + 1
        self._truncate = TRUNCATIONS[truncate_input]
        self._before, after = special_tokens_around(tokenizer)
        self._after = after if end_input else []
        self._renderer: ChatRenderer | None = None
        self._options = json.dumps({**options, "format": _FORMAT}, sort_keys=True)

    def fingerprint(self) -> str:
        """Changes with whatever would give other ids."""
        return fingerprint(tokenizer_fingerprint(self.tokenizer), self._options)

    def __call__(self, records: Sequence[Any]) -> list[list[Encoded | ValueError]]:
        """The examples of each record; in place of a bad one's, what is wrong with it."""
        found: list[list[Encoded | ValueError]] = [[] for _ in records]
        pairs: dict[int, tuple[str | list[int], str | list[int]]] = {}
        for i, record in enumerate(records):
            if isinstance(record, ValueError):
                found[i] = [record]
            elif self._turns.key in record:
                found[i] = self._conversation(record)
            else:
                try:
                    pairs[i] = (self._part(record, 0), self._part(record, 1))
                except ValueError as error:
                    found[i] = [error]
        texts = [part for pair in pairs.values() for part in pair if isinstance(part, str)]
        tokenized = iter(self._tokenize(texts))
        for i, pair in pairs.items():
            inputs, outputs = (next(tokenized) if isinstance(p, str) else p for p in pair)
            found[i] = [self._joined(inputs, outputs)]
        return found

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """The ids of a record's input, as it stands before the output in training.

        Raises `ValueError` for a record that has none.
        """
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

    def _part(self, record: Mapping[str, Any], which: int) -> str | list[int]:
        key = self._keys[which]
        ids = record.get(key)
        if isinstance(ids, list):
            size = len(self.tokenizer)
            if all(isinstance(i, int) and 0 <= i < size for i in ids):
                return ids
            raise ValueError(f'"{key}" holds a list, but not of token ids below {size}')
        if which and key in record and ids is None:
            raise ValueError(f'"{key}" is null: there is no output to learn')
        return self._formats[which](record)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in found["input_ids"]]

    def _input(self, ids: list[int]) -> tuple[list[int], bool]:
        if self._max_input is None:
            return [*self._before, *ids, *self._after], False
        room = max(0, self._max_input - len(self._before) - len(self._after))
        kept = ids if len(ids) <= room else self._truncate(ids, room)
        return [*self._before, *kept, *self._after], len(kept) < len(ids)

    def _joined(self, inputs: list[int], outputs: list[int]) -> Encoded:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(NO_EOS.format(name=self.tokenizer.name_or_path))
        inputs, cut = self._input(inputs)
        outputs = outputs if outputs[-1:] == [eos] else [*outputs, eos]
        kept = outputs[: self._max_output]
        is_output = [False] * len(inputs) + [True] * len(kept)
        cut = cut or len(kept) < len(outputs)
        return self._limited(Encoded(inputs + kept, is_output, len(inputs), cut))

    def _limited(self, whole: Encoded) -> Encoded:
        if self._max_ids is None or len(whole.ids) <= self._max_ids:
            return whole
        ids, is_output = whole.ids[: self._max_ids], whole.output[: self._max_ids]
        return Encoded(ids, is_output, min(whole.inputs, len(ids)), True)

    def _conversation(self, record: Mapping[str, Any]) -> list[Encoded | ValueError]:
        from jinja2 import TemplateError

        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer, self._assistant_turns)
        try:
            examples = self._renderer(self._turns.of(record), record.get("tools"))
            return [self._limited(Encoded(ids, mask, -1, False)) for ids, mask in examples]
        except ValueError as error:
            return [error]
        except TemplateError as error:  # templates refuse, say, roles that do not alternate
            return [ValueError(f"the chat template refuses it: {error}")]


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself, such as BOS, or T5's EOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
