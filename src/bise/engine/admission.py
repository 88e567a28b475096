"""From a request to a sequence that may run: everything that can be refused is refused here, with the
numbers.

Called from any thread; it holds no state of running sequences.
"""

from __future__ import annotations

import itertools
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from heapq import heapify, heappop, heappush

from bise.cache.prefix import salt_of
from bise.config import ModelConfig
from bise.engine.adapters import Adapters
from bise.engine.embedding import Pooler
from bise.engine.grammar import Grammars
from bise.engine.lookup import Prediction
from bise.engine.request import Request
from bise.engine.sampling import Sampler
from bise.engine.sequence import Sequence, Status
from bise.engine.truncation import truncate_tokens
from bise.errors import ConfigError, ContextOverflowError, QueueFullError, RequestError
from bise.text.stream import TextStream
from bise.text.tokenizer import Tokenizer

MAX_RETRY_S = 3600.0
"""Longest wait that a refusal names."""


class Admission:
    """Checks requests against one engine's model, context and cache."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        context: int,
        max_context: int,
        check_fits: Callable[[int], None],
        prefix_parts: tuple[str, ...] | None,
        adapters: Adapters,
        grammars: Grammars,
    ) -> None:
        """`context` is what the caller was promised, `max_context` what the cache holds of it; `check_fits`
        raises for a number of tokens that could never run; `prefix_parts` name model and KV format, None
        without a prefix cache.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._context = context
        self._max_context = max_context
        self._check_fits = check_fits
        self._prefix_parts = prefix_parts
        self._adapters = adapters
        self._grammars = grammars
        self._arrivals = itertools.count()

    def prepare(self, request: Request) -> tuple[Sequence, int]:
        """Return a new sequence for the request, and the seed in use.

        Raises RequestError, ContextOverflowError or MemoryPlanError for what cannot be honoured as asked.
        """
        params = request.params
        vocab_size = self._config.vocab_size
        if not request.token_ids:
            raise RequestError("the prompt is empty; give at least one token (BOS)", field="token_ids")
        _check_vocabulary("token_ids", request.token_ids, vocab_size)
        _check_vocabulary("prediction", request.prediction, vocab_size)
        request, num_dropped = self._truncated(request)
        sequence = Sequence(request, next(self._arrivals), self._resolve_max_tokens(request))
        sequence.num_dropped = num_dropped
        sequence.adapter = self._adapters.find(request.adapter)
        if request.pooling is not None:
            sequence.pooler = Pooler(request.pooling, sequence.num_prompt)
        eos_ids = (
            frozenset[int]() if params.ignore_eos or self._tokenizer is None else self._tokenizer.stop_ids
        )
        sequence.stop_ids = eos_ids.union(params.stop_token_ids)
        sequence.grammar = self._grammars.follow(request, sequence.stop_ids, sequence.max_tokens)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequence.sampler = Sampler(
            params, vocab_size=vocab_size, prompt=request.token_ids, stop_ids=sequence.stop_ids, seed=seed
        )
        if request.prediction:
            sequence.prediction = Prediction(request.prediction)
        if self._tokenizer is not None:
            sequence.stream = TextStream(self._tokenizer, params.stop, continuation=request.continuation)
        elif params.stop:
            raise RequestError("stop strings need a tokenizer, and this engine has none", field="stop")
        # A mean needs the hidden state of every token, cached keys and values bring none.
        may_reuse = request.use_prefix_cache and request.pooling != "mean"
        if self._prefix_parts is not None and may_reuse:
            adapter = "" if sequence.adapter is None else sequence.adapter.sha256
            sequence.salt = salt_of(*self._prefix_parts, adapter, request.tenant)
        return sequence, seed

    def _truncated(self, request: Request) -> tuple[Request, int]:
        """Return the request with a prompt that leaves room for its output, if it allows to drop the rest."""
        if request.truncate is None:
            return request, 0
        wanted = request.params.max_tokens
        assert wanted is not None, "Request checks that truncate comes with max_tokens"
        limit = self._max_context - wanted
        if limit < 1:  # no prompt at all would fit: refused with both numbers
            return request, 0
        used, num_dropped = truncate_tokens(request.token_ids, limit, request.truncate, request.truncate_keep)
        return (replace(request, token_ids=used), num_dropped) if num_dropped else (request, 0)

    def _resolve_max_tokens(self, request: Request) -> int:
        """Return how many tokens a request may produce; raises when prompt and output do not fit."""
        num_prompt, context = len(request.token_ids), self._context
        wanted = request.params.max_tokens
        # Without a limit there must be room for one token at least.
        if request.pooling is not None and num_prompt > context:
            raise ContextOverflowError(
                f"a text of {num_prompt} tokens exceeds the context of {context} tokens; shorten it or embed "
                "it in parts",
                field="token_ids",
            )
        if num_prompt + (1 if wanted is None else wanted) > context:
            asked = "at least 1 more token" if wanted is None else f"max_tokens {wanted}"
            raise ContextOverflowError(
                f"a prompt of {num_prompt} tokens and {asked} exceed the context of {context} tokens; "
                "shorten the prompt or ask for fewer tokens",
                field="max_tokens",
            )
        self._check_fits(num_prompt + (1 if wanted is None else wanted))
        return self._max_context - num_prompt if wanted is None else wanted


