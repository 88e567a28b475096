"""The assistant's models behind the gate: every answer is let in, limited, checked and written down like any
request over the API, for whoever asked.

Who asked is told by `asking`, which the one who knows the person sets (`bise.server.entry`). An answer goes
on after its request; it carries that context with it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bise.assistant.models import ChatModels, ChatTurn, Embeddings, Job, ModelFacts, Piece
from bise.engine.request import Timings, Usage
from bise.errors import BiseError, EngineError, NotFoundError, RequestError
from bise.server.access import LOCAL_OWNER, Caller
from bise.server.hosted_answers import HostedAnswers
from bise.store.limits import UNPLACED

if TYPE_CHECKING:
    from bise.server.gate import StoreGate
    from bise.server.service import Service
    from bise.server.store_ticket import StoreTicket

ENDPOINT = "assistant"
DEFAULT_ROOM = 4096
"""Tokens of an answer that are booked for a model whose context is not known."""

asking: ContextVar[Caller | None] = ContextVar("bise_asking", default=None)
"""Who asks the assistant, within one request and the answers that it starts."""


class MeteredModels:
    """Passes on what the assistant asks for, within what the one who asks may use."""

    def __init__(self, models: ChatModels, gate: StoreGate, hosted: HostedAnswers | None = None) -> None:
        self._models = models
        self._gate = gate
        self._hosted = hosted or HostedAnswers()
        self.service: Service | None = None
        """Where answers wait for each other at a stop and dead engines are replaced; set once it is there."""

    def facts(self) -> Sequence[ModelFacts]:
        """Return what is served: first what runs here, then what leaves this machine."""
        return [*self._models.facts(), *self._hosted.facts()]

    async def count(self, model: str, messages: Sequence[ChatTurn], *, continues: bool = False) -> int:
        """Return the number of prompt tokens of a conversation; for a hosted model about so many."""
        if self._hosted.serves(model):
            return sum([await self.count_text(model, message["content"]) + 4 for message in messages])
        return await self._models.count(model, messages, continues=continues)

    async def count_text(self, model: str, text: str) -> int:
        """Return the number of tokens of a text alone; for a hosted model about so many."""
        if self._hosted.serves(model):
            return self._hosted.guess(text)
        return await self._models.count_text(model, text)

    async def embed(self, model: str, texts: Sequence[str], *, tenant: str = "") -> Embeddings:
        """Return texts as vectors, admitted and written down like an answer. Raises RequestError for a hosted
        model: documents are not sent away for it.
        """
        if self._hosted.serves(model):
            reason = f"{model} leaves this machine; documents are not embedded there"
            raise RequestError(reason, field="model")
        job = Job(model=model, messages=(), tenant=tenant)
        caller = asking.get() or await self._owner_of(job.tenant)
        ticket = await self._gate.admit_caller(
            caller,
            model=model,
            endpoint=ENDPOINT,
            request_id=f"run_{secrets.token_hex(12)}",
            is_aside=True,
        )
        made: Embeddings | None = None
        error_code: str | None = None
        try:
            made = await self._models.embed(model, texts, tenant=ticket.tenant)
            return made
        except BiseError as error:
            error_code = error.code
            raise
        finally:
            await ticket.finish(
                model=model,
                usage=None if made is None else made.usage,
                timings=None,
                finish_reason="stop" if made is not None else "error" if error_code else "abort",
                error_code=error_code,
            )

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer; however it ends, its row is written and its place given back.

        Raises RateLimitError, PermissionDeniedError or ContentPolicyError when whoever asked may not.
        """
        caller = asking.get() or await self._owner_of(job.tenant)
        ticket = await self._gate.admit_caller(
            caller,
            model=job.model,
            endpoint=ENDPOINT,
            request_id=f"run_{secrets.token_hex(12)}",
            is_aside=job.is_aside,
        )
        meter = _Meter()
        error_code: str | None = None
        place = _Place(asyncio.current_task())
        jobs: set[Any] = set() if self.service is None else self.service.jobs
        jobs.add(place)
        last: Piece | None = None
        try:
            async with aclosing(self._admitted(job, ticket)) as pieces:
                async for piece in pieces:
                    meter.add(piece)
                    if piece.usage is None:
                        yield piece
                    else:
                        last = piece  # its row comes first, and says what the answer cost
        except BiseError as error:
            error_code = error.code
            raise
        finally:
            jobs.discard(place)
            await ticket.finish(
                model=job.model,
                usage=meter.usage(),
                timings=meter.timings,
                finish_reason=meter.finish_reason or ("error" if error_code else "abort"),
                error_code=error_code,
            )
        if last is not None:
            yield replace(last, **await self._cost(ticket))

    async def _cost(self, ticket: StoreTicket) -> dict[str, str]:
        """Return what an answer cost: by the price book, else what running this machine costs."""
        row = ticket.row
        cost = None if row is None else row.house_cost if row.cost is None else row.cost
        if cost is None:
            return {}
        rates = await self._gate.offload(self._gate.store.prices.rates)
        return {"cost": f"{cost:f}", "currency": rates.currency}

    async def _owner_of(self, tenant: str) -> Caller:
        """Return for whom something is done that nobody asks for now, such as for one whose request is long
        over.
        """
        try:
            account = await self._gate.offload(self._gate.store.allowances.get, tenant)
        except NotFoundError:
            return Caller(owner=tenant or LOCAL_OWNER, scopes=frozenset({"inference"}))
        return await self._gate.caller_of_account(account.account_id, account.name)

    async def _admitted(self, job: Job, ticket: StoreTicket) -> AsyncGenerator[Piece]:
        texts = [message["content"] for message in job.messages]
        await self._gate.offload(ticket.check_input, texts)
        job = replace(
            job,
            params=await self._booked(job, ticket),
            tenant=ticket.tenant,
            priority=job.priority + ticket.priority,
        )
        if not ticket.checks_output:
            async with aclosing(self._answer(job)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        held: list[Piece] = []
        async with aclosing(self._answer(job)) as pieces:
            async for piece in pieces:
                held.append(piece)
                # Counts go on, words wait until the whole answer was checked.
                yield replace(piece, text="", thought="", finish_reason=None, usage=None, timings=None)
        text = "".join(piece.text for piece in held)
        thought = "".join(piece.thought for piece in held)
        begun = texts[-1] if job.continues else ""
        await self._gate.offload(ticket.check_output, begun + text)
        await self._gate.offload(ticket.check_output, thought)
        yield replace(held[-1], text=text, thought=thought, tokens=0, prefill=None, before=None)

    async def _booked(self, job: Job, ticket: StoreTicket) -> Mapping[str, Any]:
        """Book what the answer can use at most and return its parameters, with the limit that follows."""
        if ticket.reservation is None:
            return job.params
        prompt = await self.count(job.model, job.messages, continues=job.continues)
        wanted = job.params.get("max_tokens")
        context = next((facts.context for facts in self.facts() if facts.id == job.model), None)
        room = DEFAULT_ROOM if context is None else max(1, context - prompt)
        most = room if wanted is None else int(wanted)
        if ticket.reservation.id == UNPLACED:
            await self._gate.check_tokens(ticket.caller, job.model, prompt, most)
            return job.params
        granted = await ticket.reserve(
            model=job.model,
            prompt_tokens=prompt,
            max_tokens=most,
            least=1 if wanted is None else None,
        )
        return {**job.params, "max_tokens": granted} if granted < room else job.params

    async def _answer(self, job: Job) -> AsyncGenerator[Piece]:
        if self._hosted.serves(job.model):
            async with aclosing(self._hosted.stream(job)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        try:
            async with aclosing(self._models.stream(job)) as pieces:
                async for piece in pieces:
                    yield piece
        except EngineError:
            if self.service is not None and self._is_dead(job.model):
                self.service.start_recovery(self.service.models.card(job.model).spec.name)
            raise

    def _is_dead(self, model: str) -> bool:
        assert self.service is not None
        engine = self.service.engines().get(self.service.models.card(model).spec.name)
        return engine is not None and engine.engine.failure is not None


class _Place:
    """One answer among the requests that run, so that a stop waits for it, for a while."""

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self._task = task

    def stop(self) -> None:
        """Interrupt the answer; what there is of it is kept."""
        if self._task is not None:
            self._task.cancel()


class _Meter:
    """Counts an answer, also one that ends before the engine could sum it up."""

    def __init__(self) -> None:
        self._prompt = self._completion = 0
        self._usage: Usage | None = None
        self.timings: Timings | None = None
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        if piece.prefill is not None:
            self._prompt = piece.prefill[1]
        self._completion += piece.tokens
        self._usage = piece.usage or self._usage
        self.timings = piece.timings or self.timings
        self.finish_reason = piece.finish_reason or self.finish_reason

    def usage(self) -> Usage:
        """Return the tokens so far."""
        return self._usage or Usage(
            prompt_tokens=self._prompt, cached_tokens=0, completion_tokens=self._completion
        )
