"""The engine with its prefix cache: the same output with a hit, a miss and without, and honest counts."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bise.cache.pool import BlockPool
from bise.cache.prefix import NO_MATCH, PrefixCache
from bise.cache.prefix_file import PrefixFile
from bise.engine.blocks import BlockBook
from bise.engine.request import Request, SamplingParams
from bise.engine.sequence import Sequence
from bise.errors import EngineError, NonFiniteError

WINDOWS = [(None,), (40,), (None, 40), (200, 16)]
TEXT = bytes(random.Random(5).randrange(256) for _ in range(400))


def ask(length: int = 150, *, tail: bytes = b"", scores: bool = False, **fields) -> Request:
    params = {"max_tokens": 40, "seed": 3, "logprobs": 2, "ignore_eos": True}
    params |= {name: fields.pop(name) for name in [*fields] if name in SamplingParams.__slots__}
    token_ids = (256, *TEXT[: length - 1 - len(tail)], *tail)
    return Request(token_ids=token_ids, params=SamplingParams(**params), prompt_logprobs=scores, **fields)


def output(done):
    return (done.token_ids, done.text, done.logprobs, done.prompt_logprobs, done.finish_reason)


@pytest.mark.parametrize("windows", WINDOWS)
def test_hit_miss_and_off_give_the_same_output(hash_engine, windows):
    engine, _ = hash_engine(*windows)
    off, _ = hash_engine(*windows, prefix_cache=False)
    miss, hit = engine.submit(ask()).result(), engine.submit(ask()).result()
    without = engine.submit(ask(use_prefix_cache=False)).result()
    assert output(miss) == output(hit) == output(without) == output(off.submit(ask()).result())
    assert [done.usage.cached_tokens for done in (miss, hit, without)] == [0, 128, 0]


def test_blocks_that_who_gives_way_shares_with_a_newcomer_are_counted_once():
    """Of 8 blocks one sequence holds 4 that begin the newcomer's text, too, and another holds 2."""
    pool = BlockPool(8)
    prefix = PrefixCache([pool], [None])
    book = BlockBook([pool], [None], 64, prefix)
    text = tuple(range(200))
    leaving, staying, newcomer = (
        Sequence(Request(token_ids=ids), number, 9) for number, ids in enumerate((text[:129], (7,), text))
    )
    for sequence, num_tokens in ((leaving, 128), (staying, 64)):
        sequence.salt = b"salt" if sequence is leaving else None
        book.seat(sequence, NO_MATCH)
        book.grow(sequence, num_tokens)
    book.advance(leaving, 128)
    newcomer.salt = b"salt"
    match = book.match(newcomer)
    assert match.num_tokens == 128
    # It needs 7 blocks; with 2 free and 4 given back there are 6, of which one stays spare for who runs on.
    assert not book.has_room(newcomer, match, [leaving, staying], [leaving])
    book.release(leaving)
    assert not book.has_room(newcomer, match, [staying], [])
    book.release(staying)
    assert book.has_room(newcomer, match, [], [])


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_next_turn_of_a_conversation_finds_prompt_and_answer(hash_engine, windows):
    engine, model = hash_engine(*windows)
    first = engine.submit(ask(100)).result()
    request = Request(
        token_ids=(*ask(100).token_ids, *first.token_ids, *b"and now?"),
        params=SamplingParams(max_tokens=5, seed=1),
    )
    model.batches.clear()
    second = engine.submit(request).result()
    assert second.usage.cached_tokens == 128  # of 139 tokens of the first turn
    assert len(model.batches[0].token_ids) == len(request.token_ids) - 128
    assert output(second) == output(hash_engine(*windows, prefix_cache=False)[0].submit(request).result())


def test_nothing_of_a_broken_text_is_served_though_the_cache_had_no_room_for_all_of_it(hash_engine):
    engine, _ = hash_engine(broken=[ord("X")])
    engine._memory.prefix._max_nodes = 2
    with pytest.raises(NonFiniteError):
        engine.submit(Request(token_ids=(256, *bytes(140), ord("X")))).result()
    assert engine.stats().num_cached_blocks == (0,)
    engine._scheduler.check_integrity()


def test_requests_that_run_at_the_same_time_share_what_is_computed_already(hash_engine):
    engine, _ = hash_engine(num_blocks=10)
    first = engine.submit(ask(140, max_tokens=30))
    engine.step()
    second = engine.submit(ask(140, tail=b"other", max_tokens=30))
    engine.step()
    assert engine.stats().num_running == 2
    assert engine.stats().num_blocks[0] - engine.stats().num_free_blocks[0] == 5 + 1
    assert second.result().usage.cached_tokens == 128
    assert output(first.result()) == output(hash_engine()[0].submit(ask(140, max_tokens=30)).result())


def test_tenants_never_see_each_others_prefixes(hash_engine):
    engine, _ = hash_engine()
    for tenant in ("alice", "bob"):
        assert engine.submit(ask(tenant=tenant)).result().usage.cached_tokens == 0
    assert engine.submit(ask(tenant="alice")).result().usage.cached_tokens == 128


