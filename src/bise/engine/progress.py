"""How far a request has come before its first token: who is before it, how much of its prompt is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bise.engine.handle import RequestHandle
from bise.engine.scheduler import Scheduler
from bise.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a request stands; true a moment ago."""

    before: int | None
    """Requests that wait before it; 0 while it runs; None where the queue changed while it was looked at."""
    prefilled: int
    """Prompt tokens whose keys and values are there."""


def progress_of(handle: RequestHandle, scheduler: Scheduler, arrived: Iterable[Sequence]) -> Progress:
    """Return where the request of `handle` stands. Any thread may ask: the queue is read as it changes."""
    for sequence in list(scheduler.running):
        if sequence.handle is handle:
            return Progress(before=0, prefilled=min(sequence.num_computed, sequence.num_prompt))
    try:
        waiting = [*scheduler.waiting, *arrived]
    except (RuntimeError, LookupError):  # the engine's thread changed it in the middle
        return Progress(before=None, prefilled=0)
    places = (place for place, sequence in enumerate(waiting) if sequence.handle is handle)
    return Progress(before=next(places, 0), prefilled=0)
