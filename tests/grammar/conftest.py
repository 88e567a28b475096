"""A small vocabulary whose tokens cross every border of JSON, and outputs of a model that knows nothing."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from bise.grammar.compiler import compile_grammar
from bise.grammar.follower import Follower
from bise.grammar.spec import GrammarSpec
from bise.grammar.vocabulary import Vocabulary

CONTROLS = ("<unk>", "<s>", "</s>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
END = CONTROLS.index("</s>")
PIECES = (
    '{"', '":', '": "', '",', '", "', '"}', "true", "false", "null", "[]", "{}", "12", "345", "hello", "wor",
    "ld", ' "', ", ", ": ", "\\n", "é", "日本", "}]", "}}", "],", '","', "name", ".5", "e1", "-1", "[[",
    "aaaa",
    "[TO", "0.", "2024-", '"a', 'a"', '{"a":', '"b":', "[{", "\\u00",
)  # fmt: skip


class CrossingTokenizer:
    """Control tokens, every byte, and pieces that begin in one part of a JSON text and end in another."""

    bos_id = 1
    adds_bos = True
    stop_ids = frozenset({END})
    space_prefix = False

    def __init__(self, pieces: tuple[str, ...] = PIECES, *, space_prefix: bool = False) -> None:
        self.space_prefix = space_prefix
        self._pieces = [b""] * len(CONTROLS) + [bytes([n]) for n in range(256)]
        self._pieces += [piece.encode() for piece in pieces]
        self.vocab_size = len(self._pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def control_id(self, name: str) -> int | None:
        return CONTROLS.index(name) if name in CONTROLS else None

    def decode(self, token_ids) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode()


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    tokenizer = CrossingTokenizer()
    return Vocabulary(tokenizer, tokenizer.vocab_size)


class Outputs:
    """Produces outputs under a grammar as a model does that finds all allowed tokens equally likely."""

    def __init__(self, spec: GrammarSpec, vocabulary: Vocabulary, seed: int = 0) -> None:
        self.compiled = compile_grammar(spec, vocabulary)
        self.vocabulary = vocabulary
        self.random = random.Random(seed)
        self.shortest = self.follower().shortest()
        self.may_give_up = False
        """The mask engine may reach its limits, as few grammars make it do."""

    def follower(self) -> Follower:
        return Follower(self.compiled, self.vocabulary, end_ids=frozenset({END}))

    def one(self, max_tokens: int) -> str:
        """Return the text of one output of at most `max_tokens` tokens; it is complete."""
        follower, tokens = self.follower(), []
        while len(tokens) < max_tokens and not follower.must_end:
            left = max_tokens - len(tokens)
            allowed = follower.allowed(left).tolist()
            if not allowed:
                break
            token = self.random.choice(allowed)
            if token == END or (token := follower.take(token, left)) is None:
                break
            tokens.append(token)
        assert follower.may_end, f"{self.vocabulary.tokenizer.decode(tokens)!r} is not complete"
        assert not follower.gave_up or self.may_give_up, "the mask engine reached a limit, or disagrees"
        return self.vocabulary.tokenizer.decode(tokens)

    def some(self, count: int = 20, room: int = 30) -> list[str]:
        """Return outputs of the shortest length and of up to `room` tokens more."""
        lengths = [self.shortest, *(self.shortest + self.random.randrange(room) for _ in range(count - 1))]
        return [self.one(length) for length in lengths]


@pytest.fixture
def outputs(vocabulary):
    """Return a function from a spec to its `Outputs`."""
    return lambda spec, seed=0: Outputs(spec, vocabulary, seed)


@pytest.fixture(scope="session")
def letters():
    """Return a function from a spec to its `Outputs` over a vocabulary in which every text of a and b up to
    ten letters is a token, so that one mask visits thousands of states.
    """
    pieces = ("".join(text) for length in range(1, 11) for text in itertools.product("ab", repeat=length))
    tokenizer = CrossingTokenizer(tuple(pieces))
    known = Vocabulary(tokenizer, tokenizer.vocab_size)
    return lambda spec, seed=0: Outputs(spec, known, seed)


@pytest.fixture
def accepts(vocabulary):
    """Return a function (spec, text) -> whether the grammar has the text, byte by byte."""

    def check(spec: GrammarSpec, text: str) -> bool:
        follower = Follower(compile_grammar(spec, vocabulary), vocabulary)
        tokens = [len(CONTROLS) + byte for byte in text.encode()]
        if follower.validate(tokens) < len(tokens):
            return False
        for token in tokens:
            assert follower.take(token, 10_000) == token
        return follower.may_end and not follower.gave_up

    return check


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
