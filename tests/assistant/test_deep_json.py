"""Deep JSON is read as Python's own parser reads what it can, wherever a text is cut or at fault."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.assistant.deep_json import MAX_DEPTH, TooDeepError, deep_value

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def plain(text):
    """Return what Python's parser makes of a text: the value and its end, or where the fault is."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None


def deep(text):
    try:
        return deep_value(text, 0)
    except json.JSONDecodeError:
        return None


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(0, 200), st.sampled_from(["", ",", "]", "}", ":", '"', " ", "1", "[", "\n"]))
def test_any_text_is_read_or_refused_as_pythons_parser_does(value, place, sign):
    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        at = place % (len(text) + 1)
        for given_text in (text, text[:at], text[:at] + sign + text[at:], text[:at] + sign + text[at + 1 :]):
            assert deep(given_text) == plain(given_text)


def test_a_text_that_is_cut_is_at_fault_at_its_end():
    text = json.dumps([{"a": [1, "b", {"c": None}]}], indent=1)
    for at in range(1, len(text)):
        with pytest.raises(json.JSONDecodeError) as caught:
            deep_value(text[:at], 0)
        assert caught.value.pos >= at - 16 or caught.value.msg.startswith("Unterminated string")


def test_there_is_an_end_to_what_lies_within_each_other():
    depth = MAX_DEPTH - 1
    value, end = deep_value("[" * depth + "7" + "]" * depth, 0)
    for _ in range(depth):
        (value,) = value
    assert (value, end) == (7, 2 * depth + 1)
    with pytest.raises(TooDeepError):
        deep_value('[{"a":' * MAX_DEPTH, 0)
