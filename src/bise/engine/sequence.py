"""The mutable state of one request while it lives in the engine. One writer: the thread that steps the
engine.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from bise.cache.table import BlockTable
from bise.engine.request import Request

if TYPE_CHECKING:
    from bise.cache.prefix import Node
    from bise.engine.embedding import Pooler
    from bise.engine.handle import RequestHandle
    from bise.engine.lookup import Prediction
    from bise.engine.sampling import Sampler
    from bise.engine.speculation import Foresight
    from bise.grammar.follower import Follower
    from bise.model.lora import Adapter
    from bise.text.stream import TextStream


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """Holds no blocks: new, or preempted."""
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens and counters of one request.

    There is no prefill and no decode, only tokens whose keys and values are not in the cache yet:

        token_ids      p p p p p p o o o          prompt, then output
        num_computed   ------->|                  in the cache
        num_pending            |<------>          what the next steps compute; 1 while decoding
        num_scored     ----->|                    prompt positions whose successor's log-prob was reported
    """

    __slots__ = (
        "adapter",
        "arrival",
        "clock",
        "due_s",
        "first_token_s",
        "foresight",
        "grammar",
        "handle",
        "max_tokens",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_dropped",
        "num_kept",
        "num_prompt",
        "num_scored",
        "params",
        "pooler",
        "prediction",
        "request",
        "salt",
        "sampler",
        "started_s",
        "status",
        "stop_ids",
        "stream",
        "submitted_s",
        "tables",
        "tail",
        "token_ids",
    )

    sampler: Sampler
    handle: RequestHandle

    def __init__(self, request: Request, arrival: int, max_tokens: int) -> None:
        """Start a sequence that may produce `max_tokens`; `arrival` counts requests in order."""
        self.request = request
        self.params = request.params
        self.arrival = arrival
        self.max_tokens = max_tokens
        self.stream: TextStream | None = None
        self.grammar: Follower | None = None
        """Which tokens may come, where the request has a grammar."""
        self.adapter: Adapter | None = None
        """Whose rows these are; its `sha256` tells its keys and values from others'."""
        self.pooler: Pooler | None = None
        """Gathers the prompt's vector, where one was asked for."""
        self.prediction: Prediction | None = None
        """What the caller expects, as far as the output has followed it."""
        self.foresight: Foresight | None = None
        """What guessing ahead knows about this sequence; None until it is asked."""
        self.token_ids = list(request.token_ids)
        self.num_prompt = len(request.token_ids)
        self.num_computed = 0
        self.num_scored = 0
        self.status = Status.WAITING
        self.tables: tuple[BlockTable, ...] = ()
        """One per window group while running."""
        self.salt: bytes | None = None
        """Where its chain of block hashes starts; None when it neither uses nor feeds the prefix cache."""
        self.tail: Node | None = None
        """The last of its blocks that the prefix cache knows, while running."""
        self.num_kept = 0
        """Blocks up to and including `tail`."""
        self.num_cached: int | None = None
        """Prompt tokens that the prefix cache spared it; None before it ran."""
        self.clock = 0
        """Tokens that the engine had computed when it came."""
        self.num_charged = 0
        """Tokens up to which its tenant's account was charged, or which cost nothing."""
        self.stop_ids: frozenset[int] = frozenset()
        """Tokens that end the text."""
        self.num_dropped = 0
        """Prompt tokens that `Request.truncate` dropped."""
        self.due_s: float | None = None
        """When it ends at the latest, by the engine's clock."""
        self.submitted_s = 0.0
        self.started_s = 0.0
        self.first_token_s = 0.0

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return len(self.token_ids) - self.num_prompt
