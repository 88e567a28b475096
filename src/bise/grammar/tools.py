"""Tool calls as grammars: what a model may write so that every call names a tool and fits its schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from bise.errors import RequestError, quoted
from bise.grammar.regex import Chars, Regex, Repeat, ranges, seq, text
from bise.grammar.schema import Document
from bise.grammar.schema_rules import SchemaRules, json_text
from bise.grammar.spec import GrammarKind, GrammarSpec
from bise.grammar.symbols import Builder, Control, Symbol
from bise.grammar.vocabulary import Vocabulary
from bise.text.messages import ToolSpec
from bise.text.tool_calls import MAX_CALLS, TRIGGER, CallForm

_CHOICES = ("auto", "any", "required", "none")


def tool_calls_spec(
    form: CallForm,
    tools: Sequence[ToolSpec],
    choice: str = "auto",
    *,
    name: str | None = None,
    parallel: bool = True,
    field: str = "tools",
) -> GrammarSpec | None:
    """Return the grammar of an answer that may use `tools`; None where nothing has to be kept.

    `choice` is auto, any, required or none; `name` demands that tool. With `auto` the text before a call is
    free; arguments fit the tool's schema in every case. Raises RequestError for a tool that is not there, and
    for `auto` with a model that has no token that begins a call.
    """
    if choice not in _CHOICES:
        raise RequestError(
            f"tool_choice is {quoted(choice)}; known: {', '.join(_CHOICES)}", field="tool_choice"
        )
    chosen = [(index, tool) for index, tool in enumerate(tools) if name is None or tool.name == name]
    if name is not None and not chosen:
        raise RequestError(
            f"tool_choice names {quoted(name)}, which is not among the tools", field="tool_choice"
        )
    is_forced = name is not None or choice in ("any", "required")
    if is_forced and not chosen:
        raise RequestError("tool_choice demands a call, and there are no tools", field="tool_choice")
    if not is_forced and (choice == "none" or not chosen):
        return None if form is CallForm.BARE else GrammarSpec.without(TRIGGER, field=field)
    if form is CallForm.BARE and not is_forced:
        raise RequestError(
            "tool_choice auto needs a model with a token that begins a call, which this model has not; use "
            "required, a named tool, or none",
            field="tool_choice",
        )
    entries = [
        {"place": index, "name": tool.name, "parameters": dict(tool.parameters), "strict": tool.strict}
        for index, tool in chosen
    ]
    source = {"form": form.value, "parallel": parallel, "tools": entries}
    try:
        text = json.dumps(source, ensure_ascii=False, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise RequestError(f"{field} cannot be written as JSON", field=field) from error
    return GrammarSpec(
        kind=GrammarKind.TOOL_CALLS, source=text, field=field, trigger=None if is_forced else TRIGGER
    )


def tool_rule(spec: GrammarSpec, builder: Builder, vocabulary: Vocabulary) -> Symbol:
    """Return the rule of the calls that a spec of `tool_calls_spec` describes, the trigger included."""
    source = cast(dict[str, object], json.loads(spec.source))
    form = CallForm(cast(str, source["form"]))
    most = MAX_CALLS if source["parallel"] else 1
    space = builder.rule((), (builder.text(" "),)) if vocabulary.tokenizer.space_prefix else builder.rule(())
    maker = _Calls(builder, vocabulary, spec.field, space)
    entries = cast(list[dict[str, object]], source["tools"])
    if form in (CallForm.NAMED, CallForm.NAMED_WITH_IDS):
        call = builder.rule(
            *(maker.named(entry, with_ids=form is CallForm.NAMED_WITH_IDS) for entry in entries)
        )
        return builder.rule(builder.repeated(call, 1, most))
    call = builder.rule(*(maker.listed(entry, with_ids=form is CallForm.LIST_WITH_IDS) for entry in entries))
    listed = (builder.text("["), maker.several(call, most), builder.text("]"))
    if form is CallForm.BARE:
        return builder.rule(listed)
    return builder.rule((maker.control(TRIGGER), space, *listed))


def _call_id(quote: str) -> Regex:
    """Return the nine letters and digits of a call's id, between quotes."""
    letters = Chars(ranges([(0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)]))
    return seq(text(quote), Repeat(letters, 9, 9), text(quote))


class _Calls:
    """Makes the rules of single calls."""

    def __init__(self, builder: Builder, vocabulary: Vocabulary, field: str, space: int) -> None:
        self._builder = builder
        self._vocabulary = vocabulary
        self._field = field
        self._space = space
        """A space that SentencePiece puts after a control token, or nothing."""

    def control(self, name: str) -> Control:
        return Control(self._vocabulary.control(name, self._field))

    def several(self, call: int, most: int) -> int:
        more = self._builder.rule((self._builder.text(",", ", "), call))
        return self._builder.rule((call, *self._builder.repeated(more, 0, most - 1)))

    def named(self, entry: dict[str, object], *, with_ids: bool) -> tuple[Symbol, ...]:
        """Return `[TOOL_CALLS]f[ARGS]{...}`, with an id where form and vocabulary have one."""
        word = self._builder.text
        head = (self.control(TRIGGER), self._space, word(cast(str, entry["name"])))
        call_id: tuple[Symbol, ...] = ()
        if with_ids and self._vocabulary.tokenizer.control_id("[CALL_ID]") is not None:
            call_id = (self._builder.rule((), (self.control("[CALL_ID]"), self._space, self._id(""))),)
        return (*head, *call_id, self.control("[ARGS]"), self._space, self._arguments(entry))

    def listed(self, entry: dict[str, object], *, with_ids: bool) -> tuple[Symbol, ...]:
        """Return `{"name": "f", "arguments": {...}}`, with an id at the end where the form has one."""
        word, name = self._builder.text, json_text(entry["name"])
        head = word(f'{{"name": {name}, "arguments": ', f'{{"name":{name},"arguments":')
        call_id: tuple[Symbol, ...] = ()
        if with_ids:
            call_id = (self._builder.rule((), (word(', "id": ', ',"id":'), self._id('"'))),)
        return (head, self._arguments(entry), *call_id, word("}"))

    def _id(self, quote: str) -> Symbol:
        return self._builder.expression(f"id {quote}", _call_id(quote))

    def _arguments(self, entry: dict[str, object]) -> int:
        place = f"{self._field}[{entry['place']}].function.parameters"
        document = Document(
            json_text(entry["parameters"]), place, self._builder.budget, strict=entry["strict"] is True
        )
        return SchemaRules(document, self._builder).value(("", document.add("object", {"type": "object"})))
