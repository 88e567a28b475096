"""What cannot be kept is refused with its place; what is hostile is refused or stays within its budget."""

import contextlib
import gc
import json
import re
import time
from pathlib import Path

import pytest

from bise.errors import RequestError
from bise.grammar.compiler import GrammarCache, compile_grammar
from bise.grammar.keywords import KEYWORDS, Treatment
from bise.grammar.spec import GrammarSpec

ROOT = Path(__file__).resolve().parents[2]


def refusal(vocabulary, schema, **options) -> RequestError:
    with pytest.raises(RequestError) as refused:
        compile_grammar(GrammarSpec.json_schema(schema, field="s", **options), vocabulary)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    "keyword", [name for name, (what, _) in KEYWORDS.items() if what is Treatment.REFUSED]
)
def test_each_refused_keyword_is_refused_with_a_pointer_to_it(vocabulary, keyword):
    schema = {"type": "object", "properties": {"a": {keyword: {}}}}
    assert refusal(vocabulary, schema).field == f"s#/properties/a/{keyword}"


@pytest.mark.parametrize(
    "keyword", [name for name, (what, _) in KEYWORDS.items() if what is Treatment.ANNOTATION]
)
def test_each_annotation_is_read_over(vocabulary, keyword):
    compile_grammar(GrammarSpec.json_schema({"type": "null", keyword: "x"}), vocabulary)


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"maxLenght": 3}, "/maxLenght"),
        ({"$ref": "https://example.org/schema"}, "/$ref"),
        ({"$ref": "#/$defs/absent"}, "/$ref"),
        ({"$ref": "#nowhere"}, "/$ref"),
        ({"$schema": "https://example.org/dialect"}, "/$schema"),
        ({"properties": {"a": {"$id": "b"}}, "type": "object"}, "/properties/a/$id"),
        ({"type": "number", "multipleOf": 0.01}, "/multipleOf"),
        ({"type": "string", "format": "regex"}, "/format"),
        ({"type": "number", "format": "decimal"}, "/format"),
        ({"type": "string", "pattern": "(?=a)b"}, "/pattern"),
        ({"type": "string", "pattern": r"(a)\1"}, "/pattern"),
        ({"type": "string", "pattern": r"\bword\b"}, "/pattern"),
        ({"type": "string", "pattern": "a$b"}, "/pattern"),
        ({"type": "array", "uniqueItems": True}, "/uniqueItems"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 2}, "/uniqueItems"),
        ({"type": "object", "additionalProperties": True, "minProperties": 2}, "/minProperties"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "required": ["a"]}]}, "/oneOf"),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "/patternProperties/b$"),
        (  # Python's readers count such names in, ECMAScript's do not, or the other way round
            {
                "type": "object",
                "properties": {"\u2028": {}},
                "patternProperties": {"\\W": {"type": "integer"}},
            },
            "/patternProperties/\\W",
        ),
        (
            {"type": "object", "properties": {"é": {}}, "patternProperties": {"^\\w": {"type": "integer"}}},
            "/patternProperties/^\\w",
        ),
        (
            {"type": "object", "patternProperties": {"^é": {"type": "null"}, "^\\w": {"type": "integer"}}},
            "/patternProperties/^\\w",
        ),
        ({"oneOf": [{"enum": ["é"]}, {"type": "string", "pattern": "^\\w$"}]}, "/oneOf"),
        ({"oneOf": [{"const": "2024-02-29"}, {"type": "string", "format": "date"}]}, "/oneOf"),
        ({"type": "banana"}, "/type"),
        ({"minLength": -1}, "/minLength"),
        ({"minimum": "3"}, "/minimum"),
        ({"required": "a"}, "/required"),
        ({"anyOf": []}, "/anyOf"),
        ({"items": 3, "type": "array"}, "/items"),
        ({"enum": ["(", "a"], "format": "regex"}, "/format"),
        ({"type": ["number", "null"], "format": "decimal"}, "/format"),
        ({"enum": [0.3, 0.2], "multipleOf": 0.1}, "/multipleOf"),
        ({"type": "integer", "multipleOf": 997}, "/multipleOf"),
        ({"type": "string", "maxLength": 1 << 32}, "/maxLength"),
        ({"$defs": {"a": {"$anchor": "n"}}, "$anchor": "n"}, "/$defs/a/$anchor"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}], "items": {}},
            "/prefixItems",
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "oneOf": [{"const": 1}, {"type": "integer"}],
            },
            "/oneOf/0/const",
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "items": {"$ref": "#/x-a", "minimum": 3},
                "x-a": {},
            },
            "/items/minimum",
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-06/schema#",
                "$ref": "#a",
                "definitions": {"a": {"$anchor": "a"}},
            },
            "/$ref",
        ),
    ],
)
def test_the_place_is_named(vocabulary, schema, pointer):
    assert refusal(vocabulary, schema).field == f"s#{pointer}"


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "array", "items": {}}, "/type"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "/additionalProperties"),
        (
            {"type": "object", "properties": {"a": {}}, "required": [], "additionalProperties": False},
            "/required",
        ),
    ],
)
def test_strict_schemas_are_closed_and_require_everything(vocabulary, schema, pointer):
    assert refusal(vocabulary, schema, strict=True).field == f"s#{pointer}"
    compile_grammar(GrammarSpec.json_schema(schema), vocabulary)