class Places:
    """Counts who waits to be started, in all and per tenant, and how fast places become free.

    Not thread-safe: the engine holds its lock around it.
    """

    def __init__(self, max_queue: int, max_tenant_queue: int, clock: Callable[[], float]) -> None:
        """Let `max_queue` requests wait at most, `max_tenant_queue` of one tenant; `clock` is in seconds."""
        for name, value in (("max_queue", max_queue), ("max_tenant_queue", max_tenant_queue)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)
        self._max_queue = max_queue
        self._max_tenant_queue = max_tenant_queue
        self._clock = clock
        self._per_tenant: Counter[str] = Counter()
        self._num_queued = 0
        self._freed: deque[float] = deque(maxlen=64)
        """When places became free, oldest first."""

    def take(self, tenant: str) -> None:
        """Take a place. Raises QueueFullError, with the time after which to try again, when there is none."""
        if self._num_queued >= self._max_queue:
            raise QueueFullError(
                f"{self._num_queued} requests are waiting already; try again later",
                retry_after_s=self._retry_after_s(1),
            )
        waiting = self._per_tenant[tenant]
        if waiting >= self._max_tenant_queue:
            raise QueueFullError(
                f"{waiting} requests of this key are waiting already; try again later",
                # Places go round: this tenant gets one once every other one had its turn.
                retry_after_s=self._retry_after_s(len(self._per_tenant)),
            )
        self._per_tenant[tenant] = waiting + 1
        self._num_queued += 1

    def free(self, tenant: str) -> None:
        """Give a place back."""
        self._num_queued -= 1
        self._per_tenant[tenant] -= 1
        if not self._per_tenant[tenant]:
            del self._per_tenant[tenant]
        self._freed.append(self._clock())

    def _retry_after_s(self, num_places: int) -> float:
        """Return the seconds until so many places will be free, at the rate of the last ones; 1 before there
        is one.
        """
        if not self._freed:
            return 1.0
        # Up to now: a queue that stands still is not reported with the rate of better times.
        elapsed = self._clock() - self._freed[0]
        return min(MAX_RETRY_S, max(0.0, elapsed * num_places / len(self._freed)))


class Deadlines:
    """Which sequences must end when."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Sequence]] = []
        """A heap by due time."""

    def __len__(self) -> int:
        return len(self._due)

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has a deadline."""
        if sequence.due_s is None:
            return
        if (
            len(self._due) >= 64 and len(self._due).bit_count() == 1
        ):  # at each doubling: those that are over go
            self._due = [entry for entry in self._due if entry[2].status is not Status.FINISHED]
            heapify(self._due)
        heappush(self._due, (sequence.due_s, sequence.arrival, sequence))

    def overdue(self, now: float) -> Iterator[Sequence]:
        """Yield the sequences that are due and not over yet, once each."""
        while self._due and self._due[0][0] <= now:
            sequence = heappop(self._due)[2]
            if sequence.status is not Status.FINISHED:
                yield sequence


def _check_vocabulary(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        return
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise RequestError(f"token {wrong} is outside the vocabulary of {vocab_size}", field=field)
