"""The body of POST /v1/chat/completions: OpenAI's and Mistral's fields in one model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bise.server.body import Absent, PartModel
from bise.server.fields import Prediction, SamplingFields
from bise.server.limits import MAX_CHOICES, MAX_MESSAGES, MAX_TOOLS

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JsonSchemaFormat(PartModel):
    """A schema that the answer obeys."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    schema_definition: dict[str, Any] | None = None
    """Mistral's older clients say it so."""
    strict: bool | None = None

    @property
    def document(self) -> dict[str, Any] | bool:
        """The JSON Schema; everything for none."""
        if self.schema_ is not None:
            return self.schema_
        return self.schema_definition if self.schema_definition is not None else {}


class ResponseFormat(PartModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "lark"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None
    """A pattern that the whole answer matches."""
    choice: list[str] | None = None
    """Texts, one of which is the answer."""
    lark: str | None = None
    """A grammar; its rule `start` is the answer."""

    @model_validator(mode="after")
    def _has_its_own(self) -> ResponseFormat:
        for name in ("json_schema", "regex", "choice", "lark"):
            is_given = getattr(self, name) is not None
            if self.type == name and not is_given:
                raise ValueError(f"{name} is missing; type {name} needs it")
            if self.type != name and is_given:
                raise ValueError(f"{name} needs type {name}, not {self.type}")
        return self


class FunctionName(PartModel):
    """A function by name."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")


class NamedTool(PartModel):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(PartModel):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(PartModel):
    """OpenAI's `allowed_tools`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["auto", "none", "any", "required"] | NamedTool | AllowedToolsChoice


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    """The same as `max_tokens`."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: bool | None = None
    top_prompt_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    safe_prompt: bool | None = None
    reasoning_effort: Effort | None = None
    prompt_mode: Literal["reasoning"] | None = None
    # What would change the answer and cannot be honoured is refused, not ignored.
    guardrails: Absent = None
    functions: Absent = None
    function_call: Absent = None
    audio: Absent = None
    web_search_options: Absent = None
    moderation: Absent = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError(
                "max_tokens and max_completion_tokens mean the same and differ; give one of them"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.top_prompt_logprobs and not self.prompt_logprobs:
            raise ValueError("top_prompt_logprobs needs prompt_logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.truncate is not None and self.limit is None:
            raise ValueError("truncate needs max_tokens, so that it is known how much room the answer takes")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens to produce at most."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
