"""How a key's new requests are let in: in the order of arrival, few at a time, and out of the way of others.

To let a request in costs a few milliseconds, of the event loop, of the database and so of the engine. A key
with a thousand new requests would hold up every other key for as long as that takes. One that has many open
already loses nothing by giving way: those wait in the engine, and it has enough to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

WIDTH = 2
"""Requests of a key that are let in at the same time; its others wait behind them, not before other keys."""

MANY = 32
"""Open requests from which on a key gives way: twice as many as an engine computes at once, as it comes."""

GIVES_WAY_S = 0.1
"""How long it does so after a request of a key with fewer, and for each request at most."""


class Lanes:
    """The lanes of all keys; used on one event loop."""

    def __init__(self, num_open: Callable[[str], int], clock: Callable[[], float] = time.monotonic) -> None:
        """`num_open` tells how many requests of a key are open."""
        self._num_open = num_open
        self._clock = clock
        self._lanes: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._busy_until = 0.0
        """Until when keys with many requests give way."""

    @asynccontextmanager
    async def place(self, key_id: str) -> AsyncGenerator[None]:
        """Hold a place in a key's lane, once it is there and nobody is to be let by."""
        lane = self._lanes.get(key_id)
        if lane is None:
            lane = self._lanes[key_id] = asyncio.Semaphore(WIDTH)
        if self._num_open(key_id) < MANY:
            self._busy_until = self._clock() + GIVES_WAY_S
        async with lane:
            if self._num_open(key_id) >= MANY and (left := self._busy_until - self._clock()) > 0:
                await asyncio.sleep(left)
            yield
