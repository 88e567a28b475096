"""KVCache: bytes per window group, and how a memory grant becomes blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bise.cache.pages import KVCache, kv_block_bytes, plan_num_blocks, sequence_kv_bytes
from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable, blocks_needed
from bise.config import ModelConfig
from bise.errors import ConfigError, MemoryPlanError
from bise.formats import KV_FORMATS
from bise.kernels import AttentionMeta
from bise.kernels.cpu import CpuOps

MIB = 1 << 20


def mistral_7b(window: int | None) -> ModelConfig:
    return ModelConfig(
        family="mistral",
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        vocab_size=32000,
        max_context=32768,
        windows=(window,) * 32,
    )


class SizedOps:
    """Pages that only remember what was asked for."""

    def layer(self, index):
        return self

    def pages(self, num_blocks, num_kv_heads, head_dim, kv_format):
        return (num_blocks, num_kv_heads, head_dim, kv_format)


def test_mistral_7b_v01_at_32k_holds_its_window_plus_one_block_in_16_bit():
    config = mistral_7b(4096)
    pool = BlockPool(200)
    table = BlockTable(pool, 4096)
    block = kv_block_bytes(config, 0, "f16")
    assert block == 4 * MIB
    for end in range(512, 32768 + 1, 512):
        table.extend(end)
        table.release_before(end)
        assert pool.num_used * block <= 512 * MIB + block
    assert pool.num_used * block > 500 * MIB


def test_without_a_window_32k_take_four_gibibytes():
    assert sequence_kv_bytes(mistral_7b(None), 32768, "bf16") == 4096 * MIB


def test_q8_counts_one_float_scale_per_token_and_head():
    config = mistral_7b(None)
    assert kv_block_bytes(config, 0, "q8") == 32 * 32 * 2 * 8 * (128 + 4)


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(ConfigError, match="'int3'"):
        kv_block_bytes(mistral_7b(None), 0, "int3")


def test_layers_get_the_pages_of_their_window_group():
    config = ModelConfig(
        family="ministral",
        dim=8,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=8,
        vocab_size=8,
        max_context=64,
        windows=(None, 16, None),
    )
    cache = KVCache(config, SizedOps(), (5, 2), "f16")
    assert [cache.layer(index)[0] for index in range(3)] == [5, 2, 5]
    assert cache.size_bytes == (2 * 5 + 2) * 32 * 2 * 4 * 2


@given(
    grant=st.integers(1, 2 * 4096 * MIB),
    windows=st.sampled_from([(None,), (4096,), (None, 1024), (1024, None, None, None)]),
    kv_format=st.sampled_from(["f16", "q8"]),
)
def test_a_plan_never_exceeds_the_grant_and_always_runs_the_context_it_promises(grant, windows, kv_format):
    config = ModelConfig(
        family="mistral",
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=8,
        vocab_size=8,
        max_context=32768,
        windows=windows * (32 // len(windows)),
    )
    try:
        blocks = plan_num_blocks(
            config, grant, kv_format, max_context=32768, max_step_tokens=512, max_sequences=4
        )
    except MemoryPlanError:
        assert grant < sequence_kv_bytes(config, 32, kv_format, 512)
        return
    spent = sum(count * kv_block_bytes(config, group, kv_format) for group, count in enumerate(blocks))
    assert spent <= grant
    assert min(blocks) >= 1
    assert all(
        count <= 4 * blocks_needed(32768, window, 512)
        for count, window in zip(blocks, config.window_groups, strict=True)
    )


def test_a_grant_for_one_context_holds_exactly_one():
    config = mistral_7b(None)
    blocks = plan_num_blocks(
        config, 4096 * MIB, "f16", max_context=32768, max_step_tokens=512, max_sequences=8
    )
    assert blocks == (1024,)


def test_a_grant_for_four_shorter_contexts_holds_four_windows():
    config = mistral_7b(4096)
    grant = 4 * sequence_kv_bytes(config, 8192, "f16", 512)
    blocks = plan_num_blocks(config, grant, "f16", max_context=8192, max_step_tokens=512, max_sequences=8)
    assert blocks == (4 * blocks_needed(8192, 4096, 512),)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_bytes_of_a_block_are_its_keys_and_values(kv_format):
    """What one block's views hold, written to another block, attends like the first one."""
    ops = CpuOps(1)
    pages = ops.pages(3, 2, 32, kv_format)
    rng = np.random.default_rng(0)
    rope = ops.rope(np.zeros(16), np.arange(32, dtype=np.int32), 1.0)

    def attend(block: int, rows: int, first: int):
        q, k, v = (rng.standard_normal((rows, 64), np.float32) for _ in range(3))
        meta = AttentionMeta(
            q_start=np.array([0, rows], np.int32),
            q_pos=np.array([first], np.int32),
            block_table=np.array([[block]], np.int32),
            slots=np.arange(block * 32 + first, block * 32 + first + rows, dtype=np.int32),
        )
        part = tuple(np.ascontiguousarray(table[first : first + rows]) for table in rope)
        return ops.attend(q, k, v, part, meta, pages, 32, None)

    attend(0, 31, 0)
    parts = ops.read_block(pages, 0)
    config = ModelConfig(
        family="mistral", dim=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, hidden_dim=8,
        vocab_size=9, max_context=64,
    )  # fmt: skip
    assert sum(part.size for part in parts) == kv_block_bytes(config, 0, kv_format)
    ops.write_block(pages, 2, np.concatenate(parts))
    state = rng.bit_generator.state
    expected = attend(0, 1, 31)
    rng.bit_generator.state = state
    assert (attend(2, 1, 31) == expected).all()
