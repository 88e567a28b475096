"""The engine: takes requests from any thread, steps the model on its own thread, tells each caller what was
produced.

The thread that steps owns all sequence state. Two crossings: the inbox in, `RequestHandle.push` out. A
request's own failure ends that request; the model's failure ends the requests of that step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from bise.cache.prefix_file import PrefixFile
from bise.config import ModelConfig
from bise.engine.adapters import Adapters
from bise.engine.admission import Admission, Deadlines, Places
from bise.engine.candidates import Candidates
from bise.engine.choice import choose
from bise.engine.grammar import Grammars
from bise.engine.handle import Bells, RequestHandle
from bise.engine.interrupt import Interrupted, Interrupts
from bise.engine.kv_memory import KVMemory, blocks_per_group, checked_context
from bise.engine.pace import Pace
from bise.engine.progress import Progress, progress_of
from bise.engine.request import Delta, FinishReason, Request, Timings, TokenLogprob, Usage
from bise.engine.runner import Model, Runner, score_rows
from bise.engine.sampling import check_finite, token_logprob
from bise.engine.scheduler import Scheduler, Step, StepRow
from bise.engine.sequence import Sequence, Status
from bise.engine.speculation import Speculation
from bise.errors import (
    BiseError,
    EngineError,
    OutOfMemoryError,
)
from bise.kernels import Array, Ops
from bise.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PromptLogprobs = tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A glance at the engine; read from another thread it may be one step old."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_blocks: tuple[int, ...]
    """KV blocks per window group."""
    num_free_blocks: tuple[int, ...]
    """Blocks that no running sequence holds, cached ones included."""
    num_cached_blocks: tuple[int, ...]
    """Of these, blocks whose content the prefix cache keeps until the room is needed."""
    prompt_tokens: int
    """Prompt tokens of all requests that were started."""
    cached_tokens: int
    """Of these, tokens that came from the prefix cache."""
    kv_bytes: int
    """Size of all KV pages."""


class Engine:
    """Runs requests on one model; see `submit`. Use it as a context manager, or `close` it."""

    def __init__(
        self,
        transformer: Model,
        ops: Ops,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        kv_format: str = "f16",
        num_blocks: int | SequenceOf[int] | None = None,
        kv_memory_bytes: int | None = None,
        max_context: int | None = None,
        max_step_tokens: int = 512,
        max_sequences: int = 32,
        max_queue: int = 2048,
        max_tenant_queue: int = 1024,
        prefix_cache: bool = True,
        prefix_file: PrefixFile | None = None,
        swap_bytes: int = 0,
        model_id: str = "",
        speculation: Speculation | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
        threaded: bool = True,
    ) -> None:
        """Allocate the KV cache and, unless `threaded` is False, start the engine's thread.

        Give either `num_blocks` (per window group, or one number for all) or `kv_memory_bytes`. Without a
        tokenizer deltas carry no text; without `speculation` every step decodes one token; without `pace`
        steps are as large as `max_step_tokens`. `prefix_file` keeps the prefix cache over restarts;
        `model_id` tells models apart there. Preempted sequences may leave `swap_bytes` outside of the KV
        memory, the others are computed again. Without a thread, iterating a handle or calling `step` does the
        work. Raises ConfigError, and MemoryPlanError when the memory holds no block.
        """
        context = checked_context(max_context, config)
        limits = {"max_step_tokens": max_step_tokens, "max_sequences": max_sequences}
        blocks = blocks_per_group(config, kv_format, num_blocks, kv_memory_bytes, context=context, **limits)
        self._memory = memory = KVMemory(
            config, ops, kv_format, blocks, prefix_cache=prefix_cache, prefix_file=prefix_file,
            swap_bytes=swap_bytes,
        )  # fmt: skip
        self._scheduler = Scheduler(
            memory.pools, config.window_groups, prefix=memory.prefix, swap=memory.swap, **limits
        )
        self.max_context = self._scheduler.longest(context)
        """Most tokens of one request, prompt and output: the context, or less where the cache is smaller."""
        self._runner = Runner(transformer, self._memory.pages, ops)
        self.adapters = Adapters()
        """What `Request.adapter` may name."""
        self.grammars = Grammars(tokenizer, config.vocab_size)
        """Compiles what `Request.grammar` may be. `submit` does it in the calling thread, for up to a second;
        ask `grammars.prepare` in a thread of your own first where that is too long.
        """
        self.speculation = speculation
        """Guesses tokens ahead; None: one token per step."""
        self._pace = pace
        self._clock = clock
        self._places = Places(max_queue, max_tenant_queue, clock)
        self._admission = Admission(
            config=config,
            tokenizer=tokenizer,
            context=context,
            max_context=self.max_context,
            check_fits=self._scheduler.check_fits,
            prefix_parts=(model_id, kv_format) if prefix_cache else None,
            adapters=self.adapters,
            grammars=self.grammars,
        )
        self._open(threaded)

    def _open(self, threaded: bool) -> None:
        """Begin with an empty inbox, and with a thread that takes it in."""
        self._wake = threading.Condition()
        self._bells = Bells()
        self._arrived: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._deadlines = Deadlines()
        self._interrupts = Interrupts(self._scheduler.waiting, self._newcomers)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._is_closing = False
        self._aborts_all = False
        self._failure: BiseError | None = None
        self._thread = (
            threading.Thread(target=self._run, name="bise-engine", daemon=True) if threaded else None
        )
        if self._thread is not None:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Callers' side: any thread.

    def submit(self, request: Request) -> RequestHandle:
        """Queue a request and return its handle at once.

        Raises RequestError, ContextOverflowError or MemoryPlanError for a request that cannot be honoured as
        asked, QueueFullError when `max_queue` requests wait already, or `max_tenant_queue` of its tenant,
        EngineError after `close`.
        """
        sequence, seed = self._admission.prepare(request)
        advance = self.step if self._thread is None else None
        sequence.handle = RequestHandle(seed, partial(self._cancel, sequence), advance, self._bells)
        sequence.submitted_s = time.perf_counter()
        if request.deadline_s is not None:
            sequence.due_s = self._clock() + request.deadline_s
        with self._wake:
            if self._failure is not None:
                raise EngineError(f"the engine stopped for good: {self._failure}")
            if self._is_closing:
                raise EngineError("the engine is closed")
            self._places.take(request.tenant)
            self._arrived.append(sequence)
            self._wake.notify()
        return sequence.handle

    def close(self, *, drain: bool = False) -> None:
        """Stop: abort what is there, or with `drain` finish it first; later `submit` raises. Waits for the
        thread.
        """
        with self._wake:
            self._is_closing = True
            self._aborts_all = self._aborts_all or not drain
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while not self._aborts_all and self.step():
                pass
            self._take_inbox()
        if self._failure is None:
            self._memory.save()

    @property
    def failure(self) -> BiseError | None:
        """The error that stopped the engine for good; None while it is well."""
        return self._failure

    def stats(self) -> EngineStats:
        """Return counts for people and for metrics."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._arrived),
            num_preemptions=self._scheduler.num_preemptions,
            num_blocks=self._memory.pages.num_blocks,
            num_free_blocks=tuple(pool.num_free for pool in self._memory.pools),
            num_cached_blocks=tuple(pool.num_cached for pool in self._memory.pools),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            kv_bytes=self._memory.pages.size_bytes,
        )

    def progress(self, handle: RequestHandle) -> Progress:
        """Return how far a request has come before its first token."""
        return progress_of(handle, self._scheduler, self._arrived)

    def _cancel(self, sequence: Sequence) -> None:
        with self._wake:
            self._cancelled.append(sequence)
            self._wake.notify()
        if self._thread is None:
            self._take_inbox()

    # Engine's side: the one thread that steps.

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (
                        self._arrived or self._cancelled or self._scheduler.has_work or self._is_closing
                    ):
                        self._wake.wait()
                if not self.step() and self._is_closing and not self._arrived:
                    return
        except Exception as error:  # thread root: a bug of ours must not leave callers waiting for ever
            logger.exception("event=engine_died")
            self._die(_as_engine_error(error))

    def _die(self, error: BiseError) -> None:
        """Tell everyone, without touching blocks or queues, whose state nobody can trust any more."""
        with self._wake:
            self._is_closing = True
            self._failure = error
            left = [*self._scheduler.running, *self._scheduler.waiting.everyone(), *self._arrived]
        for sequence in left:
            sequence.handle.push(_last_delta(sequence, Delta(finish_reason=FinishReason.ERROR, error=error)))

    def step(self) -> bool:
        """Run one step; False when there was nothing to do. Only for engines without a thread."""
        self._take_inbox()
        pace = self._pace
        scheduler = self._scheduler
        if pace is None:
            step = scheduler.plan()
        else:
            step = scheduler.plan(pace.budget(scheduler.num_sequences, len(scheduler.running)), pace.prices)
        if step is None:
            return False
        for row in step.rows:
            if not row.sequence.started_s:
                self._start(row.sequence)
                self._prompt_tokens += row.sequence.num_prompt
                self._cached_tokens += row.sequence.num_cached or 0
        if self.speculation is not None:
            step = self.speculation.extend(step, self._scheduler)
        began = self._clock()
        try:
            hidden, wanted = self._runner.forward(step, self._interrupts.watch(step))
            logits = self._runner.candidates(step, hidden, wanted) if len(wanted) else None
        except Interrupted:
            self._scheduler.give_up(step)
            self._interrupts.lost(self._clock() - began)
            return True
        except Exception as error:  # whatever the model raises, the engine goes on with the other requests
            logger.exception("event=step_failed sequences=%d tokens=%d", len(step.rows), step.num_tokens)
            for row in step.rows:
                self._end(row.sequence, FinishReason.ERROR, error=_as_engine_error(error))
            return True
        if self._memory.swap is not None:
            self._memory.swap.observe(step.num_tokens, self._clock() - began)
        self._scheduler.complete(step)
        self._commit(step, hidden, logits)
        seconds = self._clock() - began
        self._interrupts.worked(seconds)
        if pace is not None:
            num_decoded = step.num_decoded
            pace.observe(step.num_tokens - num_decoded, num_decoded, seconds)
        if self.speculation is not None:
            self.speculation.settle(step)
        return True

    def _newcomers(self) -> SequenceOf[Sequence]:
        if not self._arrived:
            return ()
        with self._wake:
            return tuple(self._arrived)

    def _take_inbox(self) -> None:
        # Counted first: what is cancelled from now on may not have been taken in below.
        num_cancelled = len(self._cancelled)
        while self._arrived:
            sequence = self._arrived.popleft()
            self._scheduler.add(sequence)
            self._deadlines.add(sequence)
        for _ in range(num_cancelled):
            sequence = self._cancelled.popleft()
            if sequence.status is not Status.FINISHED:
                self._end(sequence, FinishReason.ABORT)
        for sequence in self._deadlines.overdue(self._clock()):
            self._end(sequence, FinishReason.DEADLINE)
        if self._aborts_all:
            self._abort_all()

    def _start(self, sequence: Sequence) -> None:
        sequence.started_s = time.perf_counter()
        with self._wake:
            self._places.free(sequence.request.tenant)

    def _commit(self, step: Step, hidden: Array, logits: Candidates | None) -> None:
        """Score prompts, choose tokens, tell the callers; each sequence fails on its own."""
        start = sampled = 0
        for row in step.rows:
            sequence = row.sequence
            try:
                scores = self._score_prompt(row, start, hidden) if row.score_stop > row.score_start else ()
                if sequence.pooler is not None:
                    sequence.pooler.add(row.first, hidden[start : start + row.num_tokens])
                if row.num_samples:
                    assert logits is not None
                    self._choose(row, logits[sampled : sampled + row.num_samples], scores)
                elif sequence.max_tokens == 0 and not sequence.num_pending:
                    vector = () if sequence.pooler is None else sequence.pooler.vector()
                    lead = self._lead(sequence, scores)
                    self._end(sequence, FinishReason.LENGTH, prompt_logprobs=lead, embedding=vector)
                elif scores:
                    sequence.handle.push(Delta(prompt_logprobs=scores))
            except BiseError as error:
                self._end(sequence, FinishReason.ERROR, error=error)
            except Exception as error:  # a failure in one sequence's text or choice ends that sequence only
                logger.exception("event=request_failed arrival=%d", sequence.arrival)
                self._end(sequence, FinishReason.ERROR, error=_as_engine_error(error))
            start += row.num_tokens
            sampled += row.num_samples

    def _score_prompt(self, row: StepRow, start: int, hidden: Array) -> PromptLogprobs:
        """Return log-probs of the prompt tokens after positions [score_start, score_stop), a few rows at a
        time.
        """
        sequence = row.sequence
        num_top = sequence.params.logprobs or 0
        scores: list[TokenLogprob | None] = [None] if row.score_start == 0 else []
        position = row.score_start
        for rows in score_rows(row, start):
            for logits in self._runner.logits(hidden, rows):
                check_finite(logits)
                position += 1
                scores.append(token_logprob(logits, sequence.token_ids[position], num_top))
        return tuple(scores)

    def _lead(self, sequence: Sequence, scores: PromptLogprobs) -> PromptLogprobs:
        """Return scores, with the None of the first token where a prompt of one token scored nothing."""
        alone = sequence.request.prompt_logprobs and sequence.num_prompt == 1 and sequence.num_output == 0
        return (None,) if alone else scores

    def _choose(self, row: StepRow, logits: Candidates, prompt_logprobs: PromptLogprobs) -> None:
        """Choose tokens from 1 + guesses rows of logits [V], and tell the caller."""
        sequence = row.sequence
        if sequence.num_prompt == 1:
            prompt_logprobs = self._lead(sequence, prompt_logprobs)
        choice = choose(sequence, logits, row.draft)
        if row.draft:
            self._scheduler.keep_drafted(sequence, max(0, len(choice.token_ids) - 1))
        token_ids, logprobs = tuple(choice.token_ids), tuple(choice.logprobs)
        if choice.reason is not None:
            self._end(
                sequence, choice.reason, token_ids, choice.text, logprobs, prompt_logprobs, choice.match
            )
        elif token_ids:
            sequence.handle.push(
                Delta(
                    token_ids=token_ids,
                    text=choice.text,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
            )
        if choice.error is not None:
            raise choice.error

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: PromptLogprobs = (),
        stop_match: str | int | None = None,
        *,
        embedding: tuple[float, ...] = (),
        error: BiseError | None = None,
    ) -> None:
        """Free a sequence's blocks and send its last delta."""
        self._scheduler.finish(sequence, is_sound=error is None)
        if not sequence.started_s:
            self._start(sequence)
        if sequence.stream is not None and error is None:
            text += sequence.stream.finish()
            # A stop string may turn out to be complete only when no longer match is possible any more.
            if sequence.stream.stopped is not None and reason is not FinishReason.ABORT:
                reason, stop_match = FinishReason.STOP, sequence.stream.stopped
        delta = Delta(
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_match=stop_match,
            embedding=embedding,
            error=error,
        )
        sequence.handle.push(_last_delta(sequence, delta))

    def _abort_all(self) -> None:
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(sequence, FinishReason.ABORT)


def _last_delta(sequence: Sequence, delta: Delta) -> Delta:
    """Return `delta` with the counts and times of its request."""
    now = time.perf_counter()
    started = sequence.started_s or now
    first = sequence.first_token_s or now
    return replace(
        delta,
        usage=Usage(
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.num_cached or 0,
            completion_tokens=sequence.num_output,
            accepted_prediction_tokens=sequence.prediction.num_accepted if sequence.prediction else 0,
            rejected_prediction_tokens=sequence.prediction.num_rejected if sequence.prediction else 0,
            dropped_tokens=sequence.num_dropped,
        ),
        timings=Timings(
            queue_s=started - sequence.submitted_s, prefill_s=first - started, decode_s=now - first
        ),
    )


def _as_engine_error(error: Exception) -> BiseError:
    if isinstance(error, BiseError):
        return error
    # By name and message: torch need not be there, and its allocator on the host raises a plain RuntimeError.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return OutOfMemoryError("no memory was left for a step of the model; ask again, or for less")
    return EngineError(f"the engine failed: {type(error).__name__}: {error}")
