"""A tokenizer's chat template: what it renders, what it marks, and which inputs it takes."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ditty_di.data.audit import Note
from ditty_di.data.conversations import (
    IDENTIFIERS,
    Conversation,
    call_arguments,
    call_forms,
    call_names,
    holds,
    text_of,
    tool_forms,
    tool_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = """\
the tokenizer {name!r} has no chat template, so `messages` cannot be rendered. Use the tokenizer \
of a chat model, or set its `chat_template` (in YAML: tokenizer.chat_template)."""
_RENDERINGS_KEPT = 64
# Words that no template holds by itself, to find contents in what it renders.
_SYSTEM, _QUESTION, _ANSWER = "sistem0", "qvestion1", "ansver2"


class ChatTemplate:
    """Render conversations with a tokenizer's chat template.

    Raises `ValueError` for a tokenizer without one; in every method for a conversation that the
    template cannot render, whatever the template raised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(NO_TEMPLATE.format(name=tokenizer.name_or_path))
        self.tokenizer = tokenizer
        # Some renderings are needed twice: by their messages, which the entries keep alive.
        self._rendered: dict[tuple[Any, ...], tuple[Conversation, str]] = {}
        self._read: set[str] = set(IDENTIFIERS)

    def render(self, chat: Conversation, *, prompt: bool = False) -> str:
        """Return the text, with the generation prompt behind it if `prompt`."""
        key = (*map(id, chat.messages), id(chat.tools), id(chat.kwargs), prompt)
        if key not in self._rendered:
            if len(self._rendered) >= _RENDERINGS_KEPT:
                self._rendered.clear()
            self._rendered[key] = chat, self._render(chat, prompt)
        return self._rendered[key][1]

    def _render(self, chat: Conversation, prompt: bool) -> str:
        try:
            found = str(
                self.tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **chat.kwargs,
                )
            )
        except Exception as error:  # a template is code: it may raise anything
            raise _refusal(error) from error
        try:
            found.encode()
        except UnicodeEncodeError:
            raise ValueError("a turn holds half of a surrogate pair, which is not text") from None
        return found

    def marked(self, chat: Conversation) -> list[tuple[int, int]]:
        """Return the spans of characters within `{% generation %}` in what `render` returns.

        Empty for a template without the mark. Marks are found by rendering: those in comments or
        in branches that are not taken count for nothing.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.tokenizer.get_chat_template(tools=chat.tools)  # type: ignore[arg-type]
        if not _has_generation_tag(source):
            return []
        arguments = {**self.tokenizer.special_tokens_map, **chat.kwargs}
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in chat.messages
        ]
        try:
            found: Any = render_jinja_template(
                conversations=[messages],
                tools=chat.tools,  # type: ignore[arg-type]
                chat_template=source,
                return_assistant_tokens_mask=True,
                **arguments,
            )
        except Exception as error:
            raise _refusal(error) from error
        text, spans = found[0][0], found[1][0]
        return [(start, end) for start, end in spans] if text == self.render(chat) else []

    def fitted(self, chat: Conversation) -> Conversation:
        """Return the conversation in the form that the template takes.

        Contents become text or parts, arguments of tool calls objects or JSON text: the first form
        that the template renders without an error, with the calls' names, and without Python's
        notation of objects. Schemas of tools are put into `{"type": "function", "function": ...}`,
        or taken out of it, where only then the template renders their names.
        """
        chat = self._fitted_tools(chat)
        chat = chat.with_messages([self._fitted_content(m) for m in chat.messages])
        usable: Conversation | None = None
        refused: ValueError | None = None
        for messages in call_forms(chat.messages):
            form = chat.with_messages(messages)
            if messages is chat.messages:
                return form
            try:
                text = self.render(form)
            except ValueError as error:
                refused = refused or error
                continue
            if all(_shows_calls(text, message) for message in messages):
                return form
            usable = usable or form
        if usable is None:
            assert refused is not None
            raise refused
        return usable

    def with_system(self, chat: Conversation, text: str) -> Conversation | None:
        """Return the conversation behind a system turn; None if it has one or cannot have one."""
        if chat.messages[0]["role"] == "system" or not self._takes_system:
            return None
        messages = [{"role": "system", "content": text}, *chat.messages]
        return replace(chat, messages=messages, answers=[i + 1 for i in chat.answers])

    def unread(self, chat: Conversation, ignored: Container[str] = ()) -> set[Note]:
        """Return what of the conversation changes nothing in what the template renders.

        That is tools, tool calls, other keys of turns (but `ignored`), whole turns, and the
        template's arguments. A key that was read once is taken to be read.
        """
        whole = self.render(chat)
        notes: set[Note] = set()
        if chat.tools and self._alike(whole, replace(chat, tools=None)):
            notes.add(Note("tools"))
        if chat.kwargs and self._alike(whole, replace(chat, kwargs={})):
            # Some change the generation prompt alone (enable_thinking=false).
            asked = chat.with_messages(chat.messages[: max(chat.answers, default=0)])
            if not asked.messages or self._prompts_alike(asked, replace(asked, kwargs={})):
                notes.add(Note("kwargs"))
        for i, message in enumerate(chat.messages):
            if "tool_calls" in message and self._alike(whole, _without(chat, "tool_calls", i)):
                notes.add(Note("tool_calls"))
            text = text_of(message["content"]).strip()
            if text and text not in whole:
                others = [m for j, m in enumerate(chat.messages) if j != i]
                if others and self._alike(whole, chat.with_messages(others)):
                    notes.add(Note("unread_roles", message["role"]))
        keys = {k for message in chat.messages for k, v in message.items() if holds(v)}
        for key in keys - {"role", "content", "tool_calls"} - self._read:
            if key not in ignored and self._alike(whole, _without(chat, key)):
                notes.add(Note("unread_in_turns", key))
            else:
                self._read.add(key)
        return notes

    def _alike(self, text: str, other: Conversation) -> bool:
        """Return whether another conversation renders to the same text; False if refused."""
        try:
            return self.render(other) == text
        except ValueError:
            return False

    def _prompts_alike(self, asked: Conversation, other: Conversation) -> bool:
        try:
            return self.render(asked, prompt=True) == self.render(other, prompt=True)
        except ValueError:
            return True

    def _fitted_tools(self, chat: Conversation) -> Conversation:
        if not chat.tools:
            return chat
        question = self._fitted_content({"role": "user", "content": _QUESTION})
        for tools in tool_forms(chat.tools):
            names = [str(name) for tool in tools if (name := tool_name(tool))]
            try:
                text = self.render(Conversation([question], [], tools))
            except ValueError:
                continue
            if all(name in text for name in names):
                return chat if tools is chat.tools else replace(chat, tools=tools)
        return chat

    def _fitted_content(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        takes_text, takes_parts = self._contents
        if isinstance(content, str) and not takes_text:
            return message | {"content": [{"type": "text", "text": content}]}
        parts = isinstance(content, list) and (message["role"] != "tool" or bool(text_of(content)))
        return message | {"content": text_of(content)} if parts and not takes_parts else message

    @cached_property
    def _contents(self) -> tuple[bool, bool]:
        """Whether contents may be text, and whether they may be lists of parts."""
        text = self._probe(_QUESTION, _ANSWER)
        parts = self._probe(*([{"type": "text", "text": t}] for t in (_QUESTION, _ANSWER)))
        takes_text = _QUESTION in text and _ANSWER in text
        if takes_text:
            return True, parts == text
        takes_parts = _QUESTION in parts and _ANSWER in parts and "'type'" not in parts
        return not takes_parts, takes_parts

    @cached_property
    def _takes_system(self) -> bool:
        contents: list[Any] = [_QUESTION, _ANSWER, _SYSTEM]
        if not self._contents[0]:
            contents = [[{"type": "text", "text": text}] for text in contents]
        return _SYSTEM in self._probe(*contents)

    def _probe(self, question: Any, answer: Any, system: Any = None) -> str:
        roles = {"system": system, "user": question, "assistant": answer}
        messages = [{"role": r, "content": c} for r, c in roles.items() if c is not None]
        try:
            return self.render(Conversation(messages, [len(messages) - 1]))
        except ValueError:
            return ""


def _without(chat: Conversation, key: str, turn: int | None = None) -> Conversation:
    """Return the conversation without a key of one turn, or of all."""
    return chat.with_messages(
        [
            {k: v for k, v in message.items() if k != key} if turn in (None, i) else message
            for i, message in enumerate(chat.messages)
        ]
    )


@lru_cache(maxsize=16)
def _has_generation_tag(source: str) -> bool:
    from jinja2 import TemplateSyntaxError

    try:
        return any(name == "generation" for name in _tags(source))
    except TemplateSyntaxError:  # rendering says more about it
        return False


def _tags(source: str) -> Iterator[str]:
    """Yield the names of the template's tags, without those in comments or raw text."""
    from jinja2 import Environment

    opened = False
    for _, kind, value in Environment().lex(source):
        if kind == "block_begin":
            opened = True
        elif opened and kind != "whitespace":
            yield value
            opened = False


def _shows_calls(text: str, message: dict[str, Any]) -> bool:
    """Return whether a rendering has the names of all calls, and no arguments as Python's dicts."""
    names, arguments = call_names(message), call_arguments(message)
    return all(str(name) in text for name in names) and not any(
        str(given) in text for given in arguments if given and isinstance(given, dict)
    )


def _refusal(error: Exception) -> ValueError:
    from jinja2 import TemplateError

    if isinstance(error, TemplateError):  # templates refuse, say, roles that do not alternate
        return ValueError(f"the chat template refuses it: {error}")
    return ValueError(f"the chat template cannot render it: {type(error).__name__}: {error}")
