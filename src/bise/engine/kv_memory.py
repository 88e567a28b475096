"""The KV memory of one engine: how much there is, where it is, and what of it is remembered."""

from __future__ import annotations

from collections.abc import Sequence

from bise.cache.pages import KVCache, plan_num_blocks
from bise.cache.pool import BlockPool
from bise.cache.prefix import PrefixCache
from bise.cache.prefix_file import PrefixFile
from bise.config import ModelConfig
from bise.engine.swap import SwapSpace
from bise.errors import ConfigError
from bise.kernels import Ops


def checked_context(max_context: int | None, config: ModelConfig) -> int:
    """Return the context that was asked for, or the model's own. Raises ConfigError beyond that."""
    context = config.max_context if max_context is None else max_context
    if not 1 <= context <= config.max_context:
        raise ConfigError(
            f"max_context must be from 1 to the model's {config.max_context}, got {context}",
            field="max_context",
        )
    return context


def blocks_per_group(
    config: ModelConfig,
    kv_format: str,
    num_blocks: int | Sequence[int] | None,
    kv_memory_bytes: int | None,
    *,
    context: int,
    max_step_tokens: int,
    max_sequences: int,
) -> tuple[int, ...]:
    """Return the KV blocks per window group: `num_blocks` (one number for all groups, or one each), or what
    `kv_memory_bytes` hold.

    Raises ConfigError unless exactly one of them is given, MemoryPlanError when the memory holds no block.
    """
    if kv_memory_bytes is not None and num_blocks is None:
        return plan_num_blocks(
            config,
            kv_memory_bytes,
            kv_format,
            max_context=context,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
        )
    if num_blocks is None or kv_memory_bytes is not None:
        raise ConfigError("give either num_blocks or kv_memory_bytes to the engine", field="kv_memory_bytes")
    num_groups = len(config.window_groups)
    blocks = (num_blocks,) * num_groups if isinstance(num_blocks, int) else tuple(num_blocks)
    if len(blocks) != num_groups or min(blocks) < 1:
        raise ConfigError(
            f"num_blocks must be {num_groups} positive numbers, got {blocks}", field="num_blocks"
        )
    return blocks


class KVMemory:
    """Pools, pages and prefix cache; what a file holds is in them from the start."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        kv_format: str,
        num_blocks: Sequence[int],
        *,
        prefix_cache: bool,
        prefix_file: PrefixFile | None,
        swap_bytes: int,
    ) -> None:
        """Allocate `num_blocks[g]` blocks for window group g, and let preempted sequences leave `swap_bytes`
        beside them.
        """
        if swap_bytes < 0:
            raise ConfigError(f"swap_bytes must not be negative, got {swap_bytes}", field="swap_bytes")
        self.pools = [BlockPool(count) for count in num_blocks]
        self.pages = KVCache(config, ops, num_blocks, kv_format)
        self.prefix = PrefixCache(self.pools, config.window_groups) if prefix_cache else None
        self.swap = SwapSpace(self.pages, swap_bytes) if swap_bytes else None
        self._file = prefix_file
        if self.prefix is not None and prefix_file is not None:
            prefix_file.restore(self.prefix, self.pools, self.pages)

    def save(self) -> None:
        """Write the prefix cache to its file, if it has one; a second call does nothing."""
        file, self._file = self._file, None
        if self.prefix is not None and file is not None:
            file.save(self.prefix, self.pools, self.pages)
