"""JSON Schemas: whatever a clueless model writes under them validates, at every limit; jsonschema judges."""

import json

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bise.errors import RequestError
from bise.grammar.automaton import Budget, machine, span
from bise.grammar.formats import format_expression
from bise.grammar.spec import GrammarSpec

OBJECTS = {
    "plain": {"type": "object"},
    "named": {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 2, "maxLength": 5},
            "b": {"type": "number", "minimum": 0.1, "maximum": 0.35},
            "c": {"enum": ["x", 1, None, [1, {"q": 2}]]},
        },
        "required": ["a", "c"],
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "names": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "propertyNames": {"pattern": "^[a-c]{1,3}$"},
        "minProperties": 1,
    },
    "name_list": {"type": "object", "propertyNames": {"enum": ["p", "q"]}, "minProperties": 1},
    "others": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
    },
    "patterns": {
        "type": "object",
        "patternProperties": {"^x": {"type": "integer"}, "^y": {"type": "null"}},
        "properties": {"xa": {"type": "integer", "minimum": 5}},
    },
    "counted": {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
    "counted_down": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "maxProperties": 1,
    },
    "others_after_optional": {
        "type": "object",
        "properties": {"": {"type": "null"}, "c d": True},
        "required": [""],
        "additionalProperties": True,
    },
    "forbidden_name": {"type": "object", "properties": {"a": False, "b": {"type": "null"}}},
    "required_unnamed": {"type": "object", "required": ["z"], "additionalProperties": {"type": "null"}},
    "name_of_del_and_others": {
        "type": "object",
        "properties": {"\x7f": {"type": "null"}},
        "additionalProperties": {"type": "null"},
    },
    "quoted_name": {
        "type": "object",
        "properties": {'a"\\\n\u0001': {"const": 1}},
        "required": ['a"\\\n\u0001'],
    },
}
ARRAYS = {
    "bounded": {
        "type": "array",
        "items": {"type": "integer", "minimum": -5, "exclusiveMaximum": 100},
        "minItems": 2,
    },
    "counted": {"type": "array", "items": {"type": "null"}, "minItems": 10, "maxItems": 21},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": {"type": "null"},
        "minItems": 1,
        "maxItems": 5,
    },
    "closed_tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": False,
    },
    "unique": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 2},
    "unique_many": {
        "type": "array",
        "items": {"enum": [f"v{n}" for n in range(12)]},
        "uniqueItems": True,
        "minItems": 3,
        "maxItems": 5,
    },
    "empty": {"type": "array", "maxItems": 0},
}
STRINGS = {
    "pattern": {"type": "string", "pattern": '^a[^"]{2,4}é"$'},
    "found": {"type": "string", "pattern": "b+c", "maxLength": 6},
    "both": {"allOf": [{"type": "string", "pattern": "^[a-f]+$"}, {"pattern": "[d-z]$", "minLength": 3}]},
    "edges": {"type": "string", "pattern": "^ab|c$|^x$", "maxLength": 4},
    "controls": {"type": "string", "pattern": "^[\\x00-\\x1f]{1,3}$"},
    "implied": {"type": "string", "pattern": "^[ab]{2,4}$", "minLength": 1, "maxLength": 100_000},
    "link": {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
    **{
        name: {"type": "string", "format": name}
        for name in (
            "date",
            "time",
            "date-time",
            "duration",
            "email",
            "hostname",
            "ipv4",
            "ipv6",
            "uuid",
            "uri",
        )
    },
}
NUMBERS = {
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "positive": {"type": "number", "exclusiveMinimum": 0},
    "negative": {"type": "number", "maximum": -2.5},
    "narrow": {"type": "number", "minimum": 1.25, "exclusiveMaximum": 1.5},
    "sevens": {"type": "integer", "multipleOf": 7},
    "beyond_doubles": {"type": "integer", "minimum": 9e22, "maximum": 1e23},
    "just_beyond_doubles": {"type": "number", "exclusiveMinimum": 1e300},
    "beyond_what_decimals_round": {
        "allOf": [{"type": "integer", "minimum": 10**38}, {"maximum": 10**38 + 3}, {"maximum": 10**38 + 2}]
    },
    "multiples_of_huge_values": {"enum": [1e300, 3], "multipleOf": 3},
    "fives": {"type": "integer", "multipleOf": 5, "minimum": 0},
    "sixties": {"type": "integer", "multipleOf": 60, "minimum": -100, "maximum": 1000},
    "fours_and_sixes": {
        "allOf": [{"type": "number", "multipleOf": 4}, {"multipleOf": 6, "maximum": 50, "minimum": 0}]
    },
    "draft4": {"type": "integer", "minimum": 3, "exclusiveMinimum": 3, "maximum": 5},
    "int32": {"type": "integer", "format": "int32"},
}
WHOLES = {
    "anything": True,
    "typeless": {"minimum": 3, "minLength": 2, "maxItems": 1, "required": ["a"]},
    "types": {"type": ["integer", "null", "string"], "maxLength": 3},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
        "$ref": "#/$defs/node",
    },
    "tree": {"$anchor": "t", "type": "array", "items": {"$ref": "#t"}, "maxItems": 2},
    "tagged": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"k": {"const": "a"}, "x": {"type": "integer"}},
                "required": ["k", "x"],
            },
            {
                "type": "object",
                "properties": {"k": {"const": "b"}, "y": {"type": "string"}},
                "required": ["k", "y"],
            },
        ]
    },
    "one_type": {
        "oneOf": [{"type": "string"}, {"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 2}]
    },
    "long_or_any": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"b": {"type": "string", "minLength": 40}},
                "required": ["b"],
                "additionalProperties": False,
            },
            {"type": "object", "additionalProperties": {"type": "integer"}},
            {"enum": [{"b": [1, 2, 3, 4, 5, 6, 7, 8, 9]}, [1, [2, 3]]]},
            {"type": "array", "items": {"type": "integer"}},
        ]
    },
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    "filtered": {
        "enum": [1, 2.5, "a", "abc", None, [1], {"k": 1}],
        "type": ["number", "string"],
        "maxLength": 2,
    },
    "constant": {"const": {"a": [1, "x"]}},
    "values_that_only_some_readers_match": {
        "enum": [{"k": "é"}, {"k": "b"}, {"k": "-"}],
        "properties": {"k": {"oneOf": [{"pattern": "^\\w$"}, {"enum": ["é", "-"]}]}},
    },
    "odd_characters": {"const": "".join(map(chr, (0, 9, 31, 34, 92, 127, 128, 0x2028, 0xFFFF, 0x10FFFF)))},
    "beside_ref": {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 990, "maximum": 1010},
    "annotated": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/x",
        "title": "t",
        "description": "d",
        "default": 3,
        "examples": [1],
        "deprecated": True,
        "x-order": 1,
        "$comment": "c",
        "type": "boolean",
    },
}
SCHEMAS = {
    f"{group}_{name}": schema
    for group, schemas in (
        ("object", OBJECTS),
        ("array", ARRAYS),
        ("string", STRINGS),
        ("number", NUMBERS),
        ("", WHOLES),
    )
    for name, schema in schemas.items()
}


