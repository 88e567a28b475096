"""How an answer is read: text, thoughts, tool calls; and the grammar that makes it so.

Owns the translation of tools, tool_choice and response_format into what the engine enforces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from bise.engine.request import Delta, FinishReason
from bise.errors import RequestError
from bise.grammar.spec import GrammarSpec
from bise.text.messages import parse_tools
from bise.text.thoughts import Thoughts
from bise.text.tool_calls import CallForm, CallReader, ReadCall, call_form

if TYPE_CHECKING:
    from bise.server.chat_schema import ChatRequest, ResponseFormat, ToolChoice
    from bise.server.service import Job
    from bise.text.tokenizer import Tokenizer


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
    form: CallForm | None = None
    """How calls are written; None when none can come."""
    forced: bool = False
    """The answer consists of calls."""
    thinks: bool = False

    @classmethod
    def of(cls, job: Job, body: ChatRequest) -> Reading:
        """Return how the answer to `body` is read. Raises RequestError for what cannot be enforced."""
        thinks = job.traits.thinks
        for name, wanted in (("prompt_mode", body.prompt_mode), ("reasoning_effort", body.reasoning_effort)):
            if wanted not in (None, "none") and not thinks:
                raise RequestError(f"{name}: this model does not think before it answers", field=name)
        if body.reasoning_effort == "none" and thinks:
            raise RequestError("reasoning_effort: this model always thinks", field="reasoning_effort")
        # Mistral's strict keeps the schema; OpenAI's also demands that every property is required.
        grammar = format_grammar(body.response_format, openai_strict=not job.is_mistral_client)
        if not body.tools or job.loaded.template is None:
            return cls(grammar=grammar, thinks=thinks)
        choice, name, allowed = _choice(body.tool_choice, body.tools)
        tools = [tool for tool in body.tools if allowed is None or _name_of(tool) in allowed]
        specs = parse_tools(tools)
        _check_names([spec.name for spec in specs])
        form = call_form(job.loaded.template.name, job.loaded.tokenizer)
        forced = name is not None or choice in ("any", "required")
        if grammar is not None and choice != "none":
            raise RequestError(
                "response_format and tools that may be called cannot be kept together; set tool_choice: none",
                field="response_format",
            )
        if grammar is None:
            from bise.grammar.tools import tool_calls_spec

            parallel = body.parallel_tool_calls is not False
            grammar = tool_calls_spec(form, specs, choice, name=name, parallel=parallel)
        calls = choice != "none"
        return cls(
            grammar=grammar,
            shown_tools=tools if calls or form is not CallForm.BARE else None,
            form=form if calls else None,
            forced=forced,
            thinks=thinks,
        )

    def reader(self, tokenizer: Tokenizer, seed: int) -> Reader:
        """Return a reader for one choice; `seed` is the one in use."""
        calls = None
        if self.form is not None:
            calls = CallReader(self.form, tokenizer, seed=seed, forced=self.forced)
        return Reader(calls=calls, thoughts=Thoughts(tokenizer) if self.thinks else None)


def format_grammar(form: ResponseFormat | None, *, openai_strict: bool) -> GrammarSpec | None:
    """Return the grammar of a response_format; None for free text.

    `openai_strict`: a schema marked strict must keep OpenAI's rules for such schemas, or it is refused.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return GrammarSpec.json_object(field="response_format")
    if form.regex is not None:
        return GrammarSpec.regex(form.regex, field="response_format.regex")
    if form.choice is not None:
        return GrammarSpec.choice(form.choice, field="response_format.choice")
    if form.lark is not None:
        return GrammarSpec.lark(form.lark, field="response_format.lark")
    assert form.json_schema is not None
    return GrammarSpec.json_schema(
        form.json_schema.document,
        strict=bool(form.json_schema.strict) and openai_strict,
        field="response_format.json_schema.schema",
    )


def _choice(
    choice: ToolChoice | None, tools: Sequence[object]
) -> tuple[str, str | None, frozenset[str] | None]:
    """Return (mode, the one tool to call, names of the tools that may be called or None for all)."""
    from bise.server.chat_schema import NamedTool

    if choice is None:
        return "auto", None, None
    if isinstance(choice, str):
        return choice, None, None
    if isinstance(choice, NamedTool):
        return "auto", choice.function.name, None
    names = frozenset(_name_of(tool) for tool in choice.allowed_tools.tools)
    if unknown := names - {_name_of(tool) for tool in tools}:
        raise RequestError(
            f"tool_choice allows {min(unknown)[:64]!r}, which is not among the tools", field="tool_choice"
        )
    return choice.allowed_tools.mode, None, names


def _check_names(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RequestError(
                f"tools[{index}].function.name {name!r} is given twice; a call could mean either",
                field="tools",
            )


def _name_of(tool: object) -> str:
    """Return the function's name in a tool of either form; "" when it has none."""
    fields = cast(dict[str, Any], tool) if isinstance(tool, dict) else {}
    function = fields.get("function", fields)
    name = cast(dict[str, Any], function).get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


@dataclass(slots=True)
class Reader:
    """Reads the deltas of one choice."""

    calls: CallReader | None = None
    thoughts: Thoughts | None = None
    num_calls: int = field(default=0, init=False)

    @property
    def num_thought_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return 0 if self.thoughts is None else self.thoughts.num_tokens

    def feed(self, delta: Delta) -> list[Piece]:
        """Return what a delta says."""
        thought, text = "", delta.text
        if self.calls is not None:
            read = self.calls.push(delta.token_ids, text)
            return self._said(delta, read.text + read.broken, read.calls)
        if self.thoughts is not None:
            thought, text = self.thoughts.cut(delta.token_ids, text)
        return [Piece(text, thought)] if text or thought else []

    def end(self, delta: Delta) -> list[Piece]:
        """Return what was held back until the last delta."""
        if self.calls is None:
            return []
        read = self.calls.finish()
        return self._said(None, read.text + read.broken, read.calls)

    def finish_reason(self, delta: Delta) -> str:
        """Return `stop`, `length` or `tool_calls` for a sequence's last delta."""
        if self.num_calls:
            return "tool_calls"
        return "stop" if delta.finish_reason is FinishReason.STOP else "length"

    def _said(self, delta: Delta | None, text: str, calls: Sequence[ReadCall]) -> list[Piece]:
        thought = ""
        if self.thoughts is not None and delta is not None:
            thought, text = self.thoughts.cut(delta.token_ids, text)
        pieces = [Piece(text, thought)] if text or thought else []
        if calls:
            pieces.append(Piece(calls=tuple(self._wire(call) for call in calls)))
        return pieces

    def _wire(self, call: ReadCall) -> dict[str, Any]:
        self.num_calls += 1
        return {
            "id": call.id,
            "type": "function",
            "index": self.num_calls - 1,
            "function": {"name": call.name, "arguments": call.arguments},
        }
