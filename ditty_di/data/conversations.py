"""From a record to a conversation: its turns, which of them are learnt, its tools."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ditty_di.data.audit import Note

#: Keys of a turn that say whether it is learnt: OpenAI's, axolotl's, ms-swift's.
LEARN_KEYS = ("weight", "train", "loss")
#: Keys of a turn that ask for a part of it to be learnt.
_PART_KEYS = ("train_detail", "training_detail")
#: Keys of a turn that name a call or a speaker; most templates have no place for them.
IDENTIFIERS = ("tool_call_id", "name", "id")
_NOT_FOR_TEMPLATES = {"messages", "conversations", "self", "kwargs"}


def holds(value: Any) -> bool:
    """Return whether a field holds something: not None and not empty."""
    return value is not None and not (isinstance(value, str | list | dict | tuple) and not value)


def without_nulls(value: Any) -> Any:
    """Return the value without keys that are None in the objects within it."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template.

    `messages` have `role` and `content`; `answers` are the indices of the turns to learn.
    """

    messages: list[dict[str, Any]]
    answers: list[int]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def with_messages(self, messages: list[dict[str, Any]]) -> Conversation:
        return replace(self, messages=messages)


@dataclass(frozen=True)
class Turns:
    """How conversations are written in the records.

    `roles` maps their names of roles to the template's: {human: user, gpt: assistant}.
    """

    key: str = "messages"
    role_key: str = "role"
    content_key: str = "content"
    roles: Mapping[str, str] | None = None

    def keys_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that hold the conversation's turns, () for another kind of record.

        Beside `key` that is a conversational prompt and completion: two lists of turns, of which
        the second is learnt.
        """
        if record.get(self.key) is not None:
            return (self.key,)
        both = ("prompt", "completion")
        if all(is_turns(record.get(key)) for key in both):
            return both
        return ()

    def of(self, record: Mapping[str, Any], *, answered: bool = True) -> Conversation:
        """Return the record's conversation.

        `answered=False`: it is a prompt, and needs no answer.

        Raises `ValueError` for what is not a conversation.
        """
        keys = self.keys_of(record)
        if not answered and len(keys) != 1:
            keys = ("prompt",)
        messages: list[dict[str, Any]] = []
        answers: list[int] = []
        notes: list[Note] = []
        for key in keys:
            turns = _parsed(record.get(key))
            if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
                raise ValueError(
                    f'"{key}" must be a list of objects with {self.role_key} and {self.content_key}'
                )
            given = len(keys) > 1 and key == keys[0]
            for i, turn in enumerate(turns):
                message, learnt = self._message(turn, f'turn {i} of "{key}"')
                if message["role"] != "assistant":
                    asked = any(turn.get(name) is True for name in LEARN_KEYS)
                    notes += [Note("not_learnt", message["role"])] * asked
                elif learnt and not given:
                    answers.append(len(messages))
                messages.append(message)
        last = keys[-1] if keys else self.key
        own = messages[len(record[keys[0]]) if len(keys) > 1 else 0 :]
        if answered and all(message["role"] != "assistant" for message in own):
            found = sorted({message["role"] for message in own})
            raise ValueError(
                f'"{last}" has no turn of the assistant to learn from, only of {found}; '
                "`roles` maps other names to it"
            )
        kwargs = template_arguments(record.get("chat_template_kwargs"))
        schemas = tools(record.get("tools"))
        return Conversation(messages, answers, schemas, kwargs, tuple(notes))

    def _message(self, turn: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
        if turn.get(self.role_key) is None:
            raise ValueError(f'{where} has no "{self.role_key}"')
        role = str(turn[self.role_key])
        role = (self.roles or {}).get(role, role)
        learnt = is_learnt(turn, where)
        apart = {self.role_key, self.content_key, *LEARN_KEYS, *_PART_KEYS}
        message = {k: v for k, v in turn.items() if k not in apart and v is not None}
        message["role"] = role
        if "tool_calls" in message:
            message["tool_calls"] = _tool_calls(message["tool_calls"], where)
            if not message["tool_calls"]:
                del message["tool_calls"]
        content = turn.get(self.content_key)
        if content is None and holds(turn.get("function_call")):
            raise ValueError(
                f'{where} has "function_call": write it as '
                '"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": ...}}]'
            )
        if content is None and role == "assistant" and "tool_calls" not in message:
            raise ValueError(f'{where} has no "{self.content_key}": there is nothing to learn')
        message["content"] = _content(content, role, f'"{self.content_key}" of {where}')
        return message, learnt


def _parsed(turns: Any) -> Any:
    """Return what a column of JSON text holds, anything else as it is."""
    try:
        return json.loads(turns) if isinstance(turns, str) else turns
    except ValueError:
        return turns


def is_turns(value: Any) -> bool:
    """Return whether the value is a list of objects, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Return what `weight`, `train` or `loss` of a turn say; True without them.

    Raises `ValueError` for other values than 0, 1, true and false, and for parts of turns.
    """
    for key in _PART_KEYS:
        if holds(turn.get(key)):
            raise ValueError(f'{where} has "{key}"; only whole turns can be learnt or left out')
    learnt = True
    for key in LEARN_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(
                f'"{key}" of {where} is {value!r}; a turn is learnt (1, true) or not (0, false)'
            )
        learnt = learnt and bool(value)
    return learnt


def _content(content: Any, role: str, where: str) -> Any:
    """Return text, or a list of parts `{"type": "text", "text": ...}`.

    What a tool answers may be any value: templates differ in what they make of it.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and (role != "tool" or all(map(_is_part, content))):
        return [_part(part, where) for part in content]
    if role == "tool":
        return content
    raise ValueError(f"{where} holds a {type(content).__name__} instead of text")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"{where} holds a list with a {type(part).__name__} instead of parts")
    kind = part.get("type", "text")
    if kind != "text" or not isinstance(part.get("text"), str):
        named = f"of type {kind!r}" if kind != "text" else "without text"
        raise ValueError(f"{where} has a part {named}; only parts of text can be learnt from")
    return {"type": "text", "text": part["text"]}


def text_of(content: Any) -> str:
    """Return the text of a content, its parts joined; "" for what has no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(p["text"] for p in content if isinstance(p, dict) and _is_text(p))
    return ""


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def from_json(value: Any, what: str) -> Any:
    """Return what a text of JSON holds, other values as they are.

    Raises `ValueError` for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{what} is text that is not JSON ({error})") from None


def tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools, which may be JSON text; None for no tools.

    Raises `ValueError` for anything but a list of objects.
    """
    found = from_json(value, '"tools"')
    if not holds(found):
        return None
    if isinstance(found, list):
        found = [from_json(tool, f'tool {i} of "tools"') for i, tool in enumerate(found)]
        if all(isinstance(tool, dict) for tool in found):
            return found
    raise ValueError('"tools" must be a list of objects, the JSON schemas of functions')


def tool_name(tool: Mapping[str, Any]) -> Any:
    """Return the name of a tool, whichever form its schema has; None without one."""
    function = tool.get("function")
    return (function if isinstance(function, dict) else tool).get("name")


def tool_forms(tools: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the schemas as they are, each within `{"type": "function", "function": ...}`, and each
    as what stands in it."""
    yield tools
    inner = [t["function"] if isinstance(t.get("function"), dict) else t for t in tools]
    yield [{"type": "function", "function": function} for function in inner]
    yield inner


def template_arguments(value: Any) -> dict[str, Any]:
    """Return `chat_template_kwargs` of a record, which may be JSON text.

    Raises `ValueError` for anything but an object, and for names that are not the template's.
    """
    found = from_json(value, '"chat_template_kwargs"')
    if not holds(found):
        return {}
    if not isinstance(found, dict):
        raise ValueError('"chat_template_kwargs" must be an object')
    from transformers import PreTrainedTokenizerBase

    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    if taken := sorted(set(found) & (own | _NOT_FOR_TEMPLATES)):
        raise ValueError(f'"chat_template_kwargs" cannot set {", ".join(taken)}')
    return found


# --- tool calls ----------------------------------------------------------------------------------


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    found = from_json(value, f'"tool_calls" of {where}')
    if not holds(found):
        return []
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise ValueError(f'"tool_calls" of {where} must be a list of objects')
    calls = [{k: v for k, v in call.items() if v is not None} for call in found]
    for call in calls:
        arguments = _function(call).get("arguments")
        if isinstance(arguments, str) and not isinstance(_as_object(arguments), dict):
            raise ValueError(
                f'"arguments" of a tool call of {where} is text that is not a JSON object: '
                f"{arguments[:60]!r}"
            )
    return calls


def call_forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages with their tool calls in the forms that templates take.

    First with arguments as objects, then as JSON text (DeepSeek-V3 joins them with text), then both
    once more with calls in the other of the two layouts `{"name": ..., "arguments": ...}` and
    `{"type": "function", "function": {...}}`.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for layout in (lambda call: call, _other_layout):
        for arguments in (_as_object, _as_text):
            yield [
                message
                if "tool_calls" not in message
                else message
                | {"tool_calls": [_with(layout(c), arguments) for c in message["tool_calls"]]}
                for message in messages
            ]


def call_arguments(message: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of each call of a message."""
    return [_function(call).get("arguments") for call in message.get("tool_calls", ())]


def call_names(message: Mapping[str, Any]) -> list[Any]:
    """Return the name of each call of a message that has one."""
    found = [_function(call).get("name") for call in message.get("tool_calls", ())]
    return [name for name in found if name is not None]


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _with(call: dict[str, Any], form: Any) -> dict[str, Any]:
    function = _function(call)
    if "arguments" not in function:
        return call
    changed = function | {"arguments": form(function["arguments"])}
    return changed if function is call else call | {"function": changed}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _other_layout(call: dict[str, Any]) -> dict[str, Any]:
    function = _function(call)
    if function is not call:
        rest = {k: v for k, v in call.items() if k not in ("type", "function")}
        return rest | function
    apart = {k: v for k, v in call.items() if k in ("id", "type")}
    inner = {k: v for k, v in call.items() if k not in apart}
    return {"type": "function", **apart, "function": inner}
