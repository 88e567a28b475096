"""Messages and tools in OpenAI form, checked and turned into values.

Owns what a conversation may look like whatever the chat format; every fault is a RequestError that names
its place, such as `messages[3].tool_calls[0].function.name`. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

from bise.errors import RequestError
from bise.jsonfile import kind_of, shown

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "prefix", "reasoning", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id", "name"),
}


@dataclass(frozen=True, slots=True)
class Thinking:
    """A part of a message that holds the model's thoughts."""

    text: str
    closed: bool = True
    """The thoughts are complete."""


Part = str | Thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the assistant made."""

    name: str
    arguments: str
    """JSON text as the caller gave it; `{}` for none."""
    id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One checked message."""

    role: str
    """`system`, `user`, `assistant` or `tool` (developer counts as system)."""
    content: str | tuple[Part, ...] | None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    """Name of the tool that answers."""
    prefix: bool = False
    """The model goes on with this message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, object]
    strict: bool = False
    """The caller wants OpenAI's strict mode for the arguments."""


def refuse(place: str, reason: str) -> NoReturn:
    """Raise the RequestError of one place of a request."""
    raise RequestError(f"{place} {reason}", field=place)


def parse_messages(messages: Sequence[object], *, continue_final: bool) -> list[ChatMessage]:
    """Check the form of a conversation and return it; the last message gets `prefix` when it is continued."""
    if not isinstance(cast(object, messages), list | tuple):
        refuse("messages", f"must be an array, not {kind_of(messages)}")
    if not messages:
        refuse("messages", "must hold at least one message")
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    last = parsed[-1]
    if continue_final and last.role != "assistant":
        refuse(
            f"messages[{len(parsed) - 1}].role",
            f"is {last.role}; only an assistant's message can be continued",
        )
    if continue_final and not last.prefix:
        parsed[-1] = ChatMessage(
            role=last.role, content=last.content, tool_calls=last.tool_calls, prefix=True
        )
    return parsed


def parse_tools(tools: Sequence[object] | None) -> list[ToolSpec]:
    """Check the form of the tools and return them; no tools for None."""
    if tools is None:
        return []
    if not isinstance(cast(object, tools), list | tuple):
        refuse("tools", f"must be an array, not {kind_of(tools)}")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def json_value(text: str, place: str) -> object:
    """Return the value of JSON text, or the text itself when it is no JSON (as Mistral's formats have it)."""
    try:
        return cast(object, json.loads(text))
    except json.JSONDecodeError:
        return text
    except (RecursionError, ValueError):
        refuse(place, "holds JSON that is nested too deeply or a number that is too long")


