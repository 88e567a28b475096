"""A JSON Schema as a document: what stands where, what each keyword may say, which conditions hold together.

A place in the schema is a JSON pointer. A value is under a *conjunction* of places; following `$ref`, `allOf`
and one option of each `anyOf` and `oneOf` gives the *cases* of a conjunction: places whose own keywords all
hold. Whatever cannot be enforced is refused here, with its pointer, before any token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import NoReturn, cast
from urllib.parse import unquote

from bise.errors import ModelFileError, RequestError, quoted
from bise.grammar.automaton import Budget
from bise.grammar.keywords import KEYWORDS, Treatment
from bise.jsonfile import kind_of, parse_json

Places = tuple[str, ...]
"""A conjunction, or a case of one: JSON pointers, each once."""

MAX_DEPTH = 60
"""Levels of a schema's text."""
MAX_WAY = 100
"""Places that may lead to one another; more than levels, as $ref goes up again."""
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[467]/schema|draft/(2019-09|2020-12)/schema)#?")
_SCHEMAS = ("additionalProperties", "items", "additionalItems", "propertyNames")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "multipleOf")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_VALUES = ("enum", "const", "default", "examples", "example")
"""Keywords that hold values, in which nothing is a schema."""
_LATER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"draft-04/schema": ("prefixItems", "const", "propertyNames"), "draft/2020-12/schema": ()}
)
"""Per draft what is enforced and not in it; for those between it is `prefixItems`."""
_BESIDE_REF = ("$ref", "$schema", "$defs", "definitions", "$anchor")
"""Keywords beside `$ref` that set no conditions."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


class Document:
    """One schema, read with care."""

    def __init__(self, source: str, field: str, budget: Budget, *, strict: bool = False) -> None:
        """Read the JSON text `source`; errors call it `field`. RequestError when it is no schema."""
        self.field = field
        self.budget = budget
        self.strict = strict
        try:
            root = parse_json(source.encode(), field, max_depth=MAX_DEPTH, max_values=100_000)
        except ModelFileError as error:
            raise RequestError(str(error), field=field) from error
        self._places: dict[str, object] = {"": root}
        self._anchors: dict[str, str] = {}
        self._checked: set[str] = set()
        self._later: tuple[str, ...] = ()
        """Keywords that the draft of the schema, as it says, does not know yet."""
        self._is_oldest = False
        """It says that it is of draft 4, 6 or 7: no anchors, and nothing counts beside `$ref`."""
        self._cases: dict[Places, list[Places]] = {}
        if isinstance(root, dict):
            root = cast(dict[str, object], root)
            draft = root.get("$schema")
            known = _DRAFT.fullmatch(draft) if isinstance(draft, str) else None
            if known is not None:
                self._later = _LATER.get(known[1], ("prefixItems",))
                self._is_oldest = known[2] is None
            if draft is not None and known is None:
                self.refuse("/$schema", f"is {quoted(draft)}; known: drafts 4, 6, 7, 2019-09 and 2020-12")
        if not self._is_oldest:
            self._find_anchors(root, "")

    def refuse(self, pointer: str, reason: str) -> NoReturn:
        """Raise the RequestError of one place of the schema."""
        where = pointer or "the whole schema"
        raise RequestError(f"{self.field}: {quoted(where, 200)} {reason}", field=f"{self.field}#{pointer}")

    def refuse_circle(self, pointer: str) -> NoReturn:
        """Raise the RequestError of a place whose meaning is its own meaning."""
        self.refuse(pointer, "refers to itself with nothing in between")

    def check_depth(self, pointer: str, depth: int) -> None:
        """Refuse a place that `depth` others led to, if they are too many."""
        if depth > MAX_WAY:
            self.refuse(pointer, f"is reached through more than {MAX_WAY} other places; nest less")

    def schema(self, pointer: str) -> Mapping[str, object] | bool:
        """Return the schema at a place, its keywords checked the first time."""
        value = self._places.get(pointer)
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            self.refuse(pointer, f"must be a schema (an object, true or false), not {kind_of(value)}")
        found = cast(dict[str, object], value)
        if pointer not in self._checked:
            self.budget.spend(3 + len(found))
            self._checked.add(pointer)
            self._check(found, pointer)
        return found

    def members(self, case: Places) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield the places of a case with their keywords."""
        for pointer in case:
            schema = self.schema(pointer)
            assert not isinstance(schema, bool)
            yield pointer, schema

    def below(self, pointer: str, *keys: str | int) -> str:
        """Return the pointer of a part of what stands at `pointer`."""
        value = self._places[pointer]
        for key in keys:
            value = (
                cast(list[object], value)[key]
                if isinstance(key, int)
                else cast(dict[str, object], value)[key]
            )
            pointer += "/" + str(key).replace("~", "~0").replace("/", "~1")
            self._places[pointer] = value
        return pointer

    def add(self, name: str, schema: Mapping[str, object]) -> str:
        """Add a schema that the text does not hold and return its place."""
        place = f"\0{name}"
        self._places[place] = schema
        return place

    def beside(self, pointer: str, keyword: str) -> Places:
        """Return a place at which everything but `keyword` of the schema at `pointer` holds."""
        place = f"{pointer}/{keyword}/-"
        if place not in self._places:
            schema = cast(dict[str, object], self._places[pointer])
            rest = {key: value for key, value in schema.items() if key != keyword}
            self._places[place] = rest
            self._checked.add(place)
        return (place,)

    # What a conjunction means.

    def cases(self, places: Places) -> list[Places]:
        """Return the cases of a conjunction; none when a place is `false`."""
        found = self._cases.get(places)
        if found is None:
            found = list(self._expand({}, [(place, ()) for place in places], []))
            found = list(dict.fromkeys(found))
            self._cases[places] = found
        return found

    def _expand(
        self,
        seen: dict[str, None],
        left: list[tuple[str, tuple[str, ...]]],
        open_choices: list[tuple[Places, tuple[str, ...]]],
    ) -> Iterator[Places]:
        """Yield the cases below what is `seen` already; `left` holds places and how they were reached."""
        while left:
            pointer, way = left.pop(0)
            self.budget.spend(2)
            if pointer in way:
                self.refuse_circle(pointer)
            if pointer in seen:
                continue
            schema = self.schema(pointer)
            if schema is False:
                return
            if schema is True:
                continue
            seen[pointer] = None
            way = (*way, pointer)
            if "$ref" in schema:
                left.append((self.reference(pointer), way))
            for index in range(len(cast(list[object], schema.get("allOf", ())))):
                left.append((self.below(pointer, "allOf", index), way))
            for keyword in ("anyOf", "oneOf"):
                if keyword in schema:
                    count = len(cast(list[object], schema[keyword]))
                    options = tuple(self.below(pointer, keyword, index) for index in range(count))
                    open_choices.append((options, way))
        if not open_choices:
            yield tuple(seen)
            return
        options, way = open_choices[0]
        for option in options:
            self.budget.spend(len(seen))
            yield from self._expand(seen.copy(), [(option, way)], open_choices[1:])

    def reference(self, pointer: str) -> str:
        """Return the place that the `$ref` of a schema names."""
        schema = self.schema(pointer)
        assert not isinstance(schema, bool)
        return self._target(cast(str, schema["$ref"]), f"{pointer}/$ref")

    def _target(self, reference: str, pointer: str) -> str:
        if reference in ("", "#"):
            return ""
        if not reference.startswith("#"):
            self.refuse(pointer, f"is {quoted(reference)}; only places in this document (#/...) are read")
        name = unquote(reference[1:])
        if not name.startswith("/"):
            if name not in self._anchors:
                self.refuse(pointer, f"is {quoted(reference)}, and no $anchor has that name")
            return self._anchors[name]
        value, place = self._places[""], ""
        for raw in name[1:].split("/"):
            key: str | int = raw.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and raw.isdecimal() and int(raw) < len(cast(list[object], value)):
                key = int(raw)
                value = cast(list[object], value)[key]
            elif isinstance(value, dict) and key in value:
                value = cast(dict[str, object], value)[str(key)]
            else:
                self.refuse(pointer, f"is {quoted(reference)}, which is not there")
            place = self.below(place, key)
        return place

    def _find_anchors(self, value: object, pointer: str) -> None:
        left = [(value, pointer, False)]
        while left:
            value, pointer, is_map = left.pop()
            self.budget.spend(1)
            if isinstance(value, list):
                left += [(item, f"{pointer}/{n}", False) for n, item in enumerate(cast(list[object], value))]
            elif isinstance(value, dict):
                fields = cast(dict[str, object], value)
                name = None if is_map else fields.get("$anchor")
                if isinstance(name, str):
                    if name in self._anchors:
                        self.refuse(f"{pointer}/$anchor", f"is {quoted(name)}, as another place's is")
                    self._anchors[name] = pointer
                    self._places[pointer] = fields
                for key, item in fields.items():
                    if isinstance(item, dict | list) and (is_map or key not in _VALUES):
                        is_inner_map = not is_map and key in _MAPS
                        left.append((cast(object, item), f"{pointer}/{_escaped(key)}", is_inner_map))

    # What a keyword may say.

    def _check(self, schema: Mapping[str, object], pointer: str) -> None:
        for key, value in schema.items():
            place = f"{pointer}/{_escaped(key)}"
            treatment, remark = KEYWORDS.get(key, (None, ""))
            if treatment is None:
                if key.startswith("x-"):
                    continue
                self.refuse(place, "is no keyword that bise knows; names that begin with x- are read over")
            if treatment is Treatment.REFUSED:
                self.refuse(place, f"cannot be enforced{'; ' if remark else ''}{remark}")
            if key in ("$id", "id") and pointer and isinstance(value, str):
                self.refuse(place, "changes what $ref means; only the root may have one")
            if key in self._later:
                self.refuse(place, "is of a later draft than $schema names, in which it says nothing")
            is_beside = self._is_oldest and "$ref" in schema and key not in _BESIDE_REF
            if is_beside and treatment is Treatment.ENFORCED:
                self.refuse(place, "counts for nothing beside $ref in this draft; put both into allOf")
            self._check_form(key, value, place)
        if self.strict:
            self._check_strict(schema, pointer)

    def _check_form(self, key: str, value: object, place: str) -> None:
        """Refuse a keyword's value that has the wrong form."""
        if key in _COUNTS:
            good = _is_whole(value) and cast(float, value) >= 0
        elif key in _NUMBERS:
            good = _is_number(value) and (key != "multipleOf" or cast(float, value) > 0)
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            good = isinstance(value, bool) or _is_number(value)
        elif key in ("pattern", "format", "$ref", "$anchor"):
            good = isinstance(value, str)
        elif key == "uniqueItems":
            good = isinstance(value, bool)
        elif key in ("required", "enum"):
            good = isinstance(value, list) and (
                key == "enum" or all(isinstance(name, str) for name in cast(list[object], value))
            )
        elif key in _LISTS:
            good = isinstance(value, list) and bool(cast(list[object], value))
        elif key in _MAPS:
            good = isinstance(value, dict)
        elif key == "type":
            names = cast(list[object], value) if isinstance(value, list) else [value]
            good = bool(names) and all(isinstance(name, str) and name in TYPES for name in names)
        else:
            good = key not in _SCHEMAS or isinstance(value, dict | bool | list)
        if not good:
            self.refuse(place, f"cannot be {quoted(json.dumps(value), 60)}")

    def _check_strict(self, schema: Mapping[str, object], pointer: str) -> None:
        """Keep OpenAI's strict mode: objects list all properties as required and allow no others."""
        if pointer.startswith("\0"):  # ours, not the caller's
            return
        kinds = schema.get("type")
        is_object = kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
        if not pointer and kinds != "object":
            self.refuse("/type", 'must be "object" at the root of a strict schema')
        if not is_object and "properties" not in schema:
            return
        if schema.get("additionalProperties") is not False:
            self.refuse(f"{pointer}/additionalProperties", "must be false in a strict schema")
        properties = cast(dict[str, object], schema.get("properties", {}))
        required = cast(list[str], schema.get("required", []))
        missing = [name for name in properties if name not in required]
        if missing:
            self.refuse(f"{pointer}/required", f"must list {quoted(missing[0])} in a strict schema")


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return _is_number(value) and cast(float, value) == int(cast(float, value))


def decimal(value: object) -> Decimal:
    """Return a number of a JSON text exactly as it was written, as far as a double keeps it."""
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))