def test_the_documentation_lists_every_keyword_as_it_is_treated():
    rows = re.findall(
        r"^\| `([^`]+)` \| (\w+) \|", (ROOT / "docs" / "structured.md").read_text(), re.MULTILINE
    )
    listed = {name: what for name, what in rows if what in list(Treatment)}
    assert listed == {name: what.value for name, (what, _) in KEYWORDS.items()} | {"x-...": "annotation"}


@pytest.mark.parametrize(
    "schema",
    [
        {"format": "hostname", "minLength": 254},
        {"format": "hostname", "pattern": "^..--"},
        {"format": "hostname", "pattern": "[^.]{64}"},
        {"format": "email", "minLength": 255},
        {"format": "email", "pattern": "^[^@]{65}"},
        {"format": "email", "pattern": "@..--"},
    ],
)
def test_names_of_hosts_and_mailboxes_are_no_longer_and_no_odder_than_their_rfcs_allow(vocabulary, schema):
    assert "allows no output" in str(refusal(vocabulary, {"type": "string", **schema}))


def test_bounds_that_leave_only_numbers_too_long_to_write_are_refused_as_that(vocabulary):
    schema = {"type": "number", "minimum": 1e-300, "maximum": 2e-300}
    assert "more digits than bise writes" in str(refusal(vocabulary, schema))


HOSTILE = {
    "no_end": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "ref_to_itself": {"$ref": "#"},
    "value_against_a_ref_to_itself": {
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, True]}},
        "properties": {"x": {"$ref": "#/$defs/a"}},
        "enum": [{"x": 1}],
    },
    "long_way": {
        "$defs": {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(3000)} | {"a3000": True},
        "$ref": "#/$defs/a0",
    },
    "value_a_long_way_from_its_schema": {
        "$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(3000)} | {"a3000": True},
        "items": {"$ref": "#/$defs/a0"},
        "enum": [[1]],
    },
    "refs_in_a_ring": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "long_enum": {"enum": [f"value {n}" for n in range(60_000)]},
    "wide_one_of": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": n}, "v": {}}, "required": ["k"]}
            for n in range(500)
        ]
    },
    "product_of_choices": {
        "allOf": [{"anyOf": [{"minimum": i}, {"maximum": j}]} for i in range(5) for j in range(5)]
    },
    "many_repeats": {"type": "string", "pattern": "a{1000000000}"},
    "nested_repeats": {"type": "string", "pattern": "((a{100}){100}){100}"},
    "nested_counts": {"type": "string", "pattern": "^((a{0,20}){0,20}){0,40}$"},
    "wide_repeats": {"type": "string", "pattern": "^[^a]{0,15000}$"},
    "long_string": {"type": "string", "minLength": 1_000_000_000},
    "long_array": {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000},
    "product_of_patterns": {
        "type": "string",
        "minLength": 100,
        "maxLength": 1000,
        "allOf": [{"pattern": "a.{3}b"}, {"pattern": "c.{3}d"}, {"pattern": "[^x]{5}y"}],
    },
    "tail_patterns": {
        "type": "string",
        "allOf": [{"pattern": f"^(.*{chr(97 + i)}.{{{i + 5}}})$"} for i in range(12)],
    },
    "values_against_a_pattern": {"enum": [f"{'x' * 900}{n}" for n in range(900)], "pattern": "x.{600}5$"},
    "many_required": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string"} for n in range(5000)},
        "required": [f"p{n}" for n in range(5000)],
    },
    "permutations": {"type": "array", "items": {"enum": list(range(300))}, "uniqueItems": True},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_within_a_second_and_64_mib(vocabulary, name, quickest):
    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    gc.freeze()  # as a server does: what other tests left is not looked through at this one's cost
    try:
        before = memory("VmRSS")
        took = quickest(lambda: refusal(vocabulary, HOSTILE[name]), 1.0)
        most = memory("VmHWM") - before
    finally:
        gc.unfreeze()
    assert took < 1.0
    assert most < 64 << 20


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(x+x+)+y"},
        {"type": "string", "maxLength": 1_000_000_000},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 1_000_000_000},
        {"type": "integer", "minimum": -(10**30), "maximum": 10**39},
        {"anyOf": [{"const": n} for n in range(500)]},
    ],
)
def test_what_only_looks_hostile_is_kept(outputs, schema):
    made = outputs(GrammarSpec.json_schema(schema))
    for text in made.some(3, room=20):
        json.loads(text)


