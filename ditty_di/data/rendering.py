"""From a record to text: format strings with placeholders, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = re.compile(r"__([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)__")
_GENERATION = re.compile(r"\{%-?\s*generation\b")

NO_TEMPLATE = """\
the tokenizer {name!r} has no chat template, so `messages` cannot be rendered. Use the tokenizer \
of a chat model, or set its `chat_template` (in YAML: `chat_template: ...` in its node)."""
NOT_A_PREFIX = """\
the chat template renders earlier turns differently once later ones follow (turn {turn}), so this \
conversation cannot be one example that shows each answer as the model would give it. \
assistant_turns=each makes an example of every answer, assistant_turns=last of the last one"""


def field_text(record: Mapping[str, Any], key: str) -> str:
    """The field as text; "" when it is missing or null.

    Raises `ValueError` for a list or an object.
    """
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f'"{key}" holds a {type(value).__name__} instead of text')
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" holds half of a surrogate pair, which is no text') from None
    return text


class Format:
    """One or several format strings with placeholders `__field__`.

    `__input__` and `__output__` stand for the fields that `aliases` names; any other placeholder
    for the record's field of that name. The first occurrence of each is replaced, and what is put
    in is not looked at again. Of several strings the first is taken whose fields all have text,
    else the last: so an Alpaca record without `input` gets another prompt than one with it.
    """

    def __init__(self, formats: str | Sequence[str], aliases: Mapping[str, str]) -> None:
        self.formats = [formats] if isinstance(formats, str) else list(formats)
        self._keys = [
            [aliases.get(name, name) for name in _PLACEHOLDER.findall(text)]
            for text in self.formats
        ]
        for text, keys in zip(self.formats, self._keys, strict=True):
            if not keys:
                raise ValueError(
                    f"the format {text!r} has no placeholder such as __input__, so all examples "
                    "would read the same"
                )
        self._aliases = dict(aliases)

    def __call__(self, record: Mapping[str, Any]) -> str:
        """Raises `ValueError` for a field that the record does not have."""
        for text, keys in zip(self.formats, self._keys, strict=True):
            if all(field_text(record, key) for key in keys):
                return self._filled(text, record)
        for key in self._keys[-1]:
            if key not in record:
                raise ValueError(f'no key "{key}" among {sorted(record)}')
        return self._filled(self.formats[-1], record)

    def _filled(self, text: str, record: Mapping[str, Any]) -> str:
        done: set[str] = set()

        def replace(match: re.Match[str]) -> str:
            name = match[1]
            if name in done:
                return match[0]
            done.add(name)
            return field_text(record, self._aliases.get(name, name))

        return _PLACEHOLDER.sub(replace, text)


@dataclass(frozen=True)
class Turns:
    """How conversations are written in the records.

    `roles` maps their names of roles to the template's: {human: user, gpt: assistant}.
    """

    key: str = "messages"
    role_key: str = "role"
    content_key: str = "content"
    roles: Mapping[str, str] | None = None

    def of(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Messages with `role` and `content`, other keys as they are.

        Raises `ValueError` for what is no conversation.
        """
        turns = record[self.key]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f'"{self.key}" must be a list of objects with role and content')
        messages = []
        for i, turn in enumerate(turns):
            if self.role_key not in turn:
                raise ValueError(f'turn {i} of "{self.key}" has no "{self.role_key}"')
            role = str(turn[self.role_key])
            rest = {k: v for k, v in turn.items() if k not in (self.role_key, self.content_key)}
            content = turn.get(self.content_key)
            named = (self.roles or {}).get(role, role)
            messages.append({**rest, "role": named, "content": "" if content is None else content})
        if all(message["role"] != "assistant" for message in messages):
            found = sorted({message["role"] for message in messages})
            raise ValueError(
                f'"{self.key}" has no turn of the assistant to learn from, only of {found}; '
                "`roles` maps other names to it"
            )
        return messages


#: Which examples a conversation makes: pairs (number of messages, which of them are learnt).
ASSISTANT_TURNS = {
    "all": lambda answers: [(answers[-1] + 1, answers)],
    "each": lambda answers: [(i + 1, [i]) for i in answers],
    "last": lambda answers: [(answers[-1] + 1, answers[-1:])],
}


class ChatRenderer:
    """Token ids of conversations, and which of them the assistant says.

    With `{% generation %}` in the template its own mask decides. Otherwise an answer is what the
    template adds to its prompt (the messages before it, with the generation prompt), end-of-turn
    tokens included: exactly the text that the model has to write in use.

    `assistant_turns`: `all` answers of a conversation in one example, `each` in an example of its
    own, or the `last` alone.

    Raises `ValueError` for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> None:
        if not tokenizer.chat_template:
            raise ValueError(NO_TEMPLATE.format(name=tokenizer.name_or_path))
        self.tokenizer = tokenizer
        self._choose = ASSISTANT_TURNS[assistant_turns]
        template = tokenizer.get_chat_template()
        # The template's mask marks all answers; for some of them the differences are taken.
        self._has_mask = bool(_GENERATION.search(template)) and assistant_turns == "all"

    def __call__(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Pairs (ids, trained), one an example.

        Raises `ValueError` for a conversation that the template does not render stepwise.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for count, chosen in self._choose(answers):
            if self._has_mask:
                yield self._by_template(messages[:count], tools)
            else:
                yield self._by_differences(messages[:count], chosen, tools)

    def _by_template(self, messages: Any, tools: Any) -> tuple[list[int], list[bool]]:
        found: Any = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return found["input_ids"], [bool(trained) for trained in found["assistant_masks"]]

    def _by_differences(
        self, messages: list[Any], answers: list[int], tools: Any
    ) -> tuple[list[int], list[bool]]:
        def render(count: int, prompt: bool = False) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            )

        whole, ends = render(len(messages)), []
        for turn in answers:
            for text in (render(turn, prompt=True), render(turn + 1)):
                if not whole.startswith(text):
                    raise ValueError(NOT_A_PREFIX.format(turn=turn))
                ends.append(len(text))
        return self._tokens(whole, ends)

    def _tokens(self, text: str, ends: list[int]) -> tuple[list[int], list[bool]]:
        """Tokens of the text, trained in every second of the parts that end at `ends`."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = [(start, end) for start, end in found["offset_mapping"] if start < end]
            if not any(start < cut < end for start, end in spans for cut in ends):
                trained, part = [], 0
                for start, _ in found["offset_mapping"]:
                    while part < len(ends) and start >= ends[part]:
                        part += 1
                    trained.append(part % 2 == 1)
                return found["input_ids"], trained
        # A token across the border of prompt and answer is not what the model sees in use, where
        # the prompt is tokenized alone: so are the parts.
        ids: list[int] = []
        mask: list[bool] = []
        for part, (start, end) in enumerate(zip([0, *ends], [*ends, len(text)], strict=True)):
            some = self.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
            ids += some
            mask += [part % 2 == 1] * len(some)
        return ids, mask
