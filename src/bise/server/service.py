"""What all routes share: the fleet, the gate, the threads for text work, and the jobs that run now."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

from starlette.responses import JSONResponse, Response

from bise.engine.handle import RequestHandle
from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.engine.request import Delta, FinishReason
from bise.engine.request import Request as EngineRequest
from bise.errors import BiseError, EngineError, ModelNotFoundError
from bise.server.generation import Generation
from bise.server.hosted import HostedJob, HostedModels
from bise.server.limits import HttpLimits
from bise.server.problem import ApiError, as_api_error
from bise.server.receipts import Receipts
from bise.server.ticket import Gate, Ticket
from bise.server.traits import Traits
from bise.server.tuned import TunedModels
from bise.text.jinja_template import JinjaTemplate

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

    from bise.engine.fleet import Lease
    from bise.engine.load import LoadedModel
    from bise.engine.model_spec import ModelCard
    from bise.server.body import WireModel

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_TEXT_THREADS = 4
_FEW = 8
"""Sequences that are submitted on the event loop: 20 to 50 us each, by the length of the prompt."""
_SHORT_BYTES = 2 << 10
_MAX_NOTED = 256
_RECOVERY_S = 10.0
"""How long the requests of a dead engine may take to end before it is replaced."""


class Models(Protocol):
    """What the server needs of a fleet (`bise.engine.fleet.Fleet`)."""

    def cards(self) -> tuple[ModelCard, ...]:
        """Return what is known of every model."""
        ...

    def card(self, name: str) -> ModelCard:
        """Return one model's card; raises ModelNotFoundError."""
        ...

    def acquire(self, name: str, *, wait_s: float | None = None) -> Lease:
        """Return a lease on a model, loaded first if need be."""
        ...

    def acquire_loaded(self, name: str) -> Lease | None:
        """Return a lease on a model that is loaded, at once; None where `acquire` might take time."""
        ...

    def sleep(self, name: str, *, wait_s: float | None = 0.0) -> None:
        """Unload a model, once it has no users or after `wait_s` seconds not at all (ModelBusyError)."""
        ...

    def add_adapter(self, model: str, name: str, path: Path, *, at_once: bool = False) -> None:
        """Serve the adapter in directory `path` as MODEL:NAME from now on; load it first with `at_once`."""
        ...

    def remove_adapter(self, model: str, name: str) -> None:
        """Refuse MODEL:NAME from now on."""
        ...

    def close(self, *, drain: bool = False) -> None:
        """Unload everything."""
        ...


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


