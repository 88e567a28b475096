"""Pace: steps near a duration, whatever the machine, and the same output."""

import pytest

from bise.engine.pace import ALONE, CHUNK, MIN_TOKENS, Pace
from bise.engine.request import Request, SamplingParams


def test_steps_follow_the_speed_of_the_machine():
    pace = Pace(0.5)
    assert pace.budget(2) == MIN_TOKENS
    for _ in range(60):
        pace.observe(100, 0, 0.1)  # 1,000 tokens per second
    assert pace.budget(2) in (499, 500)
    assert pace.budget(1) in (1999, 500 * ALONE)
    for _ in range(60):
        pace.observe(100, 0, 2.0)
    assert pace.budget(2) == MIN_TOKENS


def test_small_steps_tell_nothing_about_large_ones():
    pace = Pace(0.5)
    pace.observe(0, 1, 0.2)
    assert pace.budget(2) == MIN_TOKENS
    pace.observe(100, 0, 0.1)
    pace.observe(0, 1, 0.2)
    assert pace.budget(2) == 500


def learned(step_s: float, row_s: float, prompt_s: float) -> Pace:
    """Return a pace that saw steps of such a machine, in the order in which a server meets them."""
    pace = Pace(0.25)
    for num_prompt, num_decoded in [(64, 0), (0, 1), (100, 1), (0, 2), (200, 3), (0, 16), (40, 15)] * 40:
        pace.observe(num_prompt, num_decoded, step_s + row_s * num_decoded + prompt_s * num_prompt)
    return pace


@pytest.mark.parametrize("machine", [(0.3e-3, 0.15e-3, 0.05e-3), (0.1, 0.02, 0.02), (0.01, 3e-5, 2e-5)])
def test_the_price_of_a_step_and_of_a_row_is_learned_from_steps_of_all_kinds(machine):
    step_s, row_s, prompt_s = machine
    prices = learned(*machine).prices
    assert prices.step == pytest.approx(step_s / prompt_s, rel=0.1)
    assert prices.row == pytest.approx(row_s / prompt_s, rel=0.1)


def test_before_several_sequences_decoded_a_row_is_taken_for_half_of_a_single_step():
    pace = Pace(0.25)
    for num_prompt, num_decoded in [(100, 0), (0, 1)] * 30:
        pace.observe(num_prompt, num_decoded, 0.004 + 0.001 * num_prompt)
    assert pace.prices == pytest.approx((2, 2), rel=0.1)


def test_a_step_is_no_longer_than_what_makes_its_own_price_small():
    small = learned(0.5e-3, 0.15e-3, 0.05e-3)
    assert small.budget(3, 2) == pytest.approx(20 * 10 + 2, abs=20)
    assert learned(0.1e-3, 0.15e-3, 0.05e-3).budget(3, 2) == CHUNK + 2
    assert small.budget(1) > 10_000
    assert learned(0.1, 0.02, 0.02).budget(3, 2) == MIN_TOKENS


class Clock:
    """A machine of 100 tokens per second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_an_engine_keeps_the_pace_and_its_output(hash_engine):
    clock = Clock()
    engine, model = hash_engine(clock=clock, pace=Pace(0.5))
    forward = model.forward

    def timed(batch, cache):
        clock.now += len(batch.token_ids) / 100
        return forward(batch, cache)

    model.forward = timed
    prompt = Request(token_ids=(256,) * 400, params=SamplingParams(max_tokens=4, seed=1))
    talk = Request(token_ids=(256, 5), params=SamplingParams(max_tokens=40, seed=2, ignore_eos=True))
    handles = [engine.submit(talk), engine.submit(prompt)]
    found = [handle.result() for handle in handles]
    sizes = [len(batch.token_ids) for batch in model.batches]
    assert sizes[0] == MIN_TOKENS
    assert max(sizes) <= 51
    plain, _ = hash_engine()
    assert [done.token_ids for done in found] == [plain.submit(r).result().token_ids for r in (talk, prompt)]
