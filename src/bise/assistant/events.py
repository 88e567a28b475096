"""What happened beside the answers themselves (titles, new messages, ended runs), told to every open tab."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

BACKLOG = 1000
"""Events that a tab may lag behind before it is told to load everything again."""


class Hub:
    """Passes events to all tabs of an owner; lives in the event loop's thread."""

    def __init__(self) -> None:
        self._tabs: dict[str, set[asyncio.Queue[dict[str, Any]]]] = {}

    def tell(self, owner: str, kind: str, **body: Any) -> None:
        """Tell all tabs of `owner`."""
        for queue in self._tabs.get(owner, ()):
            if queue.qsize() >= BACKLOG:
                continue
            queue.put_nowait({"kind": "reload"} if queue.qsize() == BACKLOG - 1 else {"kind": kind, **body})

    async def listen(self, owner: str, heartbeat_s: float) -> AsyncGenerator[dict[str, Any] | None]:
        """Yield events from now on; None as a sign of life."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._tabs.setdefault(owner, set()).add(queue)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(queue.get(), heartbeat_s)
                except TimeoutError:
                    yield None
        finally:
            self._tabs[owner].discard(queue)
            if not self._tabs[owner]:
                del self._tabs[owner]