def test_a_request_that_must_not_use_the_cache_leaves_nothing_behind(hash_engine):
    engine, _ = hash_engine()
    engine.submit(ask(use_prefix_cache=False)).result()
    assert engine.stats().num_cached_blocks == (0,)
    assert engine.submit(ask()).result().usage.cached_tokens == 0


@pytest.mark.parametrize("windows", WINDOWS)
def test_scored_prompts_are_computed_whole_and_are_found_by_others(hash_engine, windows):
    engine, _ = hash_engine(*windows)
    engine.submit(ask()).result()
    scored = engine.submit(ask(scores=True)).result()
    assert scored.usage.cached_tokens == 0
    assert len(scored.prompt_logprobs) == 150
    fresh, _ = hash_engine(*windows, prefix_cache=False)
    assert output(scored) == output(fresh.submit(ask(scores=True)).result())
    assert fresh.submit(ask(scores=True)).result().usage.cached_tokens == 0


def test_a_failed_request_leaves_nothing_that_others_would_trust(hash_engine):
    engine, model = hash_engine(max_step_tokens=64)
    handle = engine.submit(ask())
    engine.step()
    model.fail = RuntimeError("boom")
    with pytest.raises(Exception, match="boom"):
        handle.result()
    assert engine.stats().num_cached_blocks == (0,)
    assert engine.submit(ask()).result().usage.cached_tokens == 0


def test_the_engine_counts_what_the_cache_spared(hash_engine):
    engine, _ = hash_engine()
    for _ in range(3):
        engine.submit(ask(100, max_tokens=1)).result()
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (300, 192)


def test_a_preempted_sequence_goes_on_from_its_own_cached_blocks(hash_engine):
    engine, model = hash_engine(num_blocks=9, max_step_tokens=256)
    handles = [engine.submit(ask(100, tail=bytes([index]), max_tokens=100)) for index in range(2)]
    done = [handle.result() for handle in handles]
    assert engine.stats().num_preemptions >= 1
    assert [completion.usage.cached_tokens for completion in done] == [0, 0]
    computed = sum(len(batch.token_ids) for batch in model.batches)
    plain, plain_model = hash_engine(num_blocks=9, max_step_tokens=256, prefix_cache=False)
    handles = [plain.submit(ask(100, tail=bytes([index]), max_tokens=100)) for index in range(2)]
    assert [output(handle.result()) for handle in handles] == [output(completion) for completion in done]
    assert computed < sum(len(batch.token_ids) for batch in plain_model.batches)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 130), st.integers(0, 2), st.integers(0, 40), st.booleans(), st.integers(0, 2),
            st.integers(0, 5), st.booleans(),
        ),
        min_size=2, max_size=8,
    ),
    windows=st.sampled_from(WINDOWS),
    budget=st.sampled_from([5, 33, 64]),
)  # fmt: skip
def test_random_load_over_shared_prefixes_gives_what_everyone_gets_alone(hash_engine, jobs, windows, budget):
    requests = [
        ask(length, tail=bytes([branch]), max_tokens=tokens, scores=scores and tokens < 20, priority=priority,
            tenant="ab"[branch % 2], seed=branch, use_prefix_cache=uses)
        for length, branch, tokens, scores, priority, _, uses in jobs
        if length > 1
    ]  # fmt: skip
    alone = [hash_engine(*windows, prefix_cache=False)[0].submit(request).result() for request in requests]
    shared, _ = hash_engine(*windows, num_blocks=8, max_step_tokens=budget, max_sequences=3)
    handles = []
    for request, (*_, pause, _) in zip(requests, jobs, strict=False):
        handles.append(shared.submit(request))
        for _ in range(pause):
            shared.step()
            shared._scheduler.check_integrity()
    for handle, expected in zip(handles, alone, strict=True):
        found = handle.result()
        assert output(found) == output(expected)
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    shared._scheduler.check_integrity()
    assert shared.stats().num_free_blocks == shared.stats().num_blocks


def test_the_cache_survives_a_restart_on_disk(hash_engine, tmp_path):
    def start(version="1"):
        file = PrefixFile(tmp_path, model_id="m", kv_format="f16", version=version, max_bytes=1 << 24)
        return hash_engine(None, 40, prefix_file=file, model_id="m")[0]

    engine = start()
    first = engine.submit(ask(tenant="alice")).result()
    engine.close()
    engine = start()
    second = engine.submit(ask(tenant="alice")).result()
    assert output(second) == output(first)
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 128)
    assert engine.submit(ask(tenant="bob")).result().usage.cached_tokens == 0
    engine.close()
    assert start(version="2").submit(ask(tenant="alice")).result().usage.cached_tokens == 0


def test_an_engine_that_failed_saves_nothing(hash_engine, tmp_path):
    file = PrefixFile(tmp_path, model_id="m", kv_format="f16", version="1", max_bytes=1 << 24)
    engine, _ = hash_engine(prefix_file=file, model_id="m")
    engine.submit(ask()).result()
    engine._die(EngineError("broken"))
    engine.close()
    assert not file.path.exists()