def json_text(value: object, place: str) -> str:
    """Return the JSON text of a value as Mistral's formats spell it: `", "` and `": "`, characters
    unescaped.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError):
        refuse(place, "cannot be written as JSON")


def _object(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        refuse(place, f"must be an object, not {kind_of(value)}")
    return cast(Mapping[str, object], value)


def _string(fields: Mapping[str, object], key: str, place: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        refuse(f"{place}.{key}", f"must be a string, not {kind_of(value)}")
    return value


def _only(fields: Mapping[str, object], known: Sequence[str], place: str) -> None:
    for key, value in fields.items():
        # OpenAI's clients send the unused fields of their own answers back as null or [].
        if key not in known and value is not None and value != []:
            refuse(f"{place}.{key}", f"is not known here; known: {', '.join(known)}")


def _message(value: object, place: str) -> ChatMessage:
    fields = _object(value, place)
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{place}.role", f"is {shown(role)}; known: {', '.join(_ROLES)}")
    role = "system" if role == "developer" else role
    _only(fields, _KEYS[role], place)
    content = _content(fields.get("content"), f"{place}.content", role)
    thoughts = _string(fields, "reasoning_content", place) or _string(fields, "reasoning", place)
    if thoughts:
        tail = content if isinstance(content, tuple) else (content,) if content else ()
        if any(isinstance(part, Thinking) for part in tail):
            refuse(f"{place}.reasoning_content", "is given twice: content holds thinking parts too")
        content = (Thinking(thoughts), *tail)
    prefix = fields.get("prefix", False)
    if not isinstance(prefix, bool):
        refuse(f"{place}.prefix", f"must be true or false, not {kind_of(prefix)}")
    return ChatMessage(
        role=role,
        content=content,
        tool_calls=_tool_calls(fields.get("tool_calls"), f"{place}.tool_calls"),
        tool_call_id=_string(fields, "tool_call_id", place),
        name=_string(fields, "name", place),
        prefix=prefix,
    )


def _content(value: object, place: str, role: str) -> str | tuple[Part, ...] | None:
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return None
    if not isinstance(value, list | tuple):
        refuse(place, f"must be a string or an array of parts, not {kind_of(value)}")
    return tuple(_part(part, f"{place}[{index}]") for index, part in enumerate(cast(list[object], value)))


def _part(value: object, place: str) -> Part:
    fields = _object(value, place)
    kind = fields.get("type")
    if kind == "text":
        _only(fields, ("type", "text"), place)
        text = _string(fields, "text", place)
        return text if text is not None else refuse(f"{place}.text", "is missing")
    if kind == "thinking":
        _only(fields, ("type", "thinking", "closed"), place)
        text, closed = _string(fields, "thinking", place), fields.get("closed", True)
        if text is None or not isinstance(closed, bool):
            refuse(place, "must have the string `thinking` and a boolean `closed`")
        return Thinking(text, closed)
    refuse(
        f"{place}.type", f"is {shown(kind)}; this engine reads text (and thinking) only, no images or sound"
    )


def _tool_calls(value: object, place: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        refuse(place, f"must be an array, not {kind_of(value)}")
    return tuple(
        _tool_call(call, f"{place}[{index}]") for index, call in enumerate(cast(list[object], value))
    )


def _tool_call(value: object, place: str) -> ToolCall:
    fields = _object(value, place)
    _only(fields, ("id", "type", "function", "index"), place)
    if fields.get("type", "function") != "function":
        refuse(f"{place}.type", f"is {shown(fields.get('type'))}; known: function")
    function = _object(fields.get("function"), f"{place}.function")
    _only(function, ("name", "arguments"), f"{place}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json_text(cast(object, arguments), f"{place}.function.arguments")
    if arguments is not None and not isinstance(arguments, str):
        refuse(f"{place}.function.arguments", f"must be JSON text or an object, not {kind_of(arguments)}")
    return ToolCall(
        name=_function_name(function, f"{place}.function"),
        arguments=arguments or "{}",
        id=_string(fields, "id", place),
    )


def _function_name(function: Mapping[str, object], place: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        refuse(f"{place}.name", f"must be 1 to 64 letters, digits, _ or -, got {shown(name)}")
    return name


def _tool(value: object, place: str) -> ToolSpec:
    fields = _object(value, place)
    _only(fields, ("type", "function"), place)
    if fields.get("type", "function") != "function":
        refuse(f"{place}.type", f"is {shown(fields.get('type'))}; known: function")
    function = _object(fields.get("function"), f"{place}.function")
    _only(function, ("name", "description", "parameters", "strict"), f"{place}.function")
    parameters = function.get("parameters")
    checked = _object({} if parameters is None else parameters, f"{place}.function.parameters")
    _check_schema(checked, f"{place}.function.parameters")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        refuse(f"{place}.function.strict", f"must be true or false, not {kind_of(strict)}")
    return ToolSpec(
        name=_function_name(function, f"{place}.function"),
        description=_string(function, "description", f"{place}.function") or "",
        parameters=checked,
        strict=strict is True,
    )


def _check_schema(schema: Mapping[str, object], place: str) -> None:
    """Refuse parameters that are no JSON Schema (draft 7)."""
    from jsonschema import Draft7Validator
    from jsonschema.exceptions import SchemaError

    json_text(schema, place)
    try:
        Draft7Validator.check_schema(schema)  # pyright: ignore[reportUnknownMemberType]  # untyped library
    except SchemaError as error:
        refuse(place, f"is no JSON Schema (draft 7): {' '.join(error.message.split())[:160]}")
    except RecursionError:
        refuse(place, "is nested too deeply")
