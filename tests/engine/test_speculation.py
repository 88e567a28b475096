"""Guessing ahead changes no token, no log-prob, no text and no count, however good or bad the guesses are."""

import asyncio
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bise.engine.draft_model import DraftModel, check_same_vocabulary
from bise.engine.payoff import MAX_DRAFT, Payoff
from bise.engine.request import Completion, FinishReason, Request, SamplingParams
from bise.engine.speculation import Guess, Speculation
from bise.errors import ConfigError, NonFiniteError, RequestError
from bise.kernels import BLOCK_SIZE

LOOP = {byte: byte + 1 for byte in range(ord("a"), ord("f"))} | {ord("f"): ord("a")}
"""A script by which the model writes abcdef over and over."""


class Always(Payoff):
    """Takes every guess, whatever it costs."""

    def wants(self, num_sequences: int, lanes=()) -> bool:
        return True

    def choose(self, chances, lane=None) -> tuple[list[int], float]:
        return [len(row) for row in chances], 1.0 if lane is None else 2.0


def always(guesser=None) -> Speculation:
    return Speculation(payoff=Always(), guesser=guesser)


def from_tokens(tokens) -> Guess:
    return Guess(list(tokens), [0] * len(tokens), [1.0] * len(tokens))


def scatter(seed: int, vocab: range = range(258)):
    """Return a guesser that guesses anything, and any number of tokens."""
    rng = random.Random(seed)
    return lambda sequence, count: from_tokens([rng.choice(vocab) for _ in range(rng.randint(0, count))])


def oracle(texts: dict[tuple[int, ...], tuple[int, ...]], wrong_at: int | None = None):
    """Return a guesser that knows each prompt's output, and errs at every `wrong_at`-th token."""

    def guess(sequence, count: int) -> Guess:
        output = texts[sequence.request.token_ids]
        start = sequence.num_output
        tokens = list(output[start : start + count])
        if wrong_at is not None:
            tokens = [
                (token + 1) % 258 if (start + index) % wrong_at == 0 else token
                for index, token in enumerate(tokens)
            ]
        return from_tokens(tokens)

    return guess


def ask(prompt: str = "hello", **params) -> Request:
    fields = {key: params.pop(key) for key in ("prediction", "speculate", "prompt_logprobs") if key in params}
    return Request(
        token_ids=(256, *prompt.encode()),
        params=SamplingParams(**{"max_tokens": 20, "seed": 1, "logprobs": 2, **params}),
        **fields,
    )


def told(done: Completion) -> tuple:
    return (
        done.token_ids,
        done.text,
        done.finish_reason,
        done.stop_match,
        done.logprobs,
        done.prompt_logprobs,
        # How much of a prompt was cached depends on who came before, and on nothing that is told.
        replace(done.usage, cached_tokens=0),
    )


def assert_nothing_is_held(engine) -> None:
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


REQUESTS = (
    ask("greedy", temperature=0, max_tokens=40),
    ask("sampled", temperature=1.2, top_p=0.9),
    ask("penalties", temperature=0.7, repetition_penalty=1.3, presence_penalty=1, frequency_penalty=0.5),
    ask("biased and held back", logit_bias={7: 9.0, 257: 20.0}, min_tokens=12, max_tokens=30),
    ask("stopped", stop=("de",), temperature=0, max_tokens=60),
    ask("scored " * 10, prompt_logprobs=True, max_tokens=5),
    ask("one", max_tokens=1),
    ask("expected", prediction=tuple(b"abcdefabcdef"), temperature=0),
)


