import pytest

from bise.errors import ConfigError
from bise.store.rules import Guard, Rule, rules_from_json


def test_the_first_rule_that_a_text_breaks_is_named_at_its_stage():
    guard = Guard([Rule(name="a", pattern="x", stage="input"), Rule(name="b", pattern="y")])
    assert guard.broken_rule(["nothing", "yx"], "input") == "a"
    assert guard.broken_rule(["yx"], "output") == "b"
    assert guard.broken_rule(["x"], "output") is None
    assert guard.watches_output
    assert not Guard([Rule(name="a", pattern="x", stage="input")]).watches_output


def test_matching_takes_time_linear_in_the_text_whatever_the_pattern(quickest):
    guard = Guard([Rule(name="redos", pattern=r"(a|a|aa)+$"), Rule(name="also", pattern=r"(.*a){12}b")])

    def match(length):
        text = "a" * length + "!"
        return lambda: guard.broken_rule([text], "input")

    assert match(1000)() is None
    # 4 times if linear, 16 if quadratic (which is hours); the larger text may not fit a processor's cache.
    bound = 8 * max(quickest(match(1_000_000), 0.0), 0.02)
    assert quickest(match(4_000_000), bound) < bound


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(", "missing"), (r"(?=x)", "invalid"), (r"(a)\1", "invalid"), (r"((a{100}){100}){100}", "too"),
     ("", "1 to"), ("x" * 1001, "1 to")],
)  # fmt: skip
def test_a_pattern_that_cannot_be_matched_in_linear_time_and_memory_is_refused(pattern, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        Rule(name="r", pattern=pattern)
    assert caught.value.field == "rules"


@pytest.mark.parametrize(
    "value",
    [None, {}, ["x"], [{"name": "a"}], [{"name": "a", "pattern": "x", "stage": "later"}],
     [{"name": "a", "pattern": 5}], [{"name": "a", "pattern": "x", "extra": "y"}],
     [{"name": "a", "pattern": "x"}] * 65, [{"name": "a\nb", "pattern": "x"}]],
)  # fmt: skip
def test_rules_of_the_wrong_form_are_refused(value):
    with pytest.raises(ConfigError):
        rules_from_json(value)


def test_unicode_is_matched_as_characters():
    assert Guard([Rule(name="r", pattern="^.é$")]).broken_rule(["ñé"], "input") == "r"
