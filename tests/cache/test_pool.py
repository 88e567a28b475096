"""BlockPool: no block is lost or owned twice, whatever is allocated, shared and freed in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bise.cache.pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = BlockPool(4)
        self.held: list[int] = []
        self.kept: set[int] = set()
        self.cached: list[int] = []
        """Least recently used first."""
        self.evicted: list[int] = []
        self.pool.on_evict(self.evicted.append)

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self):
        num_blank = self.pool.num_free - len(self.cached)
        block = self.pool.allocate()
        assert block not in self.held
        if num_blank:
            assert not self.evicted, "a cached block is given up although a blank one is there"
            assert block not in self.cached
        else:
            assert self.evicted == [block] == [self.cached.pop(0)]
            self.kept.discard(block)
            self.evicted.clear()
        self.held.append(block)

    @precondition(lambda self: self.held or self.cached)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(self.held + self.cached))
        self.pool.share(block)
        self.held.append(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data):
        block = data.draw(st.sampled_from(self.held))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.forget(block)
        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        block = data.draw(st.sampled_from(self.held))
        self.pool.free(block)
        self.held.remove(block)
        if block in self.kept and block not in self.held:
            self.cached.append(block)

    @invariant()
    def every_block_is_accounted_for(self):
        self.pool.check_integrity(self.held)
        assert self.pool.num_used == len(set(self.held))
        assert self.pool.cached == self.cached
        assert all(self.pool.num_owners(block) == self.held.count(block) for block in range(4))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_block_that_is_shared_stays_until_its_last_owner_frees_it():
    pool = BlockPool(1)
    block = pool.allocate()
    pool.share(block)
    pool.free(block)
    assert pool.num_free == 0
    pool.free(block)
    assert pool.num_free == 1


def test_freeing_twice_is_caught():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.free(block)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block)


def test_sharing_a_free_block_is_caught():
    with pytest.raises(AssertionError, match="cannot be shared"):
        BlockPool(2).share(0)


def test_integrity_check_notices_a_lost_block():
    pool = BlockPool(3)
    pool.allocate()
    with pytest.raises(AssertionError, match="0 owners hold it, 1 are recorded"):
        pool.check_integrity([])


def test_the_block_freed_last_is_handed_out_first():
    pool = BlockPool(4)
    first, second = pool.allocate(), pool.allocate()
    pool.free(second)
    pool.free(first)
    assert pool.allocate() == first


def test_of_the_cached_blocks_the_least_recently_used_is_given_up_first():
    pool = BlockPool(3)
    evicted = []
    pool.on_evict(evicted.append)
    first, second, third = (pool.allocate() for _ in range(3))
    for block in (first, second, third):
        pool.keep(block)
    for block in (second, first, third):
        pool.free(block)
    pool.share(second)  # used again: now it is the last one
    pool.free(second)
    assert [pool.allocate() for _ in range(3)] == evicted == [first, third, second]
