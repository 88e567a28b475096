"""The K and V pages of all layers, and how many blocks fit a memory grant.

It knows sizes and layers; which block belongs to whom is the pool's and the tables' business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bise.cache.table import blocks_needed
from bise.config import ModelConfig
from bise.errors import ConfigError, MemoryPlanError
from bise.formats import KV_FORMATS
from bise.kernels import BLOCK_SIZE, Ops, Pages


def kv_block_bytes(config: ModelConfig, group: int, kv_format: str) -> int:
    """Return the bytes of one block over all layers of a window group, K and V, scales included."""
    if kv_format not in KV_FORMATS:
        raise ConfigError(
            f"kv_format must be one of {', '.join(KV_FORMATS)}, got '{kv_format}'", field="kv_format"
        )
    stored = KV_FORMATS[kv_format]
    per_head = config.head_dim * stored.value_bytes + stored.scale_bytes
    num_layers = config.windows.count(config.window_groups[group])
    return num_layers * BLOCK_SIZE * 2 * config.num_kv_heads * per_head


def sequence_kv_bytes(config: ModelConfig, num_tokens: int, kv_format: str, chunk: int = 1) -> int:
    """Return the KV bytes that one sequence holds at most while it grows to `num_tokens` in steps of
    `chunk`.
    """
    return sum(
        blocks_needed(num_tokens, window, chunk) * kv_block_bytes(config, group, kv_format)
        for group, window in enumerate(config.window_groups)
    )


def plan_num_blocks(
    config: ModelConfig,
    kv_memory_bytes: int,
    kv_format: str,
    *,
    max_context: int,
    max_step_tokens: int,
    max_sequences: int,
) -> tuple[int, ...]:
    """Return blocks per window group that fit `kv_memory_bytes`.

    A grant that holds whole contexts of `max_context` tokens is shared out so that every group runs full
    after the same number of them (and never holds more than `max_sequences`); a smaller one holds one
    sequence, as long as it can be.

    Raises MemoryPlanError when not even one block per group fits.
    """
    context, sequences = max_context, 1.0
    whole = sequence_kv_bytes(config, context, kv_format, max_step_tokens)
    if kv_memory_bytes >= whole:
        sequences = min(kv_memory_bytes / whole, max_sequences)
    else:
        context = _longest_context(config, kv_memory_bytes, kv_format, max_context, max_step_tokens)
    return tuple(
        int(sequences * blocks_needed(context, window, max_step_tokens)) for window in config.window_groups
    )


def _longest_context(
    config: ModelConfig, kv_memory_bytes: int, kv_format: str, max_context: int, chunk: int
) -> int:
    """Return the most tokens, in whole blocks, of one sequence whose KV fits `kv_memory_bytes`."""
    low, high = 0, -(-max_context // BLOCK_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_kv_bytes(config, middle * BLOCK_SIZE, kv_format, chunk) <= kv_memory_bytes:
            low = middle
        else:
            high = middle - 1
    if not low:
        needed = sequence_kv_bytes(config, BLOCK_SIZE, kv_format, chunk)
        raise MemoryPlanError(
            f"the KV cache was granted {kv_memory_bytes} bytes, but {BLOCK_SIZE} tokens need {needed}",
            field="kv_memory_bytes",
        )
    return low * BLOCK_SIZE


class KVCache:
    """K and V pages per layer; layers of one window group have the same number of blocks."""

    def __init__(self, config: ModelConfig, ops: Ops, num_blocks: Sequence[int], kv_format: str) -> None:
        """Allocate `num_blocks[g]` blocks for every layer of window group g, in one of `KV_FORMATS`."""
        groups = config.window_groups
        assert len(num_blocks) == len(groups), (num_blocks, groups)
        self.num_blocks = tuple(num_blocks)
        self.size_bytes = sum(
            count * kv_block_bytes(config, group, kv_format) for group, count in enumerate(num_blocks)
        )
        """Bytes of all pages."""
        self._pages = [
            ops.layer(index).pages(
                num_blocks[groups.index(window)], config.num_kv_heads, config.head_dim, kv_format
            )
            for index, window in enumerate(config.windows)
        ]
        self._layers = [
            [
                (ops.layer(index), self._pages[index])
                for index, window in enumerate(config.windows)
                if window == own
            ]
            for own in groups
        ]
        """Pages of the layers of each window group, and the backend that they lie on."""
        self._block_bytes: dict[int, int] = {}

    def layer(self, index: int) -> Pages:
        """Return the pages of one layer."""
        return self._pages[index]

    def block_bytes(self, group: int) -> int:
        """Return the length of what `read_block` returns for a window group."""
        if group not in self._block_bytes:
            self._block_bytes[group] = len(self.read_block(group, 0))
        return self._block_bytes[group]

    def read_block(self, group: int, block: int) -> bytes:
        """Return the keys and values of one block, all layers of its window group after one another."""
        return b"".join(
            part.tobytes() for ops, pages in self._layers[group] for part in ops.read_block(pages, block)
        )

    def write_block(self, group: int, block: int, content: bytes) -> None:
        """Put what `read_block` returned into a block of the same window group."""
        layers = self._layers[group]
        parts = np.frombuffer(content, np.uint8).reshape(len(layers), -1)
        for (ops, pages), part in zip(layers, parts, strict=True):
            ops.write_block(pages, block, part)
