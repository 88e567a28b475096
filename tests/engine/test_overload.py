"""Three times the load that an engine bears: what it took is finished at its usual rate, the rest refused."""

import pytest

from bise.engine.request import FinishReason, Request, SamplingParams
from bise.errors import QueueFullError

STEPS = 300


def offered(engine, per_step: float):
    """Offer `per_step` requests before each of `STEPS` steps, then none until all are done.

    Returns (output tokens per step, the answers, refusals).
    """
    due, handles, refusals, num_steps = 0.0, [], [], 0
    while num_steps < STEPS or engine.stats().num_running:
        due += per_step if num_steps < STEPS else 0
        while due >= 1:
            due -= 1
            params = SamplingParams(max_tokens=16, seed=1, ignore_eos=True)
            tokens = (256, *b"a prompt of some length", len(handles) % 256)
            try:
                handles.append(engine.submit(Request(token_ids=tokens, params=params)))
            except QueueFullError as error:
                refusals.append(error)
        engine.step()
        num_steps += 1
    answers = [handle.result() for handle in handles]
    return sum(len(done.token_ids) for done in answers) / num_steps, answers, refusals


@pytest.mark.parametrize("num_blocks", [64, 5])
def test_at_three_times_the_capacity_the_output_keeps_its_rate(hash_engine, num_blocks):
    # Four sequences of 16 tokens: a quarter of a request per step is what it can do.
    options = {"num_blocks": num_blocks, "max_sequences": 4, "max_queue": 8, "prefix_cache": False}
    peak, *_ = offered(hash_engine(**options)[0], 0.25)
    engine, _ = hash_engine(**options)
    rate, answers, refusals = offered(engine, 0.75)
    assert rate >= 0.9 * peak
    assert {(len(done.token_ids), done.finish_reason) for done in answers} == {(16, FinishReason.LENGTH)}
    assert len(refusals) > STEPS * 0.4
    assert all(refusal.retry_after_s > 0 for refusal in refusals)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
