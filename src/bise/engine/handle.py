"""The caller's end of a request: deltas come out, cancellation goes in. Knows neither the model nor the
scheduler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue

from bise.engine.request import Completion, Delta, collect

Call = Callable[[], None]


class Bell:
    """Calls functions on one event loop, asked from other threads: the loop is woken once for all that came
    together, since each waking costs a system call and lets the threads wait for one another.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Call] = deque()
        self._is_rung = False

    def ring(self, call: Call) -> None:
        """Have the loop call `call` soon, which must not raise. RuntimeError when the loop is closed."""
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        # In this order: `_answer` clears the flag before it looks, so a call is seen or rings anew.
        self._calls.append(call)
        if not self._is_rung:
            self._is_rung = True
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._is_rung = False
        while self._calls:
            self._calls.popleft()()


class Bells:
    """A bell for each event loop that waits for one engine."""

    def __init__(self) -> None:
        self._bells: dict[asyncio.AbstractEventLoop, Bell] = {}

    def here(self) -> Bell:
        """Return the bell of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._bells:
            self._bells = {known: bell for known, bell in self._bells.items() if not known.is_closed()}
            self._bells[loop] = Bell(loop)
        return self._bells[loop]


class RequestHandle:
    """Iterate it, with `for` or `async for`, to receive a request's deltas; the last one has a
    `finish_reason`.

    Leaving the iteration early aborts the request. One consumer: deltas that were taken are gone.
    """

    def __init__(
        self,
        seed: int,
        cancel: Callable[[], None],
        advance: Callable[[], bool] | None,
        bells: Bells | None = None,
    ) -> None:
        """`advance` runs one engine step in the caller's thread; None when the engine has its own. `bells`
        are those of the engine, shared by all of its requests.
        """
        self.seed = seed
        """The seed in use, drawn at random when the request had none."""
        self._cancel = cancel
        self._advance = advance
        self._bells = bells or Bells()
        self._deltas: SimpleQueue[Delta] = SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._is_over = False

    def push(self, delta: Delta) -> None:
        """Hand a delta over; called by the engine alone, from its thread."""
        self._deltas.put(delta)
        wake = self._wake  # read once: the consumer may take it back at any moment
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the consumer's event loop is closed: nobody will ever read on
                self._wake = None
                self._cancel()

    def cancel(self) -> None:
        """Abort the request; its blocks are free within one step. Does nothing once it is over."""
        if not self._is_over:
            self._cancel()

    def listen(self, call: Call) -> None:
        """Have the running event loop call `call` now and whenever deltas have come; see `take_ready`.

        In place of iterating, for engines with a thread of their own.
        """
        bell = self._bells.here()
        self._wake = partial(bell.ring, call)
        bell.ring(call)

    def take_ready(self) -> list[Delta]:
        """Return the deltas that have come since the last call."""
        taken: list[Delta] = []
        while not self._deltas.empty():
            taken.append(self._deltas.get_nowait())
            self._is_over = taken[-1].finish_reason is not None
        if self._is_over:
            self._wake = None
        return taken

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
        arrived = asyncio.Event()
        self._wake = partial(self._bells.here().ring, arrived.set)
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
