"""The prefix cache on disk: what was saved is found again, and nothing damaged or foreign is ever served."""

import logging
import stat

import numpy as np
import pytest

from bise.cache import prefix_file
from bise.cache.pages import KVCache
from bise.cache.pool import BlockPool
from bise.cache.prefix import PrefixCache, salt_of
from bise.cache.prefix_file import PrefixFile
from bise.cache.table import ABSENT, BlockTable
from bise.config import ModelConfig
from bise.kernels import BLOCK_SIZE
from bise.kernels.cpu import CpuOps

SALT = salt_of("m", "f16", "", "alice")
ONE, TWO = list(range(200)), [*range(64), *range(500, 600)]


class Machine:
    """Pools, pages and the cache of one start of the program."""

    def __init__(self, windows=(None, 48), num_blocks=12):
        config = ModelConfig(
            family="mistral", dim=8, num_layers=len(windows), num_heads=1, num_kv_heads=1, head_dim=4,
            hidden_dim=8, vocab_size=9, max_context=512, windows=windows,
        )  # fmt: skip
        self.windows = config.window_groups
        self.pools = [BlockPool(num_blocks) for _ in self.windows]
        self.prefix = PrefixCache(self.pools, self.windows)
        self.pages = KVCache(config, CpuOps(1), [num_blocks] * len(self.windows), "f16")

    def remember(self, token_ids, salt=SALT):
        """Fill the blocks of a text with bytes that tell which text they belong to."""
        tables = [BlockTable(pool, window) for pool, window in zip(self.pools, self.windows, strict=True)]
        match = self.prefix.match(salt, token_ids, len(token_ids) - 1)
        tail = self.prefix.adopt(match, salt, tables)
        start = match.num_tokens // BLOCK_SIZE
        for index in range(start, len(token_ids) // BLOCK_SIZE):
            end = (index + 1) * BLOCK_SIZE
            for group, table in enumerate(tables):
                table.extend(end)
                self.pages.write_block(group, table.blocks[index], self.content(group, token_ids[:end]))
            tail = self.prefix.extend(
                tail, token_ids[end - BLOCK_SIZE : end], [table.blocks[index] for table in tables]
            )
            for table in tables:
                table.release_before(end)
        self.prefix.release(tail)
        for table in tables:
            table.release_all()

    def content(self, group, token_ids):
        rng = np.random.default_rng([group, *token_ids])
        return rng.bytes(self.pages.block_bytes(group))

    def found(self, token_ids, salt=SALT):
        """Return the length of the prefix that is there, every byte of it checked."""
        match = self.prefix.match(salt, token_ids, len(token_ids) - 1)
        for index, node in enumerate(match.nodes):
            for group, block in enumerate(node.blocks):
                if block != ABSENT:
                    expected = self.content(group, token_ids[: (index + 1) * BLOCK_SIZE])
                    assert self.pages.read_block(group, block) == expected
        return match.num_tokens

    def file(self, tmp_path, max_bytes=1 << 20, **identity):
        identity = {"model_id": "m", "kv_format": "f16", "version": "1", **identity}
        return PrefixFile(tmp_path / "kv", max_bytes=max_bytes, **identity)

    def save(self, tmp_path, **options):
        return self.file(tmp_path, **options).save(self.prefix, self.pools, self.pages)

    def restore(self, tmp_path, **options):
        count = self.file(tmp_path, **options).restore(self.prefix, self.pools, self.pages)
        for pool in self.pools:
            pool.check_integrity([])
        self.prefix.check_integrity()
        return count


@pytest.fixture
def saved(tmp_path):
    """A directory with the cache of a machine that read two texts with a common beginning."""
    machine = Machine()
    machine.remember(ONE)
    machine.remember(TWO)
    assert machine.save(tmp_path) == sum(pool.num_cached for pool in machine.pools) > 10
    return tmp_path


def test_saving_takes_a_time_linear_in_the_text(tmp_path, monkeypatch):
    visited = []
    lineage = prefix_file._lineage
    monkeypatch.setattr(
        prefix_file, "_lineage", lambda *rest: (visited.extend(lineage(*rest)), lineage(*rest))[1]
    )
    machine = Machine(windows=(None,), num_blocks=200)
    machine.remember(list(range(200 * BLOCK_SIZE)))
    assert machine.save(tmp_path, max_bytes=1 << 24) == 200
    assert len(visited) == 2 * 200  # once to choose it, once to write it


def test_what_was_saved_is_found_again_byte_for_byte(saved):
    machine = Machine()
    assert machine.restore(saved) > 10
    assert (machine.found(ONE), machine.found(TWO), machine.found(ONE, salt_of("bob"))) == (192, 160, 0)


def test_saving_what_was_restored_gives_the_same_file(saved):
    machine = Machine()
    machine.restore(saved)
    before = machine.file(saved).path.read_bytes()
    machine.save(saved)
    assert machine.file(saved).path.read_bytes() == before


def test_the_order_of_use_survives(saved):
    first, second = Machine(), Machine()
    first.remember(ONE)
    first.remember(TWO)
    second.restore(saved)
    for pool_a, pool_b, group in zip(first.pools, second.pools, (0, 1), strict=True):
        keys_a = [first.prefix.node_of(group, block).key for block in pool_a.cached]
        assert keys_a == [second.prefix.node_of(group, block).key for block in pool_b.cached]


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(saved):
    (path,) = (saved / "kv").iterdir()
    (saved / "kv" / f".{path.name}.00.{(1 << 31) - 1}.tmp").write_bytes(b"half")
    machine = Machine()
    machine.restore(saved)
    machine.save(saved)
    assert list((saved / "kv").iterdir()) == [path]


def test_a_smaller_cache_takes_what_fits_and_stays_whole(saved):
    machine = Machine(num_blocks=4)
    assert machine.restore(saved) == 8
    assert machine.found(TWO) in (0, 32, 64, 96, 128, 160)


def test_a_bounded_file_holds_what_was_used_last(tmp_path):
    machine = Machine(windows=(None,))
    machine.remember(ONE)
    machine.remember([9] * 100)
    limit = (1 << 16) + 3 * (machine.pages.block_bytes(0) + 300)
    assert machine.save(tmp_path, max_bytes=limit) == 3
    assert machine.file(tmp_path).path.stat().st_size <= limit
    again = Machine(windows=(None,))
    again.restore(tmp_path, max_bytes=limit)
    assert (again.found(ONE), again.found([9] * 100)) == (0, 96)


@pytest.mark.parametrize("identity", [{"model_id": "n"}, {"kv_format": "q8"}, {"version": "2"}])
def test_another_model_format_or_version_does_not_see_it(saved, identity):
    assert Machine().restore(saved, **identity) == 0


def test_a_renamed_file_of_another_model_is_ignored(saved, caplog):
    machine = Machine()
    machine.file(saved).path.rename(machine.file(saved, model_id="n").path)
    assert machine.restore(saved, model_id="n") == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "another model" in caplog.text


def test_no_damaged_byte_is_ever_served(saved, caplog):
    path = Machine().file(saved).path
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, 25, 60, *rng.integers(0, len(sound), 60).tolist(), len(sound) - 1]:
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        caplog.clear()
        machine = Machine()
        assert machine.restore(saved) == 0, f"byte {position}"
        assert len(caplog.records) == 1
        assert machine.prefix.num_nodes == 0
        assert all(pool.num_cached == 0 for pool in machine.pools)


