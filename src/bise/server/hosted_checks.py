"""What is checked of an answer that another machine gave, before it is passed on: form, tools, schema.

Local models cannot break these promises, because a grammar holds them to it; a hosted one can, and then its
answer is a 502 and never passed on as if it were good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from bise.engine.request import Usage
from bise.errors import ModelFileError, RequestError
from bise.jsonfile import parse_json
from bise.server.conversation import call_id
from bise.server.problem import ApiError
from bise.server.reading import format_grammar
from bise.text.messages import parse_tools

if TYPE_CHECKING:
    from bise.server.chat_schema import ChatRequest

MAX_COUNT = 1 << 31
_REASONS = frozenset({"stop", "length", "tool_calls"})


def lie(what: str) -> ApiError:
    """Return the refusal of an answer that is not what was asked for."""
    return ApiError(
        502, f"the model's host {what}", code="bad_upstream_answer", headers={"x-should-retry": "false"}
    )


def fields_of(value: object, what: str) -> dict[str, Any]:
    """Return a JSON object, or refuse the answer."""
    if not isinstance(value, dict):
        raise lie(f"sent {what} that is no object")
    return cast(dict[str, Any], value)


def parsed(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `data`, or refuse the answer."""
    try:
        value = parse_json(data, what, max_values=1_000_000)
    except ModelFileError as error:
        raise lie(f"sent {what} that is no JSON") from error
    return fields_of(value, what)


def usage_of(answer: Mapping[str, Any]) -> Usage:
    """Return the tokens that the host counted; refuse an answer without, or with ones that cannot be."""
    fields = fields_of(answer.get("usage"), "a usage")
    details = fields.get("prompt_tokens_details")
    cached = cast(dict[str, Any], details).get("cached_tokens", 0) if isinstance(details, dict) else 0
    counts = [fields.get("prompt_tokens"), fields.get("completion_tokens", 0), cached or 0]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_COUNT for n in counts):
        raise lie("sent a usage with numbers that cannot be")
    prompt, completion, cached = cast(list[int], counts)
    if cached > prompt:
        raise lie("sent a usage with more cached tokens than prompt tokens")
    return Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)


