"""PrefixCache: finds exactly the prefixes whose blocks are there, never another text's, and loses nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bise.cache import prefix as prefix_module
from bise.cache.pool import BlockPool
from bise.cache.prefix import NODES_PER_BLOCK, PrefixCache, salt_of
from bise.cache.table import ABSENT, BlockTable, first_visible
from bise.kernels import BLOCK_SIZE

SALT = salt_of("model", "f16", "", "alice")


class Text:
    """A sequence of blocks in miniature: it matches, computes, remembers, slides and leaves."""

    def __init__(self, cache, pools, windows, token_ids, salt=SALT):
        self.cache, self.token_ids = cache, token_ids
        self.tables = tuple(BlockTable(pool, window) for pool, window in zip(pools, windows, strict=True))
        self.match = cache.match(salt, token_ids, len(token_ids) - 1)
        self.tail = cache.adopt(self.match, salt, self.tables)
        self.num_kept = self.match.num_tokens // BLOCK_SIZE
        self.end = self.match.num_tokens

    def compute(self, end):
        for table in self.tables:
            table.extend(end)
        while self.tail is not None and self.num_kept < end // BLOCK_SIZE:
            start = self.num_kept * BLOCK_SIZE
            blocks = [table.blocks[self.num_kept] for table in self.tables]
            self.tail = self.cache.extend(self.tail, self.token_ids[start : start + BLOCK_SIZE], blocks)
            self.num_kept += 1
        for table in self.tables:
            table.release_before(end)
        self.end = end

    def leave(self):
        for table in self.tables:
            table.release_all()
        if self.tail is not None:
            self.cache.release(self.tail)


def make(windows=(None,), num_blocks=16):
    pools = [BlockPool(num_blocks) for _ in windows]
    return PrefixCache(pools, windows), pools


def remember(cache, pools, windows, token_ids, salt=SALT, chunk=64):
    """Compute a text in chunks and leave; returns the physical blocks that each group held at the end."""
    text = Text(cache, pools, windows, token_ids, salt)
    for end in [*range(text.end + chunk, len(token_ids), chunk), len(token_ids)]:
        text.compute(end)
    held = [table.blocks.tolist() for table in text.tables]
    text.leave()
    return held


class PrefixMachine(RuleBasedStateMachine):
    """Texts over two tokens come, grow and go; a model of what is where predicts every match."""

    @initialize(
        windows=st.sampled_from([(None,), (48,), (None, 48), (70, 16)]), num_blocks=st.integers(10, 24)
    )
    def start(self, windows, num_blocks):
        self.windows = windows
        self.cache, self.pools = make(windows, num_blocks)
        self.texts: list[Text] = []
        self.written: list[dict[int, tuple]] = [{} for _ in windows]
        """Per group: the whole prefix that the content of each block belongs to."""

    @rule(data=st.data(), salt=st.sampled_from([SALT, salt_of("bob")]))
    def come(self, data, salt):
        pieces = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
        rest = data.draw(st.integers(1, BLOCK_SIZE))
        token_ids = [piece for piece in pieces for _ in range(BLOCK_SIZE)] + [7] * rest
        text = Text(self.cache, self.pools, self.windows, token_ids, salt)
        text.salt = salt
        for group, table in enumerate(text.tables):
            first = first_visible(text.match.num_tokens, table.window)
            for index in range(text.match.num_tokens // BLOCK_SIZE):
                block = table.blocks[index]
                assert (block == ABSENT) == (index < first)
                if block != ABSENT:
                    expected = (salt, *token_ids[: (index + 1) * BLOCK_SIZE])
                    assert self.written[group][block] == expected, "another text's block is served"
        self.texts.append(text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 70))
    def compute(self, data, count):
        text = data.draw(st.sampled_from(self.texts))
        end = min(text.end + count, len(text.token_ids))
        if any(t.num_missing(end) > p.num_free for t, p in zip(text.tables, self.pools, strict=True)):
            return
        known = [len(table.blocks) for table in text.tables]
        for table in text.tables:
            table.extend(end)
        for group, table in enumerate(text.tables):
            for index in range(known[group], len(table.blocks)):
                prefix = text.token_ids[: (index + 1) * BLOCK_SIZE]
                self.written[group][table.blocks[index]] = (text.salt, *prefix)
        text.compute(end)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data):
        text = data.draw(st.sampled_from(self.texts))
        text.leave()
        self.texts.remove(text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fail(self, data):
        text = data.draw(st.sampled_from(self.texts))
        self.cache.disown(text.tables)
        text.leave()
        self.texts.remove(text)

    @invariant()
    def nothing_is_lost(self):
        for group, pool in enumerate(self.pools):
            pool.check_integrity(block for text in self.texts for block in text.tables[group].held)
        self.cache.check_integrity(text.tail for text in self.texts if text.tail is not None)


TestPrefix = PrefixMachine.TestCase
TestPrefix.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_prefix_is_found_up_to_the_last_whole_block_before_the_last_token():
    cache, pools = make()
    token_ids = list(range(100))
    remember(cache, pools, (None,), token_ids)
    assert cache.match(SALT, token_ids, 99).num_tokens == 96
    assert cache.match(SALT, token_ids[:96], 95).num_tokens == 64
    assert cache.match(SALT, [*token_ids[:40], 999, *token_ids[41:]], 99).num_tokens == 32
    assert cache.match(SALT, [999, *token_ids[1:]], 99).num_tokens == 0


def test_another_salt_finds_nothing():
    cache, pools = make()
    remember(cache, pools, (None,), list(range(100)))
    for parts in [("model", "f16", "", "bob"), ("model", "q8", "", "alice"), ("other", "f16", "", "alice"),
                  ("model", "f16", "adapter", "alice"), ("modelf16", "", "", "alice")]:  # fmt: skip
        assert cache.match(salt_of(*parts), list(range(100)), 99).num_tokens == 0


def test_a_windowed_group_needs_the_last_window_of_the_prefix_only():
    windows = (48,)
    cache, pools = make(windows, 6)
    token_ids = list(range(200))
    remember(cache, pools, windows, token_ids)
    found = cache.match(SALT, token_ids, 199)
    assert found.num_tokens == 192
    assert found.firsts == (4,)  # the query at 192 sees 145 .. 192, from block 4 on
    # Two new blocks push out the oldest ones, which 192 tokens do not need, but shorter prefixes do.
    other = Text(cache, pools, windows, [500] * 40, salt_of("bob"))
    other.compute(40)
    assert cache.match(SALT, token_ids, 199).num_tokens == 192
    assert cache.match(SALT, token_ids[:60], 59).num_tokens == 0


def test_every_group_must_have_what_it_needs():
    windows = (None, 48)
    cache, pools = make(windows, 8)
    token_ids = list(range(200))
    remember(cache, pools, windows, token_ids)
    assert cache.match(SALT, token_ids, 199).num_tokens == 192
    while pools[1].num_cached > 1:  # of the window of 192 tokens one block is left, of the full group all
        pools[1].evict_oldest()
    assert cache.match(SALT, token_ids, 199).num_tokens == 0


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    cache, pools = make((None,), 6)
    token_ids = list(range(130))
    remember(cache, pools, (None,), token_ids)
    for expected in (96, 64, 32, 0):
        pools[0].evict_oldest()
        assert cache.match(SALT, token_ids, 129).num_tokens == expected


def test_the_prefix_that_was_used_last_stays_longest():
    cache, pools = make((None,), 5)
    first, second = [1] * 65, [2] * 65
    remember(cache, pools, (None,), first)
    remember(cache, pools, (None,), second)
    remember(cache, pools, (None,), first)
    Text(cache, pools, (None,), [3] * 65).compute(65)
    assert cache.match(SALT, first, 64).num_tokens == 64
    assert cache.match(SALT, second, 64).num_tokens < 64


def test_a_shared_block_has_two_owners_and_is_not_evicted():
    cache, pools = make((None,), 4)
    token_ids = [1] * 65
    remember(cache, pools, (None,), token_ids)
    one, two = (Text(cache, pools, (None,), token_ids) for _ in range(2))
    assert one.tables[0].blocks.tolist() == two.tables[0].blocks.tolist()
    assert [pools[0].num_owners(block) for block in one.tables[0].blocks] == [2, 2]
    assert pools[0].num_free == 2


@pytest.mark.parametrize("windows", [(None,), (40,)])
def test_a_forced_collision_of_the_hash_is_not_served(monkeypatch, windows):
    monkeypatch.setattr(prefix_module, "block_hash", lambda previous, tokens: b"always the same")
    cache, pools = make(windows)
    remember(cache, pools, windows, [1] * 40)
    assert cache.match(SALT, [1] * 40, 39).num_tokens == 32
    assert cache.match(SALT, [2] * 40, 39).num_tokens == 0
    assert cache.match(salt_of("bob"), [1] * 40, 39).num_tokens == 0
    remember(cache, pools, windows, [2] * 40)
    assert cache.match(SALT, [2] * 40, 39).num_tokens == 0
    cache.check_integrity()


@pytest.mark.parametrize("windows", [(None,), (32,)])
def test_a_collision_after_a_different_prefix_is_not_served(monkeypatch, windows):
    """The last blocks are equal, hash and tokens; only what came before tells the texts apart."""
    monkeypatch.setattr(prefix_module, "block_hash", lambda previous, tokens: tokens[:4])
    cache, pools = make(windows)
    end = list(range(10, 10 + BLOCK_SIZE))
    one, two = [1] * BLOCK_SIZE + [*end, 0], [2] * BLOCK_SIZE + [*end, 0]
    remember(cache, pools, windows, one)
    remember(cache, pools, windows, two)
    assert cache.match(SALT, one, 64).num_tokens == 64
    assert cache.match(SALT, two, 64).num_tokens == 32
    cache.check_integrity()


def test_blocks_in_doubt_are_served_to_nobody():
    cache, pools = make()
    text = Text(cache, pools, (None,), list(range(100)))
    text.compute(100)
    cache.disown(text.tables)
    text.leave()
    assert cache.match(SALT, list(range(100)), 99).num_tokens == 0
    assert pools[0].num_cached == 0
    assert cache.num_nodes == 0


def test_texts_remembered_without_blocks_are_bounded():
    windows = (16,)
    cache, pools = make(windows, 6)
    for number in range(40):
        remember(cache, pools, windows, [number] * 640)
    assert cache.num_nodes <= NODES_PER_BLOCK * 6
    cache.check_integrity()


@given(parts=st.lists(st.text(max_size=4), max_size=4), others=st.lists(st.text(max_size=4), max_size=4))
def test_salts_are_equal_for_equal_parts_only(parts, others):
    assert (salt_of(*parts) == salt_of(*others)) == (parts == others)
