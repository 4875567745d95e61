"""From a record to text: format strings with placeholders, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ditty_di.data.audit import Note
from ditty_di.data.chat_template import ChatTemplate
from ditty_di.data.conversations import Conversation, Turns, text_of
from ditty_di.data.token_spans import Markers, TokenSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ASSISTANT_TURNS", "ChatRenderer", "Format", "Turns"]

_PLACEHOLDER = re.compile(r"__([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)__")

NOT_A_PREFIX = """\
the chat template renders earlier turns differently once later ones follow (turn {turn}), so this \
conversation cannot be one example that shows each answer as the model would give it. \
data.encoder.assistant_turns=each makes an example of every answer, =last of the last one"""
UNMARKED = """\
the chat template's {{% generation %}} marks nothing in turn {turn}, so it cannot be learnt alone"""
OTHER_PROMPT = """\
the chat template renders the turns before turn {turn} differently once that answer follows, so it \
does not begin where the model is prompted: the prompt ends in {prompt!r}, the conversation has \
{text!r} there"""


def field_text(record: Mapping[str, Any], key: str) -> str:
    """The field as text; "" when it is missing or null. Truth values are written as in JSON.

    Raises `ValueError` for a list or an object.
    """
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f'"{key}" holds a {type(value).__name__} instead of text')
    text = str(value).lower() if isinstance(value, bool) else str(value)
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
        chosen = self._chosen(record)
        for key in self._keys[chosen]:
            if key not in record:
                raise ValueError(f'no key "{key}" among {sorted(record)}')
        return self._filled(self.formats[chosen], record)

    def keys_read(self, record: Mapping[str, Any]) -> set[str]:
        """Return the record's keys that the text is made of."""
        return set(self._keys[self._chosen(record)])

    def _chosen(self, record: Mapping[str, Any]) -> int:
        for number, keys in enumerate(self._keys):
            if all(field_text(record, key) for key in keys):
                return number
        return len(self._keys) - 1

    def _filled(self, text: str, record: Mapping[str, Any]) -> str:
        done: set[str] = set()

        def replace(match: re.Match[str]) -> str:
            name = match[1]
            if name in done:
                return match[0]
            done.add(name)
            return field_text(record, self._aliases.get(name, name))

        return _PLACEHOLDER.sub(replace, text)


#: Which examples a conversation makes: pairs (number of messages, which of them are learnt).
ASSISTANT_TURNS = {
    "all": lambda answers: [(answers[-1] + 1, answers)],
    "each": lambda answers: [(i + 1, [i]) for i in answers],
    "last": lambda answers: [(answers[-1] + 1, answers[-1:])],
}


