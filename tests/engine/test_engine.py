"""Engine: submit, stream, stop, abort, fail, close, over a hash model that reads its history from pages."""

import asyncio
import itertools
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bise.engine.engine import Engine
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.errors import (
    ConfigError,
    ContextOverflowError,
    EngineError,
    MemoryPlanError,
    NonFiniteError,
    QueueFullError,
    RequestError,
)

EOS = 257


def ask(prompt: str = "hello", scores: bool = False, priority: int = 0, **params) -> Request:
    return Request(
        token_ids=(256, *prompt.encode()),
        params=SamplingParams(**{"max_tokens": 8, "seed": 1, **params}),
        prompt_logprobs=scores,
        priority=priority,
    )


def spell(text: str) -> dict[int, int]:
    """Return a script by which the first byte of `text` (all distinct) makes the model write the rest."""
    codes = text.encode()
    assert len(set(codes)) == len(codes)
    return dict(itertools.pairwise(codes))


def free_blocks(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.num_free_blocks == stats.num_blocks


def test_a_completion_has_its_tokens_its_text_and_its_counts(hash_engine):
    engine, _ = hash_engine(script=spell("Qwerty"))
    done = engine.submit(ask("Q", max_tokens=5)).result()
    assert done.text == "werty"
    assert done.token_ids == tuple(b"werty")
    assert done.finish_reason is FinishReason.LENGTH
    assert (done.usage.prompt_tokens, done.usage.cached_tokens, done.usage.completion_tokens) == (2, 0, 5)
    assert min(done.timings.queue_s, done.timings.prefill_s, done.timings.decode_s) >= 0
    assert free_blocks(engine)


def test_the_end_of_text_token_stops_is_counted_and_is_not_text(hash_engine):
    engine, _ = hash_engine(script={**spell("Qab"), ord("b"): EOS})
    done = engine.submit(ask("Q")).result()
    assert (done.text, done.finish_reason, done.stop_match) == ("ab", FinishReason.STOP, EOS)
    assert done.token_ids == (*b"ab", EOS)
    assert done.usage.completion_tokens == 3


def test_the_end_of_text_is_passed_over_on_request(hash_engine):
    engine, _ = hash_engine(script={ord("Q"): EOS, EOS: ord("a")})
    done = engine.submit(ask("Q", ignore_eos=True, max_tokens=2)).result()
    assert (done.token_ids, done.text, done.finish_reason) == ((EOS, ord("a")), "a", FinishReason.LENGTH)


def test_a_stop_token_that_is_text_is_not_part_of_the_text(hash_engine):
    engine, _ = hash_engine(script=spell("Qabcd"))
    done = engine.submit(ask("Q", stop_token_ids=(ord("c"),))).result()
    assert (done.text, done.stop_match, done.token_ids) == ("ab", ord("c"), tuple(b"abc"))


def test_a_stop_string_ends_the_text_before_it(hash_engine):
    engine, _ = hash_engine(script=spell("Qabcdef"))
    handle = engine.submit(ask("Q", stop=("cde",)))
    deltas = list(handle)
    assert [delta.text for delta in deltas] == ["a", "b", "", "", ""]
    assert (deltas[-1].finish_reason, deltas[-1].stop_match) == (FinishReason.STOP, "cde")
    assert deltas[-1].usage.completion_tokens == 5 == sum(len(delta.token_ids) for delta in deltas)
    assert free_blocks(engine)


def test_a_stop_string_that_does_not_complete_is_shown_at_the_end(hash_engine):
    engine, _ = hash_engine(script=spell("Qabcdef"))
    assert engine.submit(ask("Q", stop=("bcdX",), max_tokens=3)).result().text == "abc"


def test_a_stop_string_decided_at_the_end_is_reported(hash_engine):
    engine, _ = hash_engine(script=spell("Qabcdef"))
    done = engine.submit(ask("Q", stop=("bcdefX", "cd"), max_tokens=4)).result()
    assert (done.text, done.finish_reason, done.stop_match) == ("ab", FinishReason.STOP, "cd")


def test_min_tokens_hold_the_end_back(hash_engine):
    engine, _ = hash_engine(script={ord("Q"): EOS})
    done = engine.submit(ask("Q", min_tokens=3, temperature=0)).result()
    assert EOS not in done.token_ids[:3]
    assert done.usage.completion_tokens >= 3


def test_without_max_tokens_the_output_runs_up_to_the_context(hash_engine):
    engine, _ = hash_engine(model_context=40)
    done = engine.submit(ask("abc", max_tokens=None, ignore_eos=True)).result()
    assert done.usage.prompt_tokens + done.usage.completion_tokens == 40
    assert done.finish_reason is FinishReason.LENGTH


def test_without_max_tokens_a_small_cache_bounds_the_output_and_says_so(hash_engine):
    engine, _ = hash_engine(model_context=400, num_blocks=2)
    assert engine.max_context == 64
    assert engine.submit(ask("abc", max_tokens=None, ignore_eos=True)).result().usage.completion_tokens == 60


def test_a_request_longer_than_the_context_is_refused_with_both_numbers(hash_engine):
    engine, _ = hash_engine(model_context=40)
    engine.submit(ask("a" * 9, max_tokens=30))
    with pytest.raises(ContextOverflowError, match=r"prompt of 10 tokens and max_tokens 31 .* context of 40"):
        engine.submit(ask("a" * 9, max_tokens=31))
    with pytest.raises(ContextOverflowError, match=r"prompt of 40 tokens and at least 1 more token"):
        engine.submit(ask("a" * 39, max_tokens=None))


def test_a_lower_context_can_be_set_and_is_named_in_the_refusal(hash_engine):
    engine, _ = hash_engine(max_context=30)
    assert engine.max_context == 30
    with pytest.raises(ContextOverflowError, match="context of 30"):
        engine.submit(ask("a" * 9, max_tokens=21))
    with pytest.raises(ConfigError, match="from 1 to the model's 512, got 513"):
        hash_engine(max_context=513)


def test_a_request_longer_than_the_cache_is_refused_with_both_numbers(hash_engine):
    engine, _ = hash_engine(model_context=400, num_blocks=3)
    with pytest.raises(MemoryPlanError, match=r"97 tokens need 4 KV blocks .* holds 3"):
        engine.submit(ask("a" * 86, max_tokens=10))


@pytest.mark.parametrize(
    ("token_ids", "reason"), [((), "empty"), ((258,), "token 258"), ((5, -1), "token -1")]
)
def test_bad_prompts_are_refused(hash_engine, token_ids, reason):
    engine, _ = hash_engine()
    with pytest.raises(RequestError, match=reason):
        engine.submit(Request(token_ids=token_ids))


def test_the_queue_is_bounded_and_opens_again(hash_engine):
    engine, _ = hash_engine(max_queue=2, max_sequences=1)
    handles = [engine.submit(ask(max_tokens=1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit(ask())
    handles[0].result()
    handles.append(engine.submit(ask(max_tokens=1)))
    assert [len(handle.result().token_ids) for handle in handles[1:]] == [1, 1]


def test_an_aborted_request_leaves_the_queue(hash_engine):
    engine, _ = hash_engine(max_queue=1)
    engine.submit(ask()).cancel()
    engine.submit(ask())


def test_cancelling_frees_every_block_before_the_next_step(hash_engine):
    engine, _ = hash_engine()
    handle = engine.submit(ask("a" * 100, max_tokens=200))
    for _ in range(5):
        engine.step()
    assert not free_blocks(engine)
    handle.cancel()
    assert free_blocks(engine)
    deltas = list(handle)
    assert deltas[-1].finish_reason is FinishReason.ABORT
    assert deltas[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) == 5


def test_leaving_the_iteration_aborts(hash_engine):
    engine, _ = hash_engine()
    for delta in engine.submit(ask(max_tokens=100)):
        assert delta.token_ids
        break
    assert free_blocks(engine)
    assert engine.stats().num_running == 0


def test_a_row_of_nan_ends_that_request_only(hash_engine):
    engine, _ = hash_engine(broken=(ord("X"),), script=spell("Qwerty"))
    bad, good = engine.submit(ask("X")), engine.submit(ask("Q", max_tokens=5))
    with pytest.raises(NonFiniteError, match="1 non-finite logits of 258"):
        bad.result()
    assert good.result().text == "werty"
    assert free_blocks(engine)


def test_nan_in_the_middle_of_a_scored_prompt_ends_the_request(hash_engine):
    engine, _ = hash_engine(broken=(ord("X"),))
    with pytest.raises(NonFiniteError):
        engine.submit(ask("abXcd", scores=True)).result()


def test_a_failing_model_ends_the_requests_of_that_step_and_the_engine_goes_on(hash_engine):
    engine, model = hash_engine(max_sequences=2, script=spell("Qwerty"))
    first, second = engine.submit(ask()), engine.submit(ask())
    later = engine.submit(ask("Q", max_tokens=5))
    model.fail = ValueError("boom")
    for handle in (first, second):
        with pytest.raises(EngineError, match="ValueError: boom"):
            handle.result()
    assert later.result().text == "werty"
    assert free_blocks(engine)


def test_a_failing_tokenizer_ends_that_request_only(hash_engine, byte_tokenizer):
    class Picky(type(byte_tokenizer)):
        def token_bytes(self, token_id):
            if token_id == ord("a"):
                raise KeyError("no such token")
            return super().token_bytes(token_id)

    engine, _ = hash_engine(script={**spell("Qa"), **spell("Rbcd")}, tokenizer=Picky())
    bad, good = engine.submit(ask("Q")), engine.submit(ask("R", max_tokens=3))
    with pytest.raises(EngineError, match="KeyError"):
        bad.result()
    assert good.result().text == "bcd"


def test_prompt_log_probs_come_once_per_token_whatever_the_chunks(hash_engine):
    whole, _ = hash_engine()
    chunked, model = hash_engine(max_step_tokens=7, max_sequences=2)
    request = ask("a long prompt for scoring", scores=True, logprobs=2)
    expected, found = whole.submit(request).result(), chunked.submit(request).result()
    assert expected.prompt_logprobs[0] is None
    assert len(expected.prompt_logprobs) == len(request.token_ids)
    assert [entry.token_id for entry in expected.prompt_logprobs[1:]] == list(request.token_ids[1:])
    assert all(len(entry.top) == 2 for entry in expected.prompt_logprobs[1:])
    assert found.prompt_logprobs == expected.prompt_logprobs
    assert len(model.batches) > 4


def test_a_prompt_of_one_token_scores_none(hash_engine):
    engine, _ = hash_engine()
    for max_tokens in (0, 2):
        done = engine.submit(ask("", scores=True, max_tokens=max_tokens)).result()
        assert done.prompt_logprobs == (None,)
        assert len(done.token_ids) == max_tokens


def test_scoring_alone_produces_no_token(hash_engine):
    engine, _ = hash_engine(max_step_tokens=4, max_sequences=1)
    done = engine.submit(ask("score me", scores=True, max_tokens=0)).result()
    assert (done.token_ids, done.text, done.finish_reason) == ((), "", FinishReason.LENGTH)
    assert len(done.prompt_logprobs) == 9
    assert done.usage.completion_tokens == 0


def test_scoring_a_long_prompt_never_holds_the_logits_of_all_of_it(hash_engine):
    engine, model = hash_engine()
    engine.submit(ask("a" * 400, scores=True, max_tokens=1)).result()
    assert model.most_logit_rows <= 64


def test_log_probs_are_reported_for_every_token(hash_engine):
    engine, _ = hash_engine()
    done = engine.submit(ask(max_tokens=6, logprobs=3)).result()
    assert [entry.token_id for entry in done.logprobs] == list(done.token_ids)
    assert all(len(entry.top) == 3 and entry.top[0][1] >= entry.logprob for entry in done.logprobs)
    assert engine.submit(ask()).result().logprobs == ()


def test_a_seed_repeats_and_its_absence_draws_another(hash_engine):
    engine, _ = hash_engine()
    first = engine.submit(ask(seed=5, max_tokens=20)).result().token_ids
    assert engine.submit(ask(seed=5, max_tokens=20)).result().token_ids == first
    handle = engine.submit(ask(seed=None, max_tokens=20))
    other = handle.result().token_ids
    assert other != first
    assert engine.submit(ask(seed=handle.seed, max_tokens=20)).result().token_ids == other


def test_without_a_tokenizer_there_are_tokens_but_no_text(hash_engine):
    engine, _ = hash_engine(tokenizer=None)
    done = engine.submit(ask(max_tokens=3)).result()
    assert (done.text, len(done.token_ids)) == ("", 3)
    with pytest.raises(RequestError, match="need a tokenizer"):
        engine.submit(ask(stop=("x",)))


def test_text_is_never_cut_inside_a_character(hash_engine):
    engine, _ = hash_engine(script={ord("Q"): 0xC3, 0xC3: 0xA9, 0xA9: 0xE2, 0xE2: 0x82, 0x82: 0xAC})
    texts = [delta.text for delta in engine.submit(ask("Q", max_tokens=5))]
    assert texts == ["", "é", "", "", "€"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 90), st.integers(0, 40), st.booleans(), st.integers(0, 2), st.integers(0, 4)
        ),
        min_size=1,
        max_size=7,
    ),
    windows=st.sampled_from([(None,), (40,), (None, 40)]),
    budget=st.sampled_from([3, 16, 64]),
)
def test_everyone_gets_what_they_would_get_alone_in_a_cache_that_is_too_small(
    hash_engine, jobs, windows, budget
):
    requests = [
        ask("x" * length, scores, priority, max_tokens=output, seed=length, logprobs=1)
        for length, output, scores, priority, _ in jobs
    ]
    alone = [hash_engine(*windows)[0].submit(request).result() for request in requests]
    shared, _ = hash_engine(*windows, num_blocks=5, max_step_tokens=budget, max_sequences=3)
    handles = []
    for request, (*_, pause) in zip(requests, jobs, strict=True):
        handles.append(shared.submit(request))
        for _ in range(pause):
            shared.step()
    for handle, expected in zip(handles, alone, strict=True):
        found = handle.result()
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.logprobs == expected.logprobs
        assert found.prompt_logprobs == expected.prompt_logprobs
    assert free_blocks(shared)


def test_closing_aborts_what_runs_and_refuses_what_comes(hash_engine):
    engine, _ = hash_engine()
    handle = engine.submit(ask(max_tokens=100))
    engine.step()
    engine.close()
    assert list(handle)[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ask())


def test_closing_with_drain_finishes_what_was_submitted(hash_engine):
    engine, _ = hash_engine()
    handles = [engine.submit(ask(max_tokens=9)) for _ in range(3)]
    engine.close(drain=True)
    assert [len(handle.result().token_ids) for handle in handles] == [9, 9, 9]


def test_an_engine_needs_exactly_one_size_of_its_cache(hash_engine):
    with pytest.raises(ConfigError, match="num_blocks or kv_memory_bytes"):
        hash_engine(num_blocks=None)
    with pytest.raises(ConfigError, match="2 positive numbers"):
        hash_engine(None, 16, num_blocks=(4,))
    engine, _ = hash_engine(kv_memory_bytes=1 << 20)
    assert engine.stats().kv_bytes <= 1 << 20


class TestThreaded:
    """The same engine on its own thread."""

    def test_many_threads_submit_at_once_and_each_gets_its_own(self, hash_engine):
        script = {**spell("Qwerty"), **spell("Zxcvbn")}
        engine, _ = hash_engine(threaded=True, script=script)
        texts: dict[int, str] = {}

        def work(index):
            texts[index] = engine.submit(ask("QZ"[index % 2], max_tokens=5)).result().text

        threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert texts == {index: ("werty", "xcvbn")[index % 2] for index in range(12)}

    def test_deltas_arrive_in_an_event_loop(self, hash_engine):
        engine, _ = hash_engine(threaded=True, script=spell("Qwerty"))

        async def read(prompt):
            return "".join([delta.text async for delta in engine.submit(ask(prompt, max_tokens=5))])

        async def main():
            return await asyncio.gather(*(read("Q") for _ in range(5)))

        assert asyncio.run(main()) == ["werty"] * 5

    def test_leaving_an_async_iteration_aborts(self, hash_engine):
        engine, model = hash_engine(threaded=True)
        model.slow_from = 50
        ended = threading.Event()

        async def main():
            handle = engine.submit(ask(max_tokens=500, ignore_eos=True))
            push = handle.push

            def watch(delta):
                push(delta)
                if delta.finish_reason is FinishReason.ABORT:
                    ended.set()

            handle.push = watch
            async for _ in handle:
                break
            assert await asyncio.to_thread(ended.wait, 30)

        asyncio.run(main())
        assert free_blocks(engine)

    def test_a_storm_of_requests_of_which_many_are_aborted_leaks_nothing(self, hash_engine):
        engine, _ = hash_engine(None, 40, threaded=True, num_blocks=12, max_step_tokens=32, max_sequences=6)
        outcomes: list[tuple[bool, FinishReason | None]] = []

        def work(seed):
            rng = random.Random(seed)
            for _ in range(12):
                aborts = rng.random() < 0.4
                output = rng.randrange(1, 40)
                handle = engine.submit(ask("x" * rng.randrange(1, 90), max_tokens=output, ignore_eos=True))
                patience = rng.randrange(3) if aborts else 1000
                reason = None
                for index, delta in enumerate(handle):
                    reason = delta.finish_reason
                    if index == patience:
                        break
                outcomes.append((aborts, reason))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(outcomes) == 72
        assert all(reason is FinishReason.LENGTH for aborts, reason in outcomes if not aborts)
        engine.close(drain=True)
        assert engine.failure is None
        assert free_blocks(engine)
        engine._scheduler.check_integrity()

    def test_a_cancelled_task_aborts(self, hash_engine):
        engine, model = hash_engine(threaded=True)
        model.slow_from = 50

        async def main():
            handle = engine.submit(ask(max_tokens=500, ignore_eos=True))
            started = asyncio.Event()

            async def read():
                async for _ in handle:
                    started.set()

            task = asyncio.create_task(read())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return handle

        asyncio.run(main())
        engine.close(drain=True)
        assert free_blocks(engine)
        assert len(model.batches) < 500

    def test_a_failing_model_does_not_kill_the_thread(self, hash_engine):
        engine, model = hash_engine(threaded=True, script=spell("Qwerty"))
        model.fail = RuntimeError("device lost")
        with pytest.raises(EngineError, match="device lost"):
            engine.submit(ask()).result()
        assert engine.submit(ask("Q", max_tokens=5)).result().text == "werty"

    def test_a_bug_in_the_scheduler_ends_everyone_instead_of_hanging(self, hash_engine):
        engine, _ = hash_engine(threaded=True)

        def broken(budget=None):
            raise AssertionError("bug")

        engine._scheduler.plan = broken
        with pytest.raises(EngineError, match="AssertionError: bug"):
            engine.submit(ask()).result()
        with pytest.raises(EngineError, match=r"stopped for good: .*AssertionError: bug"):
            engine.submit(ask())
        assert isinstance(engine.failure, EngineError)

    def test_closing_wakes_whoever_waits(self, hash_engine):
        engine, model = hash_engine(threaded=True)
        model.slow_from = 50
        handle = engine.submit(ask(max_tokens=400, ignore_eos=True))
        next(iter_once := iter(handle))
        engine.close()
        assert list(iter_once)[-1].finish_reason is FinishReason.ABORT
        assert free_blocks(engine)

    def test_closing_twice_is_harmless(self, hash_engine):
        engine, _ = hash_engine(threaded=True)
        engine.close()
        engine.close()
