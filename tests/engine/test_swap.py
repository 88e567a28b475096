"""Swap: what a preempted sequence had comes back byte for byte, within the budget, where it pays."""

from collections.abc import Iterable

import pytest

from bise.engine.request import Request, SamplingParams
from bise.engine.swap import SwapSpace
from bise.errors import ConfigError

WINDOWS = [(None,), (None, 40)]


def crowd() -> Iterable[Request]:
    return [
        Request(
            token_ids=(256, *bytes([index]) * 99),
            params=SamplingParams(max_tokens=100, seed=index, ignore_eos=True, logprobs=1),
        )
        for index in range(3)
    ]


def run(engine):
    handles = [engine.submit(request) for request in crowd()]
    found = [handle.result() for handle in handles]
    engine._scheduler.check_integrity()
    return [(done.token_ids, done.logprobs) for done in found]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_swapped_sequences_return_what_undisturbed_ones_do(hash_engine, monkeypatch, windows, prefix_cache):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)
    roomy, _ = hash_engine(*windows, num_blocks=40)
    tight, model = hash_engine(*windows, num_blocks=14, swap_bytes=1 << 20, prefix_cache=prefix_cache)
    assert run(tight) == run(roomy)
    assert tight.stats().num_preemptions == tight._memory.swap.num_saved > 0
    assert sum(len(batch.token_ids) for batch in model.batches) == 3 * 199  # nothing was computed twice
    assert not tight._memory.swap._stored


def test_what_does_not_fit_the_budget_is_computed_again(hash_engine, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)
    tight, _ = hash_engine(num_blocks=14, swap_bytes=100)
    assert run(tight) == run(hash_engine(num_blocks=40)[0])
    assert tight.stats().num_preemptions > tight._memory.swap.num_saved == 0


def test_where_computing_is_cheaper_than_copying_it_is_computed_again(hash_engine, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda self, *_: setattr(self, "_token_s", 1e-15))
    tight, _ = hash_engine(num_blocks=14, swap_bytes=1 << 20)
    assert run(tight) == run(hash_engine(num_blocks=40)[0])
    assert tight.stats().num_preemptions > tight._memory.swap.num_saved == 0


def test_a_sequence_that_is_aborted_while_swapped_out_leaves_nothing(hash_engine, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)
    tight, _ = hash_engine(num_blocks=14, swap_bytes=1 << 20)
    handles = [tight.submit(request) for request in crowd()]
    while not tight._memory.swap._stored:
        tight.step()
    for handle in handles:
        handle.cancel()
    assert (tight._memory.swap._stored, tight._memory.swap._free_bytes) == ({}, 1 << 20)
    tight._scheduler.check_integrity()


def test_where_the_granted_memory_is_not_there_it_is_computed_again(hash_engine, monkeypatch):
    monkeypatch.setattr(SwapSpace, "observe", lambda *_: None)
    tight, _ = hash_engine(num_blocks=14, swap_bytes=1 << 20)
    read_block = tight._memory.pages.read_block

    def fail(group: int, block: int) -> bytes:
        if tight.stats().num_running:
            raise MemoryError
        return read_block(group, block)

    monkeypatch.setattr(tight._memory.pages, "read_block", fail)
    tight._memory.pages._block_bytes[0] = len(read_block(0, 0))
    assert run(tight) == run(hash_engine(num_blocks=40)[0])
    assert tight.stats().num_preemptions > tight._memory.swap.num_saved == 0


def test_a_negative_budget_is_refused(hash_engine):
    with pytest.raises(ConfigError, match="swap_bytes must not be negative, got -1"):
        hash_engine(swap_bytes=-1)
