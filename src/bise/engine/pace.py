"""How many tokens a step may compute, so that whoever decodes or arrives meanwhile does not wait long.

A step cannot be interrupted: its length is the gap between two tokens of everyone who decodes, and the first
wait of everyone who comes. The size of steps never changes the output.
"""

from __future__ import annotations

MIN_TOKENS = 32
"""Below this a step mostly reads weights: smaller ones would cost throughput and gain little."""

ALONE = 8
"""Times the target that a step may last while one sequence has the engine to itself: it delays nobody yet."""

_MEMORY = 8
"""Steps over which the measured speed is averaged."""


class Pace:
    """Keeps steps near a duration by the speed of the last ones."""

    def __init__(self, target_s: float) -> None:
        """Aim at steps of `target_s` seconds."""
        assert target_s > 0, target_s
        self._target_s = target_s
        self._token_s: float | None = None
        """Seconds per token of steps that are not too small to tell."""

    def budget(self, num_sequences: int) -> int:
        """Return the most tokens of the next step while `num_sequences` run or wait; few before the first one
        was measured.
        """
        if self._token_s is None:
            return MIN_TOKENS
        target_s = self._target_s * (ALONE if num_sequences <= 1 else 1)
        return max(MIN_TOKENS, int(target_s / self._token_s))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if num_tokens < MIN_TOKENS:
            return
        sample = max(seconds, 1e-6) / num_tokens  # a clock may be coarse
        known = sample if self._token_s is None else self._token_s
        self._token_s = known + (sample - known) / _MEMORY
