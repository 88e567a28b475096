"""A chat-like trace: conversations with a common system prompt, turns that build on each other.

Lengths are log-normal with medians of 40 and 120 tokens: the shape of public chat logs, rounded. Texts are
random tokens of the synthetic models' vocabulary (`bise.bench.gguf_file`): pieces of " t" and a number.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_FIRST_WORD = 259
"""Token of the piece " t0"; before it are the control tokens and the bytes."""
_WORD = re.compile(r"t([0-9a-f]+)")


@dataclass(frozen=True)
class Turn:
    """One request: the conversation so far, and how long the answer is."""

    prompt: tuple[int, ...]
    num_output: int


@dataclass
class Conversation:
    """Turns as lengths; the text grows as they are answered."""

    text: list[int]
    turns: list[tuple[list[int], int]]
    """(tokens of the user's message, length of the answer), to come."""

    def next_turn(self, answer: str) -> Turn | None:
        """Return the next turn after `answer`, None at the end."""
        if not self.turns:
            return None
        message, num_output = self.turns.pop(0)
        self.text += [*tokens_of(answer), *message]
        return Turn(tuple(self.text), num_output)


class Trace:
    """Draws conversations: the same for every contestant and every run of one seed."""

    def __init__(self, vocab_size: int, *, scale: float = 1.0, seed: int = 0) -> None:
        """`scale` shortens all texts."""
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._scale = scale
        self._system = self._tokens(160)

    def longest(self) -> int:
        """Return the most tokens of a conversation."""
        return max(64, int(4000 * self._scale))

    def conversation(self) -> Conversation:
        """Return the next conversation: 1 to 5 turns, short questions with a long tail, longer answers."""
        rng = self._rng
        turns = [
            (self._tokens(rng.lognormvariate(3.7, 0.9)), self._length(rng.lognormvariate(4.8, 0.6)))
            for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 5]))
        ]
        room = self.longest() - len(self._system)
        kept: list[tuple[list[int], int]] = []
        for message, num_output in turns:
            room -= len(message) + num_output
            if room > 0:
                kept.append((message, num_output))
        return Conversation([1, *self._system], kept or [(self._tokens(8), self._length(8))])

    def gap_s(self, rate: float) -> float:
        """Return the time to the next conversation at `rate` per second (Poisson arrivals)."""
        return self._rng.expovariate(rate)

    def _length(self, length: float) -> int:
        return max(1, min(int(length * self._scale), int(1200 * self._scale)))

    def _tokens(self, length: float) -> list[int]:
        return [
            self._rng.randrange(_FIRST_WORD, self._vocab_size) for _ in range(max(2, self._length(length)))
        ]


def tokens_of(text: str) -> list[int]:
    """Return the tokens of an answer; single bytes, which random models hardly write, are left out."""
    return [_FIRST_WORD + int(word, 16) for word in _WORD.findall(text)]
