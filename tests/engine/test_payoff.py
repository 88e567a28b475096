"""The gate under a clock of our own: it gains where guesses come true and loses under 5 % elsewhere."""

import random
from collections.abc import Callable

import pytest

from bise.engine.payoff import LOSS_SHARE, MAX_SEQUENCES, Chances, Payoff, StepCosts
from bise.engine.request import Request, SamplingParams
from bise.engine.scheduler import Step, StepRow
from bise.engine.sequence import Sequence
from bise.engine.speculation import Speculation


def flat(rows: int) -> float:
    """A 7B on a CPU: four rows nearly for the price of one, more at a price each."""
    return 1 + 0.02 * (rows - 1) + 0.2 * max(0, rows - 4)


def steep(rows: int) -> float:
    """A tiny model: every row costs nearly a step."""
    return 1 + 0.8 * (rows - 1)


class World:
    """Sequences whose output is known beforehand, and a clock that steps move on by what their rows cost."""

    def __init__(self, texts: list[list[int]], cost: Callable[[int], float], noise: float = 0) -> None:
        self.now = 0.0
        self.plain = 0.0
        """Seconds the same tokens take one at a time."""
        self.texts = texts
        self.cost = cost
        self.noise = noise
        self.rng = random.Random(0)
        self.speculation = Speculation(clock=lambda: self.now)
        params = SamplingParams(max_tokens=100_000)
        self.sequences = [
            Sequence(Request(token_ids=tuple(text[:4]), params=params), index, 100_000)
            for index, text in enumerate(texts)
        ]

    def add_drafts(self, step: Step, drafts: list[tuple[int, ...]]) -> Step:
        rows = tuple(
            row._replace(num_tokens=1 + len(draft), num_samples=1 + len(draft), draft=draft)
            for row, draft in zip(step.rows, drafts, strict=True)
        )
        return Step(rows, sum(row.num_tokens for row in rows))

    def run(self, num_steps: int) -> "World":
        for _ in range(num_steps):
            left = [
                (sequence, text)
                for sequence, text in zip(self.sequences, self.texts, strict=True)
                if len(sequence.token_ids) + 13 < len(text)
            ]
            if not left:
                break
            rows = tuple(StepRow(sequence, len(sequence.token_ids) - 1, 1, 1, 0, 0) for sequence, _ in left)
            step = self.speculation.extend(Step(rows, len(rows)), self)
            self.now += self.cost(step.num_tokens) * (10 if self.rng.random() < self.noise else 1)
            self.plain += self._choose(step) * self.cost(len(rows)) / len(rows)
            self.speculation.settle(step)
        return self

    def _choose(self, step: Step) -> int:
        num_tokens = 0
        for row in step.rows:
            sequence = row.sequence
            text = self.texts[self.sequences.index(sequence)]
            for guess in (*row.draft, None):
                sequence.token_ids.append(text[len(sequence.token_ids)])
                num_tokens += 1
                if sequence.token_ids[-1] != guess:
                    break
        return num_tokens


def unrepeated(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1 << 20) for _ in range(length)]


def misleading(length: int) -> list[int]:
    """Every pair of tokens was seen before, and what followed it never comes again."""
    rng = random.Random(1)
    text: list[int] = []
    while len(text) < length:
        pair = rng.choice(((1, 2), (3, 4)))
        text += [*pair, 10 + len(text)]
    return text


def copied(length: int) -> list[int]:
    return [*range(1000, 1200)] * (length // 200)


@pytest.mark.parametrize("cost", [flat, steep])
@pytest.mark.parametrize("text", [unrepeated(3000), misleading(3000)])
def test_text_that_does_not_repeat_itself_loses_less_than_5_percent(cost, text):
    for num_steps in (100, 300, 2500):
        world = World([text], cost).run(num_steps)
        assert world.now <= 1.05 * world.plain


def test_copied_text_is_several_times_faster_where_rows_are_cheap():
    world = World([copied(4000)], flat).run(4000)
    assert world.now < world.plain / 2.5


def test_rows_as_dear_as_steps_are_given_up_on():
    world = World([copied(4000)], lambda rows: rows).run(3000)
    assert world.now <= 1.05 * world.plain
    assert world.speculation.stats.num_drafted < 200


def test_text_that_changes_its_nature_gains_where_it_can_and_never_loses_5_percent():
    text: list[int] = []
    for part in range(20):
        text += [*range(1000, 1200), *unrepeated(200, part), *misleading(200)]
    world = World([text], flat).run(20_000)
    assert world.now < 0.85 * world.plain
    world = World([text], steep).run(20_000)
    assert world.now <= 1.05 * world.plain


def test_a_machine_that_stalls_now_and_then_does_not_blind_the_gate():
    world = World([copied(8000)], flat, noise=0.03).run(8000)
    assert len(world.sequences[0].token_ids) / world.speculation.stats.num_steps > 2.5


def test_the_price_is_measured_again_when_the_machine_changes():
    world = World([copied(60_000)], steep).run(600)
    world.cost = flat
    before = world.now, world.plain
    world.run(6000)
    assert world.now - before[0] < (world.plain - before[1]) / 2


def test_several_sequences_share_the_rows_that_pay():
    world = World([copied(8000), misleading(2000), copied(8000)], flat).run(600)
    assert world.now < world.plain / 1.35


def test_many_sequences_leave_no_room_for_guesses():
    world = World([copied(800) for _ in range(MAX_SEQUENCES + 1)], flat).run(300)
    assert world.speculation.stats.num_drafted == 0


def test_costs_are_interpolated_and_rise_with_the_rows():
    costs = StepCosts()
    for _ in range(5):
        costs.record(1, 0, 2.0)
    assert costs.plain(1) == 2.0
    assert costs.plain(2) is None
    for _ in range(4):
        costs.record(1, 2, 3.0)
        costs.record(1, 6, 6.0)
    assert costs.prices(1)[:8] == pytest.approx([1, 1.25, 1.5, 1.875, 2.25, 2.625, 3, 3 + 1 / 3])
    costs.record(1, 4, 40.0)
    assert costs.prices(1) == sorted(costs.prices(1))
    assert costs.prices(1)[4] < 10


def test_a_sequence_starts_at_what_the_others_taught():
    everyone = Chances([0.5], 8)
    first = everyone.child()
    for _ in range(200):
        first.learn(0, True)
    assert everyone.child().of(0) > 0.9
    second = everyone.child()
    for _ in range(20):
        second.learn(0, False)
    assert second.of(0) < 0.3 < 0.6 < first.of(0)


def test_the_ledger_closes_the_gate_until_time_has_paid_for_the_loss():
    payoff = Payoff()
    for _ in range(10):
        payoff.record(1, 0, 1, 1.0)
    assert payoff.wants(1)
    payoff.record(1, 2, 1, 1 + 40 * LOSS_SHARE)
    assert not payoff.wants(1)
    for _ in range(40):
        payoff.record(1, 0, 1, 1.0)
    assert payoff.wants(1)