def test_depth_beyond_the_limit_is_refused(vocabulary):
    spec = GrammarSpec.json_schema_text('{"items":' * 5000 + "true" + "}" * 5000)
    with pytest.raises(RequestError, match="nested"):
        compile_grammar(spec, vocabulary)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("start: x", "not defined"),
        ('start: "a', "cannot be read"),
        ('a: "b"', "no rule named start"),
        ('%import common.NUMBER\nstart: "a"', "line 1: %import is not supported"),
        ("start: A\nA: B\nB: A", "contains itself"),
        ("start: " + "(" * 100 + '"a"' + ")" * 100, "nests"),
        ("start: start", "allows no output"),
        ('start: "a"~9999999', "at least"),
        ("start: /(?<=a)b/", "look-around"),
        ('start: "a"..b\nb: "c"', "line 1: a range needs"),
        ('start: "a".."\\q"', "line 1: .* escape"),
        ("start: A0\n" + "".join(f"A{n}: A{n + 1}\n" for n in range(50)) + 'A50: "x"', "A0 leads to A4"),
        (
            f"start: {' '.join(f'A{n}' for n in range(39, -1, -1))}\n"
            + "".join(f'A{n}: {"(" * 35}A{n + 1} "y"{")?" * 35}\n' for n in range(39))
            + 'A39: "x"',
            "nested too deeply",
        ),
    ],
)
def test_bad_grammars_are_refused_with_their_line_or_reason(vocabulary, source, what):
    with pytest.raises(RequestError, match=what):
        compile_grammar(GrammarSpec.lark(source), vocabulary)


@pytest.mark.parametrize(
    "source",
    [
        "start: [a-z" + "-" * 100_000,
        "start: " + "[-" * 50_000,
        "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(4000)) + 'r4000: | "x"',
    ],
)
def test_hostile_grammars_are_read_within_a_second(vocabulary, source, quickest):
    def read():
        with contextlib.suppress(RequestError):
            compile_grammar(GrammarSpec.lark(source), vocabulary)

    gc.freeze()  # as above; deep grammars are compiled in a thread of their own, so all threads count
    try:
        assert quickest(read, 1.0, time.process_time) < 1.0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec.lark("start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(6000)) + 'r6000: "[]"'),
        GrammarSpec.json_schema({"type": "array", "prefixItems": [{"type": "null"}] * 4000}),
    ],
)
def test_rules_thousands_deep_do_not_end_the_process(outputs, spec):
    made = outputs(spec)
    assert made.one(made.shortest) == "[]"


def test_the_cache_stays_within_its_size_and_drops_the_least_recently_used(vocabulary):
    cache = GrammarCache(vocabulary, max_bytes=1 << 20)
    first = GrammarSpec.choice(["keep"])
    kept = cache.get(first)
    for number in range(40):
        cache.get(GrammarSpec.choice([f"n{number}"]))
        assert cache.get(first) is kept
        assert cache.size_bytes <= 1 << 20
    assert len(cache) < 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_schemas_leave_the_memory_flat_once_the_cache_is_full(vocabulary):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    cache = GrammarCache(vocabulary, max_bytes=32 << 20)
    full = 0
    for number in range(10_000):
        schema = {
            "type": "object",
            "properties": {f"p{number}": {"type": "string", "maxLength": number % 50}},
        }
        cache.get(GrammarSpec.json_schema(schema))
        if number == 2000:
            full = resident()
    assert resident() - full < 16 << 20
