"""A tokenizer's chat template: what it renders and marks, and which inputs it accepts."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ditty_di.data.options import check_text, require
from ditty_di.data.rendering import conversations as conv
from ditty_di.data.rendering.audit import Note
from ditty_di.data.rendering.conversations import Conversation, Message

_NO_TEMPLATE = """\
the tokenizer {name!r} has no chat template, so `messages` cannot be rendered. Use the tokenizer \
of a chat model, or set its `chat_template` (in YAML: tokenizer.chat_template)."""
_RENDERINGS_KEPT = 64
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
# Words that no template contains, to find contents in what it renders.
_SYSTEM, _QUESTION, _ANSWER = "sistem0", "qvestion1", "ansver2"


class ChatTemplate:
    """Render conversations with a tokenizer's chat template.

    Every method raises `ValueError` for a conversation that the template cannot render, whatever
    the template raised.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        require(bool(tokenizer.chat_template), _NO_TEMPLATE.format(name=tokenizer.name_or_path))
        self.tokenizer = tokenizer
        # Some renderings are needed twice. The key has the messages' ids; entries keep them alive.
        self._rendered: dict[tuple[Any, ...], tuple[Conversation, str]] = {}
        self._read: set[str] = set(conv.IDENTIFIERS)

    def render(self, chat: Conversation, *, prompt: bool = False) -> str:
        """Return the conversation's text.

        Args:
            chat: The conversation.
            prompt: Add the generation prompt.
        """
        return self.as_rendered(chat, prompt=prompt)

    def as_rendered(self, chat: Conversation, *, prompt: bool = False) -> str:
        """Return what the template makes of the conversation; arguments as for `render`."""
        key = (*map(id, chat.messages), id(chat.tools), id(chat.kwargs), prompt)
        if key not in self._rendered:
            if len(self._rendered) >= _RENDERINGS_KEPT:
                self._rendered.clear()
            with _refusing():
                found: Any = self.tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **chat.kwargs,
                )
            self._rendered[key] = chat, check_text(str(found), "a turn")
        return self._rendered[key][1]

    def attempt(self, chat: Conversation, *, prompt: bool = False) -> str | None:
        """Return what `render` returns, or None if the template refuses the conversation."""
        try:
            return self.render(chat, prompt=prompt)
        except ValueError:
            return None

    def marked(self, chat: Conversation) -> list[tuple[int, int]]:
        """Return the spans of characters within `{% generation %}` in what `as_rendered` returns.

        Empty for a template without the tag, or with the tag only in comments or in branches that
        are not taken.
        """
        source = self.tokenizer.get_chat_template(tools=chat.tools)  # type: ignore[arg-type]
        if not _GENERATION_TAG.search(source):
            return []
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in chat.messages
        ]
        with _refusing():
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=chat.tools,  # type: ignore[arg-type]
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **chat.kwargs},
            )
        (text,), (spans,) = rendered
        return [(start, end) for start, end in spans] if text == self.as_rendered(chat) else []

    def fitted(self, chat: Conversation) -> Conversation:
        """Return the conversation in the form that the template accepts.

        Contents become text or parts, arguments of tool calls objects or JSON text: the first form
        that the template renders without an error, with the calls' names, and without Python's
        notation of objects. Schemas of tools are put into `{"type": "function", "function": ...}`,
        or taken out of it, where only then the template renders their names.
        """
        chat = self._fitted_tools(chat)
        chat = chat.with_messages([self._fitted_content(m) for m in chat.messages])
        if not any("tool_calls" in message for message in chat.messages):
            return chat
        forms = [chat.with_messages(messages) for messages in conv.call_forms(chat.messages)]
        accepted = None
        for form in forms:
            text = self.attempt(form)
            if text is not None and all(_shows_calls(text, message) for message in form.messages):
                return form
            accepted = accepted or (form if text is not None else None)
        if accepted is None:
            self.render(forms[0])  # raises what is wrong with it
        return accepted or chat

    def with_system(self, chat: Conversation, text: str) -> Conversation | None:
        """Return the conversation after a system turn; None if it has one or cannot have one."""
        if chat.messages[0]["role"] == "system" or not self._accepts_system:
            return None
        messages = [{"role": "system", "content": text}, *chat.messages]
        return replace(chat, messages=messages, answers=[i + 1 for i in chat.answers])

    def unread(self, chat: Conversation, ignored: Container[str] = ()) -> set[Note]:
        """Return notes of everything in the conversation that does not change what is rendered.

        That is tools, tool calls, other keys of turns, whole turns, and the template's arguments. A
        key that was rendered once is not looked at again.

        Args:
            chat: The conversation, in the form that the template accepts.
            ignored: Keys of turns that may be left out.
        """
        whole = self.render(chat)
        notes: set[Note] = set()
        if chat.tools and self.attempt(replace(chat, tools=None)) == whole:
            notes.add(Note("tools"))
        if chat.kwargs and self.attempt(replace(chat, kwargs={})) == whole:
            # Some change the generation prompt alone (enable_thinking=false).
            asked = chat.with_messages(chat.messages[: max(chat.answers, default=0)])
            others = (asked, replace(asked, kwargs={}))
            prompts = {self.attempt(it, prompt=True) for it in others} if asked.messages else set()
            if len(prompts) < 2 or None in prompts:
                notes.add(Note("kwargs"))
        for i, message in enumerate(chat.messages):
            if "tool_calls" in message and self.attempt(_without(chat, "tool_calls", i)) == whole:
                notes.add(Note("tool_calls"))
            text = conv.text_of(message["content"]).strip()
            if text and text not in whole and len(chat.messages) > 1:
                rest = [*chat.messages[:i], *chat.messages[i + 1 :]]
                if self.attempt(chat.with_messages(rest)) == whole:
                    notes.add(Note("unread_roles", message["role"]))
        keys = {k for message in chat.messages for k, v in message.items() if conv.holds(v)}
        for key in keys - {"role", "content", "tool_calls"} - self._read:
            if key not in ignored and self.attempt(_without(chat, key)) == whole:
                notes.add(Note("unread_in_turns", key))
            else:
                self._read.add(key)
        return notes

    def _fitted_tools(self, chat: Conversation) -> Conversation:
        question = self._fitted_content({"role": "user", "content": _QUESTION})
        for tools in conv.tool_forms(chat.tools) if chat.tools else ():
            names = [str(name) for tool in tools if (name := conv.tool_name(tool))]
            text = self.attempt(Conversation([question], [], tools))
            if text is not None and all(name in text for name in names):
                return replace(chat, tools=tools)
        return chat

    def _fitted_content(self, message: Message) -> Message:
        content = message["content"]
        accepts_text, accepts_parts = self._contents
        if isinstance(content, str) and not accepts_text:
            return message | {"content": _parts(content)}
        if isinstance(content, list) and not accepts_parts:
            text = conv.text_of(content)
            return message | {"content": text} if text or message["role"] != "tool" else message
        return message

    @cached_property
    def _contents(self) -> tuple[bool, bool]:
        """Whether contents may be text, and whether they may be lists of parts."""
        text = self._probe(_QUESTION, _ANSWER)
        parts = self._probe(_parts(_QUESTION), _parts(_ANSWER))
        if _QUESTION in text and _ANSWER in text:
            return True, parts == text
        accepts_parts = _QUESTION in parts and _ANSWER in parts and "'type'" not in parts
        return not accepts_parts, accepts_parts

    @cached_property
    def _accepts_system(self) -> bool:
        form = str if self._contents[0] else _parts
        return _SYSTEM in self._probe(form(_QUESTION), form(_ANSWER), form(_SYSTEM))

    def _probe(self, question: Any, answer: Any, system: Any = None) -> str:
        roles = {"system": system, "user": question, "assistant": answer}
        messages = [{"role": r, "content": c} for r, c in roles.items() if c is not None]
        return self.attempt(Conversation(messages, [len(messages) - 1])) or ""


def _parts(text: str) -> Any:
    return [{"type": "text", "text": text}]


def _without(chat: Conversation, key: str, turn: int | None = None) -> Conversation:
    """Return the conversation without a key of one turn, or of all."""
    return chat.with_messages(
        [
            {k: v for k, v in message.items() if k != key} if turn in (None, i) else message
            for i, message in enumerate(chat.messages)
        ]
    )


def _shows_calls(text: str, message: Message) -> bool:
    """Return whether a text has the names of all calls, and no arguments in Python's notation."""
    names = (conv.tool_name(call) for call in message.get("tool_calls", ()))
    return all(str(name) in text for name in names if name is not None) and not any(
        str(given) in text
        for given in conv.call_arguments(message)
        if given and isinstance(given, dict)
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise `ValueError` for whatever a template raises: it is code, and may raise anything."""
    try:
        yield
    except TemplateError as error:  # templates refuse, say, roles that do not alternate
        raise ValueError(f"the chat template refuses it: {error}") from error
    except Exception as error:
        text = f"the chat template cannot render it: {type(error).__name__}: {error}"
        raise ValueError(text) from error
