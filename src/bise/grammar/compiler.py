"""From a `GrammarSpec` to something that can follow outputs: within a budget, once per spec.

What bounds a compilation, whoever wrote the source: `Budget` counts this package's own work and memory, the
mask engine has limits of its own, and both are counts of steps, so that a source is refused or taken alike on
every machine and under every load.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, cast

from bise.errors import RequestError, quoted
from bise.grammar.automaton import UNREACHABLE, Budget, machine
from bise.grammar.lark import lark_rule
from bise.grammar.pattern import parse_pattern
from bise.grammar.regex import spelled, unedged
from bise.grammar.render import rendered
from bise.grammar.schema import Document
from bise.grammar.schema_rules import SchemaRules
from bise.grammar.spec import GrammarKind, GrammarSpec
from bise.grammar.symbols import Builder, Pattern, Symbol
from bise.grammar.tools import tool_rule
from bise.grammar.tracker import MAX_SHORTEST, Table
from bise.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

CACHE_BYTES = 256 << 20
"""What all compiled grammars of an engine may take."""
MAX_GROWN = 32
"""Grammars, the ones used last, that keep what outputs added to them."""
MAX_STATES = 20_000
"""States of the mask engine's automaton per grammar, about 10 MiB."""
SHALLOW = 500
"""Rules whose compilation any thread's stack holds: the mask engine compiles a rule inside of the one that
first names it, 3 KiB deeper each time, and dies with the process where that is too deep.
"""
DEEP_STACK = 128 << 20
"""What the compilation of more rules gets; `MAX_STEPS` allows no 40,000."""
MAX_TEXT = 2 << 20
"""Characters of a grammar in the mask engine's language at most."""


_STACK_SIZE = threading.Lock()
"""Held by whoever starts a thread with another stack; the size is one for the whole process."""


class Lead(Enum):
    """What may stand before an output: SentencePiece models begin a text with a space that is not shown."""

    NONE = "none"
    SPACE = "space"


class Compiled:
    """A grammar, ready to be followed by any number of outputs.

    The mask engine's automaton grows with the outputs that follow it, and all outputs of a grammar share it,
    up to `MAX_STATES`. Whether one of them still finds room there must not depend on the others: it can have
    a new one, and only what is too much for a new one is too much.
    """

    __slots__ = ("_text", "_vocabulary", "is_ours", "matcher", "size_bytes", "table")

    def __init__(
        self,
        table: Table,
        text: str,
        vocabulary: Vocabulary,
        matcher: LLMatcher,
        *,
        size_bytes: int,
        is_ours: bool,
    ) -> None:
        self.table = table
        self.is_ours = is_ours
        """bise chose the terminals, such that on no way out one swallows what belongs to the next."""
        self._text = text
        self._vocabulary = vocabulary
        self.matcher: LLMatcher | None = matcher
        """At the start, with what outputs have added; only ever copied. None: nobody used it lately."""
        self.size_bytes = size_bytes
        """What it takes without what outputs add, roughly and rather more."""

    def begin(self) -> LLMatcher:
        """Return a matcher at the start of the grammar."""
        matcher = self.matcher
        if matcher is None:
            matcher = self.matcher = self.fresh()
        return matcher.deep_copy()

    def fresh(self) -> LLMatcher:
        """Return a matcher at the start that shares nothing; takes as long as compiling."""
        return _matcher(self._text, self._vocabulary)