class ChatRenderer:
    """Token ids of conversations, and which of them the assistant says.

    `{% generation %}` in the template decides, where rendering gives any mark. Otherwise an answer
    is what the template adds to its prompt (the messages before it, with the generation prompt), up
    to and with the special token that ends the turn: what the model has to write in use.

    - Where the generation prompt is not how the template renders an answer that is there (it opens
      `<think>`), the answer begins where the two part.
    - Where turns are not closed and the next one's marker is a special token, that is learnt as the
      end; behind the last answer it is put, as a turn of the user (behind tool calls: of the tool)
      would begin.

    `assistant_turns`: `all` answers of a conversation in one example, `each` in an example of its
    own, or the `last` alone.

    Raises `ValueError` for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> None:
        self.template = ChatTemplate(tokenizer)
        self.tokens = TokenSpans(tokenizer)
        self._choose = ASSISTANT_TURNS[assistant_turns]
        self._markers = Markers(tokenizer)

    def __call__(self, chat: Conversation) -> Iterator[tuple[list[int], list[bool], set[Note]]]:
        """Yield (ids, learnt, notes), one an example. `chat` is as `ChatTemplate.fitted` gives it.

        A conversation whose answers are all left out (`weight: 0`) gives one example without a
        token to learn.

        Raises `ValueError` for a conversation that the template does not render stepwise.
        """
        chosen = self._choose(chat.answers) if chat.answers else [(len(chat.messages), [])]
        for count, answers in chosen:
            part = chat.with_messages(chat.messages[:count])
            whole = self.template.render(part)
            if spans := self.template.marked(part):
                yield self._by_marks(part, whole, spans, answers)
            else:
                yield self._by_differences(part, whole, answers)

    # --- the template's marks --------------------------------------------------------------------

    def _by_marks(
        self, chat: Conversation, whole: str, spans: list[tuple[int, int]], answers: list[int]
    ) -> tuple[list[int], list[bool], set[Note]]:
        everyone = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if answers != everyone:
            spans = [span for i in answers for span in self._marks_of(chat, spans, i)]
        if self.tokens.tokenizer.is_fast:
            ids, where = self.tokens.spans(whole)
            learnt = [
                any(start < end_ and end > start_ for start_, end_ in spans) for start, end in where
            ]
        else:
            cuts = [cut for span in spans for cut in span]
            ids, parts, _ = self.tokens.split(whole, cuts)
            learnt = [part % 2 == 1 for part in parts]
        ends = [i for i, it in enumerate(learnt) if it and not any(learnt[i + 1 : i + 2])]
        ended = sum(self._markers.ends(ids[: i + 1]) for i in ends)
        return ids, learnt, {Note("no_end")} if ended < len(answers) else set()

    def _marks_of(
        self, chat: Conversation, spans: list[tuple[int, int]], turn: int
    ) -> list[tuple[int, int]]:
        """Return the spans of one turn: those that come with it when turns are added one by one."""
        before, behind = (
            len(self.template.marked(chat.with_messages(chat.messages[:count]))) if count else 0
            for count in (turn, turn + 1)
        )
        if before >= behind:
            raise ValueError(UNMARKED.format(turn=turn))
        return spans[before:behind]

    # --- what the template adds to its prompts ---------------------------------------------------

    def _by_differences(
        self, chat: Conversation, whole: str, answers: list[int]
    ) -> tuple[list[int], list[bool], set[Note]]:
        notes: set[Note] = set()
        cuts: list[int] = []
        for turn in answers:
            start, prompt = self._start(chat, whole, turn)
            if start is None or (end := self._end(chat, whole, turn, start)) is None:
                raise ValueError(self._why_not(chat, whole, turn))
            if prompt:
                notes.add(Note("other_prompt", prompt))
            cuts += [start, end]
        ids, parts, apart = self.tokens.split(whole, cuts)
        if apart:
            notes.add(Note("border"))
        learnt = [part % 2 == 1 for part in parts]
        for number in range(len(answers)):
            own = [i for i, part in enumerate(parts) if part == 2 * number + 1]
            notes |= self._ended(chat, whole, ids, learnt, own)
        return ids, learnt, notes

    def _start(self, chat: Conversation, whole: str, turn: int) -> tuple[int | None, str]:
        """Return where the answer begins, None if nowhere; a generation prompt that differs."""
        asked = chat.with_messages(chat.messages[:turn])
        try:
            prompt = self.template.render(asked, prompt=True)
        except ValueError:  # nothing is before it, or nothing that the template takes alone
            return self._content_start(chat, whole, turn), ""
        if whole.startswith(prompt):
            return len(prompt), ""
        before = self.template.render(asked)
        stable = self._common(whole, before)
        if stable < len(before) and not whole.endswith(before[stable:]):
            return None, ""
        start = self._common(whole, prompt)
        if start < stable:
            return None, ""
        opening = prompt[self._common(prompt, before) :]
        if opening and (found := re.compile(r"\s*" + re.escape(opening)).match(whole, start)):
            start = found.end()  # only whitespace before it differs
        return start, opening

    def _content_start(self, chat: Conversation, whole: str, turn: int) -> int:
        """Return where the content of an answer begins: where the text would change with it."""
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
        """The text that the template appends to any conversation without a generation prompt
        (Phi-3)."""
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
            return NOT_A_PREFIX.format(turn=turn)
        asked = chat.with_messages(chat.messages[:turn])
        prompt = self.template.render(asked, prompt=True)
        at = self._common(whole, prompt)
        return OTHER_PROMPT.format(turn=turn, prompt=prompt[at : at + 60], text=whole[at : at + 60])

    def _common(self, text: str, other: str) -> int:
        """Return the length of the common prefix, which ends between two tokens of `text`."""
        pairs = enumerate(zip(text, other, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
        if common in (len(text), len(other)):
            return common
        common = self._markers.aligned(text, self._markers.aligned(other, common))
        if self.tokens.tokenizer.is_fast:
            for start, end in self.tokens.spans(text)[1]:
                if start < common < end:
                    return start
        return common

    def _ended(
        self, chat: Conversation, whole: str, ids: list[int], learnt: list[bool], own: list[int]
    ) -> set[Note]:
        """Leave out what stands behind the end of a turn, and learn the end where it is the next
        turn's marker. `own` are the answer's tokens."""
        if not own:
            return {Note("empty")}
        markers, last = self._markers, own[-1]
        filled = [i for i in own if not markers.is_blank(ids[i])]
        notes = set() if any(ids[i] not in markers.special for i in filled) else {Note("empty")}
        end = filled[-1] if filled else own[0]
        if ids[end] not in markers.special:
            following = ids[last + 1 :]
            if last + 1 == len(ids):
                following = self._next_turn(chat, whole)
                ahead = next((n for n, i in enumerate(following) if i in markers.special), None)
                following = following[: ahead + 1] if ahead is not None else []
                blank = all(map(markers.is_blank, following[:-1]))
            else:
                blank = True
                following = following[:1]
            if blank and following and following[-1] in markers.special:
                if last + 1 == len(ids):
                    ids += following
                    learnt += [True] * len(following)
                else:
                    learnt[last + 1] = True
                return notes | {Note("next_marker", markers.text(following[-1]))}
            if ids[end] not in markers.added:
                return notes | {Note("no_end")}
        for i in range(end + 1, last + 1):
            learnt[i] = False
        return notes

    def _next_turn(self, chat: Conversation, whole: str) -> list[int]:
        """Return the ids of how a turn behind the last one begins; none if that changes it."""
        called = "tool_calls" in chat.messages[-1]
        for role in ("tool", "user") if called else ("user",):
            more = [*chat.messages, {"role": role, "content": chat.messages[-1]["content"] or "a"}]
            try:
                text = self.template.render(chat.with_messages(more))
            except ValueError:
                continue
            if text.startswith(whole):
                return self.tokens.ids(text[len(whole) :])
        return []
