"""Tokens chosen by the device's kernel against those of the processor's sampler, for the same logits and
draws.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.engine.request import SamplingParams  # noqa: E402
from bise.engine.sampling import Sampler, uniform  # noqa: E402
from bise.kernels.triton.sampling import BROKEN, SURE, UNSURE, sample  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def rows_of(vocab, count, seed):
    """Return logits [count, vocab]: plain ones, ones full of equal values, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((count, vocab)) * 3).astype(np.float32)
    logits[1::3] = np.round(logits[1::3])
    logits[-1] = np.where(np.arange(vocab) % 2, 0.0, -0.0)
    return logits


def check(logits, ways, mask=None, position=9):
    """Assert that every row gets the processor's token; return how many the device left to the processor."""
    params = [SamplingParams(**way) for way in ways]
    numbers = [(p.temperature, p.top_k, p.top_p, p.min_p, uniform(i, position)) for i, p in enumerate(params)]
    packed = (
        None
        if mask is None
        else np.packbits(np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32))), axis=1, bitorder="little").view(
            np.uint32
        )
    )
    tokens, status = sample(torch.from_numpy(logits).to(DEVICE), np.array(numbers), packed)
    for index, one in enumerate(params):
        sampler = Sampler(one, vocab_size=logits.shape[1], prompt=[1], stop_ids=[], seed=index)
        allowed = None if mask is None else np.flatnonzero(mask[index])
        want = sampler.choose(logits[index], position, 0, allowed)
        assert status[index] == UNSURE or tokens[index] == want, (index, ways[index])
    return int((status == UNSURE).sum())


def test_every_way_of_choosing_gives_the_token_of_the_processor():
    assert check(rows_of(37, 6, 0), WAYS) <= 1


def test_tokens_that_a_mask_rules_out_are_never_chosen():
    mask = np.random.default_rng(1).random((6, 70)) < 0.4
    assert check(rows_of(70, 6, 2), WAYS, mask) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [33, 5000])
@pytest.mark.parametrize("masked", [False, True])
def test_many_rows_get_the_tokens_of_the_processor(vocab, masked):
    unsure = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        ways = [WAYS[index % len(WAYS)] for index in range(24)]
        mask = rng.random((24, vocab)) < 0.3 if masked else None
        if mask is not None:
            mask[:, 3] = True
        unsure += check(rows_of(vocab, 24, seed), ways, mask, position=100 + seed)
    assert unsure <= 6  # rows of equal logits, where a border falls between two of them


def test_rows_that_are_not_finite_are_reported():
    logits = rows_of(40, 3, 3)
    logits[0, 5], logits[1, 6] = np.nan, -np.inf
    _, status = sample(torch.from_numpy(logits).to(DEVICE), np.array([(0.0, 0, 1, 0, 0)] * 3), None)
    assert status.tolist() == [BROKEN, BROKEN, SURE]


def test_a_draw_on_the_border_of_two_tokens_is_left_to_the_processor():
    logits = np.zeros((1, 4), np.float32)  # the running sum is 1, 2, 3, 4
    border, inside = ([(1.0, 0, 1.0, 0.0, share)] for share in (0.5, 0.51))
    assert sample(torch.from_numpy(logits).to(DEVICE), np.array(border), None)[1][0] == UNSURE
    tokens, status = sample(torch.from_numpy(logits).to(DEVICE), np.array(inside), None)
    assert (tokens[0], status[0]) == (2, SURE)