class Service:
    """The state of one running server. Made on no event loop; used on one."""

    def __init__(
        self, models: Models, gate: Gate, limits: HttpLimits, hosted: HostedModels | None = None
    ) -> None:
        self.models = models
        self.hosted = hosted or HostedModels()
        self.tuned = TunedModels()
        self.gate = gate
        self.limits = limits
        self.pool = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="bise-text")
        """For tokenising, templates, parsing and submitting: whatever could hold up the event loop."""
        self._loads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="bise-load")
        self.started_s = time.time()
        self.jobs: set[Job | HostedJob] = set()
        self.is_draining = False
        self._noted: set[tuple[str, str]] = set()
        self._engines: WeakValueDictionary[str, LoadedModel] = WeakValueDictionary()
        """Who ran last under each name; no hold on it, which would keep what the fleet unloads in memory."""
        self._traits: dict[str, Traits] = {}
        self._recoveries: dict[str, asyncio.Task[None]] = {}

    async def offload(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in a thread of the text pool and return what it returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, lambda: function(*args, **kwargs))

    def note_unknown(self, path: str, body: WireModel) -> None:
        """Log the fields of a request that this server does not know, each one once."""
        for name in body.model_extra or {}:
            key = (path, name[:64])
            if key not in self._noted and len(self._noted) < _MAX_NOTED:
                self._noted.add(key)
                logger.warning("event=unknown_field path=%s field=%s", path, ascii(name[:64]))

    async def open(self, request: Request, *, model: str, scope: str = "inference") -> Job:
        """Admit a request and pin its model. Raises what the gate and the fleet raise, recorded."""
        self.hosted.refuse(model)
        ticket = await self.gate.admit(request, scope=scope, model=model)
        lease = None
        try:
            name = self.models.card(model).spec.name
            await self.tuned.require(request, self.gate, name, model)
            lease = await self._acquire(model)
            if lease.loaded.engine.failure is not None:
                lease.release()
                await self.recover(name)
                lease = await self._acquire(model)
            traits = await self._loaded_traits(name, lease.loaded)
        except BaseException as error:
            if lease is not None:
                lease.release()
            await ticket.finish(
                model=None,
                usage=None,
                timings=None,
                finish_reason="error",
                error_code=as_api_error(error).code,
            )
            raise
        self._engines[name] = lease.loaded
        job = Job(self, request, ticket, name, lease, traits)
        self.jobs.add(job)
        return job

    def start_recovery(self, name: str) -> asyncio.Task[None]:
        """Load a model anew whose engine has died, unless that goes on already; return the task."""
        task = self._recoveries.get(name)
        if task is None:
            task = self._recoveries[name] = asyncio.create_task(self._reload(name))
            task.add_done_callback(lambda done: self._recovered(name, done))
        return task

    async def recover(self, name: str) -> None:
        """Wait until a model whose engine has died is loaded anew. Raises what loading raises."""
        await asyncio.shield(self.start_recovery(name))

    async def _reload(self, name: str) -> None:
        def reload() -> None:
            self.models.sleep(name, wait_s=_RECOVERY_S)
            self.models.acquire(name).release()

        logger.error("event=engine_restart model=%s", ascii(name))
        await asyncio.get_running_loop().run_in_executor(self._loads, reload)
        self._engines.pop(name, None)

    def _recovered(self, name: str, task: asyncio.Task[None]) -> None:
        del self._recoveries[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error(
                "event=engine_restart_failed model=%s code=%s", ascii(name), as_api_error(error).code
            )

    async def traits(self, card: ModelCard) -> Traits | None:
        """Return what a model can do, from its files when it is not loaded; None when they are bad."""
        name = card.spec.name
        if name not in self._traits and card.fault is None:
            try:
                self._traits[name] = await self.offload(Traits.on_disk, card.spec.path)
            except BiseError as error:
                logger.warning("event=model_unavailable code=%s", error.code)
        return self._traits.get(name)

    async def _loaded_traits(self, name: str, loaded: LoadedModel) -> Traits:
        if name not in self._traits:
            self._traits[name] = await self.offload(Traits.of, loaded.tokenizer, loaded.template)
        return self._traits[name]

    async def _acquire(self, model: str) -> Lease:
        card = self.models.card(model)
        if card.fault is not None and card.plan is None:
            logger.warning("event=model_unavailable reason=%s", ascii(card.fault)[:300])
        if (lease := self.models.acquire_loaded(model)) is not None:
            return lease
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._loads, lambda: self.models.acquire(model))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.exception() else done.result().release())
            raise
        except BiseError as error:
            if isinstance(error, ModelNotFoundError):
                raise
            refusal = as_api_error(error)
            if refusal.status < 500:  # the operator's matter, whatever it is: never the client's mistake
                raise ApiError(
                    503,
                    "the model cannot be loaded now; the server's log tells why",
                    code="model_unavailable",
                    headers={"x-should-retry": "false"},
                ) from error
            raise

    def engines(self) -> dict[str, LoadedModel]:
        """Return the models that are loaded, by name, as far as this service has used them."""
        ready = {card.spec.name for card in self.models.cards() if card.state == "ready"}
        return {name: loaded for name, loaded in self._engines.items() if name in ready}

    async def end_jobs(self) -> None:
        """Abort what still runs and let the answers out; for the end of the grace time."""
        for job in list(self.jobs):
            job.stop()
        while self.jobs:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Close the models and the threads."""
        self.models.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._loads.shutdown(wait=False, cancel_futures=True)


class Job:
    """One admitted request, from its ticket to its row in the ledger."""

    def __init__(
        self,
        service: Service,
        request: Request,
        ticket: Ticket,
        model: str,
        lease: Lease,
        traits: Traits,
    ) -> None:
        self.service = service
        self.request = request
        self.ticket = ticket
        self.model = f"{model}{ADAPTER_SEPARATOR}{lease.adapter}" if lease.adapter else model
        """The name in answers, with the adapter's."""
        self._base = model
        self.loaded = lease.loaded
        self.traits = traits
        self.generation: Generation | None = None
        self.client_gone = False
        self.has_history = False
        """What is asked goes on from a conversation that was stored, of any length."""
        self.dropped_tokens = 0
        """Prompt tokens that were left out at the caller's wish, before the engine got the prompt."""
        self.around: Callable[[int, str], tuple[str, str, str]] = lambda _, text: ("", text, "")
        """What guardrails for answers read of a sequence: (text before it, its text, text after it)."""
        self._lease = lease
        self._finished = False
        self._stopped = False
        self._watch = asyncio.create_task(self._watch_client())

    @property
    def is_mistral_client(self) -> bool:
        """True when Mistral's own client asks: it reads thoughts and means `strict` in its own way."""
        return self.request.headers.get("user-agent", "").startswith("mistral-client")

    async def plan(self, function: Callable[Concatenate[Job, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what makes requests for the engine out of this request's body; a short one here and now, which
        takes a millisecond at most, a change of threads 2 ms beside an engine at work. Long bodies, stored
        conversations, guardrails and templates that are programs may take longer, and get a thread.
        """
        template = self.loaded.template
        takes_long = self.has_history or self.ticket.checks_input or isinstance(template, JinjaTemplate)
        if takes_long or len(await self.request.body()) > _SHORT_BYTES:
            return await self.service.offload(function, self, *args, **kwargs)
        return function(self, *args, **kwargs)

    async def start(
        self,
        requests: Iterable[EngineRequest],
        *,
        prompts: Sequence[int] | None = None,
        receipt: bool | None = None,
    ) -> Generation:
        """Submit to the engine, under this job's key and adapter, with `receipt` in such a way that the
        answers get receipts. All of the requests run or none.
        """
        wanted = [
            replace(
                request,
                tenant=self.ticket.tenant,
                priority=self.ticket.priority,
                adapter=self._lease.adapter,
            )
            for request in requests
        ]
        if self.client_gone:
            raise ClientGoneError
        wanted = await self._reserve(wanted, prompts)
        receipts = Receipts(self.loaded, wanted) if receipt else None
        if receipts is not None:
            wanted = receipts.requests
        # A thread costs more than what is done there, beside an engine at work 2 ms: only grammars need one.
        if len(wanted) > _FEW or any(request.grammar is not None for request in wanted):
            handles = await self.service.offload(self._submit, wanted)
        else:
            handles = self._submit(wanted)
        self.generation = Generation(
            handles, prompts=prompts, dropped_tokens=self.dropped_tokens, receipts=receipts
        )
        if self._stopped or self.client_gone:
            self.generation.cancel()
        return self.generation

    async def _reserve(
        self, requests: Sequence[EngineRequest], prompts: Sequence[int] | None
    ) -> list[EngineRequest]:
        """Book the most that `requests` can use, each prompt counted once, and return them: those without a
        limit of their own may use no more than their key has left.
        """
        lengths: dict[int, int] = {}
        rooms: list[int] = []
        for prompt, request in zip(prompts or (0,) * len(requests), requests, strict=True):
            length = lengths[prompt] = len(request.token_ids)
            wanted = request.params.max_tokens
            rooms.append(max(0, self.loaded.engine.max_context - length) if wanted is None else wanted)
        open_ones = [request.params.max_tokens is None for request in requests]
        fixed = sum(room for room, is_open in zip(rooms, open_ones, strict=True) if not is_open)
        granted = await self.ticket.reserve(
            model=self._base,
            prompt_tokens=sum(lengths.values()),
            max_tokens=sum(rooms),
            least=fixed + sum(open_ones) if any(open_ones) else None,
        )
        if granted >= sum(rooms):
            return list(requests)
        each = (granted - fixed) // sum(open_ones)
        return [
            replace(request, params=replace(request.params, max_tokens=min(room, each)))
            if is_open and room
            else request
            for request, room, is_open in zip(requests, rooms, open_ones, strict=True)
        ]

    def _submit(self, requests: Sequence[EngineRequest]) -> list[RequestHandle]:
        engine = self.loaded.engine
        handles: list[RequestHandle] = []
        try:
            for request in requests:
                handles.append(engine.submit(request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def may_fit(self, num_bytes: int) -> bool:
        """Return False for texts that cannot fit, whatever their tokens are."""
        return num_bytes // self.traits.longest_token <= self.loaded.engine.max_context

    def check_size(self, num_bytes: int) -> None:
        """Raise ContextOverflowError for texts that cannot fit, before time goes into encoding them."""
        self.traits.check_size(num_bytes, self.loaded.engine.max_context)

    async def _watch_client(self) -> None:
        """Abort when the client closes the connection; its whole body has been read."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def leave(self) -> None:
        """The client has gone: abort."""
        self.client_gone = True
        if self.generation is not None:
            self.generation.cancel()

    def stop(self) -> None:
        """The server goes: abort."""
        self._stopped = True
        if self.generation is not None:
            self.generation.cancel()

    def check(self, delta: Delta) -> None:
        """Raise what ended a sequence other than its own text: its error, the client's leaving, a stop."""
        if delta.error is not None:
            raise delta.error
        if delta.finish_reason is FinishReason.DEADLINE:
            # No client knows a finish_reason for this, and `length` or `stop` would be untrue.
            made = 0 if delta.usage is None else delta.usage.completion_tokens
            raise ApiError(
                408,
                f"deadline_s passed after {made} tokens of the answer; give it more time, ask for fewer "
                "tokens, or stream to see what there is",
                code="deadline_exceeded",
                param="deadline_s",
                headers={"x-should-retry": "false"},
            )
        if delta.finish_reason is FinishReason.ABORT:
            if self.client_gone:
                raise ClientGoneError
            if self.generation is not None and self.generation.overrun:
                raise ApiError(408, "the stream was not read for too long", code="stalled_reader")
            if self._stopped or self.service.is_draining:
                raise ApiError(
                    503, "the server is stopping", code="server_stopping", headers={"retry-after": "5"}
                )
            raise EngineError("the engine was closed while the request ran")

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (sequence, delta) as they come; raises what `check` raises.

        A key whose guardrails check answers gets each sequence whole, once all have ended and passed.
        """
        assert self.generation is not None
        if self.ticket.checks_output:
            answers = await self.generation.collect()
            await self._pass_all(answers)
            for index, answer in enumerate(answers):
                yield index, answer
            return
        async for index, delta in self.generation:
            if delta.finish_reason is FinishReason.DEADLINE and delta.token_ids:
                yield index, replace(delta, finish_reason=None)
            self.check(delta)
            yield index, delta

    async def _pass_all(self, answers: Sequence[Delta]) -> None:
        for answer in answers:
            self.check(answer)
        if self.ticket.checks_output:
            for index, answer in enumerate(answers):
                before, text, after = self.around(index, answer.text)
                await self.service.offload(self.ticket.check_output, text, before=before, after=after)

    async def collect(self) -> list[Delta]:
        """Wait for all sequences; raises what `check` raises."""
        assert self.generation is not None
        answers = await self.generation.collect()
        await self._pass_all(answers)
        return answers

    def answer(self, body: Mapping[str, object]) -> JSONResponse:
        """Return a whole answer with the headers of the request's key."""
        return JSONResponse(body, headers=dict(self.ticket.headers))

    async def render(self, make: Callable[[], Mapping[str, object]]) -> Response:
        """Return a whole answer that may be large: made and written as JSON in a thread."""

        def written() -> bytes:
            return json.dumps(make(), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

        data = await self.service.offload(written)
        return Response(data, media_type="application/json", headers=dict(self.ticket.headers))

    async def finish(self, finish_reason: str | None, error: BaseException | None = None) -> None:
        """Let engine and model go and settle with the gate; only the first call counts."""
        if self._finished:
            return
        self._finished = True
        self._watch.cancel()
        usage = timings = None
        try:
            if self.generation is not None:
                await self.generation.close()
                usage, timings = self.generation.usage(), self.generation.timings()
        finally:
            self.service.jobs.discard(self)
            self._lease.release()
            gone = self.client_gone or isinstance(error, ClientGoneError)
            await self.ticket.finish(
                model=self._base,
                adapter=self._lease.adapter,
                usage=usage,
                timings=timings,
                finish_reason="abort" if gone else "error" if error is not None else finish_reason,
                error_code=None if error is None or gone else as_api_error(error).code,
            )
