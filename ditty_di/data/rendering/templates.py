"""From a record to text and token ids: prompt templates with placeholders, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.data.options import check_text, require
from ditty_di.data.rendering.audit import Encoded, Note
from ditty_di.data.rendering.chat_template import ChatTemplate
from ditty_di.data.rendering.conversations import Conversation, paths_of, text_of
from ditty_di.data.rendering.token_spans import Markers, TokenSpans

_PLACEHOLDER = re.compile(r"__([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)__")

_NOT_A_PREFIX = """\
the chat template renders earlier turns differently once later ones follow (turn {turn}), so this \
conversation cannot be one example that shows each answer as the model would give it. \
data.renderer.assistant_turns=each makes an example of every answer, =last of the last one"""
_UNMARKED = """\
the chat template's {{% generation %}} marks nothing in turn {turn}: it has no loss mask alone"""
_OTHER_PROMPT = """\
the chat template renders the turns before turn {turn} differently once that answer follows, so it \
does not begin where the model is prompted: the prompt ends in {prompt!r}, the conversation has \
{text!r} there"""

#: Examples of a conversation by option: pairs (number of messages, which of them are trained on).
ASSISTANT_TURNS = {
    "all": lambda answers: [(answers[-1] + 1, answers)],
    "each": lambda answers: [(i + 1, [i]) for i in answers],
    "last": lambda answers: [(answers[-1] + 1, answers[-1:])],
}

#: Token ids, which of them are output (trained on) `[tokens]`, and audit findings.
_Rendered = tuple[list[int], list[bool], set[Note]]


def field_text(record: Mapping[str, Any], key: str) -> str:
    """Return a field as text; "" when it is missing or null, booleans as in JSON.

    Raises:
        ValueError: The field holds a list or an object.
    """
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f'"{key}" holds a {type(value).__name__} instead of text')
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return check_text(text, f'"{key}"')


class PromptTemplate:
    """A prompt template: one or several format strings with placeholders `__field__`.

    The first occurrence of each placeholder is replaced by the record's field of that name, and
    what is inserted is not searched again. Of several strings the first is used whose fields all
    have text, else the last: an Alpaca record without `input` gets another prompt than one with it.

    Args:
        formats: The format strings.
        aliases: Maps placeholders to other names of fields.

    Raises:
        ValueError: A format string without a placeholder.
    """

    def __init__(self, formats: str | Sequence[str], aliases: Mapping[str, str]) -> None:
        self.formats = [formats] if isinstance(formats, str) else list(formats)
        self._aliases = dict(aliases)
        self._keys = {
            text: [aliases.get(name, name) for name in _PLACEHOLDER.findall(text)]
            for text in self.formats
        }
        for text, keys in self._keys.items():
            require(
                bool(keys),
                f"the format {text!r} has no placeholder such as __input__, so all examples would "
                "read the same",
            )

    def __call__(self, record: Mapping[str, Any]) -> str:
        """Return the record's text.

        Raises:
            ValueError: The record does not have a field.
        """
        chosen = self._chosen(record)
        for key in self._keys[chosen]:
            require(key in record, f'no key "{key}" among {sorted(record)}')
        done: set[str] = set()

        def insert(match: re.Match[str]) -> str:
            if match[1] in done:
                return match[0]
            done.add(match[1])
            return field_text(record, self._aliases.get(match[1], match[1]))

        return _PLACEHOLDER.sub(insert, chosen)

    def keys_read(self, record: Mapping[str, Any]) -> set[str]:
        """Return the keys of the record that its text is made of."""
        return set(self._keys[self._chosen(record)])

    def _chosen(self, record: Mapping[str, Any]) -> str:
        for text, keys in self._keys.items():
            if all(field_text(record, key) for key in keys):
                return text
        return self.formats[-1]


