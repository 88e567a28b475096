"""The rules of JSON objects: named properties in the order of the schema, then others where they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bise.grammar.automaton import Machine, intersection, other_than
from bise.grammar.regex import ANY, Chars, Repeat, in_json, spelled
from bise.grammar.schema import Places
from bise.grammar.symbols import Symbol

if TYPE_CHECKING:
    from bise.grammar.schema_rules import SchemaRules

MAX_COUNTING = 20_000
"""Rules that counting properties may take."""

Members = Sequence[tuple[str, Mapping[str, object]]]


@dataclass(frozen=True, slots=True)
class _Shape:
    """An object, its conditions gathered."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    """Rule of each name's value."""
    required: frozenset[str]
    pair: int | None
    """Rule of one more name and value; None: no others."""
    low: int
    high: int | None
    """Counts of pairs, where they still matter; else 0 and None."""


class ObjectRules:
    """Makes the rules of objects for a `SchemaRules`."""

    def __init__(self, owner: SchemaRules) -> None:
        self._owner = owner

    def rules(self, case: Places) -> list[tuple[Symbol, ...]]:
        """Return the alternatives of the objects of a case."""
        owner = self._owner
        members = list(owner.document.members(case))
        required = list(
            dict.fromkeys(
                name for _, schema in members for name in cast(list[str], schema.get("required", []))
            )
        )
        listed = (
            name for _, schema in members for name in cast(dict[str, object], schema.get("properties", {}))
        )
        names = [name for name in dict.fromkeys([*listed, *required]) if self._may_be_named(members, name)]
        if not set(required) <= set(names):
            return []
        low, high = owner.judge.lengths(case, "Properties")
        pair = None if high is not None and high <= len(required) else self._pair(members, names)
        if low - len(names) > (1 if pair is not None else 0):
            if pair is None:
                return []
            owner.document.refuse(
                next(f"{pointer}/minProperties" for pointer, schema in members if "minProperties" in schema),
                "is more than the named properties and one; name them, because other names may repeat",
            )
        shape = _Shape(
            names=tuple(names),
            values=tuple(owner.value(self._places(members, name)) for name in names),
            required=frozenset(required),
            pair=pair,
            low=low if low > len(required) else 0,
            high=high if high is not None and (pair is not None or high < len(names)) else None,
        )
        start, end = owner.builder.text("{"), owner.builder.text("}")
        return [(start, self._chain(shape, case), end)]

    def _may_be_named(self, members: Members, name: str) -> bool:
        judge, document = self._owner.judge, self._owner.document
        return all(
            judge.admits((document.below(pointer, "propertyNames"),), name)
            for pointer, schema in members
            if "propertyNames" in schema
        )

    def _places(self, members: Members, name: str) -> Places:
        found = [
            place
            for pointer, schema in members
            for place in self._owner.judge.properties(schema, pointer, name)
        ]
        return tuple(dict.fromkeys(found))

    def _chain(self, shape: _Shape, case: Places) -> int:
        """Return the rule of the pairs: for each name, with it or (where it may be left out) without it."""
        owner, builder = self._owner, self._owner.builder
        cap = max(shape.low, shape.high or 0)
        if len(shape.names) * (cap + 1) > MAX_COUNTING:
            owner.document.refuse(case[0], "counts too many properties (minProperties, maxProperties)")
        counts = range(cap + 1) if cap else range(1)
        later: dict[tuple[bool, int], int] = {
            (is_first, count): self._others(shape, count, is_first=is_first)
            for is_first in (True, False)
            for count in counts
        }
        for name, value in zip(reversed(shape.names), reversed(shape.values), strict=True):
            here: dict[tuple[bool, int], int] = {}
            for (is_first, count), skip in later.items():
                made: list[tuple[Symbol, ...]] = [] if name in shape.required else [(skip,)]
                if shape.high is None or count < shape.high:
                    after = later[False, min(count + 1, cap)]
                    made.append((*owner.key(name, comma=not is_first), value, after))
                here[is_first, count] = builder.rule(*made)
            later = here
        return later[True, 0]

    def _others(self, shape: _Shape, count: int, *, is_first: bool) -> int:
        """Return the rule of what follows the named properties when `count` of them were written."""
        owner, builder = self._owner, self._owner.builder
        missing = max(0, shape.low - count)
        if shape.pair is None:
            return builder.rule() if missing else builder.rule(())
        most = None if shape.high is None else shape.high - count
        # One more name is new for sure, as it is none of the named; a second one may repeat it.
        if missing > 1 or (most is not None and most < missing):
            return builder.rule()
        if is_first:
            return owner.several(shape.pair, missing, most)
        more = builder.rule((owner.comma, shape.pair))
        return builder.rule(builder.repeated(more, missing, most))

    # Names that the schema does not list.

    def _pair(self, members: Members, names: Sequence[str]) -> int | None:
        """Return the rule of a pair with another name; None where there is none.

        An object that lists properties gets no others unless `additionalProperties` is there; one with
        `patternProperties` gets only names that match.
        """
        owner = self._owner
        patterns = self._pattern_names(members)
        if patterns:
            made = [
                (name, owner.colon, owner.value(self._pattern_places(members, source)))
                for source, name in self._keys(members, names, patterns)
            ]
            return owner.builder.rule(*made)
        is_said = any("additionalProperties" in schema for _, schema in members)
        if names and not is_said:
            return None
        places = tuple(
            dict.fromkeys(
                owner.document.below(pointer, "additionalProperties")
                for pointer, schema in members
                if "additionalProperties" in schema
            )
        )
        if any(not owner.document.cases((place,)) for place in places):
            return None
        name = self._key(members, names, [])
        return owner.builder.rule((name, owner.colon, owner.value(places)))

    def _pattern_names(self, members: Members) -> dict[str, str]:
        """Return the patterns of `patternProperties` with a place of each."""
        owner = self._owner
        found: dict[str, str] = {}
        for pointer, schema in members:
            for source in cast(dict[str, object], schema.get("patternProperties", {})):
                found.setdefault(source, owner.document.below(pointer, "patternProperties", source))
        return found

    def _pattern_places(self, members: Members, source: str) -> Places:
        below = self._owner.document.below
        found: list[str] = []
        for pointer, schema in members:
            if source in cast(dict[str, object], schema.get("patternProperties", {})):
                found.append(below(pointer, "patternProperties", source))
            elif "additionalProperties" in schema:
                found.append(below(pointer, "additionalProperties"))
        return tuple(dict.fromkeys(found))

    def _keys(
        self, members: Members, names: Sequence[str], patterns: Mapping[str, str]
    ) -> list[tuple[str, Symbol]]:
        """Return (pattern, terminal of the names that match it) for patterns that exclude one another."""
        owner, budget = self._owner, self._owner.document.budget
        machines = {source: owner.judge.pattern(source, place)[1] for source, place in patterns.items()}
        wide = {source: owner.judge.widely(source, place) for source, place in patterns.items()}
        for index, source in enumerate(patterns):
            for other in list(patterns)[:index]:
                pairs = ((machines[source], wide[other]), (wide[source], machines[other]))
                if not all(intersection(one, two, budget).is_empty() for one, two in pairs):
                    owner.document.refuse(
                        patterns[source],
                        "may match a name that another pattern matches too; make them exclude one another",
                    )
        return [(source, self._key(members, names, [source])) for source in patterns]

    def _key(self, members: Members, names: Sequence[str], sources: Sequence[str]) -> Symbol:
        """Return the terminal of a name that is none of `names`, as `sources` and `propertyNames` have it."""
        owner, budget = self._owner, self._owner.document.budget
        machines: list[Machine] = []
        spellings: list[str] = []
        for source in sources:
            node, automaton = owner.judge.pattern(source, "")
            machines.append(automaton)
            spellings.append(spelled(in_json(node)))
        for pointer, schema in members:
            if "propertyNames" in schema:
                automaton, inner = self._name_language(owner.document.below(pointer, "propertyNames"))
                machines.append(automaton)
                spellings += inner
        if names:
            machines.append(other_than(names, budget))
        if not machines:
            return owner.builder.json_string()
        source = machines[0]
        for other in machines[1:]:
            source = intersection(source, other, budget)
        if not spellings:
            spellings = [spelled(in_json(Repeat(Chars(ANY), 0, None)))]
        return owner.json_pattern(source, spellings, names)

    def _name_language(self, place: str) -> tuple[Machine, list[str]]:
        """Return the automaton and the spellings of the names that `propertyNames` allows."""
        owner = self._owner
        cases = owner.document.cases((place,))
        if len(cases) != 1:
            owner.document.refuse(place, "has alternatives; only string keywords and an enum are kept")
        return owner.name_language(cases[0], place)
