"""The body of POST /v1/messages, and its way into a chat request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, cast

from pydantic import Field

from bise.errors import RequestError
from bise.server.body import Absent, PartModel, WireModel, validate
from bise.server.chat_schema import ChatRequest
from bise.server.conversation import Message
from bise.server.fields import RunFields, StopString
from bise.server.limits import MAX_MESSAGES, MAX_STOPS, MAX_TOOLS

NAMES = (
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function\.", r"tools[\1]."),
    (r"tool_choice\.function\.", "tool_choice."),
    (r"reasoning_effort", "thinking"),
    (r"\bmessages\[\d+\]", "messages"),
)
"""What the fields of the chat request are called here, for refusals."""

_EFFORTS = {"enabled": "medium", "adaptive": None, "disabled": "none"}
_TOOL_FIELDS = ("type", "name", "description", "input_schema", "strict", "cache_control")


class ToolChoiceField(PartModel):
    """Whether and which tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingField(PartModel):
    """Whether to think first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    """Accepted; a model thinks as long as it thinks."""
    display: Literal["summarized"] | None = None


class MessageCountRequest(WireModel):
    """POST /v1/messages/count_tokens."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceField | None = None
    thinking: ThinkingField | None = None

    def as_chat(self, **fields: Any) -> ChatRequest:
        """Return the chat request that asks the same. Raises RequestError for what cannot be said."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system, "system")})
        for index, message in enumerate(self.messages):
            _add(messages, message, f"messages[{index}]")
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            messages[-1]["prefix"] = True
        choice, parallel = self._choice()
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())] or None,
            "tool_choice": choice,
            "parallel_tool_calls": parallel,
            "reasoning_effort": _EFFORTS[self.thinking.type] if self.thinking else None,
            **fields,
        }
        return validate({name: value for name, value in wanted.items() if value is not None}, ChatRequest)

    def _choice(self) -> tuple[object, bool | None]:
        choice = self.tool_choice
        if choice is None:
            return None, None
        parallel = False if choice.disable_parallel_tool_use else None
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name or ""}}, parallel
        return choice.type, parallel


class MessagesRequest(MessageCountRequest, RunFields):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=1 << 24)
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 22)
    truncate: Literal["oldest", "middle"] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None
    """Accepted; prefixes are cached unasked."""
    diagnostics: dict[str, Any] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None
    # What would change the answer and cannot be honoured is refused, not ignored.
    container: Absent = None
    context_management: Absent = None
    mcp_servers: Absent = None
    output_config: Absent = None
    inference_geo: Absent = None
    speed: Literal["standard"] | None = None

    def chat(self) -> ChatRequest:
        """Return the chat request that asks the same."""
        return self.as_chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            truncate=self.truncate,
            **self.run_options,
        )


def _add(messages: list[Message], message: Mapping[str, Any], place: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        _refuse(f"{place}.role", f"is {str(role)[:40]!r}; known: user, assistant")
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    if not isinstance(content, list):
        _refuse(f"{place}.content", "must be a string or a list of blocks")
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(cast(list[Any], content)):
        where = f"{place}.content[{index}]"
        fields: Mapping[str, Any] = cast(Mapping[str, Any], block) if isinstance(block, Mapping) else {}
        kind = fields.get("type")
        if kind == "text" and isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(fields, where))
        elif kind == "tool_result" and role == "user":
            messages.append(_result(fields, where))
        elif kind not in ("thinking", "redacted_thinking"):
            _refuse(where, "must be a text, tool_use or tool_result block; this server reads text only")
    if texts or calls:
        entry: Message = {"role": role, "content": "".join(texts)}
        if calls:
            entry["tool_calls"] = calls
        messages.append(entry)
    elif not content:
        _refuse(f"{place}.content", "is empty")


def _result(fields: Mapping[str, Any], place: str) -> Message:
    text = _text(fields.get("content") or "", place)
    if fields.get("is_error") is True:
        text = f"Error: {text}"  # no chat format has a mark of its own for a call that failed
    return {"role": "tool", "tool_call_id": fields.get("tool_use_id"), "content": text}


def _call(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    arguments = fields.get("input")
    if not isinstance(arguments, Mapping):
        _refuse(f"{place}.input", "must be an object")
    function = {"name": fields.get("name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": fields.get("id"), "type": "function", "function": function}


def _text(value: object, place: str) -> str:
    if isinstance(value, str):
        return value
    parts: list[str] = []
    for part in cast(list[Any], value) if isinstance(value, list) else [value]:
        fields: Mapping[str, Any] = cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {}
        if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
            _refuse(place, "must be text or a list of text blocks")
        parts.append(fields["text"])
    return "\n\n".join(parts)


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom") or "input_schema" not in tool:
        _refuse(place, "must be a function of your own with an input_schema; server tools are not here")
    for name, value in tool.items():
        if name not in _TOOL_FIELDS and value not in (None, []):
            _refuse(f"{place}.{name[:64]}", f"is not known here; known: {', '.join(_TOOL_FIELDS)}")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": {n: v for n, v in function.items() if v is not None}}


def _refuse(place: str, reason: str) -> NoReturn:
    raise RequestError(f"{place} {reason}", field=place)