@dataclass(frozen=True, slots=True)
class Checks:
    """What the answer to one request must keep to. Make it with `of`."""

    schema: Any = None
    """A validator for the content; None: free text."""
    is_json: bool = False
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """A validator of the arguments by the name of each tool that may be called."""
    must_call: bool = False
    single_call: bool = False

    @property
    def holds_content(self) -> bool:
        """True when the content can be judged only whole."""
        return self.is_json or self.schema is not None

    @classmethod
    def of(cls, body: ChatRequest) -> Checks:
        """Return what `body` asks for. Raises RequestError for a schema or tools that cannot be checked."""
        form = body.response_format
        if form is not None and form.type in ("regex", "choice", "lark"):
            raise RequestError(
                f"a hosted model cannot be held to {form.type}; ask a local one, or use json_schema",
                field="response_format.type",
            )
        format_grammar(form, openai_strict=False)
        schema = None
        if form is not None and form.json_schema is not None and form.type == "json_schema":
            schema = _validator(form.json_schema.document, "response_format.json_schema.schema")
        choice = body.tool_choice
        named = None if choice is None or isinstance(choice, str) else choice.model_dump()
        allowed: set[str] | None = None
        if named is not None and "function" in named:
            allowed = {named["function"]["name"]}
        elif named is not None:
            allowed = {
                str(tool.get("function", tool).get("name")) for tool in named["allowed_tools"]["tools"]
            }
        specs = [] if choice == "none" else parse_tools(body.tools)
        arguments = {
            spec.name: _validator(dict(spec.parameters) or True, f"tools.{spec.name}.parameters")
            for spec in specs
            if allowed is None or spec.name in allowed
        }
        if allowed is not None and allowed - arguments.keys():
            raise RequestError("tool_choice names a tool that is not among the tools", field="tool_choice")
        forced = choice in ("any", "required") or (
            named is not None and ("function" in named or named["allowed_tools"]["mode"] == "required")
        )
        return cls(
            schema=schema,
            is_json=form is not None and form.type == "json_object",
            arguments=arguments,
            must_call=forced,
            single_call=body.parallel_tool_calls is False,
        )

    def check_content(self, content: str | None, reason: str, calls: int) -> None:
        """Refuse a content that is not of the form asked for; one that was cut off at its length may be."""
        if not self.holds_content or reason == "length" or (calls and not content):
            return
        try:
            value = parse_json((content or "").encode("utf-8", "replace"), "content")
        except ModelFileError as error:
            raise lie("sent an answer that is no JSON, though JSON was asked for") from error
        if self.is_json and not isinstance(value, dict):
            raise lie("sent an answer that is no JSON object, though one was asked for")
        if self.schema is not None and not _is_valid(self.schema, cast(object, value)):
            raise lie("sent an answer that does not match the schema of response_format")

    def checked_calls(self, calls: object, seed: str) -> list[dict[str, Any]]:
        """Return tool calls in our form, or refuse the answer."""
        if calls is None or calls == []:
            if self.must_call:
                raise lie("called no tool, though tool_choice demands a call")
            return []
        if not isinstance(calls, list):
            raise lie("sent tool calls that are no array")
        entries = cast(list[object], calls)
        if self.single_call and len(entries) > 1:
            raise lie("called several tools, though parallel_tool_calls is false")
        return [self._checked_call(place, entry, seed) for place, entry in enumerate(entries)]

    def _checked_call(self, place: int, entry: object, seed: str) -> dict[str, Any]:
        function = fields_of(fields_of(entry, "a tool call").get("function"), "a tool call")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or name not in self.arguments:
            raise lie("called a tool that is none of those it may call")
        text = json.dumps(arguments) if isinstance(arguments, dict) else arguments
        if not isinstance(text, str):
            raise lie(f"called {name} with arguments that are no JSON object")
        try:
            value = parse_json((text or "{}").encode("utf-8", "replace"), "arguments")
        except ModelFileError as error:
            raise lie(f"called {name} with arguments that are no JSON") from error
        if not isinstance(value, dict):
            raise lie(f"called {name} with arguments that are no JSON object")
        if not _is_valid(self.arguments[name], cast(object, value)):
            raise lie(f"called {name} with arguments that do not match its parameters")
        return {
            "id": call_id(f"{seed}/{place}"),
            "type": "function",
            "index": place,
            "function": {"name": name, "arguments": text or "{}"},
        }


def reason_of(choice: Mapping[str, Any], calls: int) -> str:
    """Return why a choice ended, in our words, or refuse the answer."""
    reason = choice.get("finish_reason")
    if calls:
        return "tool_calls"
    known = {"model_length": "length", "tool_calls": "stop"}.get(str(reason), reason)
    if known not in _REASONS:
        raise lie("sent an answer that did not end properly")
    return str(known)


def _validator(schema: dict[str, Any] | bool, place: str) -> Any:
    """Return a validator that follows no reference out of the schema and runs in linear time on patterns."""
    import re2  # pyright: ignore[reportMissingTypeStubs]
    from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
    from referencing import Registry

    patterns: Any = re2
    extend: Any = cast(Any, validators).extend

    def pattern(validator: object, wanted: str, value: object, schema: object) -> Any:
        if isinstance(value, str) and not patterns.search(wanted, value):
            yield ValidationError("does not match the pattern")

    text = json.dumps(schema)
    if '"patternProperties"' in text or '"$dynamicRef"' in text:
        raise RequestError(f"{place}: patternProperties cannot be checked for a hosted model", field=place)
    checker = extend(Draft202012Validator, {"pattern": pattern})
    try:
        Draft202012Validator.check_schema(schema)
        for wanted in _patterns(schema):
            patterns.compile(wanted)
    except (SchemaError, patterns.error, RecursionError) as error:
        raise RequestError(f"{place}: is no JSON Schema that can be checked", field=place) from error
    return checker(schema, registry=cast(Any, Registry)())


def _patterns(schema: object) -> list[str]:
    found: list[str] = []
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            fields = cast(dict[str, object], value)
            if isinstance(fields.get("pattern"), str):
                found.append(str(fields["pattern"]))
            pending += fields.values()
        elif isinstance(value, list):
            pending += cast(list[object], value)
    return found


def _is_valid(validator: Any, value: object) -> bool:
    try:
        return bool(validator.is_valid(value))
    except Exception as error:  # a reference that leads nowhere shows only here
        raise RequestError("a schema has a reference that leads nowhere", field="response_format") from error
