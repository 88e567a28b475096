"""Runner: a Step becomes the Batch of the worked examples; logits come out as float32 rows."""

import numpy as np

from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable
from bise.engine.request import Request
from bise.engine.runner import SCORE_ROWS, Runner, build_batch, score_rows
from bise.engine.scheduler import Step, StepRow
from bise.engine.sequence import Sequence


class FixedPool(BlockPool):
    """Hands out the blocks it is told to."""

    def __init__(self, *blocks: int):
        super().__init__(64)
        self._next = list(blocks)

    def allocate(self) -> int:
        block = self._next.pop(0)
        self._free.remove(block)
        self._owners[block] = 1
        return block


def make_sequence(token_ids, end, *pools, windows=(None,)) -> Sequence:
    sequence = Sequence(Request(token_ids=tuple(token_ids)), 0, 10)
    sequence.tables = tuple(BlockTable(pool, window) for pool, window in zip(pools, windows, strict=True))
    for table in sequence.tables:
        table.extend(end)
    return sequence


def test_the_batch_of_the_docstring():
    a = make_sequence([7] * 41, 41, FixedPool(5, 2))
    b = make_sequence([1, 8, 9], 3, FixedPool(0))
    step = Step((StepRow(a, 40, 1, 1, 0, 0), StepRow(b, 0, 3, 1, 0, 0)), 4)
    batch = build_batch(step, 1)
    assert batch.token_ids.tolist() == [7, 1, 8, 9]
    assert batch.positions.tolist() == [40, 0, 1, 2]
    assert batch.logit_rows.tolist() == [0, 3]
    meta = batch.attention[0]
    assert meta.q_start.tolist() == [0, 1, 4]
    assert meta.q_pos.tolist() == [40, 0]
    assert meta.block_table.tolist() == [[5, 2], [0, -1]]
    assert meta.slots.tolist() == [2 * 32 + 8, 0, 1, 2]


def test_every_array_is_contiguous_int32():
    a = make_sequence(range(70), 70, FixedPool(5, 2, 9))
    batch = build_batch(Step((StepRow(a, 10, 60, 0, 0, 0),), 60), 1)
    meta = batch.attention[0]
    for array in (
        batch.token_ids,
        batch.positions,
        batch.logit_rows,
        *(getattr(meta, n) for n in meta.__slots__),
    ):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_a_chunk_crosses_blocks_and_an_unfinished_prefill_wants_no_logits():
    a = make_sequence(range(100, 170), 70, FixedPool(5, 2, 9))
    batch = build_batch(Step((StepRow(a, 30, 36, 0, 0, 0),), 36), 1)
    assert batch.token_ids.tolist() == list(range(130, 166))
    assert batch.attention[0].slots.tolist() == [190, 191, *range(64, 96), 288, 289]
    assert batch.logit_rows.tolist() == []


def test_each_window_group_has_its_own_table_and_slots():
    a = make_sequence([1] * 65, 65, FixedPool(5, 2, 9), FixedPool(30, 31, 32), windows=(None, 16))
    for table in a.tables:
        table.release_before(64)
    full, windowed = build_batch(Step((StepRow(a, 64, 1, 1, 0, 0),), 1), 2).attention
    assert full.block_table.tolist() == [[5, 2, 9]]
    assert windowed.block_table.tolist() == [[-1, 31, 32]]
    assert (full.slots.tolist(), windowed.slots.tolist()) == ([9 * 32], [32 * 32])


def test_a_table_can_grow_after_a_batch_was_built_from_it():
    a = make_sequence([1] * 65, 32, FixedPool(5, 2))
    batch = build_batch(Step((StepRow(a, 31, 1, 0, 0, 0),), 1), 1)
    a.tables[0].extend(33)
    assert batch.attention[0].block_table.tolist() == [[5]]


def test_rows_to_score_are_counted_within_the_step_and_come_in_slices():
    a = make_sequence([1] * 200, 200, FixedPool(*range(7)))
    assert [rows.tolist() for rows in score_rows(StepRow(a, 8, 6, 0, 10, 13), 20)] == [[22, 23, 24]]
    slices = score_rows(StepRow(a, 0, 150, 0, 0, 150), 0)
    assert [len(rows) for rows in slices] == [SCORE_ROWS, SCORE_ROWS, 150 - 2 * SCORE_ROWS]
    assert np.concatenate(slices).tolist() == list(range(150))
    assert score_rows(StepRow(a, 5, 3, 1, 0, 0), 20) == []


class PlainModel:
    """Logits are hidden states times two, in float64."""

    class config:
        window_groups = (None,)

    def logits(self, hidden):
        return hidden * 2.0


def test_logits_of_wanted_rows_are_float32():
    hidden = np.arange(12, dtype=np.float64).reshape(4, 3)
    logits = Runner(PlainModel(), None).logits(hidden, np.array([1, 3], np.int32))
    assert logits.dtype == np.float32
    assert logits.tolist() == [[6, 8, 10], [18, 20, 22]]
