"""Followers: checking ahead leaves the state as it was; Lark and patterns."""

import re
import threading

import pytest

from bise.errors import RequestError
from bise.grammar import compiler
from bise.grammar.automaton import Budget, ByteMachine, machine
from bise.grammar.follower import Follower
from bise.grammar.pattern import parse_pattern
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


EXPLOSIVE = "x(a|b)*a(a|b){30}"
"""Each mask visits thousands of states, and each token leads to others."""


@pytest.mark.parametrize("seed", range(3))
def test_an_output_on_which_the_mask_engine_gives_up_is_closed_and_still_matches(letters, monkeypatch, seed):
    monkeypatch.setattr(compiler, "MAX_STATES", 500)
    made = letters(GrammarSpec.regex(EXPLOSIVE), seed)
    made.may_give_up = True
    for limit in (made.shortest, made.shortest + 3, made.shortest + 100):
        assert re.fullmatch(EXPLOSIVE, made.one(limit))
    follower = made.follower()
    follower.take(int(follower.allowed(500)[0]), 500)
    assert follower.allowed(500).size == 1
    assert (follower.gave_up, follower.was_cut) == (True, True)


def test_what_the_mask_engine_cannot_even_begin_is_refused_before_any_token(letters):
    with pytest.raises(RequestError, match="more than the grammar engine takes"):
        letters(GrammarSpec.lark('start: x\nx: x x | "a" | "b" | "b" x "a"'))


def test_an_output_does_not_depend_on_what_other_outputs_made_the_mask_engine_remember(letters):
    """All outputs of a grammar share the engine's automaton, which two of these fill to its limit."""
    made, lone = letters(GrammarSpec.regex(EXPLOSIVE)), letters(GrammarSpec.regex(EXPLOSIVE))
    for _ in range(5):
        made.one(40)
    first = made.compiled.matcher
    for seed in range(3):
        made.random.seed(seed)
        lone.random.seed(seed)
        assert made.one(60) == lone.one(60)
    assert made.compiled.matcher is not first, "the limit was not reached"


def test_guessing_ahead_does_not_bring_the_mask_engine_nearer_to_its_limits(letters):
    made = letters(GrammarSpec.regex(EXPLOSIVE))
    follower = made.follower()
    follower.take(int(follower.allowed(500)[0]), 500)
    before = made.compiled.matcher
    for _ in range(5000):
        follower.validate([made.random.randrange(262, made.vocabulary.size) for _ in range(5)])
    follower.allowed(500)
    assert made.compiled.matcher is before


def test_grammars_that_nobody_has_used_lately_let_go_of_what_outputs_added(vocabulary, monkeypatch):
    monkeypatch.setattr(compiler, "MAX_GROWN", 3)
    cache = compiler.GrammarCache(vocabulary)
    specs = [GrammarSpec.choice([f"n{number}"]) for number in range(6)]
    made = [cache.get(spec) for spec in specs]
    assert [entry.matcher is not None for entry in made] == [False] * 3 + [True] * 3
    again = cache.get(specs[0])
    follower = Follower(again, vocabulary)
    assert follower.allowed(5).size
    assert again is made[0]
    assert [entry.matcher is not None for entry in made] == [True] + [False] * 3 + [True] * 2


def test_an_automaton_with_more_states_than_are_kept_goes_on(monkeypatch, letters):
    monkeypatch.setattr(ByteMachine, "MAX_VISITED", 5)
    pattern = "[ab]{0,9}a[ab]{4}"
    made = letters(GrammarSpec.regex(pattern))
    for text in made.some(6, room=12):
        assert re.fullmatch(pattern, text)


def test_two_threads_that_meet_new_states_of_one_automaton_give_them_different_numbers():
    """The second steps while the first is about to keep a state, as a switch of threads can make it."""
    budget = Budget("regex")
    made = ByteMachine(machine(parse_pattern("[ab]*a[ab]{4}", "regex"), budget), budget)

    class Interrupted(list):
        thread = None

        def append(self, members):
            if self.thread is None:
                self.thread = threading.Thread(target=made.step, args=(0, ord("b")))
                self.thread.start()
                self.thread.join(0.2)  # it waits for the first to be done
            super().append(members)

    made._sets = Interrupted(made._sets)
    made.step(0, ord("a"))
    made._sets.thread.join()
    assert len(made._numbers) == 3
    assert all(made._sets[number] == members for members, number in made._numbers.items())


@pytest.mark.parametrize(
    "written", [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[^\w]", r"[^\s\d]", r"[^\W_]", "."]
)
def test_a_class_holds_only_characters_that_python_counts_in_as_well(written):
    node = parse_pattern(written, "regex")
    assert node.ranges
    for low, high in node.ranges:
        for point in range(low, high + 1):
            assert re.fullmatch(written, chr(point)), hex(point)


def test_a_lark_grammar_whose_terminals_swallow_each_other_is_refused_or_still_ends(outputs):
    with pytest.raises(RequestError, match="takes what belongs to the next"):
        outputs(GrammarSpec.lark("start: A B\nA: /[a-z0-9]+/\nB: /[0-9]+/"))
    trap = """start: "y" | "x" (SHORT NAME | LONG)\nSHORT: ","\nNAME: "n1"\nLONG: ",name" """
    for text in outputs(GrammarSpec.lark(trap)).some(12, room=12):
        assert text == "y"


def test_where_a_token_must_not_come_the_others_are_listed_once_for_all_outputs(vocabulary):
    trigger = vocabulary.control("[TOOL_CALLS]", "tools")
    compiled = compiler.compile_grammar(GrammarSpec.without("[TOOL_CALLS]"), vocabulary)
    first, second = (Follower(compiled, vocabulary, trigger=trigger, forbids_trigger=True) for _ in range(2))
    allowed = first.allowed(9)
    assert allowed.tolist() == [token for token in range(vocabulary.size) if token != trigger]
    assert first.allowed(8) is second.allowed(5) is allowed
    assert not allowed.flags.writeable
