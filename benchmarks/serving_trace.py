"""A chat-like trace: conversations with a common system prompt, turns that build on each other."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple


class Event(NamedTuple):
    """What a step added to a job."""

    number: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True)
class Job:
    """One request: a turn of a conversation."""

    number: int
    prompt: tuple[int, ...]
    num_output: int


@dataclass
class Conversation:
    """Turns as lengths; the text grows as they are answered."""

    text: list[int]
    turns: list[tuple[list[int], int]]
    """(tokens of the user's message, length of the answer), to come."""

    def next_job(self, number: int, answer: list[int]) -> Job | None:
        """Return the next turn after `answer`, None at the end."""
        if not self.turns:
            return None
        message, num_output = self.turns.pop(0)
        self.text += [*answer, *message]
        return Job(number, tuple(self.text), num_output)


class Trace:
    """Draws conversations: the same for every contestant and every run of one seed."""

    def __init__(self, vocab_size: int, *, scale: float = 1.0, seed: int = 0) -> None:
        """`scale` shortens all texts, for tiny models."""
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._scale = scale
        self._system = self._tokens(160)
        self.longest = max(64, int(4000 * scale))

    def conversation(self) -> Conversation:
        """Return the next conversation: 1 to 5 turns, short questions with a long tail, longer answers.

        Medians of 40 and 120 tokens with log-normal spread: the shape of public chat logs, rounded.
        """
        rng = self._rng
        turns = [
            (self._tokens(rng.lognormvariate(3.7, 0.9)), self._length(rng.lognormvariate(4.8, 0.6)))
            for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 5]))
        ]
        room = self.longest - len(self._system)
        kept: list[tuple[list[int], int]] = []
        for message, num_output in turns:
            room -= len(message) + num_output
            if room > 0:
                kept.append((message, num_output))
        return Conversation(list(self._system), kept or [(self._tokens(8), self._length(8))])

    def gap_s(self, rate: float) -> float:
        """Return the time to the next conversation at `rate` per second (Poisson arrivals)."""
        return self._rng.expovariate(rate)

    def _length(self, length: float) -> int:
        return max(1, min(int(length * self._scale), int(1200 * self._scale)))

    def _tokens(self, length: float) -> list[int]:
        low = min(300, self._vocab_size // 2)
        return [self._rng.randrange(low, self._vocab_size) for _ in range(max(2, self._length(length)))]
