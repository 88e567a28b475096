"""Works batch jobs off in the background: each line goes through the same application as any request, at the
lowest priority, under the key that queued the job.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bise.errors import BiseError, NotFoundError, StoreError
from bise.server.access import LOCAL_OWNER, Caller
from bise.server.edge import AsgiApp, Message
from bise.server.gate import INTERNAL, StoreGate
from bise.server.problem import as_api_error, error_body
from bise.store.batches import ClaimedLine
from bise.store.worker import LEASE_S

logger = logging.getLogger(__name__)

_TICK_S = 0.25
"""How soon a stop or a cancelled job is noticed."""
_IDLE_S = 2.0
"""How often an idle worker looks for jobs of other processes."""
_MAX_PAUSE_S = 60.0
_COME_BACK = (429, 503)
"""Answers that say `later`: the line is tried again."""
_KEY_LIMIT = "rate_limit_exceeded"
"""The answer that concerns one key alone: other jobs go on."""


@dataclass(slots=True)
class _Answer:
    """What the application sent."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    body: bytearray = field(default_factory=bytearray)

    async def send(self, message: Message) -> None:
        """Take one ASGI message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


class BatchWorker:
    """Runs up to `slots` lines at a time. `start` it on the event loop, `stop` it before the gate."""

    def __init__(
        self,
        app: AsgiApp,
        gate: StoreGate,
        *,
        slots: int = 4,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._gate = gate
        self._slots = slots
        self._is_draining = is_draining
        self._running: dict[asyncio.Task[bool], ClaimedLine] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pause_until = 0.0
        self._paused_jobs: dict[str, float] = {}
        """Until when jobs rest whose key has used up a limit."""

    def start(self) -> None:
        """Begin to work."""
        self._gate.on_new_batch = self._wake.set
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop what runs and give it back, so that any process can go on with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._give_back(list(self._running))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            try:
                if self._is_draining():
                    await self._give_back(list(self._running))
                    return
                if loop.time() - renewed > LEASE_S / 3:
                    renewed = loop.time()
                    await self._gate.offload(self._gate.store.batches.renew)
                await self._step()
            except StoreError:
                await asyncio.sleep(_IDLE_S)
            except Exception:  # root of the task: jobs must go on whatever one line did
                logger.exception("event=batch_worker_failed")
                await asyncio.sleep(_IDLE_S)

    async def _step(self) -> None:
        """Start lines where there is room, then wait until something happens."""
        batches = self._gate.store.batches
        self._wake.clear()
        room = self._slots - len(self._running)
        if room and asyncio.get_running_loop().time() >= self._pause_until:
            for line in await self._gate.offload(batches.claim, room, self._resting()):
                task = asyncio.create_task(self._work(line))
                self._running[task] = line
        if not self._running:
            await self._gate.offload(batches.close_finished)
            try:
                async with asyncio.timeout(_IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                return
            return
        done, _ = await asyncio.wait(self._running, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
        await self._settle(done)

    async def _settle(self, done: set[asyncio.Task[bool]]) -> None:
        """Let go of lines that ended, give back those to be tried again, stop those nobody wants any more."""
        again: list[ClaimedLine] = []
        for task in done:
            line = self._running.pop(task)
            if task.cancelled() or task.exception() is not None or not task.result():
                again.append(line)
                if not task.cancelled() and task.exception() is not None:
                    logger.error("event=batch_line_failed", exc_info=task.exception())
                    self._pause(_IDLE_S)
        if again:
            await self._gate.offload(self._gate.store.batches.give_back, again)
        wanted: dict[str, bool] = {}
        for batch_id in {line.batch.id for line in self._running.values()}:
            wanted[batch_id] = await self._gate.offload(self._gate.store.batches.is_wanted, batch_id)
        await self._give_back([task for task, line in self._running.items() if not wanted[line.batch.id]])
        if done:
            await self._gate.offload(self._gate.store.batches.close_finished)

    async def _give_back(self, tasks: list[asyncio.Task[bool]]) -> None:
        if not tasks:
            return
        lines = [self._running.pop(task) for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._gate.offload(self._gate.store.batches.give_back, lines)

    async def _work(self, line: ClaimedLine) -> bool:
        """Run one line and write its answer; False when it has to be tried again."""
        try:
            caller = await self._gate.offload(self._caller, line)
        except BiseError as error:
            if isinstance(error, StoreError):
                raise
            refusal = as_api_error(error)
            return await self._complete(line, refusal.status, "", error_body(refusal))
        answer = await self._call(line.batch.endpoint, line.body, caller)
        if answer.status in _COME_BACK and answer.headers.get(b"x-should-retry") != b"false":
            self._rest(line, answer)
            return False
        request_id = answer.headers.get(b"x-request-id", b"").decode("latin-1")
        body = json.loads(bytes(answer.body))
        return await self._complete(line, answer.status, request_id, body)

    async def _complete(self, line: ClaimedLine, status: int, request_id: str, body: object) -> bool:
        await self._gate.offload(self._gate.store.batches.complete, line, status, request_id, body)
        return True

    def _caller(self, line: ClaimedLine) -> Caller:
        """Return for whom a line runs: its key as it is now. PermissionDeniedError when it was revoked."""
        if line.batch.key_id is None:
            key, scopes = None, frozenset({"inference"})
        else:
            key = self._gate.store.keys.usable(line.batch.key_id)
            scopes = key.scopes
        if key is None and line.batch.owner != LOCAL_OWNER:
            raise NotFoundError("the batch belongs to nobody")
        return Caller(
            owner=line.batch.owner,
            scopes=scopes,
            key=key,
            idempotency_key=line.idempotency_key,
            is_background=True,
        )

    def _rest(self, line: ClaimedLine, answer: _Answer) -> None:
        """Let the line's job, or everything when the engine is full, rest as long as the answer asks for."""
        seconds = float(answer.headers.get(b"retry-after", b"1"))
        if _KEY_LIMIT in answer.body.decode(errors="replace"):
            now = asyncio.get_running_loop().time()
            self._paused_jobs[line.batch.id] = now + min(seconds, _MAX_PAUSE_S)
        else:
            self._pause(seconds)

    def _resting(self) -> set[str]:
        """Return the jobs that rest now."""
        now = asyncio.get_running_loop().time()
        self._paused_jobs = {job: until for job, until in self._paused_jobs.items() if until > now}
        return set(self._paused_jobs)

    def _pause(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        self._pause_until = max(self._pause_until, now + min(seconds, _MAX_PAUSE_S))

    async def _call(self, endpoint: str, body: dict[str, Any], caller: Caller) -> _Answer:
        """Send one request through the application; cancelling this is what a client's leaving is."""
        data = json.dumps(body).encode()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            INTERNAL: caller,
        }
        sent = False
        gone = asyncio.Event()

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        answer = _Answer()
        task = asyncio.ensure_future(self._app(scope, receive, answer.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # As when a client closes its connection: the request ends by itself, with its row in the ledger.
            gone.set()
            await asyncio.gather(task, return_exceptions=True)
            raise
        return answer
