"""Seeded prompts under random load return what each returns alone: the promise that load breaks first."""

import random
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest

from bise.engine.engine import Engine
from bise.engine.interrupt import Interrupted, Interrupts
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.engine.speculation import Speculation
from bise.engine.swap import SwapSpace

PREFIXES = [
    tuple(random.Random(seed).randrange(256) for _ in range(length)) for seed, length in [(1, 70), (2, 40)]
]


def make_requests(count: int) -> list[Request]:
    rng = random.Random(11)
    made: list[Request] = []
    for index in range(count):
        start = rng.choice([(), *PREFIXES])
        params = SamplingParams(
            seed=index,
            temperature=rng.choice([0, 0.7, 1.1]),
            top_p=rng.choice([1, 0.9]),
            repetition_penalty=rng.choice([1, 1.2]),
            max_tokens=rng.randrange(1, 28),
            logprobs=rng.choice([None, 2]),
            ignore_eos=True,
        )
        made.append(
            Request(
                token_ids=(256, *start, *(rng.randrange(256) for _ in range(rng.randrange(40)))),
                params=params,
                prompt_logprobs=rng.random() < 0.1,
                priority=rng.randrange(3),
                tenant=rng.choice(["a", "b", "c"]),
                use_prefix_cache=rng.random() < 0.85,
            )
        )
    return made


def make_engine(transformer, ops, tokenizer, **options) -> Engine:
    options = {"num_blocks": 60, "threaded": False, **options}
    return Engine(transformer, ops, config=transformer.config, tokenizer=tokenizer, kv_format="q8", **options)


def bits(done):
    return (done.token_ids, done.text, done.logprobs, done.prompt_logprobs, done.finish_reason)


def check(transformer, ops, tokenizer, count: int, **options) -> None:
    requests = make_requests(count)
    quiet = make_engine(transformer, ops, tokenizer, prefix_cache=False)
    alone = [bits(quiet.submit(request).result()) for request in requests]
    busy = make_engine(
        transformer, ops, tokenizer, num_blocks=13, max_step_tokens=48, max_sequences=9,
        speculation=Speculation(), **options,
    )  # fmt: skip
    rng = random.Random(12)
    handles, doomed = [], []
    most = 0
    for request in requests:
        handles.append(busy.submit(request))
        if rng.random() < 0.3:  # others that leave early disturb nobody
            doomed.append(busy.submit(rng.choice(requests)))
        for _ in range(rng.choice([0, 0, 1, 3, 9])):
            busy.step()
            most = max(most, busy.stats().num_running)
        if doomed and rng.random() < 0.4:
            doomed.pop(rng.randrange(len(doomed))).cancel()
    for handle in doomed:
        handle.cancel()
    reasons: Counter[FinishReason] = Counter()
    for index, (handle, expected) in enumerate(zip(handles, alone, strict=True)):
        done = handle.result()
        reasons[done.finish_reason] += 1
        assert bits(done) == expected, f"request {index} differs"
    stats = busy.stats()
    assert stats.num_free_blocks == stats.num_blocks
    busy._scheduler.check_integrity()
    # What the test is about did happen.
    assert reasons == {FinishReason.LENGTH: count}
    assert most >= 4
    assert stats.num_preemptions > count // 20
    assert stats.cached_tokens > 0
    if options:
        swap = busy._memory.swap
        assert swap.num_saved > 0
        assert (swap._free_bytes, swap._stored) == (options["swap_bytes"], {})


@pytest.mark.parametrize("model", ["interleaved", "8 experts"])
def test_seeded_prompts_under_random_load_return_what_they_return_alone(cpu_model, byte_tokenizer, model):
    check(*cpu_model(model, "q4", 1), byte_tokenizer, 60)


def test_with_preempted_sequences_swapped_to_the_host_they_do_too(cpu_model, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)  # whatever fits is stored, fast machine or not
    check(*cpu_model("interleaved", "q4", 1), byte_tokenizer, 60, swap_bytes=1 << 17)


def break_off(interrupts: Interrupts) -> None:
    """Break a step off for whoever comes, not for few only."""
    if interrupts._newcomers():
        raise Interrupted


@pytest.mark.parametrize("model", ["interleaved", "8 experts"])
def test_requests_that_come_within_a_step_and_break_it_off_change_nothing(
    cpu_model, byte_tokenizer, monkeypatch, model
):
    transformer, ops = cpu_model(model, "q4", 1)
    requests = make_requests(60)
    quiet = make_engine(transformer, ops, byte_tokenizer, prefix_cache=False)
    alone = [bits(quiet.submit(request).result()) for request in requests]
    monkeypatch.setattr(Interrupts, "watch", lambda self, step: partial(break_off, self))
    rng, due, handles = random.Random(13), list(requests), []

    def forward(batch, cache=None):
        def layer(index):
            if due and rng.random() < 0.2:
                handles.append(busy.submit(due.pop(0)))
            return cache.layer(index)

        return transformer.forward(batch, SimpleNamespace(layer=layer))

    model = SimpleNamespace(config=transformer.config, forward=forward, logits=transformer.logits)
    busy = Engine(
        model, ops, config=transformer.config, tokenizer=byte_tokenizer, kv_format="q8", num_blocks=13,
        max_step_tokens=48, max_sequences=9, speculation=Speculation(), threaded=False,
    )  # fmt: skip
    while due:
        handles.append(busy.submit(due.pop(0)))
        while busy.step():
            busy._scheduler.check_integrity()
    assert [bits(handle.result()) for handle in handles] == alone
    assert busy._interrupts.count >= 30
    assert busy.stats().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["interleaved", "8 experts"])
def test_1000_seeded_prompts_under_random_load_return_what_they_return_alone(
    cpu_model, byte_tokenizer, model
):
    check(*cpu_model(model, "q4", 2), byte_tokenizer, 1000)