class ChatRenderer:
    """Make token ids of conversations, and masks of the tokens that the assistant says.

    `{% generation %}` in the template decides, where rendering marks anything. Otherwise an answer
    is what the template adds to its prompt (the messages before it, with the generation prompt), up
    to and including the special token that ends the turn: what the model has to generate.

    - Where the generation prompt is not how the template renders an answer (it opens `<think>`),
      the answer begins where the two differ.
    - Where turns are not closed and the next one's marker is a special token, that is the end of
      the answer; after the last answer it is added, as a turn of the user (after tool calls: of a
      tool) would begin.

    Args:
        tokenizer: The tokenizer.
        assistant_turns: `all` answers of a conversation in one example, `each` in an example of its
            own, or the `last` alone.
        template: Renders conversations; None: the tokenizer's chat template.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_turns: str,
        template: ChatTemplate | None = None,
    ) -> None:
        self.template = template or ChatTemplate(tokenizer)
        self.tokens = TokenSpans(tokenizer)
        self._choose = ASSISTANT_TURNS[assistant_turns]
        self._markers = Markers(tokenizer)

    def __call__(self, chat: Conversation) -> Iterator[Encoded]:
        """Yield the examples of a conversation.

        A conversation whose answers are all left out (`weight: 0`) is one example without output.

        Args:
            chat: The conversation, as `ChatTemplate.fitted` returns it.

        Raises:
            ValueError: The template does not render the conversation turn by turn.
        """
        chosen = self._choose(chat.answers) if chat.answers else [(len(chat.messages), [])]
        for count, answers in chosen:
            part = chat.with_messages(chat.messages[:count])
            whole = self.template.render(part)
            if spans := self.template.marked(part):
                ids, output, notes = self._by_marks(part, whole, spans, answers)
            else:
                ids, output, notes = self._by_differences(part, whole, answers)
            images = paths_of(part.messages)
            yield Encoded(ids, output, -1, False, frozenset(notes), images)

    # --- the template's marks --------------------------------------------------------------------

    def _by_marks(
        self, chat: Conversation, whole: str, spans: list[tuple[int, int]], answers: list[int]
    ) -> _Rendered:
        if answers != [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]:
            spans = [span for i in answers for span in self._marks_of(chat, spans, i)]
        if self.tokens.tokenizer.is_fast:
            ids, where = self.tokens.spans(whole)
            output = [any(a < end and b > start for start, end in spans) for a, b in where]
        else:
            ids, parts, _ = self.tokens.split(whole, [cut for span in spans for cut in span])
            output = [part % 2 == 1 for part in parts]
        last = [i for i, it in enumerate(output) if it and not any(output[i + 1 : i + 2])]
        closed = sum(self._markers.ends(ids[: i + 1]) for i in last)
        return ids, output, {Note("no_end")} if closed < len(answers) else set()

    def _marks_of(
        self, chat: Conversation, spans: list[tuple[int, int]], turn: int
    ) -> list[tuple[int, int]]:
        """Return the spans of one turn: those that it adds when turns are added one by one."""
        before, behind = (
            len(self.template.marked(chat.with_messages(chat.messages[:count]))) if count else 0
            for count in (turn, turn + 1)
        )
        require(before < behind, _UNMARKED.format(turn=turn))
        return spans[before:behind]

    # --- what the template adds to its prompts ---------------------------------------------------

    def _by_differences(self, chat: Conversation, whole: str, answers: list[int]) -> _Rendered:
        notes: set[Note] = set()
        cuts: list[int] = []
        for turn in answers:
            start, prompt = self._start(chat, whole, turn)
            if start is None or (end := self._end(chat, whole, turn, start)) is None:
                raise ValueError(self._why_not(chat, whole, turn))
            notes |= {Note("other_prompt", prompt)} if prompt else set()
            cuts += [start, end]
        ids, parts, apart = self.tokens.split(whole, cuts)
        notes |= {Note("border")} if apart else set()
        output = [part % 2 == 1 for part in parts]
        for number in range(len(answers)):
            own = [i for i, part in enumerate(parts) if part == 2 * number + 1]
            notes |= self._ended(chat, whole, ids, output, own)
        return ids, output, notes

    def _start(self, chat: Conversation, whole: str, turn: int) -> tuple[int | None, str]:
        """Return where the answer begins, None if nowhere; a generation prompt that differs."""
        asked = chat.with_messages(chat.messages[:turn])
        prompt = self.template.attempt(asked, prompt=True)
        if prompt is None:  # nothing is before it, or nothing that the template accepts alone
            return self._content_start(chat, whole, turn), ""
        if whole.startswith(prompt):
            return len(prompt), ""
        before = self.template.render(asked)
        stable, start = self._common(whole, before), self._common(whole, prompt)
        if (stable < len(before) and not whole.endswith(before[stable:])) or start < stable:
            return None, ""
        opening = prompt[self._common(prompt, before) :]
        if opening and (found := re.compile(r"\s*" + re.escape(opening)).match(whole, start)):
            start = found.end()  # only whitespace before it differs
        return start, opening

    def _content_start(self, chat: Conversation, whole: str, turn: int) -> int:
        """Return where the content of an answer begins: where another content changes the text."""
        message = chat.messages[turn]
        word = "a" if not text_of(message["content"]).startswith("a") else "b"
        content = word if isinstance(message["content"], str) else [{"type": "text", "text": word}]
        other = [*chat.messages[:turn], message | {"content": content}, *chat.messages[turn + 1 :]]
        return self._common(whole, self.template.render(chat.with_messages(other)))

    def _end(self, chat: Conversation, whole: str, turn: int, start: int) -> int | None:
        """Return where the answer ends, None if later turns change it."""
        closing = self._closing
        if turn + 1 == len(chat.messages):
            end = len(whole) - len(closing)
            if not closing or not whole.endswith(closing) or end <= start:
                return len(whole)
            closed = self._markers.ends(self.tokens.ids(whole[start:end]))
            return end if closed else len(whole)
        answered = self.template.render(chat.with_messages(chat.messages[: turn + 1]))
        if whole.startswith(answered):
            return len(answered)
        end = self._common(whole, answered)
        return end if answered[end:] == closing and end > start else None

    @cached_property
    def _closing(self) -> str:
        """Text that the template adds to any conversation without a generation prompt (Phi-3)."""
        asked = Conversation([{"role": "user", "content": "a"}], [])
        try:
            asked = self.template.fitted(asked)
            before, prompt = self.template.render(asked), self.template.render(asked, prompt=True)
        except ValueError:
            return ""
        return before[self._common(before, prompt) :]

    def _why_not(self, chat: Conversation, whole: str, turn: int) -> str:
        alone = chat.with_messages(chat.messages[: turn + 1])
        later = len(alone.messages) < len(chat.messages)
        if later and self._start(alone, self.template.render(alone), turn)[0] is not None:
            return _NOT_A_PREFIX.format(turn=turn)
        prompt = self.template.render(chat.with_messages(chat.messages[:turn]), prompt=True)
        here = slice(at := self._common(whole, prompt), at + 60)
        return _OTHER_PROMPT.format(turn=turn, prompt=prompt[here], text=whole[here])

    def _common(self, text: str, other: str) -> int:
        """Return the length of the common prefix, which ends between two tokens of `text`."""
        pairs = enumerate(zip(text, other, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
        if common in (len(text), len(other)):
            return common
        common = self._markers.aligned(text, self._markers.aligned(other, common))
        if self.tokens.tokenizer.is_fast:
            spans = self.tokens.spans(text)[1]
            return next((start for start, end in spans if start < common < end), common)
        return common

    def _ended(
        self, chat: Conversation, whole: str, ids: list[int], output: list[bool], own: list[int]
    ) -> set[Note]:
        """Let an answer's output end with the token that ends its turn.

        What follows that token is left out. Where turns are not closed, the next turn's marker is
        the end: it becomes output, and is added after the last turn.

        Args:
            chat: The conversation.
            whole: Its text.
            ids: Its token ids, changed in place.
            output: Which of them are output, changed in place.
            own: Indices of the answer's tokens.
        """
        if not own:
            return {Note("empty")}
        markers, last = self._markers, own[-1]
        filled = [i for i in own if not markers.is_blank(ids[i])]
        notes = set() if any(ids[i] not in markers.special for i in filled) else {Note("empty")}
        end = filled[-1] if filled else own[0]
        if ids[end] not in markers.special:
            is_last = last + 1 == len(ids)
            marker = self._next_marker(chat, whole) if is_last else ids[last + 1 : last + 2]
            if marker and marker[-1] in markers.special:
                ids += marker if is_last else []
                output[last + 1 :] = [True] * len(marker) + output[last + 1 + len(marker) :]
                return notes | {Note("next_marker", markers.text(marker[-1]))}
            if ids[end] not in markers.added:
                return notes | {Note("no_end")}
        output[end + 1 : last + 1] = [False] * (last - end)
        return notes

    def _next_marker(self, chat: Conversation, whole: str) -> list[int]:
        """Return the ids with which a turn after the last one begins, up to a special token.

        Only whitespace may precede it; none if that turn changes the text before.
        """
        called, markers = "tool_calls" in chat.messages[-1], self._markers
        for role in ("tool", "user") if called else ("user",):
            more = [*chat.messages, {"role": role, "content": chat.messages[-1]["content"] or "a"}]
            text = self.template.attempt(chat.with_messages(more))
            if text is not None and text.startswith(whole):
                ids = self.tokens.ids(text[len(whole) :])
                blanks = len(list(takewhile(markers.is_blank, ids)))
                return ids[: blanks + 1]
        return []