def test_a_file_that_was_cut_is_ignored(saved, caplog):
    path = Machine().file(saved).path
    sound = path.read_bytes()
    for length in (0, 5, 40, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        caplog.clear()
        assert Machine().restore(saved) == 0
        assert len(caplog.records) == 1


def test_a_header_that_overruns_a_json_reader_is_ignored(saved):
    machine = Machine()
    deep = b"[" * 60000
    machine.file(saved).path.write_bytes(prefix_file.MAGIC + len(deep).to_bytes(8, "little") + deep)
    assert machine.restore(saved) == 0


def test_a_directory_in_its_place_is_ignored(tmp_path, caplog):
    machine = Machine()
    machine.file(tmp_path).path.mkdir(parents=True)
    assert machine.restore(tmp_path) == 0
    assert len(caplog.records) == 1


def test_only_the_owner_may_read_it_and_nothing_half_written_stays(saved):
    path = Machine().file(saved).path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_disk_costs_a_line_in_the_log_and_the_old_file_stays(saved, caplog, monkeypatch):
    machine = Machine()
    machine.restore(saved)
    before = machine.file(saved).path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bise.cache.prefix_file.os.fsync", full)
    assert machine.save(saved) == 0
    assert "No space left" in caplog.text
    assert machine.file(saved).path.read_bytes() == before
    assert len(list(machine.file(saved).path.parent.iterdir())) == 1