@pytest.mark.parametrize("windows", [(None,), (40,), (None, 40)])
@pytest.mark.parametrize("script", [None, LOOP])
def test_no_guess_good_or_bad_changes_what_a_request_returns(hash_engine, windows, script):
    expected = [
        told(hash_engine(*windows, script=script)[0].submit(request).result()) for request in REQUESTS
    ]
    outputs = {request.token_ids: known[0] for request, known in zip(REQUESTS, expected, strict=True)}
    for guesser in (None, scatter(1), scatter(2, range(97, 103)), oracle(outputs), oracle(outputs, 3)):
        for num_blocks in (64, 9):
            engine, _ = hash_engine(
                *windows, script=script, speculation=always(guesser), num_blocks=num_blocks, max_sequences=8
            )
            handles = [engine.submit(request) for request in REQUESTS]
            assert [told(handle.result()) for handle in handles] == expected
            assert_nothing_is_held(engine)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1 << 20),
    budget=st.integers(4, 40),
    window=st.sampled_from([None, 33, 64]),
    temperature=st.sampled_from([0, 1.0]),
)
def test_random_guesses_at_random_arrivals_leave_every_request_as_alone(
    hash_engine, seed, budget, window, temperature
):
    rng = random.Random(seed)
    requests = [
        ask("x" * rng.randrange(1, 50), seed=index, temperature=temperature, max_tokens=rng.randrange(1, 50))
        for index in range(4)
    ]
    expected = [told(hash_engine(window, script=LOOP)[0].submit(request).result()) for request in requests]
    engine, _ = hash_engine(
        window,
        script=LOOP,
        speculation=always(scatter(seed, range(97, 104))),
        num_blocks=7,
        max_step_tokens=budget,
        max_sequences=3,
    )
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        for _ in range(rng.randrange(4)):
            engine.step()
            engine._scheduler.check_integrity()
    assert [told(handle.result()) for handle in handles] == expected
    assert_nothing_is_held(engine)


def test_right_guesses_take_fewer_steps(hash_engine):
    request = ask("a", temperature=0, max_tokens=53)
    plain, model = hash_engine(script=LOOP)
    output = plain.submit(request).result().token_ids
    num_plain = len(model.batches)
    engine, model = hash_engine(script=LOOP, speculation=always(oracle({request.token_ids: output})))
    assert engine.submit(request).result().token_ids == output
    assert num_plain == 53
    # The first token comes from the prompt's step, every other step gives one token and its guesses.
    assert len(model.batches) == 1 + (53 - 1) // (1 + MAX_DRAFT)
    assert engine.speculation.stats.num_accepted == 52 - 4


def test_repeats_are_found_and_used(hash_engine):
    engine, model = hash_engine(script=LOOP, speculation=always())
    done = engine.submit(ask("abc", temperature=0, max_tokens=60)).result()
    assert done.text == ("defabc" * 10)
    assert len(model.batches) < 20


def test_a_prediction_is_used_from_the_second_token_on_and_counted(hash_engine):
    engine, model = hash_engine(script=LOOP, speculation=always())
    predicted = b"bcdefabcdef" + b"zz"
    done = engine.submit(ask("a", temperature=0, max_tokens=11, prediction=tuple(predicted))).result()
    assert done.token_ids == tuple(predicted[:11])
    assert len(model.batches) == 2
    usage = done.usage
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (11, 2)
    plain, _ = hash_engine(script=LOOP)
    counted = plain.submit(ask("a", temperature=0, max_tokens=11, prediction=tuple(predicted))).result().usage
    assert counted == usage


def test_a_prediction_outside_the_vocabulary_is_refused(hash_engine):
    engine, _ = hash_engine()
    with pytest.raises(RequestError, match="token 258 is outside the vocabulary of 258") as caught:
        engine.submit(ask(prediction=(1, 258)))
    assert caught.value.field == "prediction"


def test_a_request_can_ask_not_to_be_guessed_about(hash_engine):
    engine, model = hash_engine(script=LOOP, speculation=always())
    engine.submit(ask("abc", temperature=0, max_tokens=30, speculate=False)).result()
    assert len(model.batches) == 30


def test_a_stop_inside_a_run_of_right_guesses_ends_the_text_there(hash_engine):
    request = ask("a", temperature=0, stop_token_ids=(ord("e"),), max_tokens=30)
    engine, _ = hash_engine(
        script=LOOP, speculation=always(oracle({request.token_ids: tuple(b"bcdefabcdefabc")}))
    )
    deltas = list(engine.submit(request))
    assert [bytes(delta.token_ids) for delta in deltas] == [b"b", b"cde"]
    assert (deltas[-1].finish_reason, deltas[-1].text) == (FinishReason.STOP, "cd")
    assert deltas[-1].usage.completion_tokens == 4
    assert_nothing_is_held(engine)


def test_logits_broken_behind_a_wrong_guess_hurt_nobody(hash_engine):
    request = ask("a", temperature=0, max_tokens=12)
    engine, _ = hash_engine(
        script=LOOP, broken=(ord("Z"),), speculation=always(lambda s, n: from_tokens(b"ZZ"[:n]))
    )
    assert engine.submit(request).result().text == "bcdefabcdefa"


