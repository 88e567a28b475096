"""Runs: answers being written. The server owns them; whoever looks on may come, go and come back.

A run keeps every event in order, numbered from 1. A subscriber says after which number it wants to hear, so
that a reload or a second tab loses and doubles nothing. Only an explicit stop ends a run early.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bise.assistant.models import ChatModels, Job, Piece
from bise.engine.request import Timings, Usage
from bise.errors import BiseError

logger = logging.getLogger(__name__)

SNAPSHOT_S = 1.0
"""A crash loses at most this much of an answer."""
USAGE_S = 0.25
"""How often live speed and counts are told."""
GATHER_S = 0.02
"""What happens within this time is told at once: an answer may come faster than any screen shows it."""
KEEP_ENDED_S = 120.0
"""How long the events of an ended run can still be read."""
ENDED = ("complete", "stopped", "interrupted", "error")

Save = Callable[[dict[str, Any], bool], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Event:
    """One numbered event of a run. `kind`: piece, state, prefill, reading, sources, parts, usage or end."""

    seq: int
    kind: str
    body: dict[str, Any]


class Run:
    """One answer being written; lives in the event loop's thread."""

    def __init__(
        self,
        run_id: str,
        *,
        message_id: str,
        conversation_id: str,
        owner: str,
        job: Job,
        text: str = "",
        parts: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`text` and `parts` are what an earlier run of the same answer wrote."""
        self.id = run_id
        self.message_id = message_id
        self.conversation_id = conversation_id
        self.owner = owner
        self.job = job
        self.text = text
        self.status = "queued"
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.cost: dict[str, str | None] = {}
        self.parts: list[dict[str, Any]] = [*parts]
        """What belongs to the answer and is no text of it; see `bise.assistant.messages.Message`."""
        self.tokens = 0
        self.first_token_s: float | None = None
        self.events: list[Event] = []
        self.task: asyncio.Task[None] | None = None
        self.is_stopping = False
        self.is_ending = False
        """True from the moment when it is only saved any more: nothing may cancel that."""
        self._started = time.perf_counter()
        self._prefill: tuple[int, int] | None = None
        self._before: int = 0
        self._loaded: float | None = None
        self._thinking_since: float | None = None
        self._told_thought = 0.0
        self._first: float | None = None
        self._changed = asyncio.Event()

    @property
    def seq(self) -> int:
        """Number of the last event; `text` contains exactly the pieces up to it."""
        return len(self.events)

    @property
    def is_over(self) -> bool:
        """True once nothing more can come."""
        return self.status in ENDED

    @property
    def is_writing(self) -> bool:
        """True while a model works on it."""
        return self.status in ("prefill", "running")

    def tell(self, kind: str, body: dict[str, Any]) -> None:
        """Append an event and wake all subscribers."""
        self.events.append(Event(len(self.events) + 1, kind, body))
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, after: int, heartbeat_s: float) -> AsyncGenerator[list[Event] | None]:
        """Yield the events after number `after`, as many at once as there are, until the end; None as a sign
        of life when nothing happens for `heartbeat_s`. Pieces of text that follow each other come as one,
        under the number of the last.
        """
        position = max(0, min(after, len(self.events)))
        while True:
            changed = self._changed
            if position < len(self.events):
                fresh = self.events[position:]
                position = len(self.events)
                yield _joined(fresh)
                if not self.is_over:
                    await asyncio.sleep(GATHER_S)
                continue
            if self.is_over:
                return
            try:
                await asyncio.wait_for(changed.wait(), heartbeat_s)
            except TimeoutError:
                yield None

    def speed(self) -> dict[str, Any]:
        """Return live figures: tokens, tokens per second, seconds to the first token."""
        rate = None
        if self._first is not None and self.tokens > 1:
            passed = time.perf_counter() - self._first
            rate = (self.tokens - 1) / passed if passed > 0 else None
        return {
            "completion_tokens": self.tokens,
            "tokens_per_second": None if rate is None else round(rate, 2),
            "ttft_s": None if self.first_token_s is None else round(self.first_token_s, 4),
        }

    def take(self, piece: Piece) -> None:
        """Add a piece to the text and tell it."""
        if piece.loaded is not None:
            self._load(round(piece.loaded, 2))
        if piece.before:
            self._wait(piece.before)
        elif piece.prefill is not None and self._first is None:
            self._enter("prefill")
            if piece.prefill != self._prefill:
                self._prefill = piece.prefill
                self.tell("prefill", {"done": piece.prefill[0], "total": piece.prefill[1]})
        if piece.tokens and self._first is None:
            self._first = time.perf_counter()
            self.first_token_s = self._first - self._started
            self._enter("running")
        self.tokens += piece.tokens
        if piece.thought:
            self._think(piece.thought)
        if piece.text:
            self.settle()
            self.text += piece.text
            self.tell("piece", {"content": piece.text})
        if piece.usage is not None:
            self.usage, self.timings = piece.usage, piece.timings
        if piece.cost is not None:
            self.cost = {"cost": piece.cost, "currency": piece.currency}
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason

    def figures(self) -> dict[str, Any]:
        """Return usage and timings as they are kept with the message."""
        usage = None
        if self.usage is not None:
            usage = {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "completion_tokens": self.usage.completion_tokens,
                **self.cost,
            }
        timings: dict[str, Any] = self.speed()
        if self.timings is not None:
            timings |= {
                "queue_s": round(self.timings.queue_s, 4),
                "prefill_s": round(self.timings.prefill_s, 4),
                "decode_s": round(self.timings.decode_s, 4),
            }
        return {"usage": usage, "timings": timings}

    def end(self, status: str) -> None:
        """Tell the end; nothing comes after it."""
        self.settle()
        self.status = status
        self.tell(
            "end",
            {"status": status, "finish_reason": self.finish_reason, "error": self.error} | self.figures(),
        )

    def settle(self) -> None:
        """End what was being thought, and say how long it took."""
        if self._thinking_since is not None:
            self.parts[-1] = self.parts[-1] | {
                "seconds": round(time.perf_counter() - self._thinking_since, 2)
            }
            self._thinking_since = None
            self.tell("parts", {"parts": [*self.parts]})

    def _think(self, thought: str) -> None:
        if self._thinking_since is None:
            self._thinking_since = self._told_thought = time.perf_counter()
            self.parts.append({"type": "thinking", "text": ""})
        self.parts[-1] = self.parts[-1] | {"text": self.parts[-1]["text"] + thought}
        # Parts are told whole, so not for every token.
        if time.perf_counter() - self._told_thought >= USAGE_S or len(self.parts[-1]["text"]) == len(thought):
            self._told_thought = time.perf_counter()
            self.tell("parts", {"parts": [*self.parts]})

    def _wait(self, before: int) -> None:
        if before != self._before or self.status != "queued":
            self.status, self._before = "queued", before
            self.tell("state", {"status": "queued", "before": before})

    def _load(self, share: float) -> None:
        if share != self._loaded:
            self._loaded = share
            self.tell("state", {"status": self.status, "before": 0, "loaded": share})

    def _enter(self, status: str) -> None:
        if self.status != status:
            self.status = status
            self.tell("state", {"status": status, "before": 0})


def _joined(events: Sequence[Event]) -> list[Event]:
    """Return events with neighbouring pieces of text as one."""
    found: list[Event] = []
    for event in events:
        if found and event.kind == found[-1].kind == "piece":
            text = found[-1].body["content"] + event.body["content"]
            found[-1] = Event(event.seq, "piece", {"content": text})
        else:
            found.append(event)
    return found


class Runs:
    """All runs of this process."""

    def __init__(self, models: ChatModels) -> None:
        self._models = models
        self._runs: dict[str, Run] = {}

    def get(self, run_id: str | None) -> Run | None:
        """Return a run that is live or ended a moment ago."""
        return None if run_id is None else self._runs.get(run_id)

    def live(self, owner: str) -> list[Run]:
        """Return the runs of one owner that are still writing."""
        return [run for run in self._runs.values() if run.owner == owner and not run.is_over]

    def of_conversation(self, conversation_id: str) -> list[Run]:
        """Return the live runs of one conversation."""
        return [
            run for run in self._runs.values() if run.conversation_id == conversation_id and not run.is_over
        ]

    def is_busy(self) -> bool:
        """Return True while a model works on anybody's answer."""
        return any(run.is_writing for run in self._runs.values())

    def start(
        self,
        run: Run,
        save: Save,
        ended: Callable[[Run], Awaitable[None]],
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        """Let a run go on its own: `prepare` completes its job, `save(fields, is_final)` keeps its text,
        `ended` is awaited after the end.
        """
        self._runs[run.id] = run
        run.task = asyncio.create_task(self._work(run, save, ended, prepare), name=f"run-{run.id}")

    async def stop(self, run: Run) -> None:
        """End a run and return when its place is free; does nothing once it is over."""
        if run.task is None or run.task is asyncio.current_task():
            return
        if not run.is_stopping and not run.is_ending:
            run.is_stopping = True
            # A task that is cancelled before its first step would never reach its own clean-up.
            await asyncio.sleep(0)
            run.task.cancel()
        await asyncio.wait([run.task])

    async def close(self) -> None:
        """Interrupt all runs, as a restart does: their text is kept."""
        await asyncio.sleep(0)  # as in `stop`
        tasks: list[asyncio.Task[None]] = []
        for run in self._runs.values():
            if run.task is not None and not run.task.done():
                tasks.append(run.task)
                if not run.is_ending:
                    run.task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _work(
        self,
        run: Run,
        save: Save,
        ended: Callable[[Run], Awaitable[None]],
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        status = "error"
        try:
            await prepare()
            status = await self._write(run, save)
        except asyncio.CancelledError:
            status = "stopped" if run.is_stopping else "interrupted"
            run.finish_reason = "abort"
        except BiseError as error:
            run.error, run.finish_reason = str(error), "error"
            logger.warning("event=run_failed run=%s code=%s", run.id, error.code)
        except Exception:
            run.error, run.finish_reason = "the answer failed inside the server", "error"
            logger.exception("event=run_crashed run=%s", run.id)
        finally:
            run.is_ending = True
            await asyncio.shield(self._finish(run, status, save, ended))

    async def _write(self, run: Run, save: Save) -> str:
        pieces = self._models.stream(run.job)
        saved = told = time.monotonic()
        try:
            async for piece in pieces:
                run.take(piece)
                now = time.monotonic()
                if now - told >= USAGE_S and run.tokens:
                    told = now
                    run.tell("usage", run.speed())
                if now - saved >= SNAPSHOT_S:
                    saved = now
                    fields = {"text": run.text, "parts": [*run.parts], "seq": run.seq, "status": run.status}
                    await save(fields, False)
        finally:
            await pieces.aclose()
        return "complete"

    async def _finish(
        self, run: Run, status: str, save: Save, ended: Callable[[Run], Awaitable[None]]
    ) -> None:
        run.settle()
        try:
            status = await self._keep(run, status, save)
        finally:  # whoever looks on must hear of the end, whatever went wrong
            run.end(status)
            asyncio.get_running_loop().call_later(KEEP_ENDED_S, self._runs.pop, run.id, None)
        await ended(run)

    async def _keep(self, run: Run, status: str, save: Save) -> str:
        """Save a run that is over and return its status, `error` when that failed."""
        fields: dict[str, Any] = {
            "text": run.text,
            "parts": run.parts,
            "status": status,
            "finish_reason": run.finish_reason,
            "error": run.error,
            "seq": run.seq + 1,
        }
        try:
            # First the disk, then the word: who hears of the end finds it saved.
            await save(fields | run.figures(), True)
        except BiseError as error:
            run.error = f"the answer could not be saved: {error}"
            return "error"
        except Exception:  # the root of a run: a bug of ours must not leave readers waiting for ever
            run.error = "the answer could not be saved; the server's log tells why"
            logger.exception("event=run_not_saved run=%s", run.id)
            return "error"
        return status
