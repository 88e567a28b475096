"""Guesses without a model: text repeats itself, so what followed the same words before may follow again.

Two sources: `Repeats` looks into the sequence's own prompt and output, `Prediction` follows the text that the
caller expects. Both know token ids only; whether a guess is worth its price is `payoff.py`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

MAX_MATCH = 32
"""Longer matches are not told apart."""
NUM_CANDIDATES = 8
"""Earlier places that are compared per search."""
CATCH_UP = 4096
"""Tokens indexed per call at most, so that a long prompt never holds the engine up by more than ~2 ms."""

_TABLE_BITS = 15
_MASK = (1 << _TABLE_BITS) - 1
_NOWHERE = -1
_NEARBY = 16
"""So many tokens after a divergence two matching tokens are enough to find back into a prediction."""


class NgramIndex:
    """Where pairs of tokens stand in a growing list: hash chains, as LZ77 coders keep them.

    Adding a token and searching take constant time; memory is 128 KiB and 4 bytes per token.
    """

    __slots__ = ("_heads", "_previous", "_tokens")

    def __init__(self, tokens: Sequence[int]) -> None:
        """Index `tokens`, which the owner may go on appending to; nothing is read before `extend`."""
        self._tokens = tokens
        self._heads = array("i", (_NOWHERE,)) * (1 << _TABLE_BITS)
        self._previous = array("i", (_NOWHERE, _NOWHERE))
        """Place p stands for the pair (p - 2, p - 1); the one before it with the same hash."""

    def extend(self, end: int) -> bool:
        """Add the places up to and including `end`, CATCH_UP of them at most; True when all are there."""
        tokens, heads, previous = self._tokens, self._heads, self._previous
        start = len(previous)
        stop = min(end + 1, start + CATCH_UP)
        for place in range(start, stop):
            slot = (tokens[place - 2] * 40503 + tokens[place - 1]) & _MASK
            previous.append(heads[slot])
            heads[slot] = place
        return stop > end

    def find(self, text: Sequence[int], near: int) -> tuple[int, int]:
        """Return (place, length): the longest end of `text` that also ends just before `place`.

        Among equals the one nearest to `near` wins. (-1, 0) when not even the last two tokens are found.
        """
        end = len(text)
        if end < 2:
            return _NOWHERE, 0
        tokens, previous = self._tokens, self._previous
        place = self._heads[(text[end - 2] * 40503 + text[end - 1]) & _MASK]
        best, best_length = _NOWHERE, 1
        for _ in range(NUM_CANDIDATES):
            if place < 0:
                break
            length, limit = 0, min(place, end, MAX_MATCH)
            while length < limit and tokens[place - 1 - length] == text[end - 1 - length]:
                length += 1
            if length > best_length or (length == best_length > 1 and abs(place - near) < abs(best - near)):
                best, best_length = place, length
            place = previous[place]
        return (best, best_length) if best >= 0 else (_NOWHERE, 0)


class Repeats:
    """Guesses that a sequence goes on as it did after the same tokens before."""

    __slots__ = ("_index", "_length", "_num_seen", "_place", "_tokens")

    def __init__(self, tokens: list[int]) -> None:
        """Look into `tokens`, the sequence's own growing list."""
        self._tokens = tokens
        self._index = NgramIndex(tokens)
        self._place = _NOWHERE
        """Where the guess goes on; the tokens before it equal the end of the text."""
        self._length = 0
        self._num_seen = len(tokens)

    def match(self) -> int:
        """Take in the tokens that came since, and return how many tokens the text and the place found have in
        common; 0 without a guess.
        """
        tokens = self._tokens
        end = len(tokens)
        if not self._index.extend(end - 1):
            return 0
        if self._place >= 0:
            for position in range(self._num_seen, end):
                if tokens[self._place] != tokens[position]:
                    self._place = _NOWHERE
                    break
                self._place += 1
                self._length += 1
        self._num_seen = end
        if self._place < 0:
            self._place, self._length = self._index.find(tokens, end)
        return min(self._length, MAX_MATCH)

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next; call `match` first."""
        if self._place < 0:
            return []
        end = len(self._tokens)
        found = self._tokens[self._place : self._place + count]
        # The place may lie so close to the end that the guess goes on with itself: "ababab".
        while len(found) < count:
            found.append(found[self._place + len(found) - end])
        return found


class Prediction:
    """Follows the output along the text that the caller predicted, and finds back after a divergence."""

    __slots__ = ("_came_true", "_index", "_is_lost", "_place", "_recent", "_run", "_tokens")

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = tokens
        self._index: NgramIndex | None = None
        self._place = 0
        """Where the prediction goes on, or where the output left it."""
        self._is_lost = False
        self._run = MAX_MATCH
        """Tokens in common since the two were last brought together; the beginning is taken on trust."""
        self._recent: list[int] = []
        self._came_true = bytearray(len(tokens))

    @property
    def num_accepted(self) -> int:
        """Tokens of the prediction that the output has in the same place; depends on the output alone."""
        return sum(self._came_true)

    @property
    def num_rejected(self) -> int:
        """The other tokens of the prediction."""
        return len(self._tokens) - self.num_accepted

    def follow(self, token_id: int) -> None:
        """Take in the next token of the output."""
        self._recent.append(token_id)
        if len(self._recent) >= 4 * MAX_MATCH:
            del self._recent[:-MAX_MATCH]
        if not self._is_lost and self._place < len(self._tokens) and self._tokens[self._place] == token_id:
            self._came_true[self._place] = 1
            self._place += 1
            self._run = min(self._run + 1, MAX_MATCH)
            return
        self._is_lost = True
        self._find_back()

    def match(self) -> int:
        """Return how many tokens output and prediction have in common before the guess; 0 without a guess."""
        return 0 if self._is_lost or self._place == len(self._tokens) else self._run

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next."""
        return [] if self._is_lost else list(self._tokens[self._place : self._place + count])

    def _find_back(self) -> None:
        if self._index is None:
            self._index = NgramIndex(self._tokens)
        if len(self._tokens) < 3 or not self._index.extend(len(self._tokens) - 1):
            return
        place, length = self._index.find(self._recent, self._place)
        if length >= 3 or (length == 2 and 0 <= place - self._place <= _NEARBY):
            self._is_lost = False
            self._place, self._run = place, length
