"""What the assistant needs of a model: a protocol, and its realisation over the engine's fleet."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from bise.engine.fleet import Fleet
from bise.engine.fleet_entry import Lease
from bise.engine.handle import RequestHandle
from bise.engine.load import LoadedModel
from bise.engine.request import Delta, Request, SamplingParams, Timings, Usage
from bise.errors import EngineError, RequestError
from bise.text.thoughts import Thoughts

EMBED_PRIORITY = 100
"""After every answer and every title, before batch work."""
PROGRESS_S = 0.25
"""How often it is told how far a request has come before its first token."""

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
    leaves_machine: bool = False
    """Prompts to it are sent to another machine."""
    loaded: float | None = None
    """How much of it is read, 0 to 1, while it is being loaded."""
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
    is_aside: bool = False
    """It belongs to another answer, such as a title: it uses tokens and money, but is no request."""
    keeps_nothing: bool = False
    """Nothing of it may reach a disk, cached prefixes included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step added to an answer; the last one has a finish_reason."""

    text: str = ""
    thought: str = ""
    """What the model thought before it answers."""
    tokens: int = 0
    before: int | None = None
    """Requests that wait before this one."""
    loaded: float | None = None
    """How much of the model is read, 0 to 1, while the answer waits for that."""
    prefill: tuple[int, int] | None = None
    """Prompt tokens done, and all."""
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    cost: str | None = None
    """What the answer costs by the ledger, as a decimal number; None where nothing has a price."""
    currency: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Texts as unit vectors."""

    rows: tuple[bytes, ...]
    """float32 in machine order, one row a text."""
    usage: Usage


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

    async def embed(self, model: str, texts: Sequence[str], *, tenant: str = "") -> Embeddings:
        """Return texts as vectors, while nothing more urgent is to be done. Raises BiseError."""
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
                loaded=card.loaded,
                sliding_window=None if card.plan is None else card.plan.window,
            )
            for card in self._fleet.cards()
        ]

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer; the model is loaded first if need be."""
        pending = asyncio.ensure_future(_acquired(self._fleet, job.model))
        try:
            while not (await asyncio.wait([pending], timeout=PROGRESS_S))[0]:
                if (share := self._fleet.card(job.model).loaded) is not None:
                    yield Piece(loaded=share)
        except BaseException:  # nobody waits for the model any more
            pending.cancel()
            pending.add_done_callback(_let_go)
            raise
        lease = await pending
        try:
            ids = await asyncio.to_thread(_prompt, lease.loaded, job)
            params: dict[str, Any] = {"temperature": lease.loaded.temperature, **job.params}
            outlasts = self._fleet.card(job.model).spec.prefix_cache_dir is not None
            request = Request(
                token_ids=tuple(ids),
                params=SamplingParams(**params),
                adapter=lease.adapter,
                tenant=job.tenant,
                priority=job.priority,
                continuation=job.continues,
                use_prefix_cache=not (job.keeps_nothing and outlasts),
            )
            yield Piece(prefill=(0, len(ids)))
            handle = lease.loaded.engine.submit(request)
            async with aclosing(_pieces(lease.loaded, handle, len(ids))) as pieces:
                async for piece in pieces:
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

    async def embed(self, model: str, texts: Sequence[str], *, tenant: str = "") -> Embeddings:
        """Return texts as vectors: the mean of the final hidden states, after everybody else's requests."""
        lease = await _acquired(self._fleet, model)
        handles: list[RequestHandle] = []
        try:
            rows: list[bytes] = []
            total = 0
            requests = await asyncio.to_thread(_embeddings, lease, texts, tenant)
            handles += [lease.loaded.engine.submit(request) for request in requests]
            for handle in handles:
                async for delta in handle:
                    if delta.error is not None:
                        raise delta.error
                    if delta.embedding:
                        rows.append(array("f", delta.embedding).tobytes())
                        total += 0 if delta.usage is None else delta.usage.prompt_tokens
            if len(rows) != len(texts):
                raise EngineError("the engine ended before all texts were embedded")
            usage = Usage(prompt_tokens=total, cached_tokens=0, completion_tokens=0)
            return Embeddings(rows=tuple(rows), usage=usage)
        finally:
            for handle in handles:
                handle.cancel()
            lease.release()


async def _acquired(fleet: Fleet, model: str) -> Lease:
    """Return a lease; one that comes after the caller gave up is released."""
    pending = asyncio.ensure_future(asyncio.to_thread(fleet.acquire, model))
    try:
        return await asyncio.shield(pending)
    except asyncio.CancelledError:
        pending.add_done_callback(_let_go)
        raise


def _let_go(done: asyncio.Future[Lease]) -> None:
    with suppress(BaseException):
        done.result().release()


def _prompt(loaded: LoadedModel, job: Job) -> list[int]:
    if loaded.template is None:
        raise RequestError(f"{job.model} has no chat format; choose another model", field="model")
    return loaded.template.encode(list(job.messages), continue_final=job.continues)


def _embeddings(lease: Lease, texts: Sequence[str], tenant: str) -> list[Request]:
    tokenizer = lease.loaded.tokenizer
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [
        Request(
            token_ids=(*start, *tokenizer.encode(text)),
            params=SamplingParams(max_tokens=0),
            pooling="mean",
            adapter=lease.adapter,
            tenant=tenant,
            priority=EMBED_PRIORITY,
            use_prefix_cache=False,
        )
        for text in texts
    ]


async def _pieces(loaded: LoadedModel, handle: RequestHandle, num_prompt: int) -> AsyncGenerator[Piece]:
    """Yield what the engine says, and until the first token how far it has come."""
    thoughts = Thoughts(loaded.tokenizer)
    deltas = cast("AsyncGenerator[Delta]", aiter(handle))
    pending = asyncio.ensure_future(anext(deltas))
    told: Piece | None = None
    try:
        while not (await asyncio.wait([pending], timeout=PROGRESS_S))[0]:
            progress = loaded.engine.progress(handle)
            piece = Piece(before=progress.before, prefill=(progress.prefilled, num_prompt))
            if piece != told:
                told = piece
                yield piece
        with suppress(StopAsyncIteration):
            yield _as_piece(await pending, thoughts)
        async for delta in deltas:
            yield _as_piece(delta, thoughts)
    finally:
        pending.cancel()
        with suppress(BaseException):
            await pending
        await deltas.aclose()


def _as_piece(delta: Delta, thoughts: Thoughts) -> Piece:
    if delta.error is not None:
        raise delta.error
    thought, text = thoughts.cut(delta.token_ids, delta.text) if thoughts.can_come else ("", delta.text)
    if delta.finish_reason is None:
        return Piece(text=text, thought=thought, tokens=len(delta.token_ids))
    if delta.usage is None:
        raise EngineError("the engine ended an answer without counting it")
    return Piece(
        text=text,
        thought=thought,
        tokens=len(delta.token_ids),
        finish_reason=delta.finish_reason.value,
        usage=delta.usage,
        timings=delta.timings,
    )
