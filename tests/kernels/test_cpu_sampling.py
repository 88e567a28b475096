"""Tokens that the native kernel chooses against those of `engine.sampling`, for the same logits and draws."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.kernels.cpu import CpuOps, detected_isas

SURE, UNSURE, BROKEN = 0, 1, 2
MORE_WAYS = [
    {"temperature": 0.7, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.01, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 1},
]


def rows_of(choosing, vocab, count, seed, width=3.0):
    """Return logits [count, vocab], of some of which a few stand out."""
    logits = choosing.rows(vocab, count, seed, width)
    logits[2::3, np.random.default_rng(seed).integers(0, vocab, 3)] += 12
    return logits


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000, 4096, 32000])
def test_every_way_of_choosing_gives_the_token_of_the_sampler(choosing, vocab, threads):
    ops, ways = CpuOps(threads), (choosing.ways + MORE_WAYS) * 4
    unsure = sum(
        choosing.check(ops.sample, rows_of(choosing, vocab, len(ways), seed), ways, position=seed)
        for seed in range(3)
    )
    assert unsure <= len(ways) // 6  # equal values, where a border falls between two of them


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=200),
    st.floats(0.05, 3) | st.just(0.0),
    st.integers(0, 210),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_any_row_gets_the_token_of_the_sampler(choosing, values, temperature, top_k, top_p, min_p, position):
    way = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    choosing.check(CpuOps(1).sample, np.array([values], np.float32), [way], position=position)


def test_logits_that_are_nearly_equal_keep_their_order(choosing):
    choosing.check_nearly_equal(CpuOps(1).sample)


def test_tokens_come_as_often_as_they_weigh(choosing):
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)).repeat(4000, 0)
    tokens, status = CpuOps(2).sample(logits, choosing.numbers([{"temperature": 1.0}] * 4000, 0), None)
    assert not status.any()
    shares = np.bincount(tokens, minlength=4) / 4000
    assert np.abs(shares - [0.5, 0.25, 0.125, 0.125]).max() < 0.03


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40, 63, 64, 99])
def test_a_row_with_a_number_that_is_none_is_reported_and_no_other(choosing, bad, place):
    logits = rows_of(choosing, 100, 3, 3)
    logits[1, place] = bad
    for way in choosing.ways + MORE_WAYS:
        status = CpuOps(1).sample(logits, choosing.numbers([way] * 3, 0), None)[1]
        assert status.tolist() == [SURE, BROKEN, SURE]


def test_a_draw_on_the_border_of_two_tokens_is_left_to_the_sampler():
    logits = np.zeros((2, 4), np.float32)  # the running sum is 1, 2, 3, 4
    numbers = np.array([(1.0, 0, 1.0, 0.0, 0.5), (1.0, 0, 1.0, 0.0, 0.51)])
    tokens, status = CpuOps(1).sample(logits, numbers, None)
    assert status.tolist() == [UNSURE, SURE]
    assert tokens[1] == 2


def test_rows_that_keep_most_of_a_flat_vocabulary_are_left_to_the_sampler_or_right(choosing):
    logits = (np.random.default_rng(0).standard_normal((4, 131072)) * 0.01).astype(np.float32)
    ways = [{"temperature": 1.0}, {"top_p": 0.99}, {"min_p": 0.5}, {"top_k": 1000}]
    assert choosing.check(CpuOps(2).sample, logits, ways) <= 2


_OF_AN_ISA = """
import sys
import numpy as np
from bise.kernels.cpu import CpuOps
ops = CpuOps(1)
assert ops.isa == sys.argv[1]
given = np.load(sys.argv[2])
np.save(sys.argv[3], ops.sample(given["logits"], given["parameters"], None))
"""


@pytest.mark.parametrize("isa", detected_isas())
def test_every_instruction_set_chooses_as_the_sampler_does(choosing, isa, tmp_path):
    def sample(logits, parameters, mask):
        given, found = tmp_path / "given.npz", tmp_path / "found.npy"
        np.savez(given, logits=logits, parameters=parameters)
        command = [sys.executable, "-c", _OF_AN_ISA, isa, str(given), str(found)]
        done = subprocess.run(command, env={**os.environ, "BISE_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return np.load(found)

    ways = choosing.ways + MORE_WAYS
    rows = [rows_of(choosing, 3000, len(ways), seed, width) for seed, width in ((0, 1), (1, 8))]
    assert choosing.check(sample, np.concatenate(rows), ways * 2) <= 2