class GrammarCache:
    """Compiled grammars of one vocabulary, the least recently used dropped first. Any thread may ask."""

    def __init__(self, vocabulary: Vocabulary, *, max_bytes: int = CACHE_BYTES) -> None:
        self.vocabulary = vocabulary
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[GrammarSpec, Lead], Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0
        """What the entries take."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, spec: GrammarSpec, lead: Lead = Lead.NONE) -> Compiled:
        """Return the grammar of `spec`, compiled in the calling thread when it is not there.

        Raises RequestError for a source that is wrong, cannot be enforced, or is too much work.
        """
        key = (spec, lead)
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self._let_go()
                return found
        made = compile_grammar(spec, self.vocabulary, lead)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made
                self.size_bytes += made.size_bytes
            while self.size_bytes > self._max_bytes and len(self._entries) > 1:
                _, dropped = self._entries.popitem(last=False)
                self.size_bytes -= dropped.size_bytes
            self._let_go()
        return made

    def _let_go(self) -> None:
        """Let the matcher of the grammar go that is no longer among those used last."""
        for entry in islice(reversed(self._entries.values()), MAX_GROWN, MAX_GROWN + 1):
            entry.matcher = None


def compile_grammar(spec: GrammarSpec, vocabulary: Vocabulary, lead: Lead = Lead.NONE) -> Compiled:
    """Return the compiled grammar of `spec`; see `GrammarCache.get`."""
    budget = Budget(spec.field)
    builder = Builder(budget)
    try:
        symbols = (_root(spec, builder, vocabulary),)
    except RecursionError:  # patterns in terminals in terminals; each kind of source bounds its own depth
        raise RequestError(f"{spec.field} is nested too deeply", field=spec.field) from None
    if lead is Lead.SPACE:
        symbols = (builder.text(" "), *symbols)
    builder.grammar.start = builder.rule(symbols)
    table = Table(builder.grammar, budget)
    _check_shortest(table, spec.field)
    text = rendered(table)
    if len(text) > MAX_TEXT:
        raise RequestError(
            f"{spec.field} is too large to be enforced; use fewer alternatives", field=spec.field
        )
    matcher = _matcher(text, vocabulary)
    # What is too much for the very first mask is refused now, not closed at once later.
    trial = matcher.deep_copy()
    if not matcher.is_error():
        trial.compute_bitmask()
    if trial.is_error():
        reason = " ".join(trial.get_error().split())[:160]
        raise RequestError(f"{spec.field} is more than the grammar engine takes ({reason})", field=spec.field)
    size = (1 << 16) + 40 * len(text) + 200 * budget.spent
    is_ours = spec.kind is not GrammarKind.LARK
    return Compiled(table, text, vocabulary, matcher, size_bytes=size, is_ours=is_ours)


def _root(spec: GrammarSpec, builder: Builder, vocabulary: Vocabulary) -> Symbol:
    match spec.kind:
        case GrammarKind.JSON_SCHEMA:
            document = Document(spec.source, spec.field, builder.budget, strict=spec.strict)
            return SchemaRules(document, builder).value(("",))
        case GrammarKind.REGEX:
            return _regex_rule(spec, builder)
        case GrammarKind.CHOICE:
            options = cast(list[object], json.loads(spec.source))
            texts = [option for option in options if isinstance(option, str) and option]
            if not texts or len(texts) < len(options):
                raise RequestError(
                    f"{spec.field} must be a list of texts, none of them empty", field=spec.field
                )
            return builder.rule((builder.text(*texts),))
        case GrammarKind.LARK:
            return lark_rule(spec.source, builder, spec.field)
        case GrammarKind.TOOL_CALLS:
            return tool_rule(spec, builder, vocabulary)
        case GrammarKind.FREE:
            # Never begun: the follower forbids the trigger.
            return builder.rule((builder.text("-"),))


def _regex_rule(spec: GrammarSpec, builder: Builder) -> Symbol:
    node = unedged(parse_pattern(spec.source, spec.field))
    if node is None:
        raise RequestError(
            f"{spec.field} {quoted(spec.source)} has ^ or $ in its middle; the whole output matches anyway",
            field=spec.field,
        )
    automaton = machine(node, builder.budget)
    terminal = Pattern(automaton, f"/{spelled(node)}/", builder.budget)
    return builder.rule((terminal,), *([()] if 0 in automaton.final else []))


def _check_shortest(table: Table, field: str) -> None:
    """Refuse a language that is empty, and one whose shortest text is out of all proportion."""
    cost = table.costs[table.start]
    if cost >= UNREACHABLE:
        raise RequestError(
            f"{field} allows no output at all: its conditions exclude one another, or what they leave "
            "has more digits than bise writes",
            field=field,
        )
    if cost > MAX_SHORTEST:
        raise RequestError(
            f"{field} needs an output of at least {cost} bytes; at most {MAX_SHORTEST} are taken", field=field
        )


def _matcher(text: str, vocabulary: Vocabulary) -> LLMatcher:
    if text.count("\n") <= SHALLOW:
        return _compiled(text, vocabulary)
    made: Future[LLMatcher] = Future()

    def compile_deep() -> None:
        try:
            made.set_result(_compiled(text, vocabulary))
        except BaseException as error:
            made.set_exception(error)

    with _STACK_SIZE:
        before = threading.stack_size(DEEP_STACK)
        try:
            threading.Thread(target=compile_deep, name="bise-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return made.result()


def _compiled(text: str, vocabulary: Vocabulary) -> LLMatcher:
    import llguidance

    limits = llguidance.LLParserLimits(
        max_items_in_row=50_000,
        max_lexer_states=MAX_STATES,
        max_grammar_size=200_000,
        # Never what decides: states that are known already need no fuel, so it would count differently for an
        # output that follows others.
        step_lexer_fuel=20_000_000,
        verbose_errors=False,
    )
    return llguidance.LLMatcher(
        vocabulary.engine, llguidance.LLMatcher.grammar_from_lark(text), log_level=0, limits=limits
    )
