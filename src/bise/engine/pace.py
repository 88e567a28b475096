"""How many tokens a step may compute, so that whoever decodes or arrives meanwhile does not wait long.

A step cannot be interrupted: its length is the gap between two tokens of everyone who decodes, and the first
wait of everyone who comes. The size of steps never changes the output.
"""

from __future__ import annotations

from typing import NamedTuple

from bise.engine.samples import Samples

MIN_TOKENS = 32
"""Below this a step mostly reads weights: smaller ones would cost throughput and gain little."""

ALONE = 8
"""Times the target that a step may last while one sequence has the engine to itself: it delays nobody yet."""

ENOUGH = 20
"""Prompt tokens in a step, in what the step costs without them: more would spare 5 % of the time at most."""

MOSTLY = 8
"""A step tells the price of prompts when it has so many tokens of them for each one that is decoded."""

CHUNK = 128
"""Prompt tokens that a step may always have, as far as its duration allows: prices are never exact."""

_MEMORY = 8
"""Steps over which the measured speed is averaged."""


class Prices(NamedTuple):
    """What steps cost, in prompt tokens."""

    step: float
    """The step itself, whatever it computes: the weights are read, the layers are walked."""
    row: float
    """A token of a sequence that decodes: its attention, its logits, its choice."""


PRICES = Prices(step=5.0, row=2.0)
"""Before any were measured: about what they are on a processor."""


class Pace:
    """Keeps steps near a duration by the speed of the last ones, and knows what they cost."""

    def __init__(self, target_s: float) -> None:
        """Aim at steps of `target_s` seconds."""
        assert target_s > 0, target_s
        self._target_s = target_s
        self._token_s: float | None = None
        """Seconds per token of steps that are not too small to tell, all that they computed included."""
        self._single_s = Samples()
        """Seconds of a step in which one sequence decodes one token."""
        self._row_s = Samples()
        """Seconds of each further such token."""
        self._prompt_s = Samples()
        """Seconds per prompt token beside all else."""

    @property
    def prices(self) -> Prices:
        """What steps cost by the last ones."""
        return self._measured() or PRICES

    def budget(self, num_sequences: int, num_running: int = 1) -> int:
        """Return the most tokens of the next step while `num_sequences` run or wait; few before the first one
        was measured.
        """
        if self._token_s is None:
            return MIN_TOKENS
        if num_sequences <= 1:
            return max(MIN_TOKENS, int(ALONE * self._target_s / self._token_s))
        tokens, prices = int(self._target_s / self._token_s), self._measured()
        if prices is not None:
            tokens = min(tokens, max(CHUNK, int(ENOUGH * prices.step)) + num_running)
        return max(MIN_TOKENS, tokens)

    def observe(self, num_prompt: int, num_decoded: int, seconds: float) -> None:
        """Learn from a step of so many prompt tokens and tokens of decoding sequences that took `seconds`."""
        seconds = max(seconds, 1e-6)  # a clock may be coarse
        if num_prompt + num_decoded >= MIN_TOKENS:
            sample = seconds / (num_prompt + num_decoded)
            known = sample if self._token_s is None else self._token_s
            self._token_s = known + (sample - known) / _MEMORY
        others = self._single_s.value + self._row_s.value * (num_decoded - 1)
        if num_prompt >= max(MIN_TOKENS, MOSTLY * num_decoded):
            self._prompt_s.add(max(seconds - others, seconds / 100) / num_prompt)
        elif num_decoded == 1 and not num_prompt:
            self._single_s.add(seconds)
        elif not num_prompt and self._single_s.count:
            self._row_s.add(max(seconds - self._single_s.value, seconds / 100) / (num_decoded - 1))

    def _measured(self) -> Prices | None:
        if not (self._prompt_s.count and self._single_s.count):
            return None
        single_s = self._single_s.value
        # A token that is decoded is computed like one of a prompt, and then chosen.
        row_s = max(self._row_s.value if self._row_s.count else single_s / 2, self._prompt_s.value)
        step_s = max(single_s - row_s, single_s / 2)  # a busy machine makes rows look dear
        return Prices(step_s / self._prompt_s.value, row_s / self._prompt_s.value)
