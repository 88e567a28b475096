"""The body of POST /v1/responses, and its way into a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import Field, field_validator

from bise.errors import RequestError
from bise.server.body import Absent, PartModel, validate
from bise.server.chat_schema import ChatRequest, Effort
from bise.server.conversation import Message
from bise.server.fields import RunFields
from bise.server.limits import MAX_MESSAGES, MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


_ROLES = ("system", "developer", "user", "assistant")
_ITEM_FIELDS = {
    "message": ("type", "role", "content", "id", "status", "phase"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status"),
    "function_call_output": ("type", "call_id", "output", "id", "status"),
}
"""What each kind of input item may say; ids, status and phase of earlier answers change nothing."""


NAMES = (
    (r"response_format(\.json_schema)?", "text.format"),
    (r"\bmax_tokens", "max_output_tokens"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"tools\[(\d+)\]\.function\.", r"tools[\1]."),
    (r"tool_choice\.function\.", "tool_choice."),
    (r"\bmessages\[\d+\]", "input"),
    (r"\btruncate\b", "truncation"),
)
"""What the fields of the chat request are called here, for refusals."""


class TextOptions(PartModel):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(PartModel):
    """How long to think."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    """Thoughts come whole; none are summarised."""
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(PartModel):
    """How a stream looks."""

    include_obfuscation: Literal[False] | None = None
    """Events are never padded."""


class ResponsesRequest(RunFields):
    """POST /v1/responses."""

    model: str = Field(min_length=1, max_length=512)
    input: str | list[dict[str, Any]] = Field(max_length=1 << 24)
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    include: list[str] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=64)
    previous_response_id: str | None = Field(None, max_length=128)
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` leaves out the oldest turns where all do not fit; needs `max_output_tokens`."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    # What would change the answer and cannot be honoured is refused, not ignored.
    background: Literal[False] | None = None
    conversation: Absent = None
    prompt: Absent = None
    max_tool_calls: Absent = None
    context_management: Absent = None
    moderation: Absent = None
    image: Absent = None
    access_programs: Absent = None
    background_options: Absent = None

    @field_validator("include")
    @classmethod
    def _known_include(cls, value: list[str] | None) -> list[str] | None:
        check_include(value or ())
        return value

    @property
    def wants_logprobs(self) -> bool:
        """True when the text parts carry log-probs."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def new_messages(self) -> list[Message]:
        """Return the input as chat messages. Raises RequestError for items that cannot be said."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not 1 <= len(self.input) <= MAX_MESSAGES:
            raise RequestError(
                f"input must have 1 to {MAX_MESSAGES} items, got {len(self.input)}", field="input"
            )
        messages: list[Message] = []
        for index, item in enumerate(self.input):
            _add_item(messages, item, f"input[{index}]")
        return messages

    def as_chat(self, messages: Sequence[Message]) -> ChatRequest:
        """Return the chat request that asks the same; `messages` include those of earlier responses."""
        start: list[Message] = []
        if self.instructions:
            start = [{"role": "system", "content": self.instructions}]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*start, *messages],
            "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())] or None,
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _format(self.text.format if self.text else None),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "max_tokens": self.max_output_tokens,
            "truncate": "oldest" if self.truncation == "auto" else None,
            "deadline_s": self.deadline_s,
            "use_prefix_cache": self.use_prefix_cache,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
        }
        return validate({name: value for name, value in fields.items() if value is not None}, ChatRequest)


def check_include(names: Sequence[str]) -> None:
    """Raise RequestError for what cannot be shown beside a response: only log-probs can."""
    for name in names:
        if name != LOGPROBS:
            raise RequestError(
                f"include: {name[:64]!r} is not known here; known: {LOGPROBS}", field="include"
            )


def _add_item(messages: list[Message], item: Mapping[str, Any], place: str) -> None:
    kind = item.get("type", "message")
    if isinstance(kind, str) and kind in _ITEM_FIELDS:
        _only(item, _ITEM_FIELDS[kind], place)
    if kind == "message":
        if item.get("role") not in _ROLES:
            shown = str(item.get("role"))[:40]
            raise RequestError(
                f"{place}.role is {shown!r}; known: {', '.join(_ROLES)}", field=f"{place}.role"
            )
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), place)})
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":
            last["tool_calls"] = [*last.get("tool_calls", ()), call]
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append(
            {
                "role": "tool",
                "tool_call_id": item.get("call_id"),
                "content": _content(item.get("output"), place),
            }
        )
    elif kind == "reasoning":
        return  # a model reads its earlier thoughts in none of the formats here
    else:
        raise RequestError(
            f"{place}.type is {str(kind)[:40]!r}; known: message, function_call, function_call_output, "
            "reasoning",
            field=f"{place}.type",
        )


def _only(item: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Refuse fields that would be dropped."""
    for name, value in item.items():
        if name not in known and value not in (None, []):
            raise RequestError(
                f"{place}.{name[:64]} is not known here; known: {', '.join(known)}", field=place
            )


def _content(value: object, place: str) -> object:
    if not isinstance(value, list):
        return value
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(cast(list[Any], value)):
        fields: Mapping[str, Any] = cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {}
        if fields.get("type") not in _TEXT_PARTS or not isinstance(fields.get("text"), str):
            raise RequestError(
                f"{place}.content[{index}] must be a text part; this server reads text only",
                field=f"{place}.content",
            )
        parts.append({"type": "text", "text": fields["text"]})
    return parts


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"{place}.type is {str(tool.get('type'))[:40]!r}; only functions can be called here", field=place
        )
    if isinstance(tool.get("function"), Mapping):
        return dict(tool)
    names = ("name", "description", "parameters", "strict")
    _only(tool, ("type", *names), place)
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _choice(choice: str | Mapping[str, Any] | None) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = {"mode": choice.get("mode", "auto"), "tools": choice.get("tools", [])}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if form is None:
        return None
    if form.get("type") != "json_schema" or "json_schema" in form:
        return dict(form)
    names = ("name", "schema", "strict", "description")
    _only(form, ("type", *names), "text.format")
    if form.get("schema") is None:
        raise RequestError("text.format.schema is missing; type json_schema needs it", field="text.format")
    return {"type": "json_schema", "json_schema": {n: form[n] for n in names if form.get(n) is not None}}
