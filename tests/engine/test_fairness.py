"""Fair shares: a tenant's backlog is that tenant's own, levels come first, age beats levels, nobody waits for
ever.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.cache.pool import BlockPool
from bise.cache.prefix import PrefixCache
from bise.engine import fairness
from bise.engine.fairness import CREDIT_TOKENS, MAX_ABSENT, FairQueue
from bise.engine.pace import Prices
from bise.engine.request import Request, SamplingParams
from bise.engine.scheduler import Scheduler
from bise.engine.sequence import Sequence, Status

LARGE = Prices(step=32.0, row=1.0)
"""Reading the weights of a model too large for the caches takes as long as computing some 30 tokens of it."""
SMALL = Prices(step=5.0, row=3.0)
"""The embedded model on one core: nothing to read, and what is chosen costs more than what is computed."""
DEVICE = Prices(step=400.0, row=1.0)


class Simulation:
    """A scheduler under a clock of computed tokens; every sequence that is caught up gets one more token."""

    def __init__(
        self, *, num_blocks=400, max_step_tokens=256, max_sequences=8, is_cached=False, prices=LARGE
    ):
        self.prices = prices
        self.left_out: set[Sequence] = set()
        self.is_roomy = num_blocks >= 400
        pools = [BlockPool(num_blocks)]
        self.scheduler = Scheduler(
            pools,
            [None],
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            prefix=PrefixCache(pools, [None]) if is_cached else None,
        )
        self.now = 0.0
        self.arrived: dict[Sequence, float] = {}
        self.first_token: dict[Sequence, float] = {}
        self.computed: Counter[str] = Counter()
        self.count = 0

    def submit(self, tenant, num_prompt, max_tokens, priority=0):
        self.count += 1
        request = Request(
            token_ids=tuple(range(self.count, self.count + num_prompt)),
            params=SamplingParams(max_tokens=max_tokens),
            tenant=tenant,
            priority=priority,
        )
        sequence = Sequence(request, self.count, max_tokens)
        self.scheduler.add(sequence)
        self.arrived[sequence] = self.now
        return sequence

    def step(self):
        waited = [s for s in self.scheduler.running if s.num_pending == 1 and s in self.left_out]
        step = self.scheduler.plan(prices=self.prices)
        if step is None:
            return False
        self.now += self.prices.step + step.num_tokens + (self.prices.row - 1) * step.num_decoded
        served = {row.sequence for row in step.rows}
        running = self.scheduler.running
        if self.is_roomy:  # else blocks may be missing
            assert all(s in served for s in waited if s in running), "left out of two steps in a row"
        self.left_out = {s for s in running if s.num_pending == 1 and s not in served}
        self.scheduler.complete(step)
        for row in step.rows:
            sequence = row.sequence
            self.computed[sequence.request.tenant] += row.num_tokens
            if row.num_samples:
                self.first_token.setdefault(sequence, self.now)
                sequence.token_ids.append(1)
                if sequence.num_output == sequence.max_tokens:
                    self.scheduler.finish(sequence)
        return True

    def wait_for(self, sequence, limit=100_000):
        """Step until a sequence has its first token; returns the time it took from its arrival."""
        for _ in range(limit):
            if sequence in self.first_token:
                return self.first_token[sequence] - self.arrived[sequence]
            self.step()
        raise AssertionError("the sequence starves")

    def finish(self, sequence, limit=100_000):
        """Step until a sequence is over."""
        for _ in range(limit):
            if sequence.status is Status.FINISHED:
                return self.now
            self.step()
        raise AssertionError("the sequence starves")


@pytest.mark.parametrize("num_prompt", [1, 5, 20, 200, 600, 1500])
@pytest.mark.parametrize("num_steps", [1, 7, 40, 333])
@pytest.mark.parametrize("prices", [LARGE, SMALL, DEVICE])
def test_a_backlog_of_1000_requests_does_not_double_anothers_time_to_first_token(
    num_prompt, num_steps, prices
):
    quiet = Simulation(prices=prices)
    alone = quiet.wait_for(quiet.submit("small", num_prompt, 20))
    crowded = Simulation(prices=prices)
    rng = random.Random(num_steps)
    for _ in range(1000):
        crowded.submit("large", rng.randrange(50, 400), rng.randrange(20, 200))
    for _ in range(num_steps):
        crowded.step()
    assert len(crowded.scheduler.running) == 8 or num_steps == 1
    shared = crowded.wait_for(crowded.submit("small", num_prompt, 20))
    assert len(crowded.scheduler.waiting) > 900 - num_steps
    assert shared <= 2 * alone, (shared, alone)


def test_a_backlog_that_is_old_does_not_go_ahead_of_who_comes(monkeypatch):
    monkeypatch.setattr(fairness, "AGING_TOKENS", 100)
    alone = (quiet := Simulation()).wait_for(quiet.submit("small", 20, 20))
    crowded = Simulation()
    for _ in range(300):
        crowded.submit("large", 100, 50)
    for _ in range(200):
        crowded.step()
    assert crowded.computed["large"] > 20 * fairness.AGING_TOKENS
    assert crowded.wait_for(crowded.submit("small", 20, 20)) <= 2 * alone


@pytest.mark.parametrize(("aging", "waits"), [(2000, False), (1 << 60, True)])
def test_a_stream_of_new_tenants_does_not_keep_an_old_one_waiting_for_ever(monkeypatch, aging, waits):
    """The second case is the positive control: without hunger it does."""
    monkeypatch.setattr(fairness, "AGING_TOKENS", aging)
    simulation = Simulation(max_sequences=1)
    simulation.submit("waits", 40, 400, priority=5)
    simulation.finish(simulation.submit("old", 100, 100))
    old = simulation.submit("old", 40, 5)
    for number in range(300):
        simulation.submit(f"new {number}", 40, 3)
        simulation.step()
    assert (old.status is Status.WAITING) == waits


@pytest.mark.parametrize(("prices", "fewest"), [(DEVICE, 7), (LARGE, 7), (SMALL, 0)])
def test_who_decodes_waits_for_anothers_first_token_only_where_that_would_come_late(prices, fewest):
    simulation = Simulation(prices=prices)
    for _ in range(20):
        simulation.submit("large", 40, 400)
    for _ in range(10):
        simulation.step()
    simulation.submit("small", 5, 1)
    before = Counter(simulation.computed)
    simulation.step()
    assert simulation.computed["small"] == 5
    assert fewest <= simulation.computed["large"] - before["large"] <= 7
    assert bool(simulation.left_out) == (fewest < 7)
    before = Counter(simulation.computed)
    simulation.step()
    assert simulation.computed["large"] - before["large"] >= 7


def test_first_tokens_in_every_step_hold_nobody_back_for_long():
    simulation = Simulation(prices=SMALL)
    talking = [simulation.submit("large", 40, 300) for _ in range(7)]
    for _ in range(20):
        simulation.step()
    seen = [sequence.num_output for sequence in talking]
    for number in range(100):
        simulation.submit(f"new {number}", 5, 1)
        simulation.step()
    assert all(sequence.num_output >= count + 50 for sequence, count in zip(talking, seen, strict=True))


def test_without_tenants_the_same_backlog_comes_first():
    """The positive control: where everyone is one tenant, the newcomer waits for all 1,000."""
    crowded = Simulation()
    for _ in range(1000):
        crowded.submit("", 100, 20)
    crowded.step()
    assert crowded.wait_for(crowded.submit("", 200, 20)) > 100_000


def test_two_tenants_with_work_get_equal_numbers_of_tokens():
    simulation = Simulation()
    for _ in range(300):
        simulation.submit("short", 40, 10)
        simulation.submit("long", 400, 100)
    for _ in range(400):
        simulation.step()
    assert simulation.scheduler.waiting
    shares = [simulation.computed[name] for name in ("short", "long")]
    assert max(shares) / min(shares) < 1.2, shares


def test_a_pause_earns_a_bounded_credit():
    simulation = Simulation(max_sequences=2)
    for _ in range(200):
        simulation.submit("busy", 50, 10)
    for _ in range(100):
        simulation.step()
    simulation.computed.clear()
    for _ in range(100):
        simulation.submit("late", 50, 10)
    for _ in range(200):
        simulation.step()
    assert {sequence.request.tenant for sequence in simulation.scheduler.waiting} == {"busy", "late"}
    assert simulation.computed["late"] - simulation.computed["busy"] < CREDIT_TOKENS + 200


def test_within_a_tenant_and_level_the_first_to_come_is_the_first_to_start():
    simulation = Simulation(max_sequences=1)
    sequences = [simulation.submit("a", 30, 2) for _ in range(5)]
    while simulation.step():
        pass
    starts = [simulation.first_token[sequence] for sequence in sequences]
    assert starts == sorted(starts)


def test_a_better_level_makes_a_running_sequence_give_way():
    simulation = Simulation(max_sequences=2)
    first, second = simulation.submit("a", 40, 500, priority=5), simulation.submit("a", 40, 500, priority=5)
    for _ in range(3):
        simulation.step()
    urgent = simulation.submit("b", 40, 5, priority=0)
    simulation.step()
    assert (first.status, second.status, urgent.status) == (Status.RUNNING, Status.WAITING, Status.RUNNING)
    simulation.finish(urgent)
    simulation.finish(second)


def test_the_last_sequence_of_a_tenant_does_not_give_way_to_an_equal():
    simulation = Simulation(max_sequences=2)
    one, two = simulation.submit("a", 40, 100), simulation.submit("b", 40, 100)
    simulation.step()
    simulation.submit("c", 40, 100)
    simulation.step()
    assert simulation.scheduler.running == [one, two]
    assert simulation.scheduler.num_preemptions == 0


def test_nobody_gives_way_in_vain():
    simulation = Simulation(num_blocks=20, max_sequences=8)
    for _ in range(4):
        simulation.submit("a", 100, 20)
    simulation.step()
    simulation.submit("b", 19 * 32, 10)
    simulation.step()
    assert simulation.scheduler.num_preemptions == 0


def test_age_makes_up_for_priority(monkeypatch):
    monkeypatch.setattr(fairness, "AGING_TOKENS", 500)
    simulation = Simulation(max_sequences=1)
    old = simulation.submit("a", 40, 5, priority=3)
    simulation.submit("b", 40, 5, priority=0)
    for _ in range(100):
        simulation.finish(simulation.submit("b", 40, 5, priority=0))
    assert old.status is Status.FINISHED


def test_without_age_a_stream_of_better_priorities_would_starve_the_rest(monkeypatch):
    """The positive control of the test above."""
    monkeypatch.setattr(fairness, "AGING_TOKENS", 1 << 60)
    simulation = Simulation(max_sequences=1)
    old = simulation.submit("a", 40, 5, priority=3)
    simulation.submit("b", 40, 5, priority=0)
    for _ in range(100):
        simulation.finish(simulation.submit("b", 40, 5, priority=0))
    assert old.num_output == 0


def test_the_eldest_of_the_best_level_finishes_however_many_tenants_come():
    simulation = Simulation(num_blocks=16, max_sequences=3)
    eldest = simulation.submit("old", 100, 200)
    simulation.step()
    computed = 0
    for number in range(2000):
        if eldest.status is Status.FINISHED:
            break
        simulation.submit(f"new {number}", 60, 40)
        simulation.step()
        assert eldest.num_computed >= computed
        computed = eldest.num_computed
    assert eldest.status is Status.FINISHED


def test_work_that_is_done_again_is_charged_once():
    simulation = Simulation(num_blocks=8, max_sequences=4)
    sequences = [simulation.submit("a", 40, 100), simulation.submit("a", 40, 100)]
    queue = simulation.scheduler.waiting
    while any(sequence.num_output < 90 for sequence in sequences):
        simulation.step()
    assert simulation.scheduler.num_preemptions >= 1
    assert simulation.computed["a"] > 2 * 130
    assert queue._served["a"] + CREDIT_TOKENS <= 2 * 140


def test_what_the_prefix_cache_spares_is_not_charged():
    simulation = Simulation(is_cached=True)
    request = Request(token_ids=(1,) * 129, params=SamplingParams(max_tokens=50))
    first, second = (Sequence(request, number, 50) for number in (1, 2))
    for sequence in (first, second):
        sequence.salt = b"salt"
        simulation.scheduler.add(sequence)
        simulation.arrived[sequence] = 0.0
        simulation.step()
    assert second.num_cached == 128
    assert simulation.scheduler.waiting._served[""] + CREDIT_TOKENS == 130 + 1


def test_tenants_that_are_gone_are_forgotten_in_the_end():
    queue = FairQueue()
    anchor = Sequence(Request(token_ids=(1,), tenant="anchor"), 0, 1)
    queue.enter(anchor)
    for number in range(MAX_ABSENT + 500):
        sequence = Sequence(Request(token_ids=(1,), tenant=f"t{number}"), number + 1, 1)
        queue.enter(sequence)
        queue.push(sequence)
        queue.pop(sequence)
        queue.leave(sequence)
    assert len(queue._served) <= MAX_ABSENT + 2
    queue.leave(anchor)
    assert not queue._served


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 120), st.integers(1, 60), st.integers(0, 2),
                  st.integers(0, 6), st.integers(0, 9)),
        min_size=1, max_size=14,
    ),
    num_blocks=st.integers(6, 30),
    max_sequences=st.integers(1, 4),
    is_cached=st.booleans(),
)  # fmt: skip
def test_everyone_finishes_whoever_comes_aborts_and_gives_way(jobs, num_blocks, max_sequences, is_cached):
    simulation = Simulation(
        num_blocks=num_blocks, max_step_tokens=64, max_sequences=max_sequences, is_cached=is_cached
    )
    aborted = set()
    sequences = []
    for tenant, num_prompt, max_tokens, priority, pause, abort in jobs:
        sequence = simulation.submit(tenant, num_prompt, max_tokens, priority)
        sequence.salt = tenant.encode() if is_cached else None
        sequences.append(sequence)
        for _ in range(pause):
            simulation.step()
            simulation.scheduler.check_integrity()
        victim = sequences[abort % len(sequences)]
        if abort > 6 and victim.status is not Status.FINISHED:
            simulation.scheduler.finish(victim)
            aborted.add(victim)
    for _ in range(20_000):
        if not simulation.step():
            break
        simulation.scheduler.check_integrity()
    assert all(sequence.status is Status.FINISHED for sequence in sequences)
    assert all(s.num_output == s.max_tokens for s in sequences if s not in aborted)
    assert not simulation.scheduler.waiting._served
