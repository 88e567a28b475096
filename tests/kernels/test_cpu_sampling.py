"""Tokens that the native kernel chooses against those of `engine.sampling`, for the same logits and draws."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.engine.request import SamplingParams
from bise.engine.sampling import Sampler, uniform
from bise.kernels.cpu import CpuOps, detected_isas

SURE, UNSURE, BROKEN = 0, 1, 2
WAYS = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.01, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 1},
]


def rows_of(vocab, count, seed, width=3.0):
    """Return logits [count, vocab]: plain ones, ones full of equal values, a few that stand out."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((count, vocab)) * width).astype(np.float32)
    logits[1::3] = np.round(logits[1::3])
    logits[2::3, rng.integers(0, vocab, 3)] += 12
    return logits


def chosen(ops, logits, ways, position):
    numbers = [
        (way.get("temperature", 1.0), way.get("top_k", 0), way.get("top_p", 1.0), way.get("min_p", 0.0),
         uniform(index, position))
        for index, way in enumerate(ways)
    ]  # fmt: skip
    return ops.sample(logits, np.array(numbers, np.float64), None)


def check(ops, logits, ways, position=9):
    """Assert that every row gets the sampler's token or is left to it; return how many are left."""
    tokens, status = chosen(ops, logits, ways, position)
    for index, way in enumerate(ways):
        sampler = Sampler(
            SamplingParams(**way), vocab_size=logits.shape[1], prompt=[0], stop_ids=[], seed=index
        )
        if status[index] == SURE:
            assert tokens[index] == sampler.choose(logits[index], position, 0), (index, way)
        else:
            assert status[index] == UNSURE
    return int((status == UNSURE).sum())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000, 4096, 32000])
def test_every_way_of_choosing_gives_the_token_of_the_sampler(vocab, threads):
    ops, ways = CpuOps(threads), WAYS * 4
    unsure = sum(check(ops, rows_of(vocab, len(ways), seed), ways, seed) for seed in range(3))
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
def test_any_row_gets_the_token_of_the_sampler(values, temperature, top_k, top_p, min_p, position):
    way = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check(CpuOps(1), np.array([values], np.float32), [way], position)


def test_tokens_come_as_often_as_they_weigh():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)).repeat(4000, 0)
    tokens, status = chosen(CpuOps(2), logits, [{"temperature": 1.0}] * 4000, 0)
    assert not status.any()
    shares = np.bincount(tokens, minlength=4) / 4000
    assert np.abs(shares - [0.5, 0.25, 0.125, 0.125]).max() < 0.03


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40, 63, 64, 99])
def test_a_row_with_a_number_that_is_none_is_reported_and_no_other(bad, place):
    logits = rows_of(100, 3, 3)
    logits[1, place] = bad
    for way in WAYS:
        assert chosen(CpuOps(1), logits, [way] * 3, 0)[1].tolist() == [SURE, BROKEN, SURE]


def test_a_draw_on_the_border_of_two_tokens_is_left_to_the_sampler():
    logits = np.zeros((2, 4), np.float32)  # the running sum is 1, 2, 3, 4
    numbers = np.array([(1.0, 0, 1.0, 0.0, 0.5), (1.0, 0, 1.0, 0.0, 0.51)])
    tokens, status = CpuOps(1).sample(logits, numbers, None)
    assert status.tolist() == [UNSURE, SURE]
    assert tokens[1] == 2


def test_rows_that_keep_most_of_a_flat_vocabulary_are_left_to_the_sampler_or_right():
    logits = (np.random.default_rng(0).standard_normal((4, 131072)) * 0.01).astype(np.float32)
    ways = [{"temperature": 1.0}, {"top_p": 0.99}, {"min_p": 0.5}, {"top_k": 1000}]
    assert check(CpuOps(2), logits, ways) <= 2


@pytest.mark.parametrize("isa", detected_isas())
def test_every_instruction_set_chooses_as_the_sampler_does(isa):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_cpu_sampling import *\n"
        "ops = CpuOps(1)\n"
        "assert ops.isa == sys.argv[2]\n"
        "assert sum(check(ops, rows_of(3000, len(WAYS), s, w), WAYS, s) for s, w in ((0, 1), (1, 8))) <= 2\n"
    )
    env = {**os.environ, "BISE_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), isa], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