def judged(schema, text: str) -> object:
    value = json.loads(text)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    return value


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_output_validates_at_the_shortest_limit_and_above(outputs, name):
    made = outputs(GrammarSpec.json_schema(SCHEMAS[name]))
    for text in made.some(4, room=12):
        judged(SCHEMAS[name], text)


@pytest.mark.parametrize(
    "name", ["object_named", "_recursive", "string_uuid", "array_counted", "number_sevens"]
)
def test_every_limit_from_the_shortest_up_gives_a_whole_output(outputs, name):
    made = outputs(GrammarSpec.json_schema(SCHEMAS[name]))
    for limit in range(made.shortest, made.shortest + 8):
        judged(SCHEMAS[name], made.one(limit))


@pytest.mark.parametrize("step", [7, 60, 66, 1000])
def test_multiples_without_bounds_have_no_more_digits_than_doubles_keep(outputs, step):
    made = outputs(GrammarSpec.json_schema({"type": "number", "multipleOf": step}))
    values = [int(made.one(60)) for _ in range(30)]
    assert all(value % step == 0 and abs(value) < 10**15 for value in values)
    assert max(map(abs, values)) > 10**8, "long ones are possible"


def plain_schemas():
    """Return schemas of every enforced kind, nested; some of them allow nothing."""
    counts = st.integers(0, 6)
    leaves = st.one_of(
        st.just(True),
        st.sampled_from([{"type": kind} for kind in ("null", "boolean", "integer", "number", "string")]),
        st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": b}, counts, counts),
        st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": b}, st.integers(), st.integers()),
        st.builds(
            lambda a, b: {"type": "number", "minimum": a, "exclusiveMaximum": b},
            st.floats(-1e6, 1e6),
            st.floats(-1e6, 1e6),
        ),
        st.builds(
            lambda values: {"enum": values},
            st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none())),
        ),
        st.sampled_from(["^[a-z]+$", "x?y", "^.{2,3}$", "[^ab]$"]).map(
            lambda p: {"type": "string", "pattern": p}
        ),
    )
    names = st.sampled_from(["a", "b", "c d", 'q"', ""])

    def nested(inner):
        objects = st.builds(
            lambda properties, required, others: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": others,
            },
            st.dictionaries(names, inner, max_size=3),
            st.lists(names, unique=True, max_size=3),
            st.one_of(st.booleans(), inner),
        )
        arrays = st.builds(
            lambda items, low, high: {"type": "array", "items": items, "minItems": low, "maxItems": high},
            inner,
            st.integers(0, 3),
            st.integers(0, 5),
        )
        unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
        meets = st.lists(inner, min_size=2, max_size=2).map(lambda parts: {"allOf": parts})
        return st.one_of(objects, arrays, unions, meets)

    return st.recursive(leaves, nested, max_leaves=6)


