"""The grammar that every source is turned into: rules over terminals, and terminals that know their ends.

A terminal is a regular language of texts of at least one byte (an empty match counts as not there). Text is
cut into terminals greedily: one goes on as long as any terminal that may stand there can.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from bise.grammar.automaton import Budget, ByteMachine, Machine, machine
from bise.grammar.regex import STRING_CHARACTER, Regex, spelled

State: TypeAlias = "int | frozenset[int] | tuple[int, ...]"


class Terminal(Protocol):
    """A regular language, followed byte by byte."""

    spelling: str
    """The language as a terminal of a Lark grammar."""
    start: State

    def step(self, state: State, byte: int) -> State | None:
        """Return the state after `byte`; None where no text of the language goes on so."""
        ...

    def rest(self, state: State) -> int:
        """Return the fewest bytes to an end; 0 where the text may end."""
        ...

    def shortest(self, state: State) -> bytes:
        """Return the shortest text from `state` to an end."""
        ...


class Pattern:
    """A terminal given by an automaton."""

    __slots__ = ("_machine", "spelling", "start")

    def __init__(self, source: Machine, spelling: str, budget: Budget, *, in_json: bool = False) -> None:
        """Take the language of `source`, quoted and escaped as a JSON string when `in_json`."""
        self._machine = ByteMachine(source, budget, in_json=in_json)
        self.spelling = spelling
        self.start: State = 0

    def step(self, state: State, byte: int) -> State | None:
        """Return the state after `byte`, or None."""
        assert not isinstance(state, tuple)
        return self._machine.step(state, byte)

    def rest(self, state: State) -> int:
        """Return the fewest bytes to an end."""
        assert not isinstance(state, tuple)
        return self._machine.rest(state)

    def shortest(self, state: State) -> bytes:
        """Return the shortest text to an end."""
        assert not isinstance(state, tuple)
        return self._machine.shortest(state)


def lark_text(value: str) -> str:
    """Return a text as the mask engine's Lark writes it, which is JSON but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


class Choice:
    """A terminal that is one of some texts, however many; a state is (first, last, length) of a sorted
    list.
    """

    __slots__ = ("_nearest", "_options", "spelling", "start")

    def __init__(self, options: Sequence[str]) -> None:
        """Take `options`, none of them empty."""
        ordered = sorted(set(options))
        self._options = sorted(option.encode() for option in ordered)
        self._nearest: dict[tuple[int, int], int] = {}
        self.spelling = "|".join(map(lark_text, ordered))
        self.start: State = (0, len(self._options), 0)

    def step(self, state: State, byte: int) -> State | None:
        """Return the state after `byte`, or None."""
        assert isinstance(state, tuple)
        first, last, length = state

        def byte_at(option: bytes) -> int:
            return option[length] if len(option) > length else -1

        low = bisect_left(self._options, byte, first, last, key=byte_at)
        high = bisect_left(self._options, byte + 1, low, last, key=byte_at)
        return (low, high, length + 1) if low < high else None

    def rest(self, state: State) -> int:
        """Return the fewest bytes to an end."""
        return len(self._options[self._index(state)]) - self._length(state)

    def shortest(self, state: State) -> bytes:
        """Return the shortest text to an end."""
        return self._options[self._index(state)][self._length(state) :]

    def _length(self, state: State) -> int:
        assert isinstance(state, tuple)
        return state[2]

    def _index(self, state: State) -> int:
        """Return which of the options still possible is the shortest."""
        assert isinstance(state, tuple)
        first, last, _ = state
        found = self._nearest.get((first, last))
        if found is None:
            found = min(range(first, last), key=lambda index: len(self._options[index]))
            self._nearest[first, last] = found
        return found


_OPEN, _INSIDE, _ESCAPE, _CLOSED = 0, 1, 2, 3
_TAILS = {
    # Lead byte -> (bytes to come, range of the first of them): the well-formed sequences of UTF-8.
    **dict.fromkeys(range(0xC2, 0xE0), (1, 0x80, 0xBF)),
    **dict.fromkeys(range(0xE1, 0xF0), (2, 0x80, 0xBF)),
    **dict.fromkeys(range(0xF1, 0xF4), (3, 0x80, 0xBF)),
    0xE0: (2, 0xA0, 0xBF), 0xED: (2, 0x80, 0x9F), 0xF0: (3, 0x90, 0xBF), 0xF4: (3, 0x80, 0x8F),
}  # fmt: skip
_SHORT_ESCAPES = frozenset(b'"\\bfnrt')


