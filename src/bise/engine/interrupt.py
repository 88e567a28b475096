"""When a step under way is broken off, for the first token of somebody who comes meanwhile.

A step cannot be paused, but it can be thrown away: nothing counts as computed before it is over, and what it
wrote to its slots is written again, the same bytes. That is done for a tenant that asks for less than all of
those in the step; what is thrown away is bounded to a share of the engine's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from bise.engine.fairness import FairQueue
from bise.engine.scheduler import Step
from bise.engine.sequence import Sequence

SHARE = 1 / 16
"""Of the time of all steps, what may be thrown away in the long run."""

MOST_SAVED_S = 0.25
"""What may be thrown away at once after a time in which nothing was."""


SHORT = 8
"""A step of so few tokens is over soon, and may be computed in one native call (`engine.replay`)."""


class Interrupted(Exception):
    """The step was broken off between two layers."""


class Interrupts:
    """Tells when to break off; used by the engine's thread alone."""

    def __init__(self, queue: FairQueue, newcomers: Callable[[], SequenceOf[Sequence]]) -> None:
        """`newcomers` returns who came since the step was planned, who is in `queue` not included."""
        self.count = 0
        """Steps that were broken off."""
        self._queue = queue
        self._newcomers = newcomers
        self._saved_s = 0.0
        """Time that may be thrown away now; below 0 after a step that was longer than that."""

    def watch(self, step: Step) -> Callable[[], None] | None:
        """Return what is to be called between two layers of a step, and raises Interrupted; None where
        nothing may be thrown away.
        """
        if self._saved_s <= 0 or step.num_tokens <= SHORT:
            return None
        present = min(self._queue.num_present(row.sequence.request.tenant) for row in step.rows)
        priority = min(row.sequence.request.priority for row in step.rows)

        def check() -> None:
            newcomers = self._newcomers()
            counts = Counter(newcomer.request.tenant for newcomer in newcomers)
            for newcomer in newcomers:
                tenant = newcomer.request.tenant
                asks_for_less = self._queue.num_present(tenant) + counts[tenant] < present
                if asks_for_less and newcomer.request.priority <= priority:
                    raise Interrupted

        return check

    def worked(self, seconds: float) -> None:
        """Count a step that was computed."""
        self._saved_s = min(MOST_SAVED_S, self._saved_s + SHARE * seconds)

    def lost(self, seconds: float) -> None:
        """Count a step that was broken off after `seconds`."""
        self.count += 1
        self._saved_s -= seconds
