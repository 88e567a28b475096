"""Who begins next: of requests that come together one begins at a time, every caller in turn.

To read a request and let it in takes the event loop a millisecond or two. A thousand of one caller would hold
up whoever comes after them for as long; here they wait for nothing but their own turn.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Gives one turn in each iteration of the event loop, which looks at all connections between two; used on
    one loop.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits, by caller; the caller whose turn is next stands first."""
        self._is_given = False
        """Somebody has begun since the loop last looked at its connections."""

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their turn."""
        return sum(len(own) for own in self._waiting.values())

    async def take(self, caller: str) -> None:
        """Return when a request of `caller` may begin: at once where nobody else begins."""
        if not self._is_given:
            self._give()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        await turn  # one that is cancelled is passed over

    def _give(self) -> None:
        self._is_given = True
        asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        """Give the next turn, one iteration of the loop after the last one."""
        self._is_given = False
        while self._waiting and not self._is_given:
            caller = next(iter(self._waiting))
            own = self._waiting.pop(caller)
            turn = own.popleft()
            if own:
                self._waiting[caller] = own  # behind the others
            if not turn.done():
                turn.set_result(None)
                self._give()
