"""Which values a schema admits: for `enum` and `const` beside other keywords, and for `oneOf`.

Knows the same keywords with the same meaning as the grammar that outputs are held to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import inf, nextafter
from typing import TypeAlias, cast

from bise.errors import quoted
from bise.grammar.automaton import Machine, intersection, machine, of_length, span
from bise.grammar.formats import INTEGER_FORMATS, STRING_FORMATS, format_expression
from bise.grammar.pattern import parse_pattern
from bise.grammar.regex import Regex, anchored
from bise.grammar.schema import TYPES, Document, Places, decimal

Bounds: TypeAlias = tuple[Decimal | None, Decimal | None, bool, bool]
"""(lowest, highest, lowest left out, highest left out)."""

MAX_COUNTED = 2000
"""Lengths beside a pattern at most, where the pattern does not imply them."""


class Judge:
    """Answers questions about the values under the places of one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._patterns: dict[str, tuple[Regex, Machine]] = {}
        self._asked: list[tuple[str, int]] = []
        """Which value is being judged by which place, from the outermost question in."""
        self._is_generous = False
        """Say of strings what any reader may find valid, not what each does."""
        self._keys: dict[str, frozenset[object]] = {}

    def pattern(self, source: str, place: str) -> tuple[Regex, Machine]:
        """Return the expression of a pattern, anchored, and its automaton."""
        found = self._patterns.get(source)
        if found is None:
            whole = anchored(parse_pattern(source, f"{self._document.field}#{place}"))
            if whole is None:
                self._document.refuse(place, "has ^ or $ in its middle, which cannot be enforced")
            found = self._patterns[source] = (whole, machine(whole, self._document.budget))
        return found

    def widely(self, source: str, place: str) -> Machine:
        """Return the automaton of what a pattern matches to any reader: classes differ between ECMAScript and
        Python, and where a match brings conditions or must not be, too few are as wrong as too many.
        """
        key = f"\0wide {source}"
        found = self._patterns.get(key)
        if found is None:
            field = f"{self._document.field}#{place}"
            whole = anchored(parse_pattern(source, field, is_wide=True), is_wide=True)
            narrow = self.pattern(source, place)
            assert whole is not None, "the narrow one has its edges in the same places"
            same = whole == narrow[0]
            found = self._patterns[key] = narrow if same else (whole, machine(whole, self._document.budget))
        return found[1]

    def string_format(
        self, schema: Mapping[str, object], pointer: str, most: int | None = None
    ) -> tuple[Regex, Machine]:
        """Return the expression of the format that a place says of strings, and its automaton; of a format
        without a longest text that part whose texts have `most` characters, where it has one.
        """
        name = cast(str, schema["format"])
        if name not in STRING_FORMATS:
            known = ", ".join(sorted(STRING_FORMATS))
            self._document.refuse(f"{pointer}/format", f"{quoted(name)} is not enforced; known: {known}")
        key = f"\0{name} {most}"
        found = self._patterns.get(key)
        if found is None:
            whole = format_expression(name, most)
            found = self._patterns[key] = (whole, machine(whole, self._document.budget))
        return found

    def types(self, case: Places) -> set[str]:
        """Return the types that a value of a case may have; `integer` only where `number` is not."""
        kinds: set[str] = set(TYPES)
        for _, schema in self._document.members(case):
            if "type" in schema:
                said = schema["type"]
                names = set(cast(list[str], said) if isinstance(said, list) else [cast(str, said)])
                if "number" in names:
                    names.add("integer")
                kinds &= names
        if "number" in kinds:
            kinds.discard("integer")
        return kinds

    def listed(self, case: Places) -> list[object] | None:
        """Return the values that `enum` and `const` leave, and that all else admits; None without either."""
        for _, schema in self._document.members(case):
            if "const" in schema or "enum" in schema:
                values = [schema["const"]] if "const" in schema else cast(list[object], schema["enum"])
                self._document.budget.spend(len(values) * len(case))
                # What $ref, allOf, anyOf and oneOf lead to is in the case itself.
                return [value for value in values if all(self._admits_alone(place, value) for place in case)]
        return None

    def admits(self, places: Sequence[str], value: object) -> bool:
        """Say whether a value is valid at all `places`."""
        return all(self._admits(place, value) for place in places)

    def _admits(self, pointer: str, value: object) -> bool:
        schema = self._document.schema(pointer)
        if isinstance(schema, bool):
            return schema
        question = (pointer, id(value))
        if question in self._asked:
            self._document.refuse_circle(pointer)
        self._document.check_depth(pointer, len(self._asked))
        self._asked.append(question)
        try:
            return self._admits_alone(pointer, value) and self._admits_parts(schema, pointer, value)
        finally:
            self._asked.pop()

    def _admits_alone(self, pointer: str, value: object) -> bool:
        """Judge by the keywords of one place that hold no other places for the same value."""
        document = self._document
        document.budget.spend(1)
        schema = document.schema(pointer)
        if isinstance(schema, bool):
            return schema
        if ("const" in schema or "enum" in schema) and key_of(value) not in self._constants(schema, pointer):
            return False
        if not _has_type(schema, value):
            return False
        if isinstance(value, str):
            return self._admits_string(schema, pointer, value)
        if isinstance(value, list):
            return self._admits_array(schema, pointer, cast(list[object], value))
        if isinstance(value, dict):
            return self._admits_object((pointer,), cast(dict[str, object], value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._admits_number(schema, pointer, value)
        return True

    def _constants(self, schema: Mapping[str, object], pointer: str) -> frozenset[object]:
        """Return the keys of the values that `const` and `enum` of one place both allow."""
        found = self._keys.get(pointer)
        if found is None:
            lists = [cast(list[object], schema["enum"])] if "enum" in schema else []
            lists += [[schema["const"]]] if "const" in schema else []
            self._document.budget.spend(sum(map(len, lists)))
            found = frozenset(map(key_of, lists[0]))
            for values in lists[1:]:
                found &= frozenset(map(key_of, values))
            self._keys[pointer] = found
        return found

    def _admits_parts(self, schema: Mapping[str, object], pointer: str, value: object) -> bool:
        """Judge by `$ref`, `allOf`, `anyOf` and `oneOf`."""
        below = self._document.below
        if "$ref" in schema and not self._admits(self._document.reference(pointer), value):
            return False
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword not in schema:
                continue
            count = len(cast(list[object], schema[keyword]))
            hits = sum(self._admits(below(pointer, keyword, index), value) for index in range(count))
            if not {"allOf": hits == count, "anyOf": hits > 0, "oneOf": hits >= 1}[keyword]:
                return False
            if keyword == "oneOf" and self._count_rivals(pointer, count, value) > 1:
                return False
        return True

    def _count_rivals(self, pointer: str, count: int, value: object) -> int:
        """Return how many options of a `oneOf` may match a value: those that do to every reader where the
        question is what may be valid, those that do to any where it is what surely is.
        """
        self._is_generous = not self._is_generous
        try:
            places = [self._document.below(pointer, "oneOf", index) for index in range(count)]
            return sum(self._admits(place, value) for place in places)
        finally:
            self._is_generous = not self._is_generous

    def _admits_string(self, schema: Mapping[str, object], pointer: str, value: str) -> bool:
        if (
            not cast(int, schema.get("minLength", 0))
            <= len(value)
            <= cast(int, schema.get("maxLength", len(value)))
        ):
            return False
        if "pattern" in schema:
            source, place = cast(str, schema["pattern"]), f"{pointer}/pattern"
            automaton = self.widely(source, place) if self._is_generous else self.pattern(source, place)[1]
            if not automaton.matches(value, self._document.budget):
                return False
        if "format" not in schema or schema["format"] in INTEGER_FORMATS:
            return True
        automaton = self.string_format(schema, pointer)[1]
        return self._is_generous or automaton.matches(value, self._document.budget)

    def _admits_number(self, schema: Mapping[str, object], pointer: str, value: int | float) -> bool:
        number = decimal(value)
        low, high, above, below = bounds(schema)
        if low is not None and (number <= low if above else number < low):
            return False
        if high is not None and (number >= high if below else number > high):
            return False
        limits = self.number_format(schema, pointer)
        if limits is not None and not limits[0] <= number <= limits[1]:
            return False
        if "multipleOf" not in schema:
            return True
        factor = self.factor(schema, pointer)
        # As written and as a double keeps it: readers differ, and do so from 2^53 on only.
        return number == int(number) and int(number) % factor == int(value) % factor == 0

    def number_format(self, schema: Mapping[str, object], pointer: str) -> tuple[int, int] | None:
        """Return the bounds that the format of a place sets to numbers; those of strings say nothing."""
        name = schema.get("format")
        if isinstance(name, str) and name not in STRING_FORMATS and name not in INTEGER_FORMATS:
            self._document.refuse(f"{pointer}/format", f"{quoted(name)} is no format of numbers here")
        return INTEGER_FORMATS.get(cast(str, name))

    def factor(self, schema: Mapping[str, object], pointer: str) -> int:
        """Return the `multipleOf` of a place."""
        factor = decimal(schema["multipleOf"])
        if factor != factor.to_integral_value():
            self._document.refuse(
                f"{pointer}/multipleOf",
                "must be a whole number: floating point cannot tell the multiples of a fraction",
            )
        return int(factor)

    def _admits_array(self, schema: Mapping[str, object], pointer: str, value: list[object]) -> bool:
        if (
            not cast(int, schema.get("minItems", 0))
            <= len(value)
            <= cast(int, schema.get("maxItems", len(value)))
        ):
            return False
        if schema.get("uniqueItems") and len(set(map(key_of, value))) < len(value):
            return False
        for index, item in enumerate(value):
            place = self.item(schema, pointer, index)
            if place is not None and not self._admits(place, item):
                return False
        return True

    def item(self, schema: Mapping[str, object], pointer: str, index: int) -> str | None:
        """Return the place of the item number `index` of an array; None where nothing is said."""
        items = schema.get("items")
        listed = "prefixItems" if "prefixItems" in schema else "items" if isinstance(items, list) else None
        if listed is not None and index < len(cast(list[object], schema[listed])):
            return self._document.below(pointer, listed, index)
        rest = "additionalItems" if listed == "items" else "items"
        return self._document.below(pointer, rest) if rest in schema else None

    def _admits_object(self, plain: Places, value: dict[str, object]) -> bool:
        for pointer, schema in self._document.members(plain):
            if not set(cast(list[str], schema.get("required", []))) <= set(value):
                return False
            low, high = schema.get("minProperties", 0), schema.get("maxProperties", len(value))
            if not cast(int, low) <= len(value) <= cast(int, high):
                return False
            for name, item in value.items():
                if "propertyNames" in schema:
                    place = self._document.below(pointer, "propertyNames")
                    if not self._admits(place, name):
                        return False
                if not self.admits(self.properties(schema, pointer, name), item):
                    return False
        return True

    def properties(self, schema: Mapping[str, object], pointer: str, name: str) -> list[str]:
        """Return the places that hold for the property `name` of an object at one place."""
        below = self._document.below
        found: list[str] = []
        if name in cast(dict[str, object], schema.get("properties", {})):
            found.append(below(pointer, "properties", name))
        for source in cast(dict[str, object], schema.get("patternProperties", {})):
            place = below(pointer, "patternProperties", source)
            is_match = self.pattern(source, place)[1].matches(name, self._document.budget)
            if is_match != self.widely(source, place).matches(name, self._document.budget):
                self._document.refuse(place, f"matches {quoted(name)} to some readers and not to others")
            if is_match:
                found.append(place)
        if not found and "additionalProperties" in schema:
            found.append(below(pointer, "additionalProperties"))
        return found

    # Whether anything is valid at all, for oneOf.

    def satisfiable(self, places: Places, depth: int = 0) -> bool:
        """Say False only where no value is valid at all `places`, to any reader."""
        before, self._is_generous = self._is_generous, True
        try:
            cases = self._document.cases(places)
            return depth > 6 or any(self._case_satisfiable(case, depth) for case in cases)
        finally:
            self._is_generous = before

    def _case_satisfiable(self, case: Places, depth: int) -> bool:
        self._document.budget.spend(10)
        values = self.listed(case)
        if values is not None:
            return bool(values)
        kinds = self.types(case)
        if kinds == {"object"}:
            return self._object_satisfiable(case, depth)
        if kinds in ({"number"}, {"integer"}):
            low, high, above, below = self.number_bounds(case)
            return low is None or high is None or (low < high if above or below else low <= high)
        if kinds == {"string"}:
            return self.lengths(case, "Length")[0] <= (self.lengths(case, "Length")[1] or 1 << 60)
        return bool(kinds)

    def _object_satisfiable(self, case: Places, depth: int) -> bool:
        members = list(self._document.members(case))
        required = {name for _, schema in members for name in cast(list[str], schema.get("required", []))}
        for name in sorted(required):
            places = [
                place for pointer, schema in members for place in self.properties(schema, pointer, name)
            ]
            if not self.satisfiable(tuple(dict.fromkeys(places)), depth + 1):
                return False
        return True

    def number_bounds(self, case: Places) -> Bounds:
        """Return (lowest, highest, lowest left out, highest left out) of the numbers of a case."""
        low, high, above, below = None, None, False, False
        for _, schema in self._document.members(case):
            first, last, is_above, is_below = bounds(schema)
            if first is not None and (low is None or (first, is_above) > (low, above)):
                low, above = first, is_above
            if last is not None and (
                high is None or (last.copy_negate(), is_below) > (high.copy_negate(), below)
            ):
                high, below = last, is_below
        return low, high, above, below

    def lengths(self, case: Places, what: str) -> tuple[int, int | None]:
        """Return the least and the greatest `what`: Length, Items or Properties."""
        low, high = 0, None
        for _, schema in self._document.members(case):
            low = max(low, int(cast(float, schema.get(f"min{what}", 0))))
            if f"max{what}" in schema:
                most = int(cast(float, schema[f"max{what}"]))
                high = most if high is None else min(high, most)
        return low, high


def limited(
    source: Machine, low: int, high: int | None, document: Document, place: str
) -> tuple[Machine, int, int | None]:
    """Return the texts of `source` that have `low` to `high` characters, and those bounds that `source` alone
    does not keep: 0 and None where it keeps both.
    """
    shortest, longest = span(source, document.budget)
    low = low if low > shortest else 0
    high = None if high is None or (longest is not None and longest <= high) else high
    if not low and high is None:
        return source, 0, None
    if low > MAX_COUNTED or (high or 0) > MAX_COUNTED:
        document.refuse(
            place, f"and a pattern or format together are kept up to {MAX_COUNTED} characters only"
        )
    return intersection(source, of_length(low, high, document.budget), document.budget), low, high


def bounds(schema: Mapping[str, object]) -> Bounds:
    """Return the bounds that one place sets; draft 4's boolean exclusive bounds are read too."""
    low, high, above, below = None, None, False, False
    if "minimum" in schema:
        low, above = _least(schema["minimum"], strict=schema.get("exclusiveMinimum") is True)
    if "maximum" in schema:
        high, below = _most(schema["maximum"], strict=schema.get("exclusiveMaximum") is True)
    strict = schema.get("exclusiveMinimum")
    if strict is not None and not isinstance(strict, bool):
        least = _least(strict, strict=True)
        if low is None or least >= (low, above):
            low, above = least
    strict = schema.get("exclusiveMaximum")
    if strict is not None and not isinstance(strict, bool):
        most, is_out = _most(strict, strict=True)
        if high is None or (most.copy_negate(), is_out) >= (high.copy_negate(), below):
            high, below = most, is_out
    return low, high, above, below


def _least(bound: object, *, strict: bool) -> tuple[Decimal, bool]:
    """Return a lower bound such that no reader finds a number across it, and whether it is left out itself.

    Where doubles lie more than 1 apart, 1e23 is not 10^23 to a reader with integers of any length, and the
    integers next to it are 1e23 to one that has doubles.
    """
    written = decimal(bound)
    if not isinstance(bound, float) or abs(bound) < 1 << 53:
        return written, strict
    following = nextafter(bound, inf)
    if strict and following < inf:
        return max(written, Decimal(following)), False
    return max(written, Decimal(bound)), strict


def _most(bound: object, *, strict: bool) -> tuple[Decimal, bool]:
    """Return the same of an upper bound."""
    least, is_out = _least(-cast(float, bound), strict=strict)
    return least.copy_negate(), is_out  # what - does is round


def key_of(value: object) -> object:
    """Return what two JSON values share exactly when they are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, list):
        return ("array", *map(key_of, cast(list[object], value)))
    if isinstance(value, dict):
        members = cast(dict[str, object], value).items()
        return ("object", frozenset((name, key_of(item)) for name, item in members))
    return (isinstance(value, bool), value)


def _has_type(schema: Mapping[str, object], value: object) -> bool:
    said = schema.get("type")
    if said is None:
        return True
    return not _types_of(value).isdisjoint(
        cast(list[str], said) if isinstance(said, list) else [cast(str, said)]
    )


def _types_of(value: object) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}
