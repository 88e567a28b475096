"""Scheduler: everyone finishes, no block is lost or owned twice, steps keep to their budget and to the
order.
"""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.cache.pool import BlockPool
from bise.cache.table import blocks_needed, blocks_spanned
from bise.engine.request import Request, SamplingParams
from bise.engine.scheduler import Scheduler
from bise.engine.sequence import Sequence, Status
from bise.errors import ConfigError, MemoryPlanError


class Simulation:
    """Drives a scheduler without a model: each sequence that is caught up gets one more token."""

    def __init__(self, windows=(None,), num_blocks=(16,), max_step_tokens=64, max_sequences=4):
        self.pools = [BlockPool(count) for count in num_blocks]
        self.windows = windows
        self.max_step_tokens = max_step_tokens
        self.max_sequences = max_sequences
        self.scheduler = Scheduler(
            self.pools, windows, max_step_tokens=max_step_tokens, max_sequences=max_sequences
        )
        self.sequences: list[Sequence] = []
        self.num_steps = 0

    def submit(self, num_prompt, max_tokens, priority=0, prompt_logprobs=False):
        request = Request(
            token_ids=(1,) * num_prompt,
            params=SamplingParams(max_tokens=max_tokens),
            priority=priority,
            prompt_logprobs=prompt_logprobs,
        )
        self.scheduler.check_fits(num_prompt + max_tokens)
        sequence = Sequence(request, len(self.sequences), max_tokens)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        step = self.scheduler.plan()
        if step is None:
            return None
        self.num_steps += 1
        self.check(step)
        self.scheduler.complete(step)
        for row in step.rows:
            sequence = row.sequence
            for table in sequence.tables:
                if table.window is not None:
                    assert table.num_held <= blocks_spanned(table.window)
            if row.num_samples:
                sequence.token_ids.append(1)
            if not sequence.num_pending or (row.num_samples and sequence.num_output == sequence.max_tokens):
                self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        return step

    def check(self, step):
        assert 1 <= step.num_tokens == sum(row.num_tokens for row in step.rows) <= self.max_step_tokens
        assert len({id(row.sequence) for row in step.rows}) == len(step.rows) <= self.max_sequences
        for row in step.rows:
            assert row.num_tokens >= 1
            assert row.sequence.status is Status.RUNNING
            assert row.first == row.sequence.num_computed
            for position in (row.first, row.first + row.num_tokens - 1):
                assert all(table.slot(position) >= 0 for table in row.sequence.tables)
        first = min(
            self.scheduler.running, key=lambda sequence: (sequence.request.priority, sequence.arrival)
        )
        assert any(row.sequence is first for row in step.rows), "the first in order does not advance"

    def run(self, limit=10_000):
        while self.step() is not None:
            assert self.num_steps < limit, "somebody starves"