def test_tokens_before_broken_logits_are_told_as_without_guesses(hash_engine):
    request = ask("a", temperature=0, max_tokens=12)
    found = []
    for speculation in (None, always(oracle({request.token_ids: tuple(b"bcdefabcdefa")}))):
        engine, _ = hash_engine(script=LOOP, broken=(ord("e"),), speculation=speculation)
        deltas = list(engine.submit(request))
        assert isinstance(deltas[-1].error, NonFiniteError)
        found.append(b"".join(bytes(delta.token_ids) for delta in deltas))
        assert_nothing_is_held(engine)
    assert found == [b"bcde", b"bcde"]


def test_guesses_take_only_what_the_step_and_the_cache_leave(hash_engine):
    engine, model = hash_engine(
        speculation=always(scatter(3)), max_step_tokens=6, max_sequences=3, num_blocks=3
    )
    handles = [engine.submit(ask("ab", max_tokens=25, seed=seed)) for seed in range(3)]
    for handle in handles:
        handle.result()
    assert max(len(batch.token_ids) for batch in model.batches) == 6
    assert engine.stats().num_preemptions == 0


def test_no_guess_is_made_while_a_prompt_is_computed(hash_engine):
    engine, model = hash_engine(script=LOOP, speculation=always(), max_step_tokens=16, max_sequences=4)
    first = engine.submit(ask("abcdef" * 2, temperature=0, max_tokens=200))
    for _ in range(4):
        engine.step()
    engine.submit(ask("x" * 60, max_tokens=1))
    before = len(model.batches)
    for _ in range(4):
        engine.step()
    assert [len(batch.logit_rows) for batch in model.batches[before : before + 4]] == [1, 1, 1, 1]
    first.cancel()


def test_an_abort_between_guessing_steps_frees_everything(hash_engine):
    engine, _ = hash_engine(40, script=LOOP, speculation=always(scatter(4, range(97, 103))))

    async def leave() -> None:
        async for delta in engine.submit(ask("abc", max_tokens=300, temperature=0)):
            if len(delta.token_ids) > 1:
                break

    asyncio.run(leave())
    engine.step()
    assert_nothing_is_held(engine)


def test_windows_release_blocks_by_what_came_true(hash_engine):
    """A block that the next query still sees stays, however far the guesses reached."""
    engine, _ = hash_engine(33, script=LOOP, speculation=always(scatter(5)), num_blocks=4)
    handle = engine.submit(ask("a" * 30, temperature=0, max_tokens=150))
    plain, _ = hash_engine(33, script=LOOP)
    held = []
    while engine.step():
        held.append(4 - engine.stats().num_free_blocks[0])
    assert max(held) <= 2
    assert told(handle.result()) == told(plain.submit(ask("a" * 30, temperature=0, max_tokens=150)).result())


def test_the_gate_learns_from_the_engine_s_own_steps(hash_engine):
    clock = itertools.count()
    engine, model = hash_engine(script=LOOP, speculation=Speculation(clock=lambda: float(next(clock))))
    engine.submit(ask("abc", temperature=0, max_tokens=200)).result()
    # Every step lasts one tick here, so guesses are free and soon taken.
    assert len(model.batches) < 80
    stats = engine.speculation.stats
    assert 0 < stats.num_guessing_steps < stats.num_steps == len(model.batches) - 1
    assert stats.num_accepted <= stats.num_drafted
    assert np.isclose(stats.lost_s, 0)


class TokenPages:
    """All that a hash model asks of a backend."""

    def layer(self, index):
        return self

    def pages(self, num_blocks, num_kv_heads, head_dim, kv_format):
        return np.full(num_blocks * BLOCK_SIZE, -1, np.int64)


@pytest.fixture
def draft_of(hash_engine):
    """Return a function that makes a draft model of a hash model, and gives both: (script, **options)."""

    def make(script, *, windows=(None,), num_blocks=64, broken=()):
        _, model = hash_engine(*windows, script=script, broken=broken)
        return DraftModel(model, TokenPages(), num_blocks=(num_blocks,)), model

    return make


