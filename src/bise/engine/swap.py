"""Keys and values of preempted sequences, outside of the pools, until they run again.

An option: a swapped sequence goes on where it was, others are computed again as far as their blocks left the
prefix cache. It takes memory that a larger pool could use as well, so it is off unless it is granted some.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bise.cache.pages import KVCache
from bise.engine.sequence import Sequence

_BYTE_S = 1 / 2e9
"""Seconds per byte that a copy is expected to take before one was measured."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What one sequence had."""

    num_computed: int
    firsts: tuple[int, ...]
    """First logical block that was held, per window group."""
    contents: tuple[tuple[bytes, ...], ...]
    """The bytes of its blocks, per window group."""
    size_bytes: int


class SwapSpace:
    """Holds up to `max_bytes`; used by the engine's thread alone."""

    def __init__(
        self, pages: KVCache, max_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._pages = pages
        self._free_bytes = max_bytes
        self._clock = clock
        self._stored: dict[int, _Stored] = {}
        self._byte_s = _BYTE_S
        self._token_s = 0.0
        """Seconds per token of computing; 0 before it was measured: then whatever fits is stored."""
        self.num_saved = 0
        """Sequences that were stored so far."""

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn what computing costs from a step."""
        sample = seconds / num_tokens
        self._token_s += (sample - self._token_s) / (8 if self._token_s else 1)

    def save(self, sequence: Sequence) -> bool:
        """Copy what a running sequence holds, where that is cheaper than computing it again and there is
        room; False when it is not done.
        """
        size_bytes = sum(
            table.num_held * self._pages.block_bytes(group) for group, table in enumerate(sequence.tables)
        )
        is_cheaper = (
            not self._token_s or 2 * size_bytes * self._byte_s < sequence.num_computed * self._token_s
        )
        if not sequence.num_computed or size_bytes > self._free_bytes or not is_cheaper:
            return False
        began = self._clock()
        try:
            contents = tuple(
                tuple(self._pages.read_block(group, block) for block in table.held)
                for group, table in enumerate(sequence.tables)
            )
        except MemoryError:  # what was granted is not there: no reason to end anybody's request
            return False
        if size_bytes:
            self._byte_s += ((self._clock() - began) / size_bytes - self._byte_s) / 8
        firsts = tuple(table.first for table in sequence.tables)
        self._stored[sequence.arrival] = _Stored(sequence.num_computed, firsts, contents, size_bytes)
        self._free_bytes -= size_bytes
        self.num_saved += 1
        return True

    def num_computed(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence are stored here; 0 for none."""
        stored = self._stored.get(sequence.arrival)
        return 0 if stored is None else stored.num_computed

    def restore(self, sequence: Sequence) -> None:
        """Put what is stored into the new, empty tables of its sequence, and let it go here."""
        stored = self._stored[sequence.arrival]
        for group, table in enumerate(sequence.tables):
            table.resume(stored.firsts[group], len(stored.contents[group]))
            for block, content in zip(table.held, stored.contents[group], strict=True):
                self._pages.write_block(group, block, content)
        sequence.num_computed = stored.num_computed
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget what is stored of a sequence, if anything."""
        stored = self._stored.pop(sequence.arrival, None)
        if stored is not None:
            self._free_bytes += stored.size_bytes
