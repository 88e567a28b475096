"""The running half of a request: its handles read side by side, each new piece handed on as soon as wanted.

A reader that falls behind gets what piled up as one delta; what may pile up is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bise.engine.handle import RequestHandle
from bise.engine.request import Delta, Timings, Usage

if TYPE_CHECKING:
    from bise.server.receipts import Receipts

_MERGE_AT = 32
"""Deltas of one sequence that wait before they are put together into one."""
_MAX_PENDING_CHARS = 64 << 10
_MAX_PENDING_TOKENS = 16 << 10


class Generation:
    """The sequences of one request; iterate it once to receive (sequence, delta) pairs until all have ended,
    or `collect` what they become.

    Must be made on the event loop that iterates it. Leaving early does not abort: call `close`.
    """

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        *,
        prompts: Sequence[int] | None = None,
        dropped_tokens: int = 0,
        receipts: Receipts | None = None,
    ) -> None:
        """`prompts[i]` is the prompt that sequence i belongs to, so that usage counts each prompt once; all
        belong to one prompt without it. `dropped_tokens` of the prompt never reached the engine. With
        `receipts` each sequence gets one.
        """
        self.receipts = receipts
        self._dropped_tokens = dropped_tokens
        self._handles = tuple(handles)
        self._prompts = tuple(prompts) if prompts is not None else (0,) * len(self._handles)
        self._pending: list[list[Delta]] = [[] for _ in self._handles]
        self._arrived = asyncio.Event()
        self._num_open = len(self._handles)
        self._wants_whole = False
        self.finals: list[Delta | None] = [None] * len(self._handles)
        """The last delta of each sequence that has ended."""
        self.overrun = False
        """The reader fell so far behind that the request was given up."""
        for index, handle in enumerate(self._handles):
            handle.listen(partial(self._take, index, handle))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed in use of each sequence."""
        return tuple(handle.seed for handle in self._handles)

    def cancel(self) -> None:
        """Abort all sequences; their last deltas still arrive."""
        for handle in self._handles:
            handle.cancel()

    async def close(self) -> None:
        """Abort what still runs and wait until the engine has let it go."""
        self.cancel()
        while self._num_open:
            self._arrived.clear()
            await self._arrived.wait()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        while True:
            for index, parts in enumerate(self._pending):
                if parts:
                    self._pending[index] = []
                    yield index, merge(parts)
            if any(self._pending):
                continue
            if not self._num_open:
                return
            await self._arrived.wait()
            self._arrived.clear()

    async def collect(self) -> list[Delta]:
        """Wait for the end and return one delta per sequence with everything in it."""
        # Woken once: to be woken for each token was a third of what the event loop did beside many answers.
        self._wants_whole = True
        while self._num_open:
            self._arrived.clear()
            await self._arrived.wait()
        return [merge(parts) for parts in self._pending]

    def usage(self) -> Usage | None:
        """Return the tokens of all sequences, each prompt counted once; None before any has ended."""
        ended = [(p, d.usage) for p, d in zip(self._prompts, self.finals, strict=True) if d and d.usage]
        if not ended:
            return None
        first: dict[int, Usage] = {}
        for prompt, usage in ended:
            first.setdefault(prompt, usage)
        return replace(
            ended[0][1],
            prompt_tokens=sum(usage.prompt_tokens for usage in first.values()),
            cached_tokens=sum(usage.cached_tokens for usage in first.values()),
            completion_tokens=sum(usage.completion_tokens for _, usage in ended),
            accepted_prediction_tokens=sum(usage.accepted_prediction_tokens for _, usage in ended),
            rejected_prediction_tokens=sum(usage.rejected_prediction_tokens for _, usage in ended),
            dropped_tokens=self._dropped_tokens + sum(usage.dropped_tokens for usage in first.values()),
        )

    def timings(self) -> Timings | None:
        """Return the longest of each time over the sequences; None before any has ended."""
        ended = [delta.timings for delta in self.finals if delta and delta.timings]
        if not ended:
            return None
        return replace(
            ended[0],
            queue_s=max(entry.queue_s for entry in ended),
            prefill_s=max(entry.prefill_s for entry in ended),
            decode_s=max(entry.decode_s for entry in ended),
        )

    def _take(self, index: int, handle: RequestHandle) -> None:
        for delta in handle.take_ready():
            if delta.finish_reason is not None:
                self.finals[index] = delta
                self._num_open -= 1
            if self.receipts is not None:
                self.receipts.take(index, delta)
            self._put(index, delta)
        if not (self._wants_whole and self._num_open):
            self._arrived.set()

    def _put(self, index: int, delta: Delta) -> None:
        parts = self._pending[index]
        parts.append(delta)
        if self._wants_whole or len(parts) < _MERGE_AT:
            return
        parts[:] = [merge(parts)]
        if len(parts[0].text) > _MAX_PENDING_CHARS or len(parts[0].token_ids) > _MAX_PENDING_TOKENS:
            self.overrun = True
            self.cancel()


def merge(deltas: Sequence[Delta]) -> Delta:
    """Return consecutive deltas of one sequence as one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
    )
