"""BlockTable: positions keep their slots while they are visible; blocks that slid out are given back at
once.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable, blocks_needed, blocks_spanned
from bise.kernels import BLOCK_SIZE


class TableMachine(RuleBasedStateMachine):
    """Two tables, one full and one windowed, grow, slide and restart over one pool."""

    @initialize(window=st.integers(1, 130))
    def start(self, window):
        self.pool = BlockPool(64)
        self.tables = [BlockTable(self.pool, None), BlockTable(self.pool, window)]
        self.ends = [0, 0]
        self.slots: list[dict[int, int]] = [{}, {}]

    @rule(which=st.integers(0, 1), count=st.integers(1, 80))
    def step(self, which, count):
        table, first = self.tables[which], self.ends[which]
        if table.num_missing(first + count) > self.pool.num_free:
            return
        table.extend(first + count)
        for position in range(first, first + count):
            self.slots[which][position] = table.slot(position)
        self.ends[which] = first + count
        table.release_before(first + count)
        if table.window is not None:
            assert table.num_held <= blocks_spanned(table.window)
            lowest = first + count - table.window + 1
            self.slots[which] = {p: slot for p, slot in self.slots[which].items() if p >= lowest}

    @rule(which=st.integers(0, 1))
    def restart(self, which):
        self.tables[which].release_all()
        self.ends[which], self.slots[which] = 0, {}

    @invariant()
    def visible_positions_keep_distinct_slots(self):
        everyone = [(which, p, slot) for which, slots in enumerate(self.slots) for p, slot in slots.items()]
        assert all(self.tables[which].slot(position) == slot for which, position, slot in everyone)
        assert len({slot for *_, slot in everyone}) == len(everyone)

    @invariant()
    def no_block_is_lost_or_owned_twice(self):
        self.pool.check_integrity(block for table in self.tables for block in table.held)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(start=st.integers(0, 500), count=st.integers(1, 300))
def test_blocks_spanned_is_the_most_that_any_start_touches(start, count):
    touched = (start + count - 1) // BLOCK_SIZE - start // BLOCK_SIZE + 1
    assert touched <= blocks_spanned(count)
    worst = (BLOCK_SIZE - 1 + count - 1) // BLOCK_SIZE + 1
    assert worst == blocks_spanned(count)


@given(
    window=st.one_of(st.none(), st.integers(1, 200)),
    total=st.integers(1, 400),
    chunk=st.integers(1, 100),
)
def test_blocks_needed_covers_every_step_of_a_growing_sequence(window, total, chunk):
    pool = BlockPool(blocks_needed(total, window, chunk))
    table = BlockTable(pool, window)
    for first in range(0, total, chunk):
        end = min(first + chunk, total)
        assert table.num_missing(end) <= pool.num_free
        table.extend(end)
        table.release_before(end)


def test_a_window_of_4096_holds_129_blocks_after_each_step_and_reuses_them():
    pool = BlockPool(129 + 16)
    table = BlockTable(pool, 4096)
    most = 0
    for first in range(0, 32768 - 512, 512):
        table.extend(first + 512)
        table.release_before(first + 512)
        most = max(most, table.num_held)
    for position in range(32768 - 512, 32768):
        table.extend(position + 1)
        table.release_before(position + 1)
        most = max(most, table.num_held)
    assert most == blocks_spanned(4096) == 129
    assert len(table.blocks) == 1024


def test_a_windowed_block_is_freed_at_the_first_query_that_cannot_see_it():
    table = BlockTable(BlockPool(4), 48)
    table.extend(100)
    table.release_before(32 + 48 - 2)  # sees 31 ..
    assert table.num_held == 4
    table.release_before(32 + 48 - 1)  # sees 32 ..
    assert table.num_held == 3
    with pytest.raises(AssertionError, match="slid out"):
        table.slot(31)


def test_a_full_table_releases_nothing():
    table = BlockTable(BlockPool(4), None)
    table.extend(128)
    table.release_before(128)
    assert table.num_held == 4


def test_slots_follow_the_physical_blocks():
    pool = BlockPool(8)
    for _ in range(5):
        pool.allocate()
    table = BlockTable(pool, None)
    table.extend(33)
    assert list(table.blocks) == [5, 6]
    assert table.slot(0) == 5 * BLOCK_SIZE
    assert table.slot(32) == 6 * BLOCK_SIZE
