"""Conversations in records: their turns, which of them are trained on, their tools."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.data.options import require
from ditty_di.data.rendering.audit import Note

#: Keys of a turn that say whether it is trained on: OpenAI's, axolotl's, ms-swift's.
_TRAIN_KEYS = ("weight", "train", "loss")
#: Keys of a turn that ask for a part of it to be trained on.
_PART_KEYS = ("train_detail", "training_detail")
#: Keys of a turn that name a call or a speaker; most templates do not render them.
IDENTIFIERS = ("tool_call_id", "name", "id")
#: Names that `chat_template_kwargs` cannot set: they are arguments of the rendering itself.
_RESERVED = {"messages", "conversations", "self", "kwargs"}
_RESERVED |= set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)

#: What to do about parts of another type.
_HINTS = {
    "image_url": ': write {"type": "image", "path": ...}',
    "video": ": videos are not read; leave the example out, or give frames of it as images",
}
_NO_IMAGES = _HINTS | dict.fromkeys(("image", "image_url"), " (data=image_text reads images)")

_CALLS = '[{"type": "function", "function": {"name": ..., "arguments": ...}}]'

Message = dict[str, Any]


def holds(value: Any) -> bool:
    """Return whether a field holds something: not None and not empty."""
    return value is not None and not (isinstance(value, str | list | dict | tuple) and not value)


def is_turns(value: Any) -> bool:
    """Return whether the value is a list of objects, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def decoded(value: Any, what: str = "") -> Any:
    """Return the value of JSON text (None if it is blank), and other values as they are.

    Args:
        value: The value, which may be JSON text.
        what: Its name in the message; "" returns text that is not JSON as it is.

    Raises:
        ValueError: Text that is not JSON.
    """
    try:
        if isinstance(value, str):
            return json.loads(value) if value.strip() else None
    except ValueError as error:
        require(not what, f"{what} is text that is not JSON ({error})")
    return value


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template.

    Attributes:
        messages: Turns with `role` and `content`.
        answers: Indices of the turns to train on.
        tools: JSON schemas of the tools.
        kwargs: Other arguments of the template.
        notes: Audit findings.
    """

    messages: list[Message]
    answers: list[int]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def with_messages(self, messages: list[Message]) -> Conversation:
        """Return the conversation with other messages."""
        return replace(self, messages=messages)


@dataclass(frozen=True)
class ChatFormat:
    """The chat format: how conversations are written in the records.

    Args:
        key: Key of the list of turns.
        role_key: Key of a turn's role.
        content_key: Key of a turn's content.
        roles: Maps the records' names of roles to the template's: {human: user, gpt: assistant}.
        images: Whether contents may have parts `{"type": "image", "path": ...}`.
    """

    key: str = "messages"
    role_key: str = "role"
    content_key: str = "content"
    roles: Mapping[str, str] | None = None
    images: bool = False

    def keys_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that hold the conversation's turns, () for another kind of record.

        They are `key`, or `prompt` and `completion` if both are lists of turns; of these only the
        completion is trained on.
        """
        if record.get(self.key) is not None:
            return (self.key,)
        both = ("prompt", "completion")
        return both if all(is_turns(record.get(key)) for key in both) else ()

    def of(self, record: Mapping[str, Any], *, answered: bool = True) -> Conversation:
        """Return the record's conversation.

        Args:
            record: The record.
            answered: Require an answer; a prompt needs none.

        Raises:
            ValueError: The record is not a conversation.
        """
        keys = self.keys_of(record)
        if not answered and len(keys) != 1:
            keys = ("prompt",)
        messages: list[Message] = []
        answers: list[int] = []
        notes: list[Note] = []
        first = 0
        for key in keys:
            turns, first = decoded(record.get(key)), len(messages)
            text = f'"{key}" must be a list of objects with {self.role_key} and {self.content_key}'
            require(is_turns(turns) or turns == [], text)
            for i, turn in enumerate(turns):
                message, trained_on = self._message(turn, f'turn {i} of "{key}"')
                if message["role"] != "assistant":
                    if any(turn.get(name) is True for name in _TRAIN_KEYS):
                        notes.append(Note("not_trained_on", message["role"]))
                elif trained_on and key == keys[-1]:
                    answers.append(len(messages))
                messages.append(message)
        roles = sorted({message["role"] for message in messages[first:]})
        text = f"no turn of the assistant to learn from, only of {roles}; `roles` maps other names"
        require(not answered or "assistant" in roles, f'"{keys[-1]}" has {text}')
        kwargs = _template_arguments(record.get("chat_template_kwargs"))
        return Conversation(messages, answers, _tools(record.get("tools")), kwargs, tuple(notes))

    def asked(self, record: Mapping[str, Any]) -> Conversation:
        """Return the record's conversation up to where the assistant is to answer.

        Raises:
            ValueError: The record is not a conversation, or only the assistant speaks.
        """
        chat = self.of(record, answered=False)
        messages = list(chat.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        require(bool(messages), f'"{self.key}" has no turn that the assistant could answer')
        return chat.with_messages(messages)

    def _message(self, turn: Message, where: str) -> tuple[Message, bool]:
        require(turn.get(self.role_key) is not None, f'{where} has no "{self.role_key}"')
        role = str(turn[self.role_key])
        role = (self.roles or {}).get(role, role)
        trained_on = _is_trained_on(turn, where)
        calls = _tool_calls(turn.get("tool_calls"), where)
        apart = {self.role_key, self.content_key, *_TRAIN_KEYS, *_PART_KEYS}
        apart |= set() if calls else {"tool_calls"}
        # Keys keep their order: a template may render the whole object.
        message = {k: v for k, v in turn.items() if k not in apart and v is not None}
        message |= {"role": role} | ({"tool_calls": calls} if calls else {})
        content = turn.get(self.content_key)
        if content is None:
            text = f'{where} has "function_call": write it as "tool_calls": {_CALLS}'
            require(not holds(turn.get("function_call")), text)
            text = f'{where} has no "{self.content_key}": there is nothing to learn'
            require(role != "assistant" or bool(calls), text)
        named = f'"{self.content_key}" of {where}'
        message["content"] = _content(content, role, named, self.images)
        return message, trained_on


def _is_trained_on(turn: Message, where: str) -> bool:
    """Return whether `weight`, `train` and `loss` of a turn, if present, are 1 or true."""
    for key in _PART_KEYS:
        text = f'{where} has "{key}"; only whole turns can be trained on or left out'
        require(not holds(turn.get(key)), text)
    flags = {key: turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None}
    for key, value in flags.items():
        text = f'"{key}" of {where} is {value!r}; a turn is trained on (1, true) or not (0, false)'
        require(isinstance(value, int | float) and value in (0, 1), text)
    return all(flags.values())


def _content(content: Any, role: str, where: str, images: bool) -> Any:
    """Return text, or a list of parts `{"type": "text", "text": ...}`, also of images.

    A tool's answer may be any value: templates differ in how they render it.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and (role != "tool" or all(map(_is_part, content))):
        return [_part(part, where, images) for part in content]
    require(role == "tool", f"{where} holds a {type(content).__name__} instead of text")
    return content


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _part(part: Any, where: str, images: bool) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"{where} holds a list with a {type(part).__name__} instead of parts")
    kind = part.get("type", "text")
    if kind == "image" and images:
        path = part.get("path", part.get("image"))
        require(isinstance(path, str), f'{where} has an image without the "path" of a file')
        return {"type": "image", "path": str(path)}
    named = f"of type {kind!r}" if kind != "text" else "without text"
    is_text = kind == "text" and isinstance(part.get("text"), str)
    readable, hint = (
        ("parts of text and images", _HINTS) if images else ("parts of text", _NO_IMAGES)
    )
    text = f"{where} has a part {named}; only {readable} can be learned from"
    require(is_text, f"{text}{hint.get(str(kind), '')}")
    return {"type": "text", "text": part["text"]}


def text_of(content: Any) -> str:
    """Return the text of a content, its parts joined; "" for other contents."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    parts = (part for part in content if isinstance(part, dict) and part.get("type") == "text")
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def paths_of(messages: Iterable[Message]) -> tuple[str, ...]:
    """Return the paths of the images in turns, in their order."""
    contents = (message["content"] for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return tuple(part["path"] for part in parts if part.get("type") == "image")


def _template_arguments(value: Any) -> dict[str, Any]:
    """Return `chat_template_kwargs` of a record, which may be JSON text."""
    found = decoded(value, '"chat_template_kwargs"')
    if not holds(found):
        return {}
    require(isinstance(found, dict), '"chat_template_kwargs" must be an object')
    taken = sorted(set(found) & _RESERVED)
    require(not taken, f'"chat_template_kwargs" cannot set {", ".join(taken)}')
    return dict(found)


# --- tools and their calls -----------------------------------------------------------------------


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools, which may be JSON text; None for no tools."""
    found = decoded(value, '"tools"')
    if not holds(found):
        return None
    if isinstance(found, list):
        found = [decoded(tool, f'tool {i} of "tools"') for i, tool in enumerate(found)]
    require(is_turns(found), '"tools" must be a list of objects, the JSON schemas of functions')
    return list(found)


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """Return the function of a schema or call, which may be within `{"function": ...}`."""
    function = value.get("function")
    return function if isinstance(function, dict) else value


def tool_name(tool: dict[str, Any]) -> Any:
    """Return the name of a schema or call in either layout; None without one."""
    return _function(tool).get("name")


def tool_forms(tools: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the schemas in each layout that a template may expect.

    As they are, each within `{"type": "function", "function": ...}`, and each without it.
    """
    yield tools
    yield [{"type": "function", "function": _function(tool)} for tool in tools]
    yield [_function(tool) for tool in tools]


def call_arguments(message: Message) -> list[Any]:
    """Return the arguments of each call of a message."""
    return [_function(call).get("arguments") for call in message.get("tool_calls", ())]


def call_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages with their tool calls in each form that a template may expect.

    First with arguments as objects, then as JSON text (DeepSeek-V3 joins them with text), then both
    with calls in the other of the two layouts `{"name": ..., "arguments": ...}` and
    `{"type": "function", "function": {...}}`.
    """
    for layout in (lambda call: call, _other_layout):
        for arguments in (_as_object, _as_text):
            yield [
                message | {"tool_calls": [_with(layout(c), arguments) for c in calls]}
                if (calls := message.get("tool_calls"))
                else message
                for message in messages
            ]


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    found = decoded(value, f'"tool_calls" of {where}')
    if not holds(found):
        return []
    require(is_turns(found), f'"tool_calls" of {where} must be a list of objects')
    for call in found:
        arguments = _function(call).get("arguments")
        given = str(arguments)[:60]
        text = f'"arguments" of a tool call of {where} is text that is not a JSON object: {given!r}'
        require(not isinstance(_as_object(arguments), str), text)
    return [{k: v for k, v in call.items() if v is not None} for call in found]


def _with(call: dict[str, Any], form: Any) -> dict[str, Any]:
    function = _function(call)
    if "arguments" not in function:
        return call
    changed = function | {"arguments": form(function["arguments"])}
    return changed if function is call else call | {"function": changed}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str) and not arguments.strip():
        return {}
    found = decoded(arguments)
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _other_layout(call: dict[str, Any]) -> dict[str, Any]:
    function = _function(call)
    if function is not call:
        return {k: v for k, v in call.items() if k not in ("type", "function")} | function
    outer = {k: v for k, v in call.items() if k in ("id", "type")}
    inner = {k: v for k, v in call.items() if k not in outer}
    return {"type": "function", **outer, "function": inner}
