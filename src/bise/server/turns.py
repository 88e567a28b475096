"""Who begins next: of requests that come together a few begin at a time, every caller in turn.

To read a request and let it in takes the event loop a millisecond or two. A thousand of one caller would hold
up whoever comes after them for as long; here they wait for nothing but their own turn.
"""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 1
"""Requests that begin in one iteration of the event loop; between two it looks at all connections."""


class Turns:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits, by caller; the caller whose turn is next stands first."""
        self._begun = 0
        """Requests that have begun since the loop last looked at its connections."""
        self._is_due = False

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their turn."""
        return sum(len(own) for own in self._waiting.values())

    async def take(self, caller: str) -> None:
        """Return when a request of `caller` may begin: at once where nobody else begins."""
        if self._begun < AT_ONCE and not self._waiting:
            self._begin()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self._plan()
        await turn  # one that is cancelled is passed over

    def _begin(self) -> None:
        self._begun += 1
        self._plan()

    def _plan(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        """Give the next turns, one iteration of the loop after the last ones."""
        self._is_due = False
        self._begun = 0
        while self._waiting and self._begun < AT_ONCE:
            caller = next(iter(self._waiting))
            own = self._waiting.pop(caller)
            turn = own.popleft()
            if own:
                self._waiting[caller] = own  # behind the others
            if not turn.done():
                turn.set_result(None)
                self._begin()
