"""What the assistant needs of a model: a protocol, and its realisation over the engine's fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from bise.engine.fleet import Fleet
from bise.engine.fleet_entry import Lease
from bise.engine.handle import RequestHandle
from bise.engine.load import LoadedModel
from bise.engine.request import Delta, Request, SamplingParams, Timings, Usage
from bise.errors import EngineError, RequestError

ChatTurn = Mapping[str, str]
"""role and content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model as the assistant shows it."""

    id: str
    title: str
    context: int | None
    """Most tokens of prompt and answer together; None where its files could not be read."""
    parameters: int | None
    state: str
    """cold, loading, ready or closing; hosted."""
    is_embedded: bool = False
    """The small model that comes with bise: it can chat but knows little."""
    fault: str | None = None
    sliding_window: int | None = None
    """Tokens that one token sees in the layers with a sliding window; None where every layer sees all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer that is wanted."""

    model: str
    messages: Sequence[ChatTurn]
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    continues: bool = False
    """The last message is the beginning of the answer."""
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step added to an answer; the last one has a finish_reason."""

    text: str = ""
    tokens: int = 0
    prefill: tuple[int, int] | None = None
    """Prompt tokens done, and all."""
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class ChatModels(Protocol):
    """Answers conversations."""

    def facts(self) -> Sequence[ModelFacts]:
        """Return what is served, the default first."""
        ...

    def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer; closing the generator aborts. Raises BiseError."""
        ...

    async def count(self, model: str, messages: Sequence[ChatTurn], *, continues: bool = False) -> int:
        """Return the exact number of prompt tokens of a conversation."""
        ...

    async def count_text(self, model: str, text: str) -> int:
        """Return the number of tokens of a text alone."""
        ...


class FleetModels:
    """The models of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def facts(self) -> Sequence[ModelFacts]:
        """Return what the fleet serves, without loading anything."""
        from bise.hub.embedded import is_embedded

        return [
            ModelFacts(
                id=card.spec.name,
                title=card.plan.title if card.plan is not None and card.plan.title else card.spec.name,
                context=None if card.plan is None else card.plan.context,
                parameters=None if card.plan is None else card.plan.parameters,
                state=card.state,
                is_embedded=is_embedded(card.spec.path),
                fault=card.fault,
                sliding_window=None if card.plan is None else card.plan.window,
            )
            for card in self._fleet.cards()
        ]

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer; the model is loaded first if need be."""
        lease = await _acquired(self._fleet, job.model)
        try:
            ids = await asyncio.to_thread(_prompt, lease.loaded, job)
            params: dict[str, Any] = {"temperature": lease.loaded.temperature, **job.params}
            yield Piece(prefill=(0, len(ids)))
            handle = lease.loaded.engine.submit(
                Request(
                    token_ids=tuple(ids),
                    params=SamplingParams(**params),
                    adapter=lease.adapter,
                    tenant=job.tenant,
                    priority=job.priority,
                    continuation=job.continues,
                )
            )
            async for piece in _pieces(handle):
                yield piece
        finally:
            lease.release()

    async def count(self, model: str, messages: Sequence[ChatTurn], *, continues: bool = False) -> int:
        """Return the exact number of prompt tokens; loads the model if need be."""
        lease = await _acquired(self._fleet, model)
        try:
            job = Job(model=model, messages=messages, continues=continues)
            return len(await asyncio.to_thread(_prompt, lease.loaded, job))
        finally:
            lease.release()

    async def count_text(self, model: str, text: str) -> int:
        """Return the number of tokens of a text alone; loads the model if need be."""
        lease = await _acquired(self._fleet, model)
        try:
            return len(await asyncio.to_thread(lease.loaded.tokenizer.encode, text))
        finally:
            lease.release()


async def _acquired(fleet: Fleet, model: str) -> Lease:
    """Return a lease; one that comes after the caller gave up is released."""
    pending = asyncio.ensure_future(asyncio.to_thread(fleet.acquire, model))
    try:
        return await asyncio.shield(pending)
    except asyncio.CancelledError:

        def let_go(done: asyncio.Future[Lease]) -> None:
            with suppress(BaseException):
                done.result().release()

        pending.add_done_callback(let_go)
        raise


def _prompt(loaded: LoadedModel, job: Job) -> list[int]:
    if loaded.template is None:
        raise RequestError(f"{job.model} has no chat format; choose another model", field="model")
    return loaded.template.encode(list(job.messages), continue_final=job.continues)


async def _pieces(handle: RequestHandle) -> AsyncGenerator[Piece]:
    async for delta in handle:
        if delta.error is not None:
            raise delta.error
        yield _as_piece(delta)


def _as_piece(delta: Delta) -> Piece:
    if delta.finish_reason is None:
        return Piece(text=delta.text, tokens=len(delta.token_ids))
    if delta.usage is None:
        raise EngineError("the engine ended an answer without counting it")
    return Piece(
        text=delta.text,
        tokens=len(delta.token_ids),
        finish_reason=delta.finish_reason.value,
        usage=delta.usage,
        timings=delta.timings,
    )