def with_draft(draft: DraftModel) -> Speculation:
    """Return speculation with nothing found in texts, so that the draft model is asked at every step."""
    return Speculation(payoff=Always(), guesser=lambda sequence, count: Guess([], [], []), draft_model=draft)


@pytest.mark.parametrize("draft_windows", [(None,), (40,)])
@pytest.mark.parametrize("draft_script", [LOOP, None, {**LOOP, ord("d"): ord("a")}])
def test_a_draft_model_right_or_wrong_changes_nothing(hash_engine, draft_of, draft_windows, draft_script):
    """The second one writes noise, the third errs at every fourth token."""
    expected = [told(hash_engine(script=LOOP)[0].submit(request).result()) for request in REQUESTS]
    for num_blocks in (64, 3):
        draft, _ = draft_of(draft_script, windows=draft_windows, num_blocks=num_blocks)
        engine, _ = hash_engine(script=LOOP, speculation=with_draft(draft), max_sequences=8)
        handles = [engine.submit(request) for request in REQUESTS]
        assert [told(handle.result()) for handle in handles] == expected
        assert_nothing_is_held(engine)


def test_a_draft_model_that_agrees_saves_steps_and_computes_every_token_once(hash_engine, draft_of):
    draft, small = draft_of(LOOP)
    engine, model = hash_engine(script=LOOP, speculation=with_draft(draft))
    done = engine.submit(ask("a", temperature=0, max_tokens=53)).result()
    assert len(done.token_ids) == 53
    assert len(model.batches) == 1 + 52 // (1 + MAX_DRAFT)
    positions = np.concatenate([batch.positions for batch in small.batches])
    # Where all guesses came true, the last one's keys and values are missing and computed with the next.
    assert len(positions) == len(set(positions.tolist()))


def test_a_draft_model_draws_with_the_number_of_the_large_one(hash_engine, draft_of):
    """The same weights agree at any temperature, though no token is the likeliest."""
    draft, _ = draft_of(None)
    engine, _ = hash_engine(speculation=with_draft(draft))
    engine.submit(ask("abc", temperature=1.5, max_tokens=60, ignore_eos=True)).result()
    stats = engine.speculation.stats
    assert stats.num_accepted == stats.num_drafted > 40


def test_broken_numbers_of_a_draft_model_hurt_nobody(hash_engine, draft_of):
    draft, _ = draft_of(LOOP, broken=tuple(b"cf"))
    engine, _ = hash_engine(script=LOOP, speculation=with_draft(draft))
    assert engine.submit(ask("a", temperature=0, max_tokens=12)).result().text == "bcdefabcdefa"


def test_a_draft_model_that_fails_hurts_nobody_and_rests_a_while(hash_engine, draft_of, monkeypatch):
    monkeypatch.setattr("bise.engine.speculation.REST_STEPS", 5)
    draft, small = draft_of(LOOP)
    engine, model = hash_engine(script=LOOP, speculation=with_draft(draft))
    small.fail = MemoryError("no room for a guess")
    assert engine.submit(ask("a", temperature=0, max_tokens=30)).result().text == ("bcdefa" * 5)
    assert engine.speculation.stats.num_drafted > 0
    assert len(model.batches) < 30
    assert_nothing_is_held(engine)


def test_a_draft_model_gives_the_blocks_of_ended_sequences_back(hash_engine, draft_of):
    draft, _ = draft_of(LOOP, num_blocks=2)
    engine, _ = hash_engine(script=LOOP, speculation=with_draft(draft))
    for _ in range(3):
        before = engine.speculation.stats.num_drafted
        engine.submit(ask("abc", temperature=0, max_tokens=40)).result()
        assert engine.speculation.stats.num_drafted > before


def test_a_vocabulary_that_differs_is_refused_with_the_first_difference(byte_tokenizer):
    class Other(type(byte_tokenizer)):
        def token_bytes(self, token_id: int) -> bytes:
            return b"?" if token_id == 65 else super().token_bytes(token_id)

    check_same_vocabulary(byte_tokenizer, byte_tokenizer, "small")
    with pytest.raises(ConfigError, match=r"small cannot guess .*: token 65 is b'\?' there and b'A' here"):
        check_same_vocabulary(Other(), byte_tokenizer, "small")
    Other.vocab_size = 300
    with pytest.raises(ConfigError, match="its size is 300 there and 258 here"):
        check_same_vocabulary(Other(), byte_tokenizer, "small")
