"""Engine.progress: who waits before a request, and how much of its prompt is computed."""

from bise.engine.progress import Progress
from bise.engine.request import Request, SamplingParams


def ask(num_tokens):
    return Request(
        token_ids=(256, *b"x" * (num_tokens - 1)),
        params=SamplingParams(max_tokens=3, seed=1, ignore_eos=True),
    )


def test_a_request_hears_how_many_wait_before_it_and_then_how_far_its_prompt_is(hash_engine):
    engine, _ = hash_engine(max_sequences=1, max_step_tokens=8)
    first, second, third = (engine.submit(ask(20)) for _ in range(3))
    assert engine.progress(third) == Progress(before=2, prefilled=0)
    engine.step()
    assert engine.progress(first) == Progress(before=0, prefilled=8)
    assert engine.progress(second) == Progress(before=0, prefilled=0)
    assert engine.progress(third) == Progress(before=1, prefilled=0)
    engine.step()
    assert engine.progress(first).prefilled == 16
    first.result()
    engine.step()
    assert engine.progress(third) == Progress(before=0, prefilled=0)