class JsonString:
    """A terminal: a JSON string of `low` to `high` characters, counted and never written out."""

    __slots__ = ("_high", "_low", "spelling", "start")

    def __init__(self, low: int, high: int | None) -> None:
        self._low = low
        self._high = high
        counts = f"{{{low},{'' if high is None else high}}}" if low or high is not None else "*"
        self.spelling = f'/"{STRING_CHARACTER}{counts}"/'
        self.start: State = (_OPEN, 0)

    def step(self, state: State, byte: int) -> State | None:
        """Return the state after `byte`, or None."""
        assert isinstance(state, tuple)
        kind, count = state[0], state[1]
        if kind >= 4:
            # (4 + bytes to come, count, lowest, highest)
            if not state[2] <= byte <= state[3]:
                return None
            return (_INSIDE, count + 1) if kind == 5 else (kind - 1, count, 0x80, 0xBF)
        if kind == _INSIDE:
            return self._inside(count, byte)
        if kind == _OPEN:
            return (_INSIDE, 0) if byte == 0x22 else None
        if kind == _ESCAPE:
            return (_INSIDE, count + 1) if byte in _SHORT_ESCAPES else None
        return None

    def _inside(self, count: int, byte: int) -> State | None:
        if byte == 0x22:
            return (_CLOSED, count) if count >= self._low else None
        if self._high is not None and count >= self._high:
            return None
        count = min(count, self._low) if self._high is None else count
        if byte == 0x5C:
            return (_ESCAPE, count)
        if 0x20 <= byte < 0x80:
            return (_INSIDE, count + 1)
        tail = _TAILS.get(byte)
        return None if tail is None else (4 + tail[0], count, tail[1], tail[2])

    def rest(self, state: State) -> int:
        """Return the fewest bytes to an end."""
        assert isinstance(state, tuple)
        kind, count = state[0], state[1]
        if kind == _CLOSED:
            return 0
        if kind == _OPEN:
            return 2 + self._low
        begun = 1 if kind == _ESCAPE else kind - 4 if kind >= 4 else 0
        return begun + max(0, self._low - count - (1 if begun else 0)) + 1

    def shortest(self, state: State) -> bytes:
        """Return the shortest text to an end."""
        assert isinstance(state, tuple)
        kind, count = state[0], state[1]
        if kind == _CLOSED:
            return b""
        if kind == _OPEN:
            return b'"' + b"a" * self._low + b'"'
        begun = b"n" if kind == _ESCAPE else b""
        if kind >= 4:
            begun = bytes([state[2]]) + b"\x80" * (kind - 5)
        return begun + b"a" * max(0, self._low - count - (1 if begun else 0)) + b'"'


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, which no text spells."""

    token_id: int


Symbol: TypeAlias = "int | Control | Terminal"
"""A rule by its number, or what it ends in."""


@dataclass(slots=True)
class Grammar:
    """Rules by number; each has alternatives, each a sequence of symbols."""

    rules: list[list[tuple[Symbol, ...]]] = field(default_factory=list[list[tuple[Symbol, ...]]])
    start: int = 0


class Builder:
    """Makes a grammar; equal terminals are made once."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.grammar = Grammar()
        self._texts: dict[tuple[str, ...], Choice] = {}
        self._expressions: dict[str, Pattern] = {}
        self._strings: dict[tuple[int, int | None], JsonString] = {}

    def rule(self, *alternatives: tuple[Symbol, ...]) -> int:
        """Add a rule and return its number; `define` can fill it later."""
        self.grammar.rules.append([])
        number = len(self.grammar.rules) - 1
        self.define(number, *alternatives)
        return number

    def define(self, number: int, *alternatives: tuple[Symbol, ...]) -> None:
        """Add alternatives to a rule."""
        self.budget.spend(3 + sum(4 + 3 * len(symbols) for symbols in alternatives))
        self.grammar.rules[number] += alternatives

    def text(self, *options: str) -> Terminal:
        """Return the terminal of one of `options`, which are not empty."""
        key = tuple(options)
        if key not in self._texts:
            self.budget.spend(sum(map(len, options)) // 4 + len(options))
            self._texts[key] = Choice(options)
        return self._texts[key]

    def json_string(self, low: int = 0, high: int | None = None) -> Terminal:
        """Return the terminal of JSON strings of `low` to `high` characters."""
        key = (low, high)
        if key not in self._strings:
            self._strings[key] = JsonString(low, high)
        return self._strings[key]

    def expression(self, name: str, node: Regex) -> Terminal:
        """Return the terminal of an expression; equal names mean equal expressions."""
        if name not in self._expressions:
            source = machine(node, self.budget)
            self._expressions[name] = Pattern(source, f"/{spelled(node)}/", self.budget)
        return self._expressions[name]

    def repeated(self, item: Symbol, low: int, high: int | None) -> tuple[Symbol, ...]:
        """Return the symbols of `low` to `high` items in a row, in rules that grow with the logarithm."""
        if high is None:
            return (*self._exactly(item, low), self._any_number(item))
        return (*self._exactly(item, low), *self._at_most(item, high - low))

    def _any_number(self, item: Symbol) -> int:
        number = self.rule(())
        # Left recursion: a long list costs the parser nothing per item.
        self.define(number, (number, item))
        return number

    def _exactly(self, item: Symbol, count: int) -> tuple[Symbol, ...]:
        if count <= 8:
            return (item,) * count
        quotient, remainder = divmod(count, 8)
        chunk = self.rule((item,) * 8)
        return (*self._exactly(chunk, quotient), *(item,) * remainder)

    def _at_most(self, item: Symbol, count: int) -> tuple[Symbol, ...]:
        if count == 0:
            return ()
        if count <= 8:
            number = self.rule(())
            for _ in range(count - 1):
                number = self.rule((), (item, number))
            return (self.rule((), (item, number)),)
        quotient, remainder = divmod(count, 8)
        chunk = self.rule((item,) * 8)
        whole = (*self._at_most(chunk, quotient - 1), *self._at_most(item, 7))
        full = (*self._exactly(chunk, quotient), *self._at_most(item, remainder))
        return (self.rule(whole, full),)
