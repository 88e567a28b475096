"""Sampling: the distributions of the published methods, draws that depend on seed and position alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.engine.request import SamplingParams
from bise.engine.sampling import (
    Sampler,
    check_finite,
    largest,
    pick,
    smallest_set,
    token_logprob,
    truncate,
    uniform,
)
from bise.errors import NonFiniteError, RequestError

VOCAB = 257
PINNED = [0.0564663990004608, 0.8614033402518924, 0.2767587067703342]


def row_of(seed: int, size: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sampler(vocab: int = VOCAB, prompt=(), stop_ids=(), seed: int = 1, **params) -> Sampler:
    return Sampler(SamplingParams(**params), vocab_size=vocab, prompt=prompt, stop_ids=stop_ids, seed=seed)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Return what `truncate` leaves, as probabilities [V]."""
    ids, weights = truncate(logits.astype(np.float64), params)
    full = np.zeros(logits.size)
    full[np.arange(logits.size) if ids is None else ids] = weights / weights.sum()
    return full


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The same by sorting everything, as the papers describe it."""

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    p = softmax(logits.astype(np.float64) / params.temperature)

    def keep(order, mass):
        nonlocal p
        total, kept = 0.0, []
        for index in order:
            kept.append(index)
            total += p[index]
            if total >= mass * p.sum():
                break
        mask = np.zeros(p.size, bool)
        mask[kept] = True
        p = np.where(mask, p, 0)
        p = p / p.sum()

    by_probability = sorted(range(p.size), key=lambda i: (-p[i], i))
    if params.top_k:
        p[by_probability[params.top_k :]] = 0
        p = p / p.sum()
    if params.top_p < 1:
        keep([i for i in by_probability if p[i] > 0], params.top_p)
    if params.min_p > 0:
        p = np.where(p >= params.min_p * p.max(), p, 0)
        p = p / p.sum()
    if params.typical_p < 1:
        alive = np.flatnonzero(p)
        surprise = -np.log(p[alive])
        entropy = (p[alive] * surprise).sum()
        keep(alive[np.argsort(np.abs(surprise - entropy), kind="stable")], params.typical_p)
    return p


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 10, 100, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 20), params=PARAMS, scale=st.sampled_from([0.01, 1.0, 5.0, 30.0]))
def test_every_mix_of_truncations_equals_the_plain_reference(seed, params, scale):
    logits = row_of(seed, 97, scale)
    np.testing.assert_allclose(distribution(logits, params), reference(logits, params), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"typical_p": 0.2},
        {"typical_p": 0.9},
        {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.7, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.7},
    ],
)
def test_truncations_equal_those_of_transformers(params):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(20):
        logits = row_of(seed)
        scores = torch.tensor(logits, dtype=torch.float64)[None] / params.get("temperature", 1.0)
        for name, warper in (
            ("top_k", "TopKLogitsWarper"),
            ("top_p", "TopPLogitsWarper"),
            ("min_p", "MinPLogitsWarper"),
            ("typical_p", "TypicalLogitsWarper"),
        ):
            if name in params:
                scores = getattr(warpers, warper)(params[name])(None, scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        np.testing.assert_allclose(
            distribution(logits, SamplingParams(**params)), expected, rtol=1e-9, atol=1e-15
        )


def test_repetition_penalty_equals_that_of_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(20):
        logits = row_of(seed)
        chooser = sampler(prompt=(3, 5, 5), temperature=0, repetition_penalty=1.8)
        chooser.accept(int(logits.argmax()))
        seen = torch.tensor([[3, 5, 5, int(logits.argmax())]])
        expected = warpers.RepetitionPenaltyLogitsProcessor(1.8)(
            seen, torch.tensor(logits, dtype=torch.float64)[None]
        )
        assert chooser.choose(logits, 4, 1) == int(expected.argmax())


def test_presence_counts_once_and_frequency_counts_each_time_and_neither_counts_the_prompt():
    logits = np.zeros(4, np.float32)
    logits[:] = [2.0, 1.4, 0.9, -5]
    chooser = sampler(4, prompt=(0, 0), temperature=0, presence_penalty=0.4, frequency_penalty=0.3)
    outputs = []
    for index in range(5):
        outputs.append(chooser.choose(logits, 2 + index, index))
        chooser.accept(outputs[-1])
    # 2.0 | 1.3 after one | 1.0 after two; 1.4 | 0.7 | ...; 0.9 | 0.2
    assert outputs == [0, 1, 0, 0, 2]


def test_logit_bias_is_added_before_the_choice():
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert sampler(3, temperature=0, logit_bias={2: 1.5}).choose(logits, 0, 0) == 2
    assert sampler(3, temperature=0, logit_bias={1: -100}).choose(logits, 0, 0) == 2


def test_stop_tokens_stay_masked_until_min_tokens_were_produced():
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    chooser = sampler(3, stop_ids=(1,), temperature=0, min_tokens=2)
    assert [chooser.choose(logits, 5 + index, index) for index in range(4)] == [2, 2, 1, 1]
    drawn = sampler(3, stop_ids=(1,), temperature=1, min_tokens=100)
    assert 1 not in {drawn.choose(logits, position, 0) for position in range(200)}


def test_greedy_takes_the_highest_logit_and_ties_go_to_the_lower_id():
    assert sampler(4, temperature=0).choose(np.array([1, 2, 2, 0], np.float32), 0, 0) == 1
    assert sampler(4, temperature=0, logit_bias={3: 2}).choose(np.array([1, 2, 2, 0], np.float32), 0, 0) == 1


def test_a_tiny_temperature_is_greedy_in_effect_and_does_not_overflow():
    logits = row_of(3, scale=50)
    chooser = sampler(temperature=1e-300)
    assert {chooser.choose(logits, position, 0) for position in range(50)} == {int(logits.argmax())}


def test_top_k_keeps_exactly_k_when_logits_tie():
    kept = distribution(np.zeros(10, np.float32), SamplingParams(top_k=3))
    assert np.flatnonzero(kept).tolist() == [0, 1, 2]


def test_a_draw_depends_on_seed_and_position_alone():
    assert uniform(7, 11) == uniform(7, 11)
    values = {uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(values) == 1600
    assert all(0 <= value < 1 for value in values)
    assert uniform((1 << 64) - 1, 1 << 24) < 1


def test_draws_are_pinned_so_that_a_seed_means_the_same_on_every_machine_and_version():
    assert [uniform(0, 0), uniform(42, 7), uniform((1 << 64) - 1, 3)] == PINNED


def test_uniform_numbers_are_uniform_and_uncorrelated():
    draws = np.array([uniform(5, position) for position in range(20000)])
    counts = np.bincount((draws * 20).astype(int), minlength=20)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 99.9 % of chi-square with 19 degrees of freedom
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_frequencies_follow_the_distribution():
    logits = row_of(9, 12, 1.5)
    params = {"temperature": 0.8, "top_p": 0.9}
    expected = reference(logits, SamplingParams(**params))
    chooser = sampler(12, seed=123, **params)
    counts = np.bincount([chooser.choose(logits, position, 0) for position in range(6000)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((counts[likely] - 6000 * expected[likely]) ** 2 / (6000 * expected[likely])).sum()
    assert chi_square < 31.3  # 99.9 % with at most 11 degrees of freedom


def test_the_choice_and_its_log_prob_have_the_same_bits_in_every_row_of_every_batch():
    rows = np.stack([row_of(seed, 1003) for seed in range(9)])
    chooser = sampler(1003, temperature=0.9, top_p=0.95, seed=4)
    for index in range(9):
        alone = rows[index].copy()
        padded = np.zeros((3, 1003), np.float32)
        padded[1] = alone
        for same in (rows[index], padded[1], np.concatenate([[np.float32(0)], alone])[1:]):
            assert chooser.choose(same, 17, 0) == chooser.choose(alone, 17, 0)
            assert token_logprob(same, 5, 20) == token_logprob(alone, 5, 20)


def test_log_probs_equal_a_float64_log_softmax():
    torch = pytest.importorskip("torch")
    for seed in range(10):
        logits = row_of(seed, 5000, 6.0)
        expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
        found = token_logprob(logits, seed, 20)
        assert found.logprob == pytest.approx(expected[seed], rel=1e-12, abs=1e-13)
        order = np.argsort(-expected, kind="stable")[:20]
        assert [index for index, _ in found.top] == order.tolist()
        assert [value for _, value in found.top] == pytest.approx(
            expected[order].tolist(), rel=1e-12, abs=1e-13
        )


def test_log_probs_are_of_the_models_own_distribution():
    logits = row_of(1)
    assert token_logprob(logits, 2, 0).top == ()
    assert math.fsum(math.exp(value) for _, value in token_logprob(logits, 2, VOCAB).top) == pytest.approx(1)


def test_the_most_likely_tokens_come_in_order_with_ties_to_the_lower_id():
    assert largest(np.array([1.0, 3, 3, 2, 3]), 2).tolist() == [1, 2]
    assert largest(np.array([1.0, 3, 3, 2, 3]), 9).tolist() == [1, 2, 4, 3, 0]
    assert largest(np.array([1.0]), 0).tolist() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_end_in_an_error(value, place, temperature):
    logits = row_of(1)
    logits[place] = value
    with pytest.raises(NonFiniteError, match=f"1 non-finite logits of {VOCAB}"):
        sampler(temperature=temperature).choose(logits, 0, 0)


def test_finite_logits_of_any_size_pass():
    check_finite(np.array([3e38, -3e38, 0], np.float32))


@given(share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 1000))
def test_a_token_of_no_weight_is_never_picked(share, seed):
    rng = np.random.default_rng(seed)
    weights = rng.random(20) * (rng.random(20) < 0.4)
    weights[rng.integers(20)] = 1e-3
    assert weights[pick(np.cumsum(weights), share)] > 0


def test_the_largest_share_picks_the_last_possible_token():
    assert pick(np.cumsum([0.1, 0.2, 0.0]), 1 - 2.0**-53) == 1


@given(st.lists(st.floats(0, 50), min_size=1, max_size=40), st.floats(0.001, 0.999))
def test_the_smallest_set_is_minimal_and_reaches_its_mass(keys, mass):
    keys = np.array(keys)
    weights = np.exp(-keys)
    kept = smallest_set(keys, weights, mass)
    goal = mass * weights.sum()
    assert weights[kept].sum() >= goal * (1 - 1e-12)
    last = kept[np.argsort(keys[kept], kind="stable")[-1]]
    assert weights[kept].sum() - weights[last] < goal * (1 + 1e-12)
    assert keys[kept].max() <= np.delete(keys, kept).min(initial=np.inf)


def test_equal_keys_enter_the_smallest_set_by_index():
    assert smallest_set(np.array([1.0, 0, 0, 1, 0]), np.ones(5), 0.35).tolist() == [1, 2]
    assert smallest_set(np.array([1.0, 0, 0, 1, 0]), np.ones(5), 0.75).tolist() == [0, 1, 2, 4]
    assert smallest_set(np.zeros(5), np.ones(5), 1e-9).tolist() == [0]


@pytest.mark.parametrize("scale", [0.01, 2.0, 20.0])
def test_top_p_on_a_large_vocabulary_sorts_next_to_nothing(monkeypatch, scale):
    logits = row_of(5, 131072, scale)
    sizes = []
    original = np.argsort

    def spy(values, **options):
        sizes.append(values.size)
        return original(values, **options)

    monkeypatch.setattr(np, "argsort", spy)
    sampler(131072, top_p=0.9).choose(logits, 0, 0)
    assert max(sizes) < 1000


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"logit_bias": {VOCAB: 1}}, "logit_bias"),
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ({"logit_bias": {1: 1, 10**30: 1}}, "logit_bias"),
        ({"stop_token_ids": (10**30,)}, "stop_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params, field):
    with pytest.raises(RequestError, match=rf"{field}: token \d+ is outside the vocabulary of {VOCAB}"):
        sampler(**params)


@pytest.mark.parametrize("other", [{"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.1}, {"top_k": 5}, {}])
def test_the_least_temperature_above_zero_takes_the_best_token(other):
    logits = row_of(3)
    assert sampler(temperature=5e-324, **other).choose(logits, 0, 0) == int(logits.argmax())


def test_min_tokens_cannot_mask_the_whole_vocabulary():
    with pytest.raises(RequestError, match="every token is a stop token"):
        sampler(2, stop_ids=(0, 1), min_tokens=1)


@pytest.mark.parametrize("size", [1, 31, 64, 700, 5000])
def test_the_largest_are_those_of_a_whole_sort_whatever_ties_and_infinities_there_are(size):
    rng = np.random.default_rng(size)
    for count in (0, 1, 7, 20, 150):
        for values in (
            rng.standard_normal(size),
            np.round(rng.standard_normal(size)),
            np.where(rng.random(size) < 0.5, -np.inf, 1.0),
        ):
            assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()
