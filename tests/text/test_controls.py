"""Control strings in a rendered template: leftmost longest, in near linear time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bise.text.controls import ControlSplitter, ControlString

NAMES = ["<s>", "</s>", "<", "<<", "[INST]", "[INST", "<s><s>", "ab", "b>"]


def splitter(names: list[str], **flags: bool) -> ControlSplitter:
    return ControlSplitter([ControlString(text=name, token_id=n, **flags) for n, name in enumerate(names)])


@given(text=st.text("<s>/[INST]ab ", max_size=40), names=st.lists(st.sampled_from(NAMES), unique=True))
def test_equals_a_regular_expression_of_all_names(text, names):
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
    expected: list[str | int] = []
    end = 0
    for match in re.finditer(pattern, text):
        expected += [text[end : match.start()], names.index(match[0])]
        end = match.end()
    expected.append(text[end:])
    assert splitter(names).split(text) == [part for part in expected if part != ""]


def test_white_space_belongs_to_strings_that_eat_it():
    assert splitter(["<s>"], eats_left=True).split("a \n<s> b") == ["a", 0, " b"]
    assert splitter(["<s>"], eats_right=True).split("a <s> \n b") == ["a ", 0, "b"]


@pytest.mark.parametrize("unit", ["a", "<", "<SPECIAL_", " ", "[INST]"])
def test_time_is_near_linear_with_a_thousand_strings(unit, quickest):
    many = splitter(["<s>", "</s>", "[INST]", *[f"<SPECIAL_{n}>" for n in range(1000)]])

    small, large = (unit * (size // len(unit)) for size in (1 << 14, 1 << 17))
    bound = 24 * max(quickest(lambda: many.split(small), 0.0), 0.002)  # linear is 8, quadratic 64
    assert quickest(lambda: many.split(large), bound) < bound