def check_schema(outputs, schema, seed):
    try:
        made = outputs(GrammarSpec.json_schema(schema), seed)
    except RequestError as error:
        if "allows no output" not in str(error):
            raise
        return
    for text in made.some(3, room=10):
        judged(schema, text)


@pytest.mark.parametrize("most", [130, 551, 552, 2083, 10**6])
def test_links_of_a_limited_length_have_no_more_characters_than_that(most):
    budget = Budget("uri")
    shortest, longest = span(machine(format_expression("uri", most), budget), budget)
    assert shortest == 6
    assert min(most, 2048) - 5 < longest <= most


def test_twenty_fields_of_one_format_cost_little_more_than_one(outputs):
    fields = {f"link {n}": {"type": "string", "format": "uri", "maxLength": 2083} for n in range(20)}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    made = outputs(GrammarSpec.json_schema(schema, strict=False))
    assert made.compiled.size_bytes < 16 << 20
    judged(schema, made.one(made.shortest + 20))


@given(schema=plain_schemas(), seed=st.integers(0, 1 << 16))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_generated_schemas_are_kept_or_allow_nothing(outputs, schema, seed):
    check_schema(outputs, schema, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(schema=plain_schemas(), seed=st.integers(0, 1 << 16))
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_generated_schemas_are_kept_or_allow_nothing(outputs, schema, seed):
    check_schema(outputs, schema, seed)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (OBJECTS["named"], {"a": "xyz", "b": 0.3, "c": [1, {"q": 2}]}),
        (OBJECTS["others"], {"a": 1, "zz": True}),
        (OBJECTS["others_after_optional"], {"": None, "other": 1}),
        (OBJECTS["patterns"], {"xa": 7, "xb": 1, "yz": None}),
        (ARRAYS["unique"], ["c", "a"]),
        (ARRAYS["counted"], [None] * 17),
        (NUMBERS["sevens"], -7777777),
        (STRINGS["date-time"], "2026-11-21T23:59:59.5+02:00"),
        (STRINGS["uri"], "https://example.org:80/a/b?c=d%20#e"),
        (WHOLES["recursive"], {"value": 1, "next": {"value": 2, "next": None}}),
        (WHOLES["anything"], {"a": [1, -2.5e3, 'x\n"\\', {"b": {}}], "c": None}),
        ({"type": "string", "maxLength": 3}, "日本é"),
    ],
)
def test_outputs_that_a_good_model_would_write_are_possible(accepts, schema, value):
    spec = GrammarSpec.json_schema(schema)
    judged(schema, json.dumps(value))
    assert accepts(spec, json.dumps(value, ensure_ascii=False)), "with the spaces of json.dumps"
    assert accepts(spec, json.dumps(value, ensure_ascii=False, separators=(",", ":"))), "compact"


@pytest.mark.parametrize("text", ['{ "a": 1}', '{"a" :1}', '{"a":  1}', '{"a":\n1}', ' {"a":1}', '{"a":1} '])
def test_there_is_one_space_at_most_and_only_after_a_comma_or_a_colon(accepts, text):
    assert not accepts(GrammarSpec.json_object(), text)


def test_a_json_object_is_an_object(outputs):
    assert all(isinstance(json.loads(text), dict) for text in outputs(GrammarSpec.json_object()).some())
