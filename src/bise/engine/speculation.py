"""Guess tokens ahead, verify them in one step: the same output to the last bit, in fewer steps.

A guess is never trusted. Its rows are computed behind the sequence's own row, every position is sampled from
the model's own logits exactly as if it were alone (a draw depends on seed and position only), and the first
token that differs from the guess ends what is kept. Who guesses and how far decides about time alone.

Guesses come from the caller's prediction, from the sequence's own text (`lookup.py`) or, when one is given,
from a draft model. `payoff.py` says how many are worth computing; shadows, guesses that are not computed but
compared with what came, teach it without a price.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from bise.engine.draft_model import DraftModel
from bise.engine.lookup import Repeats
from bise.engine.payoff import MAX_DRAFT, MAX_SEQUENCES, Chances, Lane, Payoff, SpeculationStats
from bise.engine.scheduler import Scheduler, Step
from bise.engine.sequence import Sequence

logger = logging.getLogger(__name__)

REST_STEPS = 1024
"""Steps without guesses after guessing failed: a failure that comes each time must not fill the log."""

_LENGTHS = (2, 3, 5, 8, 16)
_NUM_LENGTHS = len(_LENGTHS) + 1
_KIND_OF_LENGTH = tuple(sum(length > bound for bound in _LENGTHS) for length in range(64))
_PREDICTION = _NUM_LENGTHS
"""First kind of guesses that rest on a prediction; below are those of lookups."""
_MODEL = 2 * _NUM_LENGTHS
"""Kind of guesses that a draft model made."""
_PRIORS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.85, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.6)


@dataclass(slots=True)
class Guess:
    """What may come next in one sequence."""

    tokens: list[int]
    kinds: list[int]
    """What each guess rests on, see `Chances`."""
    chances: list[float]
    """Probability that the guess and all before it come true."""


Guesser = Callable[[Sequence, int], "Guess"]
"""Guesses for one sequence, at most so many."""


class Foresight:
    """What one sequence needs for guessing: the repeats of its text, and how good guesses about it were."""

    __slots__ = ("chances", "repeats")

    def __init__(self, sequence: Sequence, chances: Chances) -> None:
        self.repeats = Repeats(sequence.token_ids)
        self.chances = chances


class Speculation:
    """Adds guesses to steps in which sequences only decode. One per engine, used by its thread alone."""

    def __init__(
        self,
        *,
        payoff: Payoff | None = None,
        guesser: Guesser | None = None,
        draft_model: DraftModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Guess from predictions and repeats, or as `guesser` says, and with `draft_model` where that pays
        more; `clock` returns seconds.
        """
        self._payoff = Payoff() if payoff is None else payoff
        self._guesser = self._look_up if guesser is None else guesser
        self._draft_model = draft_model
        self._lanes = (Lane.FOUND,) if draft_model is None else (Lane.FOUND, Lane.MODEL)
        self._lane = Lane.FOUND
        self._clock = clock
        self._chances = Chances(_PRIORS, 8)
        self._guesses: list[Guess] = []
        self._began = 0.0
        self._num_resting = 0
        """Steps that go without guesses yet."""

    @property
    def stats(self) -> SpeculationStats:
        """Counts of what was guessed and what came true."""
        return self._payoff.stats

    def forget(self, payoff: Payoff | None = None) -> None:
        """Forget prices, chances and counts, as if the engine had just started (with `payoff`)."""
        self._payoff = Payoff() if payoff is None else payoff
        self._chances = Chances(_PRIORS, 8)
        self._guesses = []

    def extend(self, step: Step, scheduler: Scheduler) -> Step:
        """Return the step with as many guesses behind its rows as are worth it; none when it has prefills or
        too many rows. Where guessing fails, whatever the reason, this step and the next ones go without.
        """
        self._began = self._clock()
        self._guesses = []
        if self._num_resting:
            self._num_resting -= 1
            return step
        try:
            return self._extended(step, scheduler)
        except Exception:  # a guess decides about time alone: no request ends for it, nor the engine
            logger.exception("event=guessing_failed sequences=%d", len(step.rows))
            self._guesses = []
            self._num_resting = REST_STEPS
            return step

    def _extended(self, step: Step, scheduler: Scheduler) -> Step:
        if len(step.rows) > MAX_SEQUENCES or any(
            row.num_tokens != 1 or not row.num_samples for row in step.rows
        ):
            return step
        self._lane = Lane.FOUND
        wanted = self._payoff.wants(len(step.rows), self._lanes)
        self._guesses = [self._guess(row.sequence, MAX_DRAFT if wanted else 1) for row in step.rows]
        if not wanted:
            return step
        counts, gain = self._payoff.choose([guess.chances for guess in self._guesses])
        if self._draft_model is not None:
            counts = self._ask_model(self._draft_model, step, counts, gain)
        if not any(counts):
            return step
        drafts = [tuple(guess.tokens[:n]) for guess, n in zip(self._guesses, counts, strict=True)]
        return scheduler.add_drafts(step, drafts)

    def settle(self, step: Step) -> None:
        """Learn from a step after its tokens were chosen; does nothing for one that had no part in this."""
        if not self._guesses:
            return
        num_tokens = 0
        for row, guess in zip(step.rows, self._guesses, strict=True):
            sequence = row.sequence
            chosen = sequence.token_ids[row.first + 1 :]
            num_tokens += len(chosen)
            if sequence.foresight is not None:
                for token_id, guessed, kind in zip(chosen, guess.tokens, guess.kinds, strict=False):
                    sequence.foresight.chances.learn(kind, token_id == guessed)
                    if token_id != guessed:
                        break
        num_drafted = step.num_tokens - len(step.rows)
        seconds = self._clock() - self._began
        self._payoff.record(len(step.rows), num_drafted, num_tokens, seconds, self._lane)
        self._guesses = []

    def _guess(self, sequence: Sequence, count: int) -> Guess:
        count = min(count, _room(sequence))
        return _allowed(sequence, self._guesser(sequence, count)) if count else Guess([], [], [])

    def _ask_model(self, model: DraftModel, step: Step, counts: list[int], gain: float) -> list[int]:
        """Replace found guesses by the model's where its are likelier, if the step gains by it; return how
        many guesses each sequence gets.
        """
        chances = [guess.chances for guess in self._guesses]
        asked: list[int] = []
        for index, row in enumerate(step.rows):
            foresight = row.sequence.foresight
            chance = self._chances.of(_MODEL) if foresight is None else foresight.chances.of(_MODEL)
            room = _room(row.sequence)
            if room and (not chances[index] or chances[index][0] < chance):
                chances[index] = [chance**depth for depth in range(1, room + 1)]
                asked.append(index)
        wanted, hoped = self._payoff.choose(chances, Lane.MODEL)
        depth = max((wanted[index] for index in asked), default=0)
        if not depth or hoped <= gain:
            return counts
        self._lane = Lane.MODEL
        drafts = model.draft([step.rows[index].sequence for index in asked], depth)
        for index, tokens in zip(asked, drafts, strict=True):
            drafted = Guess(tokens, [_MODEL] * len(tokens), chances[index][: len(tokens)])
            self._guesses[index] = _allowed(step.rows[index].sequence, drafted)
        return wanted

    def _look_up(self, sequence: Sequence, count: int) -> Guess:
        """Guess from the prediction, else from what followed the same words before in the text."""
        if sequence.foresight is None:
            sequence.foresight = Foresight(sequence, self._chances.child())
        foresight, prediction = sequence.foresight, sequence.prediction
        length, kind = prediction.match() if prediction is not None else 0, _PREDICTION
        repeated = foresight.repeats.match()
        if prediction is not None and length:
            tokens = prediction.guess(count)
        else:
            length, kind = repeated, 0
            tokens = foresight.repeats.guess(count)
        kinds = [kind + _KIND_OF_LENGTH[length + depth] for depth in range(len(tokens))]
        chances: list[float] = []
        chance = 1.0
        for entry in kinds:
            chance *= foresight.chances.of(entry)
            chances.append(chance)
        return Guess(tokens, kinds, chances)


def _room(sequence: Sequence) -> int:
    """Return how many guesses a sequence may get at most."""
    if not sequence.request.speculate:
        return 0
    # The last token that may be produced needs no row of its own: nothing follows it.
    return max(0, min(MAX_DRAFT, sequence.max_tokens - sequence.num_output - 1))


def _allowed(sequence: Sequence, guess: Guess) -> Guess:
    """Return the guesses up to the first one that the sequence's grammar rules out."""
    if sequence.grammar is None:
        return guess
    count = sequence.grammar.validate(guess.tokens)
    return Guess(guess.tokens[:count], guess.kinds[:count], guess.chances[:count])
