"""Followers: taking back, copying and checking ahead leave the state that they should; Lark and patterns."""

import re

import pytest

from bise.grammar.spec import GrammarSpec

NESTED = GrammarSpec.json_schema(
    {"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "string"}}}
)


def walk(made, count):
    follower, tokens = made.follower(), []
    while len(tokens) < count and not follower.must_end:
        allowed = [token for token in follower.allowed(500).tolist() if token > 5]
        tokens.append(follower.take(made.random.choice(allowed), 500))
    return follower, tokens


@pytest.mark.parametrize("seed", range(5))
def test_tokens_taken_back_leave_the_state_before_them(outputs, seed):
    made = outputs(NESTED, seed)
    follower, tokens = walk(made, 25)
    for back in (1, 3, len(tokens) - 4):
        follower.rollback(back)
        tokens = tokens[: len(tokens) - back]
        fresh = made.follower()
        assert [fresh.take(token, 500) for token in tokens] == tokens
        assert follower.allowed(500).tolist() == fresh.allowed(500).tolist()
        assert follower.shortest() == fresh.shortest()


def test_a_copy_goes_its_own_way(outputs):
    made = outputs(NESTED)
    follower, _ = walk(made, 6)
    before, copied = follower.allowed(500).tolist(), follower.copy()
    copied.take(next(token for token in before if token > 5), 500)
    assert follower.allowed(500).tolist() == before


def test_checking_ahead_counts_what_could_come_and_changes_nothing(outputs):
    made = outputs(NESTED)
    _, tokens = walk(made, 12)
    follower = made.follower()
    before = follower.allowed(500).tolist()
    assert follower.validate(tokens) == len(tokens)
    assert follower.validate([*tokens[:5], 3, *tokens[5:]]) == 5
    assert follower.allowed(500).tolist() == before


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ('start: "a"+ "b" ~ 2..3 (C | "x"i)?\nC: /[0-9]{2,4}/', r"a+b{2,3}([0-9]{2,4}|[xX])?"),
        ('root ::= "yes" | "no" item{2,}\nitem ::= [a-c] "\\n"?', r"yes|no([a-c]\n?){2,}"),
        ('start: WORD ("," WORD)*\nWORD: LETTER+ // words\nLETTER: "a".."f" | "é"\n', r"[a-fé]+(,[a-fé]+)*"),
        ('start: NUM (OP NUM)*\nOP: "+" | "-"\nNUM: /[0-9]+/\n%ignore " "', r" ?[0-9]+ ?([+-] ?[0-9]+ ?)*"),
        ("start: A B\nA: /[a-z]*/\nB: /[0-9]+/", r"[a-z]*[0-9]+"),
    ],
)
def test_outputs_of_lark_grammars_are_in_their_language(outputs, source, pattern):
    for text in outputs(GrammarSpec.lark(source)).some(6, room=12):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-[a-z]+", "(a|b)*abb", "[^\\x00-\\x7f]{2}", "x{0,20}y", "(?:foo|ba[rz])!?"]
)
def test_outputs_of_patterns_match(outputs, pattern):
    for text in outputs(GrammarSpec.regex(pattern)).some(6, room=12):
        assert re.fullmatch(pattern, text, re.ASCII), text
