"""The caller's end of a request: deltas come out, cancellation goes in. Knows neither the model nor the
scheduler.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue

from bise.engine.request import Completion, Delta, collect


class RequestHandle:
    """Iterate it, with `for` or `async for`, to receive a request's deltas; the last one has a
    `finish_reason`.

    Leaving the iteration early aborts the request. One consumer: deltas that were taken are gone.
    """

    def __init__(self, seed: int, cancel: Callable[[], None], advance: Callable[[], bool] | None) -> None:
        """`advance` runs one engine step in the caller's thread; None when the engine has its own."""
        self.seed = seed
        """The seed in use, drawn at random when the request had none."""
        self._cancel = cancel
        self._advance = advance
        self._deltas: SimpleQueue[Delta] = SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._is_over = False

    def push(self, delta: Delta) -> None:
        """Hand a delta over; called by the engine alone, from its thread."""
        self._deltas.put(delta)
        if self._wake is not None:
            try:
                self._wake()
            except RuntimeError:  # the consumer's event loop is closed: nobody will ever read on
                self._wake = None
                self._cancel()

    def cancel(self) -> None:
        """Abort the request; its blocks are free within one step. Does nothing once it is over."""
        if not self._is_over:
            self._cancel()

    def result(self) -> Completion:
        """Wait for the end and return everything at once. Raises the request's own error, if it ended with
        one.
        """
        return collect(self)

    def __iter__(self) -> Iterator[Delta]:
        try:
            while not self._is_over:
                delta = self._take()
                self._is_over = delta.finish_reason is not None
                yield delta
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while not self._is_over:
                try:
                    delta = self._deltas.get_nowait()
                except Empty:
                    await self._arrival(arrived)
                    continue
                self._is_over = delta.finish_reason is not None
                yield delta
        finally:
            self._wake = None
            self.cancel()

    def _take(self) -> Delta:
        if self._advance is None:
            return self._deltas.get()
        while self._deltas.empty():
            moved = self._advance()
            assert moved or not self._deltas.empty(), (
                "the request is over, its deltas were taken by someone else"
            )
        return self._deltas.get()

    async def _arrival(self, arrived: asyncio.Event) -> None:
        if self._advance is not None:
            self._advance()
            await asyncio.sleep(0)
            return
        await arrived.wait()
        arrived.clear()
