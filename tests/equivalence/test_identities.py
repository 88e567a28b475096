"""Whole-engine identities: what a request returns does not depend on how it was computed.

Exact on the cpu backend, tokens and log-probs alike; on torch in float64 the log-probs may differ in the last
bits of their float32 logits.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from bise.cache.pages import KVCache
from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable, blocks_spanned
from bise.engine.engine import Engine
from bise.engine.request import Completion, FinishReason, Request, SamplingParams
from bise.engine.runner import Runner
from bise.engine.sampling import token_logprob
from bise.engine.scheduler import Step, StepRow
from bise.engine.sequence import Sequence


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return (256, *(random.Random(seed).randrange(256) for _ in range(length - 1)))


def ask(length: int, seed: int = 0, *, scores: bool = False, **params) -> Request:
    params = {"max_tokens": 12, "seed": seed, "logprobs": 3, "ignore_eos": True, **params}
    return Request(token_ids=prompt(length, seed), params=SamplingParams(**params), prompt_logprobs=scores)


REQUESTS = (
    ask(70, 1, temperature=0),
    ask(3, 2, temperature=0.8),
    ask(100, 3, top_p=0.9, scores=True),
    ask(33, 4, temperature=1.3, top_k=20, repetition_penalty=1.2),
    ask(1, 5, min_p=0.05, presence_penalty=0.5),
)
"""Greedy and sampled, shorter and longer than the window, one of them scored."""


@pytest.fixture
def assert_same(backend):
    """Return a function that compares two completions: equal on exact backends, else to 1e-5 in log-probs."""

    def logprobs(completion: Completion) -> list[float]:
        entries = [*completion.logprobs, *filter(None, completion.prompt_logprobs)]
        return [value for entry in entries for value in (entry.logprob, *(value for _, value in entry.top))]

    def compare(found: Completion, expected: Completion) -> None:
        assert found.token_ids == expected.token_ids
        assert (found.text, found.finish_reason, found.usage) == (
            expected.text,
            expected.finish_reason,
            expected.usage,
        )
        if backend.is_exact:
            assert found.logprobs == expected.logprobs
            assert found.prompt_logprobs == expected.prompt_logprobs
        np.testing.assert_allclose(logprobs(found), logprobs(expected), rtol=1e-5, atol=1e-6)

    return compare


@pytest.fixture(scope="session")
def alone(make_engine) -> list[Completion]:
    """What each of `REQUESTS` returns on its own."""
    return [make_engine().submit(request).result() for request in REQUESTS]


def assert_no_block_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_batched_equals_alone(make_engine, alone, assert_same):
    engine = make_engine()
    handles = [engine.submit(request) for request in REQUESTS]
    for handle, expected in zip(handles, alone, strict=True):
        assert_same(handle.result(), expected)
    assert_no_block_is_held(engine)


def test_arriving_while_others_run_equals_alone(make_engine, alone, assert_same):
    engine = make_engine()
    handles = []
    for request in REQUESTS:
        handles.append(engine.submit(request))
        for _ in range(3):
            engine.step()
    for handle, expected in zip(handles, alone, strict=True):
        assert_same(handle.result(), expected)


@pytest.mark.parametrize("budget", [1, 7, 32, 33])
def test_chunked_prefill_equals_whole(make_engine, assert_same, budget):
    request = ask(90, 6, scores=True)
    expected = make_engine().submit(request).result()
    found = make_engine(max_step_tokens=budget, max_sequences=1).submit(request).result()
    assert_same(found, expected)


def test_chunks_beyond_one_attention_split_equal_whole(make_engine, assert_same):
    request = ask(1100, 7, max_tokens=4)
    expected = make_engine(max_step_tokens=2000).submit(request).result()
    assert_same(make_engine(max_step_tokens=300).submit(request).result(), expected)


def test_preempted_equals_undisturbed(make_engine, alone, assert_same):
    engine = make_engine(num_blocks=4, max_step_tokens=16, max_sequences=5)
    handles = [engine.submit(request) for request in REQUESTS]
    found = [handle.result() for handle in handles]
    for completion, expected in zip(found, alone, strict=True):
        assert_same(completion, expected)
    crowded = make_engine(num_blocks=4, max_step_tokens=16, max_sequences=5)
    long = [ask(30, seed, max_tokens=36) for seed in range(3)]
    handles = [crowded.submit(request) for request in long]
    found = [handle.result() for handle in handles]
    assert crowded.stats().num_preemptions > 0
    for request, completion in zip(long, found, strict=True):
        assert_same(completion, make_engine().submit(request).result())
    assert_no_block_is_held(crowded)


def test_streamed_text_equals_the_text_of_all_tokens(make_engine, byte_tokenizer):
    for request in REQUESTS:
        handle = make_engine().submit(request)
        deltas = list(handle)
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert "".join(delta.text for delta in deltas) == byte_tokenizer.decode(token_ids)


def test_the_score_of_generated_text_equals_its_reported_log_probs(make_engine, backend):
    for request in REQUESTS:
        done = make_engine().submit(request).result()
        scored = make_engine(max_step_tokens=40).submit(
            Request(
                token_ids=request.token_ids + done.token_ids,
                params=SamplingParams(max_tokens=0, logprobs=3),
                prompt_logprobs=True,
            )
        )
        found = scored.result().prompt_logprobs[len(request.token_ids) :]
        if backend.is_exact:
            assert found == done.logprobs
        assert [entry.token_id for entry in found] == list(done.token_ids)
        np.testing.assert_allclose(
            [entry.logprob for entry in found],
            [entry.logprob for entry in done.logprobs],
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_rolling_window_equals_full_attention_with_a_window_mask(make_engine, backend, ops, model):
    """The engine frees blocks that slid out; the reference keeps every key of every layer and only masks."""
    request = ask(200, 8, scores=True, max_tokens=0, logprobs=0)
    rolled = make_engine(max_step_tokens=32, max_sequences=1).submit(request).result().prompt_logprobs
    groups = model.config.window_groups
    kept = KVCache(model.config, ops, (7,) * len(groups), backend.kv_format)
    sequence = Sequence(request, 0, 0)
    sequence.tables = tuple(BlockTable(BlockPool(7), None) for _ in groups)
    for table in sequence.tables:
        table.extend(200)
    runner = Runner(model, kept)
    hidden, _ = runner.forward(Step((StepRow(sequence, 0, 200, 0, 0, 0),), 200))
    logits = runner.logits(hidden, np.arange(199, dtype=np.int32))
    masked = [token_logprob(row, request.token_ids[index + 1], 0) for index, row in enumerate(logits)]
    assert all(-1 not in table.blocks for table in sequence.tables)
    if backend.is_exact:
        assert list(rolled[1:]) == masked
    np.testing.assert_allclose(
        [entry.logprob for entry in rolled[1:]], [entry.logprob for entry in masked], rtol=1e-5, atol=1e-6
    )


def test_a_window_bounds_the_blocks_that_are_held(make_engine, model):
    engine = make_engine(max_step_tokens=16, max_sequences=1)
    handle = engine.submit(ask(300, 9, max_tokens=40))
    while engine.step():
        stats = engine.stats()
        for window, total, free in zip(
            model.config.window_groups, stats.num_blocks, stats.num_free_blocks, strict=True
        ):
            if window is not None:
                assert total - free <= blocks_spanned(window)
    assert handle.result().finish_reason is FinishReason.LENGTH


def test_an_abort_frees_its_blocks_within_one_step_and_disturbs_nobody(make_engine, alone, assert_same):
    engine = make_engine()
    handles = [engine.submit(request) for request in REQUESTS]
    doomed = engine.submit(ask(150, 10, max_tokens=200))
    for _ in range(4):
        engine.step()
    held = engine.stats().num_free_blocks
    doomed.cancel()
    engine.step()
    assert all(now > before for now, before in zip(engine.stats().num_free_blocks, held, strict=True))
    for handle, expected in zip(handles, alone, strict=True):
        assert_same(handle.result(), expected)
    assert_no_block_is_held(engine)


def test_any_number_of_threads_gives_the_same_bits(backend, model, byte_tokenizer, alone):
    if not backend.is_exact:
        pytest.skip("the torch backend has no thread contract")
    for threads in (2, 3):
        ops = backend.make_ops(threads)
        engine = Engine(
            backend.transformer(model.config, ops),
            ops,
            config=model.config,
            tokenizer=byte_tokenizer,
            num_blocks=80,
            kv_format=backend.kv_format,
            threaded=False,
        )
        handles = [engine.submit(request) for request in REQUESTS]
        found = [handle.result() for handle in handles]
        assert [(done.token_ids, done.logprobs, done.prompt_logprobs) for done in found] == [
            (done.token_ids, done.logprobs, done.prompt_logprobs) for done in alone
        ]
