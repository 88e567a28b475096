"""Whether guessing ahead pays: what steps cost by the rows they compute, how often guesses come true.

Everything here is measured while the engine runs, and decides about speed alone: the output is the same
whatever it says. Three parts: `StepCosts` knows seconds, `Chances` knows probabilities, `Payoff` weighs one
against the other and keeps a ledger, so that what guessing loses stays below a share of the time whatever the
estimates say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from bise.engine.samples import Samples

MAX_DRAFT = 12
"""Guessed tokens behind one sequence at most."""
MAX_DRAFTED_ROWS = 24
"""Guessed tokens in one step at most."""
MAX_SEQUENCES = 8
"""With more sequences decoding at once nobody guesses: their rows fill the step."""
LOSS_SHARE = 0.025
"""Time that guessing may lose, of all decoding time."""
PROBE_EVERY = 32
"""After so many steps with guesses one goes without, so that the price of a plain step stays known."""

_MIN_PLAIN_STEPS = 3
_MEMORY = 128
"""Steps after which the ledger has forgotten most."""
_HOPED_ROW_COST = 0.05
"""Price of a guessed row, in plain steps, before any was measured: what it is where memory is the limit."""
_FORGET_EVERY = 256
_MIN_GAIN = 1.02
_MIN_CHANCE = 0.02


class Lane(Enum):
    """Where the guesses of a step come from, since that is part of their price."""

    FOUND = "found"
    """In a text."""
    MODEL = "model"
    """From a draft model, at least one of them."""


_Group = tuple[int, Lane]


class StepCosts:
    """Seconds of a step by sequences and guessed rows, each learned from steps like it."""

    def __init__(self) -> None:
        self._plain: dict[int, Samples] = {}
        self._ratios: dict[_Group, dict[int, Samples]] = {}
        self._prices: dict[_Group, list[float]] = {}
        self._until_forgetting = _FORGET_EVERY

    def plain(self, num_sequences: int) -> float | None:
        """Return the mean seconds of the last steps without guesses; None while too few were seen."""
        samples = self._plain.get(num_sequences)
        return samples.mean if samples is not None and samples.count >= _MIN_PLAIN_STEPS else None

    def prices(self, num_sequences: int, lane: Lane = Lane.FOUND) -> list[float]:
        """Return the price of 0, 1, 2 ... guessed rows in plain steps, up to twice what was ever tried.

        Between two measured numbers the price is interpolated, beyond the last it goes on as it rose so far.
        """
        group = (num_sequences, lane)
        if group not in self._prices:
            self._prices[group] = _curve(self._ratios.get(group, {}))
        return self._prices[group]

    def record(self, num_sequences: int, num_drafted: int, seconds: float, lane: Lane = Lane.FOUND) -> None:
        """Learn from a step."""
        if not num_drafted:
            self._plain.setdefault(num_sequences, Samples()).add(seconds)
            self._until_forgetting -= 1
            if not self._until_forgetting:
                self._forget()
            return
        if self.plain(num_sequences) is not None:
            known = self._ratios.setdefault((num_sequences, lane), {})
            known.setdefault(num_drafted, Samples()).add(seconds / self._plain[num_sequences].value)
            self._prices.pop((num_sequences, lane), None)

    def _forget(self) -> None:
        """Forget the oldest figures: what was measured under a passing load is tried again some day."""
        self._until_forgetting = _FORGET_EVERY
        for group, known in self._ratios.items():
            for rows in list(known):
                known[rows].forget_one()
                if not known[rows].count:
                    del known[rows]
            self._prices.pop(group, None)


def _curve(known: dict[int, Samples]) -> list[float]:
    """Return prices that rise with the rows and follow what is known of some of them."""
    # (rows, price, weight); a row more is never cheaper, so neighbours that say so are averaged.
    points: list[tuple[list[int], float, int]] = [([0], 1.0, 16)]
    for rows in sorted(known):
        points.append(([rows], known[rows].value, known[rows].count))
        while len(points) > 1 and points[-1][1] < points[-2][1]:
            (left, low, first), (right, high, second) = points[-2:]
            mean = (low * first + high * second) / (first + second)
            points[-2:] = [(left + right, mean, first + second)]
    prices: list[float] = []
    for rows, price in ((rows, price) for group, price, _ in points for rows in group):
        last, missing = (prices[-1] if prices else price), rows - len(prices) + 1
        prices.extend(last + (price - last) * step / missing for step in range(1, missing + 1))
    tried = len(prices) - 1
    rise = (prices[tried] - prices[0]) / tried if tried else _HOPED_ROW_COST
    more = min(max(tried, 2), MAX_DRAFTED_ROWS - tried)
    prices.extend(prices[tried] + rise * step for step in range(1, more + 1))
    return [price / prices[0] for price in prices]


class Chances:
    """How often guesses of a kind came true, for one sequence on the ground of all of them.

    Kinds are small integers: what a guess rests on, see `kind_of_match`.
    """

    __slots__ = ("_hits", "_parent", "_priors", "_tries", "_weight")

    def __init__(self, priors: Sequence[float], weight: float, parent: Chances | None = None) -> None:
        """Start at `priors` (or what `parent` has learned by the time of asking), worth `weight` trials."""
        self._priors = priors
        self._weight = weight
        self._parent = parent
        self._hits = [0.0] * len(priors)
        self._tries = [0.0] * len(priors)

    def child(self) -> Chances:
        """Return the chances of one sequence, which start at these and teach them."""
        return Chances(self._priors, 4, self)

    def of(self, kind: int) -> float:
        """Return the probability that a guess of a kind comes true."""
        ground = self._priors[kind] if self._parent is None else self._parent.of(kind)
        return (self._hits[kind] + self._weight * ground) / (self._tries[kind] + self._weight)

    def learn(self, kind: int, came_true: bool) -> None:
        """Count one guess that was put to the test."""
        self._hits[kind] += came_true
        self._tries[kind] += 1
        if self._tries[kind] > 64:
            self._hits[kind] /= 2
            self._tries[kind] /= 2
        if self._parent is not None:
            self._parent.learn(kind, came_true)


@dataclass(slots=True)
class SpeculationStats:
    """Counts since the engine started; read from another thread they may be one step old."""

    num_steps: int = 0
    """Steps in which sequences decoded and nothing else happened, few enough of them to guess."""
    num_guessing_steps: int = 0
    num_drafted: int = 0
    """Guessed tokens that were computed."""
    num_accepted: int = 0
    """Those that came true."""
    lost_s: float = 0.0
    """What guessing lost lately and has not won back, by the ledger."""


class Payoff:
    """Decides how many guesses each sequence gets in a step."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.stats = SpeculationStats()
        self._total_s = 0.0
        self._since_probe = 0

    def wants(self, num_sequences: int, lanes: Sequence[Lane] = (Lane.FOUND,)) -> bool:
        """True when any number of certain guesses could pay, and the ledger allows to lose."""
        if self.costs.plain(num_sequences) is None or self.stats.lost_s > LOSS_SHARE * self._total_s:
            return False
        if self._since_probe >= PROBE_EVERY:
            return False
        return any(
            (num_sequences + rows) / price > num_sequences
            for lane in lanes
            for rows, price in enumerate(self.costs.prices(num_sequences, lane))
        )

    def choose(self, chances: Sequence[Sequence[float]], lane: Lane = Lane.FOUND) -> tuple[list[int], float]:
        """Return how many guesses each sequence gets, and how much faster that is expected to be, given the
        probability that each sequence's 1st, 2nd, ... guess and all before it come true.

        Guesses are taken by probability over all sequences; the number with the most tokens per second wins.
        """
        num_sequences = len(chances)
        counts = [0] * num_sequences
        prices = self.costs.prices(num_sequences, lane)
        ranked = sorted(
            (-chance, depth, index)
            for index, row in enumerate(chances)
            for depth, chance in enumerate(row)
            if chance > _MIN_CHANCE
        )
        tokens = float(num_sequences)
        best, best_rate = 0, tokens
        for rows, (chance, _, _) in enumerate(ranked[: len(prices) - 1], start=1):
            tokens -= chance
            if tokens / prices[rows] > best_rate * (1 if best else _MIN_GAIN):
                best, best_rate = rows, tokens / prices[rows]
        for _, _, index in ranked[:best]:
            counts[index] += 1
        return counts, best_rate / num_sequences

    def record(
        self,
        num_sequences: int,
        num_drafted: int,
        num_tokens: int,
        seconds: float,
        lane: Lane = Lane.FOUND,
    ) -> None:
        """Learn from a step of `num_sequences` that computed `num_drafted` guesses and gave `num_tokens`."""
        stats = self.stats
        plain = self.costs.plain(num_sequences)
        self.costs.record(num_sequences, num_drafted, seconds, lane)
        stats.num_steps += 1
        self._total_s += seconds - self._total_s / _MEMORY
        stats.lost_s -= stats.lost_s / _MEMORY
        if not num_drafted:
            self._since_probe = 0
            return
        self._since_probe += 1
        stats.num_guessing_steps += 1
        stats.num_drafted += num_drafted
        stats.num_accepted += num_tokens - num_sequences
        if plain is not None:
            # Gains are not saved up: a text that guessing does not help must not pay with those of another.
            stats.lost_s = max(0.0, stats.lost_s + seconds - plain * num_tokens / num_sequences)
