"""How an answer is read: plain text, thoughts, tool calls; and the grammar that makes it so.

Owns the translation of tool_choice and response_format into what the engine enforces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bise.engine.request import Delta, FinishReason
from bise.errors import RequestError
from bise.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.server.chat_schema import ChatRequest, ResponseFormat


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer; any of its fields may be empty."""

    text: str = ""
    thought: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    """Whole tool calls in wire form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What to tell the engine about the answer's form, and how to read what comes."""

    grammar: GrammarSpec | None = None
    shown_tools: Sequence[dict[str, Any]] | None = None
    """The tools that the model is told of."""

    @classmethod
    def of(cls, loaded: LoadedModel, body: ChatRequest) -> Reading:
        """Return how the answer to `body` is read. Raises RequestError for what cannot be enforced."""
        if body.tools and body.tool_choice != "none":
            raise RequestError("tools are not supported yet", field="tools")
        if body.reasoning_effort not in (None, "none") or body.prompt_mode is not None:
            field_name = "prompt_mode" if body.prompt_mode else "reasoning_effort"
            raise RequestError(f"{field_name}: this model does not think before it answers", field=field_name)
        return cls(grammar=format_grammar(body.response_format))

    def reader(self) -> Reader:
        """Return a reader for one choice."""
        return Reader()


def format_grammar(form: ResponseFormat | None) -> GrammarSpec | None:
    """Return the grammar of a response_format; None for free text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return GrammarSpec.json_object(field="response_format")
    assert form.json_schema is not None
    return GrammarSpec.json_schema(
        form.json_schema.document,
        strict=bool(form.json_schema.strict),
        field="response_format.json_schema.schema",
    )


@dataclass(slots=True)
class Reader:
    """Reads the deltas of one choice."""

    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def feed(self, delta: Delta) -> list[Piece]:
        """Return what a delta says."""
        return [Piece(text=delta.text)] if delta.text else []

    def end(self, delta: Delta) -> list[Piece]:
        """Return what was held back."""
        return []

    def finish_reason(self, delta: Delta) -> str:
        """Return `stop`, `length` or `tool_calls` for a sequence's last delta."""
        if self.calls:
            return "tool_calls"
        return "stop" if delta.finish_reason is FinishReason.STOP else "length"
