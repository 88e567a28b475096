"""From the conditions on a JSON value to the rules of the texts that keep them.

JSON is written on one line, with at most one space after a comma or a colon, and with properties in the
order of the schema. A rule belongs to a conjunction of places, so that recursive schemas become recursive
rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from math import lcm
from typing import cast

from bise.grammar.automaton import Machine, intersection, machine
from bise.grammar.formats import INTEGER_FORMATS
from bise.grammar.numbers import (
    PRECISION,
    any_integer,
    any_number,
    integers_between,
    multiples,
    numbers_between,
)
from bise.grammar.object_rules import ObjectRules
from bise.grammar.regex import ANY, Alt, Chars, Regex, Repeat, in_json, spelled, text
from bise.grammar.schema import Document, Places
from bise.grammar.symbols import Builder, Pattern, Symbol, Terminal, lark_text
from bise.grammar.values import Judge, limited

MAX_FREE_DEPTH = 24
"""How deep a value may nest about which nothing is said."""
MAX_REMAINDERS = 1000
"""Greatest multipleOf without both bounds."""
MAX_COUNTED_REMAINDERS = 600
"""Rules that the digits of its multiples may take."""
MIN_MULTIPLE_DIGITS = 9
"""Digits that its multiples can have at least."""


class SchemaRules:
    """Makes the rules of one document."""

    def __init__(self, document: Document, builder: Builder) -> None:
        self.document = document
        self.builder = builder
        self.judge = Judge(document)
        self.comma = builder.text(",", ", ")
        self.colon = builder.text(":", ": ")
        self._values: dict[Places, int] = {}
        self._depth = 0
        """Rules that are being made, each for another."""
        self._anything: dict[int, int] = {}
        self._strings: dict[tuple[object, ...], Terminal] = {}
        """Terminals of strings by spellings and lengths, which say the language: equal fields share one."""
        self._told_apart: set[str] = set()
        """Places of `oneOf` whose options exclude one another."""
        self._objects = ObjectRules(self)

    def value(self, places: Places) -> int:
        """Return the rule of the values that are valid at all `places`."""
        if not places:
            return self.anything(0)
        found = self._values.get(places)
        if found is None:
            self.document.check_depth(places[-1], self._depth)
            found = self._values[places] = self.builder.rule()
            self._depth += 1
            for case in self.document.cases(places):
                self.builder.define(found, *self._case(case, places))
            self._depth -= 1
        return found

    def _case(self, case: Places, places: Places) -> list[tuple[Symbol, ...]]:
        self._refuse_overlaps(case)
        if not case:
            return [(self.anything(0),)]
        values = self.judge.listed(case)
        if values is not None:
            return self._listed(values)
        kinds = self.judge.types(case)
        made: list[tuple[Symbol, ...]] = []
        if "null" in kinds:
            made.append((self.builder.text("null"),))
        if "boolean" in kinds:
            made.append((self.builder.text("true", "false"),))
        if "number" in kinds or "integer" in kinds:
            made += self._number(case, whole="number" not in kinds)
        if "string" in kinds:
            made += self._string(case)
        if "array" in kinds:
            made += self._array(case)
        if "object" in kinds:
            made += self._objects.rules(case)
        return made

    def _refuse_overlaps(self, case: Places) -> None:
        """Refuse `oneOf` whose options a value may match twice; with the conditions beside it in view."""
        for pointer, schema in self.document.members(case):
            if "oneOf" not in schema or pointer in self._told_apart:
                continue
            self._told_apart.add(pointer)
            count = len(cast(list[object], schema["oneOf"]))
            options = [self.document.below(pointer, "oneOf", index) for index in range(count)]
            self._check_options(pointer, options)

    def _check_options(self, pointer: str, options: Sequence[str]) -> None:
        constants = [self.document.schema(option) for option in options]
        named = [one["const"] for one in constants if not isinstance(one, bool) and "const" in one]
        if len(named) == len(options) == len({one for one in named if isinstance(one, str)}):
            return
        # The places beside the choice count; the choice itself would ask the question again.
        beside = self.document.beside(pointer, "oneOf")
        for index, option in enumerate(options):
            for other in options[:index]:
                self.document.budget.spend(10)
                if self.judge.satisfiable((*beside, other, option)):
                    self.document.refuse(
                        f"{pointer}/oneOf",
                        f"has options {options.index(other)} and {index} that a value may match both; make "
                        "them exclude one another (a required property with different const), or use anyOf",
                    )

    # Values that are listed, and values about which nothing is said.

    def _listed(self, values: Sequence[object]) -> list[tuple[Symbol, ...]]:
        plain = [json_text(value) for value in values if not isinstance(value, dict | list)]
        made: list[tuple[Symbol, ...]] = [(self.builder.text(*plain),)] if plain else []
        nested = [value for value in values if _is_nested(value)]
        return made + [self._literal(value) for value in nested]

    def _literal(self, value: object) -> tuple[Symbol, ...]:
        """Return the symbols of one value, spaced as all JSON here."""
        word = self.builder.text
        if isinstance(value, list):
            inner: list[Symbol] = []
            for index, item in enumerate(cast(list[object], value)):
                inner += [*([self.comma] if index else []), *self._literal(item)]
            return (word("["), *inner, word("]"))
        if isinstance(value, dict):
            inner = []
            for index, (name, item) in enumerate(cast(dict[str, object], value).items()):
                inner += [*self.key(name, comma=index > 0), *self._literal(item)]
            return (word("{"), *inner, word("}"))
        return (word(json_text(value)),)

    def key(self, name: str, *, comma: bool) -> tuple[Symbol, ...]:
        """Return the symbols of a property's name and its colon, with or without a comma before it.

        Each is one token of JSON, as all terminals here: text is cut greedily, and one that went on past a
        token's end would leave what else may follow no chance.
        """
        lead = (self.comma,) if comma else ()
        return (*lead, self.builder.text(json_text(name)), self.colon)

    def anything(self, depth: int) -> int:
        """Return the rule of all JSON values that nest at most `MAX_FREE_DEPTH - depth` deep."""
        found = self._anything.get(depth)
        if found is not None:
            return found
        word = self.builder.text
        found = self._anything[depth] = self.builder.rule(
            (word("null"),),
            (word("true", "false"),),
            (self.builder.expression("number", any_number()),),
            (self.builder.json_string(),),
        )
        if depth < MAX_FREE_DEPTH:
            inner = self.anything(depth + 1)
            pair = self.builder.rule((self.builder.json_string(), self.colon, inner))
            self.builder.define(found, (word("["), self.several(inner, 0, None), word("]")))
            self.builder.define(found, (word("{"), self.several(pair, 0, None), word("}")))
        return found

    def several(self, item: Symbol, low: int, high: int | None) -> int:
        """Return the rule of `low` to `high` items with commas between them."""
        if high is not None and (high < low or high <= 0):
            return self.builder.rule(()) if low <= 0 else self.builder.rule()
        more = self.builder.rule((self.comma, item))
        rest = self.builder.repeated(more, max(0, low - 1), None if high is None else high - 1)
        return self.builder.rule(*([()] if low <= 0 else []), (item, *rest))

    # Numbers.

    def _number(self, case: Places, *, whole: bool) -> list[tuple[Symbol, ...]]:
        low, high, above, below = self.judge.number_bounds(case)
        step: int | None = None
        for pointer, schema in self.document.members(case):
            limits = self.judge.number_format(schema, pointer)
            if limits is not None:
                low = Decimal(limits[0]) if low is None else max(low, Decimal(limits[0]))
                high = Decimal(limits[1]) if high is None else min(high, Decimal(limits[1]))
            if "multipleOf" in schema:
                factor = self.judge.factor(schema, pointer)
                step = factor if step is None else lcm(step, factor)
        if whole or step is not None:
            return self._integer(case, _ceiling(low, above), _floor(high, below), step or 1)
        if low is None and high is None:
            return [(self.builder.expression("number", any_number()),)]
        key = f"number {low} {high} {above} {below}"
        return [(self.builder.expression(key, numbers_between(low, high, above=above, below=below)),)]

    def _integer(
        self, case: Places, low: int | None, high: int | None, step: int
    ) -> list[tuple[Symbol, ...]]:
        if low is not None and high is not None and low > high:
            return []
        if step == 1:
            if low is None and high is None:
                return [(self.builder.expression("integer", any_integer()),)]
            return [(self.builder.expression(f"integer {low} {high}", integers_between(low, high)),)]
        values = multiples(step, low, high)
        if values is not None:
            return [(self.builder.text(*map(str, values)),)] if values else []
        states = self._remainders(step) if step <= MAX_REMAINDERS else []
        length = min(PRECISION, MAX_COUNTED_REMAINDERS // len(states)) if states else 0
        if high is not None or length < MIN_MULTIPLE_DIGITS or (low is not None and not -step < low <= step):
            self.document.refuse(
                f"{self._place_of(case, 'multipleOf')}",
                "is kept for small and round numbers without a maximum and with no minimum or one near 0, "
                "and where minimum and maximum leave at most 4,096 values",
            )
        positive = self._multiples(states, length)
        made: list[tuple[Symbol, ...]] = [(positive,)]
        if low is None or low <= 0:
            made.append((self.builder.text("0"),))
        if low is None:
            made.append((self.builder.text("-"), positive))
        return made

    def _remainders(self, step: int) -> list[tuple[int, ...]]:
        """Return for each remainder that matters, 0 first, where each digit leads from it.

        Remainders that the same digits bring to 0 are one: 1,000 has 4 that matter, 997 has 997.
        """
        self.document.budget.spend(10 * step)
        kinds = [int(remainder > 0) for remainder in range(step)]
        while True:
            ways = [
                (kinds[one], *(kinds[(one * 10 + digit) % step] for digit in range(10)))
                for one in range(step)
            ]
            numbers = {way: number for number, way in enumerate(dict.fromkeys(ways))}
            if len(numbers) == max(kinds) + 1:
                return [way[1:] for way in numbers]
            kinds = [numbers[way] for way in ways]

    def _multiples(self, states: Sequence[tuple[int, ...]], length: int) -> int:
        """Return the rule of the positive multiples of up to `length` digits: a rule per remainder and
        number of digits that may follow.
        """
        word = self.builder.text
        rules: dict[int, int] = {0: self.builder.rule(())}
        for left in range(1, length + 1):
            following, rules = rules, {}
            for state, targets in enumerate(states):
                digits = range(1 if left == length else 0, 10)
                made = [(word(str(d)), following[targets[d]]) for d in digits if targets[d] in following]
                if left == length:
                    if state == 0:
                        return self.builder.rule(*made)
                    continue
                ends: list[tuple[Symbol, ...]] = [] if state else [()]
                if made or ends:
                    rules[state] = self.builder.rule(*ends, *made)
        raise AssertionError("a number has at least one digit")

    def _place_of(self, case: Places, keyword: str) -> str:
        return next(f"{pointer}/{keyword}" for pointer, one in self.document.members(case) if keyword in one)

    # Strings.

    def _string(self, case: Places) -> list[tuple[Symbol, ...]]:
        low, high = self.judge.lengths(case, "Length")
        if high is not None and high < low:
            return []
        kept = self.string_language(case)
        if high is not None and high >= 1 << 32:
            self.document.refuse(self._place_of(case, "maxLength"), "is more than any output; leave it out")
        if kept is None:
            return [(self.builder.json_string(low, high),)]
        source, spellings, pointer = kept
        key = (*spellings, low, high)
        if key not in self._strings:
            if low or high is not None:
                source, low, high = limited(source, low, high, self.document, pointer)
            if low or high is not None:
                spellings = [*spellings, spelled(in_json(Repeat(Chars(ANY), low, high)))]
            self._strings[key] = self.json_pattern(source, spellings)
        return [(self._strings[key],)]

    def string_language(self, case: Places) -> tuple[Machine, list[str], str] | None:
        """Return the automaton, the spellings inside of quotes, and a place, of what patterns and formats
        leave; None where there are none.
        """
        _, most = self.judge.lengths(case, "Length")
        machines: list[Machine] = []
        spellings: list[str] = []
        place = ""
        for pointer, schema in self.document.members(case):
            found: list[tuple[Regex, Machine]] = []
            if "pattern" in schema:
                place = f"{pointer}/pattern"
                found.append(self.judge.pattern(cast(str, schema["pattern"]), place))
            if "format" in schema and schema["format"] not in INTEGER_FORMATS:
                place = f"{pointer}/format"
                found.append(self.judge.string_format(schema, pointer, most))
            for node, automaton in found:
                machines.append(automaton)
                spellings.append(spelled(in_json(node)))
        if not machines:
            return None
        source = machines[0]
        for other in machines[1:]:
            source = intersection(source, other, self.document.budget)
        return source, spellings, place

    def json_pattern(
        self, source: Machine, spellings: Sequence[str], excluded: Sequence[str] = ()
    ) -> Terminal:
        """Return the terminal of the JSON strings in all languages of `spellings` but the `excluded` ones;
        `source` is the automaton of that.
        """
        spelling = " & ".join(f'/"{inner}"/' for inner in spellings)
        if excluded:
            spelling += f" & ~({'|'.join(lark_text(json_text(name)) for name in excluded)})"
        self.builder.budget.spend(len(spelling) // 8)
        return Pattern(source, spelling, self.builder.budget, in_json=True)

    def name_language(self, case: Places, place: str) -> tuple[Machine, list[str]]:
        """Return the automaton and the spellings of the strings of a case of `propertyNames`."""
        values = self.judge.listed(case)
        if values is not None:
            node: Regex = Alt(tuple(text(value) for value in values if isinstance(value, str)))
            return machine(node, self.document.budget), [spelled(in_json(node))]
        if "string" not in self.judge.types(case):
            return machine(Alt(()), self.document.budget), []
        low, high = self.judge.lengths(case, "Length")
        kept = self.string_language(case)
        source, spellings, _ = kept or (machine(Repeat(Chars(ANY), 0, None), self.document.budget), [], place)
        if low or high is not None:
            source, low, high = limited(source, low, high, self.document, place)
        if low or high is not None:
            spellings = [*spellings, spelled(in_json(Repeat(Chars(ANY), low, high)))]
        return source, spellings

    # Arrays.

    def _array(self, case: Places) -> list[tuple[Symbol, ...]]:
        low, high = self.judge.lengths(case, "Items")
        members = list(self.document.members(case))
        prefix = max(_prefix_length(schema) for _, schema in members)
        rest = self._item(members, prefix)
        closed = any(not self.document.cases((place,)) for place in rest)
        if closed:
            high = prefix if high is None else min(high, prefix)
        unique = [pointer for pointer, schema in members if schema.get("uniqueItems")]
        if unique and (high is None or high > 1):
            return self._unique(unique[0], prefix, rest, low, high)
        if high is not None and high < low:
            return []
        start, end = self.builder.text("["), self.builder.text("]")
        if prefix == 0:
            item = self.builder.rule() if high == 0 else self.value(rest)
            return [(start, self.several(item, low, high), end)]
        return [(start, self._tuple(members, prefix, rest, low, high), end)]

    def _item(self, members: Sequence[tuple[str, Mapping[str, object]]], index: int) -> Places:
        places = [self.judge.item(schema, pointer, index) for pointer, schema in members]
        return tuple(dict.fromkeys(place for place in places if place is not None))

    def _tuple(
        self,
        members: Sequence[tuple[str, Mapping[str, object]]],
        prefix: int,
        rest: Places,
        low: int,
        high: int | None,
    ) -> int:
        """Return the rule of an array whose first `prefix` items have schemas of their own."""
        count = prefix if high is None else min(prefix, high)
        if high is not None and high <= prefix:
            tail: tuple[Symbol, ...] = ()
        else:
            more = self.builder.rule((self.comma, self.value(rest)))
            most = None if high is None else high - prefix
            tail = self.builder.repeated(more, max(0, low - prefix), most)
        for index in range(count - 1, -1, -1):
            item: tuple[Symbol, ...] = (self.value(self._item(members, index)), *tail)
            item = (self.comma, *item) if index else item
            tail = (self.builder.rule(*([()] if index >= low else []), item),)
        return self.builder.rule(tail)

    def _unique(
        self, pointer: str, prefix: int, rest: Places, low: int, high: int | None
    ) -> list[tuple[Symbol, ...]]:
        """Return the arrays of different values of an `enum`, in any order up to 6 and else in its order."""
        values: list[object] = []
        for case in self.document.cases(rest) if rest and not prefix else ():
            values += self.judge.listed(case) or [None, None]
        texts = [json_text(value) for value in values]
        if (
            not texts
            or len(set(texts)) < len(texts)
            or any(isinstance(v, dict | list | float) for v in values)
        ):
            self.document.refuse(
                f"{pointer}/uniqueItems",
                "is kept where items come from an enum of scalars; write one, or leave it out",
            )
        high = len(texts) if high is None else min(high, len(texts))
        chosen = self._permutations if len(texts) <= 6 else self._selections
        return [(self.builder.text("["), chosen(texts, low, high), self.builder.text("]"))]

    def _permutations(self, texts: Sequence[str], low: int, high: int) -> int:
        rules: dict[int, int] = {}

        def after(used: int) -> int:
            count = used.bit_count()
            if used not in rules:
                rules[used] = self.builder.rule(*([()] if count >= low else []))
                for index, one in enumerate(texts if count < high else ()):
                    if not used >> index & 1:
                        lead = (self.comma,) if used else ()
                        self.builder.define(
                            rules[used], (*lead, self.builder.text(one), after(used | 1 << index))
                        )
            return rules[used]

        return after(0)

    def _selections(self, texts: Sequence[str], low: int, high: int) -> int:
        rules: dict[tuple[int, int], int] = {}
        # From the last text back, so that no Python call is as deep as the list is long.
        for index in range(len(texts), -1, -1):
            for count in range(min(index, high), -1, -1):
                made: list[tuple[Symbol, ...]] = []
                if index == len(texts):
                    made = [()] if count >= low else []
                else:
                    made.append((rules[index + 1, count],))
                    if count < high:
                        lead = (self.comma,) if count else ()
                        made.append((*lead, self.builder.text(texts[index]), rules[index + 1, count + 1]))
                rules[index, count] = self.builder.rule(*made)
        return rules[0, 0]


def json_text(value: object) -> str:
    """Return the one spelling of a JSON value that outputs use for names and scalars."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _prefix_length(schema: Mapping[str, object]) -> int:
    listed = schema.get("prefixItems", schema.get("items"))
    return len(cast(list[object], listed)) if isinstance(listed, list) else 0


def _ceiling(bound: Decimal | None, strict: bool) -> int | None:
    if bound is None:
        return None
    whole = int(bound.to_integral_value(ROUND_CEILING))
    return whole + 1 if strict and whole == bound else whole


def _floor(bound: Decimal | None, strict: bool) -> int | None:
    if bound is None:
        return None
    whole = int(bound.to_integral_value(ROUND_FLOOR))
    return whole - 1 if strict and whole == bound else whole
