"""Truncation: what is used and what is dropped add up, what must stay stays, and nothing happens unasked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bise.engine.request import Request, SamplingParams
from bise.engine.truncation import truncate_messages, truncate_tokens
from bise.errors import ContextOverflowError


def test_the_example_of_the_docstring():
    assert truncate_tokens(range(10), 6, "oldest", 1) == ((0, 5, 6, 7, 8, 9), 4)
    assert truncate_tokens(range(10), 6, "middle", 1) == ((0, 1, 2, 7, 8, 9), 4)


@given(
    length=st.integers(0, 60),
    limit=st.integers(1, 70),
    keep=st.integers(0, 20),
    mode=st.sampled_from(["oldest", "middle"]),
)
def test_used_and_dropped_add_up_and_the_ends_stay(length, limit, keep, mode):
    token_ids = list(range(length))
    if length > limit and keep >= limit:
        with pytest.raises(ContextOverflowError, match=f"truncate_keep {keep} .* {limit} of its {length}"):
            truncate_tokens(token_ids, limit, mode, keep)
        return
    used, dropped = truncate_tokens(token_ids, limit, mode, keep)
    assert len(used) + dropped == length
    assert len(used) == min(length, limit)
    assert list(used) == sorted(set(used))
    assert list(used[:keep]) == token_ids[:keep]
    assert used[-1:] == tuple(token_ids[-1:])
    gap = [index for index in token_ids if index not in used]
    assert gap == list(range(gap[0], gap[0] + dropped)) if gap else dropped == 0
    if mode == "oldest" and gap:
        assert gap[0] == keep


def words(messages):
    return sum(len(message["content"].split()) + 1 for message in messages)


def chat(*pairs):
    return [{"role": role, "content": " ".join(["w"] * count)} for role, count in pairs]


DIALOGUE = chat(
    ("system", 3), ("user", 5), ("assistant", 5), ("user", 2), ("assistant", 1), ("tool", 4),
    ("assistant", 2), ("user", 6), ("assistant", 1), ("user", 1),
)  # fmt: skip


def test_the_oldest_turns_go_first_and_whole():
    cut = truncate_messages(DIALOGUE, 30, "oldest", words)
    assert cut.dropped == (1, 2)
    assert cut.num_tokens == words(cut.messages) == 28
    assert cut.num_tokens + cut.num_dropped_tokens == words(DIALOGUE) == 40
    assert cut.messages[0]["role"] == "system"


def test_the_middle_goes_first_on_request():
    cut = truncate_messages(DIALOGUE, 30, "middle", words)
    assert cut.dropped == (3, 4, 5, 6)


def test_a_conversation_that_fits_is_left_alone():
    cut = truncate_messages(DIALOGUE, 40, "oldest", words)
    assert (cut.messages, cut.dropped, cut.num_dropped_tokens) == (tuple(DIALOGUE), (), 0)


def test_what_must_stay_and_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ContextOverflowError, match=r"has 40 tokens, 5 fit, .* last turn alone have 6"):
        truncate_messages(DIALOGUE, 5, "oldest", words)


@given(
    turns=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=7),
    system=st.booleans(),
    limit=st.integers(1, 60),
    mode=st.sampled_from(["oldest", "middle"]),
)
def test_messages_used_and_dropped_add_up_and_no_turn_is_torn(turns, system, limit, mode):
    messages = chat(("system", 2)) if system else []
    turn_of = [-1] if system else []
    for number, sizes in enumerate(turns):
        roles = ["user", *["assistant", "tool", "assistant"][: len(sizes) - 1]]
        messages += chat(*zip(roles, sizes, strict=True))
        turn_of += [number] * len(sizes)
    kept = [m for m, turn in zip(messages, turn_of, strict=True) if turn in (-1, len(turns) - 1)]
    if words(kept) > limit:
        with pytest.raises(ContextOverflowError):
            truncate_messages(messages, limit, mode, words)
        return
    cut = truncate_messages(messages, limit, mode, words)
    assert cut.num_tokens == words(cut.messages) <= limit
    assert cut.num_tokens + cut.num_dropped_tokens == words(messages)
    assert [m for i, m in enumerate(messages) if i not in cut.dropped] == list(cut.messages)
    gone = {turn_of[index] for index in cut.dropped}
    assert gone.isdisjoint({-1, len(turns) - 1})
    assert all(index in cut.dropped for index, turn in enumerate(turn_of) if turn in gone)


@pytest.mark.parametrize("mode", ["oldest", "middle"])
def test_a_request_that_may_be_truncated_says_what_was_dropped(hash_engine, mode):
    engine, _ = hash_engine(model_context=100)
    request = Request(
        token_ids=tuple(range(200)),
        params=SamplingParams(max_tokens=10, seed=1),
        truncate=mode,
        truncate_keep=5,
    )
    done = engine.submit(request).result()
    assert (done.usage.prompt_tokens, done.usage.dropped_tokens) == (90, 110)
    used, _ = truncate_tokens(request.token_ids, 90, mode, 5)
    by_hand = engine.submit(Request(token_ids=used, params=request.params)).result()
    assert done.token_ids == by_hand.token_ids
    assert by_hand.usage.dropped_tokens == 0


def test_a_request_that_fits_is_not_truncated(hash_engine):
    engine, _ = hash_engine(model_context=100)
    request = Request(
        token_ids=tuple(range(90)), params=SamplingParams(max_tokens=10, seed=1), truncate="oldest"
    )
    usage = engine.submit(request).result().usage
    assert (usage.prompt_tokens, usage.dropped_tokens) == (90, 0)


def test_without_being_asked_nothing_is_dropped(hash_engine):
    engine, _ = hash_engine(model_context=100)
    with pytest.raises(
        ContextOverflowError, match=r"prompt of 91 tokens and max_tokens 10 .* context of 100"
    ):
        engine.submit(Request(token_ids=tuple(range(91)), params=SamplingParams(max_tokens=10)))


def test_an_answer_that_leaves_no_room_for_any_prompt_is_refused_with_both_numbers(hash_engine):
    engine, _ = hash_engine(model_context=100)
    with pytest.raises(
        ContextOverflowError, match=r"prompt of 9 tokens and max_tokens 100 .* context of 100"
    ):
        engine.submit(
            Request(token_ids=tuple(range(9)), params=SamplingParams(max_tokens=100), truncate="oldest")
        )


@given(
    length=st.integers(1, 300),
    max_tokens=st.integers(0, 90),
    mode=st.sampled_from([None, "oldest", "middle"]),
    keep=st.integers(0, 9),
)
def test_tokens_received_are_tokens_used_and_tokens_dropped(scoring_engine, length, max_tokens, mode, keep):
    request = Request(
        token_ids=tuple(index % 256 for index in range(length)),
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        truncate=mode,
        truncate_keep=keep,
    )
    if mode is None and length + max_tokens > 100:
        with pytest.raises(ContextOverflowError):
            scoring_engine.submit(request)
        return
    handle = scoring_engine.submit(request)
    scoring_engine.step()
    handle.cancel()
    usage = list(handle)[-1].usage
    assert usage.prompt_tokens + usage.dropped_tokens == length
    assert usage.prompt_tokens <= 100 - max_tokens
    assert (usage.dropped_tokens > 0) == (length + max_tokens > 100)


@pytest.fixture(scope="module")
def scoring_engine():
    """An engine over a model that costs nothing."""
    import numpy as np

    from bise.config import ModelConfig
    from bise.engine.engine import Engine
    from bise.kernels.cpu import CpuOps

    config = ModelConfig(
        family="mistral", dim=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=2,
        vocab_size=256, max_context=100,
    )  # fmt: skip

    class NoModel:
        def __init__(self):
            self.config = config

        def forward(self, batch, cache=None):
            return np.zeros((len(batch.token_ids), 1), np.float32)

        def logits(self, hidden):
            return np.zeros((len(hidden), 256), np.float32)

    with Engine(NoModel(), CpuOps(1), config=config, tokenizer=None, num_blocks=8, threaded=False) as engine:
        yield engine