REQUESTS = st.lists(
    st.tuples(st.integers(1, 150), st.integers(0, 60), st.integers(0, 2), st.booleans(), st.integers(0, 12)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(
    requests=REQUESTS,
    windows=st.sampled_from([(None,), (48,), (None, 48), (200, 16)]),
    spare=st.integers(0, 12),
    max_step_tokens=st.sampled_from([4, 7, 32, 64, 500]),
    max_sequences=st.integers(1, 4),
    abort_seed=st.integers(0, 1 << 30),
)
def test_everyone_finishes_and_no_block_is_lost_under_random_arrival_and_abort(
    requests, windows, spare, max_step_tokens, max_sequences, abort_seed
):
    longest = max(prompt + output for prompt, output, *_ in requests)
    blocks = tuple(blocks_needed(longest, window) + spare for window in windows)
    simulation = Simulation(windows, blocks, max_step_tokens, max_sequences)
    rng = random.Random(abort_seed)
    aborted: set[int] = set()
    for prompt, output, priority, scores, pause in requests:
        simulation.submit(prompt, output, priority, scores)
        for _ in range(pause):
            simulation.step()
        alive = [sequence for sequence in simulation.sequences if sequence.status is not Status.FINISHED]
        if alive and rng.random() < 0.25:
            victim = rng.choice(alive)
            simulation.scheduler.finish(victim)
            aborted.add(victim.arrival)
            simulation.scheduler.check_integrity()
    simulation.run()
    for sequence in simulation.sequences:
        assert sequence.status is Status.FINISHED
        if sequence.arrival not in aborted:
            assert sequence.num_output == sequence.max_tokens
            if sequence.request.prompt_logprobs:
                assert sequence.num_scored == sequence.num_prompt - 1
    assert all(pool.num_used == 0 for pool in simulation.pools)


def test_decodes_keep_their_token_while_a_prefill_takes_the_rest_of_the_budget():
    simulation = Simulation(num_blocks=(64,), max_step_tokens=8)
    a = simulation.submit(3, 20)
    simulation.step()
    b = simulation.submit(12, 5)
    step = simulation.step()
    assert [(row.sequence, row.first, row.num_tokens, row.num_samples) for row in step.rows] == [
        (a, 3, 1, 1),
        (b, 0, 7, 0),
    ]
    step = simulation.step()
    assert [(row.sequence, row.first, row.num_tokens, row.num_samples) for row in step.rows] == [
        (a, 4, 1, 1),
        (b, 7, 5, 1),
    ]


def test_a_prefill_of_the_first_in_order_leaves_room_for_every_decode_behind_it():
    simulation = Simulation(num_blocks=(64,), max_step_tokens=4)
    decoding = [simulation.submit(1, 30, priority=1) for _ in range(3)]
    simulation.step()
    long = simulation.submit(30, 1, priority=0)
    simulation.step()
    step = simulation.step()
    assert {row.sequence for row in step.rows} == {long, *decoding}
    assert step.num_tokens == 4


def test_who_waits_for_a_place_is_looked_for_once_a_step_and_looked_up_once(monkeypatch):
    simulation = Simulation(num_blocks=(64,), max_sequences=4)
    looks, walks = [], []
    head, match = simulation.scheduler.waiting.head, simulation.scheduler._book.match
    monkeypatch.setattr(simulation.scheduler.waiting, "head", lambda: (looks.append(1), head())[1])
    monkeypatch.setattr(simulation.scheduler._book, "match", lambda one: (walks.append(one), match(one))[1])
    everyone = [simulation.submit(8, 20) for _ in range(8)]
    simulation.run()
    assert walks == everyone  # once each, as a place is there
    assert len(looks) <= simulation.num_steps + 1 + len(everyone)


def test_waiting_sequences_start_by_priority_then_arrival():
    simulation = Simulation(max_sequences=1, max_step_tokens=64)
    for priority in (2, 1, 2, 0, 1):
        simulation.submit(4, 1, priority)
    order = []
    while (step := simulation.step()) is not None:
        order.append(step.rows[0].sequence.arrival)
    assert order == [3, 1, 4, 0, 2]


def test_nobody_overtakes_the_first_in_the_queue():
    simulation = Simulation(num_blocks=(8,), max_step_tokens=256)
    simulation.submit(100, 30)
    big = simulation.submit(140, 10)
    small = simulation.submit(1, 1)
    simulation.step()
    assert list(simulation.scheduler.waiting) == [big, small]


def test_the_last_in_order_is_preempted_and_computed_again():
    simulation = Simulation(num_blocks=(4,), max_step_tokens=64)
    first = simulation.submit(31, 60)
    second = simulation.submit(31, 60)
    simulation.run()
    assert simulation.scheduler.num_preemptions >= 1
    assert first.num_output == second.num_output == 60


def test_the_first_in_order_is_never_preempted():
    simulation = Simulation(num_blocks=(6,), max_step_tokens=64)
    first = simulation.submit(31, 100)
    for _ in range(3):
        simulation.submit(20, 60)
    computed = 0
    while first.status is not Status.FINISHED:
        simulation.step()
        assert first.num_computed > computed
        computed = first.num_computed
    assert simulation.scheduler.num_preemptions >= 1


def test_a_sequence_that_can_never_fit_is_refused_with_both_numbers():
    simulation = Simulation(num_blocks=(4,))
    simulation.scheduler.check_fits(128)
    with pytest.raises(MemoryPlanError, match=r"129 tokens need 5 KV blocks .* holds 4"):
        simulation.scheduler.check_fits(129)


def test_a_windowed_cache_takes_any_length_once_it_holds_the_window():
    simulation = Simulation(windows=(64,), num_blocks=(blocks_spanned(64),))
    simulation.scheduler.check_fits(1_000_000)
    assert simulation.scheduler.longest(1 << 20) == 1 << 20
    simulation.submit(500, 20)
    simulation.run()


def test_longest_is_what_the_tightest_group_holds():
    assert Simulation(windows=(None, 64), num_blocks=(7, 3)).scheduler.longest(1000) == 7 * 32
    assert Simulation(windows=(64,), num_blocks=(2,)).scheduler.longest(1000) == 64
    assert Simulation(windows=(None,), num_blocks=(7,)).scheduler.longest(100) == 100


def test_prompt_positions_are_scored_once_also_after_preemption():
    simulation = Simulation(num_blocks=(6,), max_step_tokens=8)
    simulation.submit(31, 120)
    scored = simulation.submit(60, 40, prompt_logprobs=True)
    positions = []
    while (step := simulation.step()) is not None:
        for row in step.rows:
            if row.sequence is scored:
                positions.extend(range(row.score_start, row.score_stop))
    assert simulation.scheduler.num_preemptions >= 1
    assert positions == list(range(59))


def test_a_step_must_hold_a_token_of_every_running_sequence():
    with pytest.raises(ConfigError, match="max_sequences"):
        Simulation(max_step_tokens=4, max_sequences=5)


def test_scheduling_needs_neither_torch_nor_arrays():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import bise.cache.pool, bise.cache.table, bise.engine.request, bise.engine.sequence\n"
        "import bise.engine.scheduler"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
