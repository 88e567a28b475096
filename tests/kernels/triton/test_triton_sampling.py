"""Tokens chosen by the device's kernel against those of the processor's sampler, for the same logits and
draws.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels.triton.sampling import BROKEN, SURE, UNSURE, sample  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(logits, parameters, mask):
    return sample(torch.from_numpy(logits).to(DEVICE), parameters, mask)


def rows_of(choosing, vocab, count, seed):
    """Return logits [count, vocab], the last ones zeros of both signs."""
    logits = choosing.rows(vocab, count, seed)
    logits[-1] = np.where(np.arange(vocab) % 2, 0.0, -0.0)
    return logits


def test_every_way_of_choosing_gives_the_token_of_the_processor(choosing):
    assert choosing.check(on_device, rows_of(choosing, 37, 6, 0), choosing.ways) <= 1


def test_logits_that_are_nearly_equal_keep_their_order(choosing):
    choosing.check_nearly_equal(on_device)


def test_tokens_that_a_mask_rules_out_are_never_chosen(choosing):
    mask = np.random.default_rng(1).random((6, 70)) < 0.4
    assert choosing.check(on_device, rows_of(choosing, 70, 6, 2), choosing.ways, mask) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [33, 5000])
@pytest.mark.parametrize("masked", [False, True])
def test_many_rows_get_the_tokens_of_the_processor(choosing, vocab, masked):
    unsure = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        ways = choosing.ways * 4
        mask = rng.random((24, vocab)) < 0.3 if masked else None
        if mask is not None:
            mask[:, 3] = True
        unsure += choosing.check(on_device, rows_of(choosing, vocab, 24, seed), ways, mask, 100 + seed)
    assert unsure <= 6  # rows of equal logits, where a border falls between two of them


def test_rows_that_are_not_finite_are_reported(choosing):
    logits = rows_of(choosing, 40, 3, 3)
    logits[0, 5], logits[1, 6] = np.nan, -np.inf
    _, status = on_device(logits, np.array([(0.0, 0, 1, 0, 0)] * 3), None)
    assert status.tolist() == [BROKEN, BROKEN, SURE]


def test_a_draw_on_the_border_of_two_tokens_is_left_to_the_processor():
    logits = np.zeros((1, 4), np.float32)  # the running sum is 1, 2, 3, 4
    border, inside = ([(1.0, 0, 1.0, 0.0, share)] for share in (0.5, 0.51))
    assert on_device(logits, np.array(border), None)[1][0] == UNSURE
    tokens, status = on_device(logits, np.array(inside), None)
    assert (tokens[0], status[0]) == (2, SURE)
