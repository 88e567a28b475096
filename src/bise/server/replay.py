"""A request repeated with its Idempotency-Key gets the first answer again: computed once, billed once.

Sits between the edge and the routes, so that it holds for every dialect, streamed or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from bise.errors import RequestError, StoreError
from bise.server.gate import MAX_IDEMPOTENCY_KEY, StoreGate
from bise.server.limits import UPLOADS
from bise.server.problem import ApiError
from bise.server.sse import STREAM_FAILED
from bise.store.replays import MAX_ANSWER_BYTES, KeptAnswer, Standing
from bise.store.secret import keyed_hash

if TYPE_CHECKING:
    from bise.server.edge import AsgiApp, Message, Receive, Send

logger = logging.getLogger(__name__)

HEADER = "idempotency-key"
_ROUTES = frozenset(
    f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "fim/completions", "embeddings", "responses", "messages",
        "moderations", "chat/moderations", "classifications", "chat/classifications", "batch/jobs", "batches",
        "fine_tuning/jobs",
    )
)  # fmt: skip
_WAIT_S = 2.0
"""How long a repeat waits for the first attempt: one that was just given up needs a moment to end."""
_TICK_S = 0.05
_KEPT_HEADERS = ("content-type", "x-bise-leaves-machine")


class Replaying:
    """Wraps the routes; see the module."""

    def __init__(self, app: AsgiApp, gate: StoreGate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        given = request.headers.get(HEADER)
        if given is None or scope["path"] not in (*_ROUTES, UPLOADS):
            await self._app(scope, receive, send)
            return
        caller = await self._gate.caller(request, "inference")
        if scope["path"] == UPLOADS:
            raise RequestError(
                "Idempotency-Key is not kept for uploads; leave it out", field="Idempotency-Key"
            )
        await self._serve(request, f"{caller.owner}\0{scope['path']}\0{checked_key(given)}", send)

    async def _serve(self, request: Request, place: str, send: Send) -> None:
        gate, scope = self._gate, request.scope
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        secret = gate.store.secret
        ident = keyed_hash(secret, "replay", place).hex()
        body_hash = (await gate.offload(keyed_hash, secret, "replay_body", body.decode("latin-1"))).hex()
        standing, kept = await self._claim(ident, body_hash)
        if kept is not None:
            await _send_again(kept, send)
            return
        if standing is not Standing.FIRST:
            raise _refusal(standing)
        record = _Record(self._gate, ident, scope, send)
        try:
            await self._app(scope, _with_body(body, request), record.send)
        finally:
            if not record.is_kept:
                await self._release(ident)

    async def _claim(self, ident: str, body_hash: str) -> tuple[Standing, KeptAnswer | None]:
        """Return how a request stands, after a moment's patience with one that still runs."""
        store, loop = self._gate.store, asyncio.get_running_loop()
        until = loop.time() + _WAIT_S
        while True:
            standing, kept = await self._gate.offload(store.replays.claim, ident, body_hash)
            if standing is not Standing.RUNNING or loop.time() >= until:
                return standing, kept
            await asyncio.sleep(_TICK_S)

    async def _release(self, ident: str) -> None:
        try:
            await self._gate.offload(self._gate.store.replays.release, ident)
        except StoreError:  # its lease runs out
            logger.warning("event=replay_not_released")


def checked_key(given: str) -> str:
    """Return an Idempotency-Key; RequestError for one that cannot be kept."""
    if not 0 < len(given) <= MAX_IDEMPOTENCY_KEY or not given.isprintable():
        raise RequestError(
            f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} printable characters",
            field="Idempotency-Key",
        )
    return given


class _Record:
    """Passes an answer on, and keeps it before its end is sent: whoever has it all can rely on the repeat."""

    def __init__(self, gate: StoreGate, ident: str, scope: MutableMapping[str, Any], send: Send) -> None:
        self._gate = gate
        self._ident = ident
        self._scope = scope
        self._send = send
        self.is_kept = False
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Take one ASGI message."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            pairs = ((name.decode("latin-1").lower(), value) for name, value in message["headers"])
            self._headers = {name: value.decode("latin-1") for name, value in pairs if name in _KEPT_HEADERS}
        elif message["type"] == "http.response.body":
            if len(self._body) <= MAX_ANSWER_BYTES:
                self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._keep()
        await self._send(message)

    async def _keep(self) -> None:
        """Keep what was sent, unless it is a refusal: whatever failed may be tried again."""
        if not 200 <= self._status < 300 or STREAM_FAILED in self._scope:
            return
        answer = KeptAnswer(status=self._status, headers=self._headers, body=bytes(self._body))
        try:
            await self._gate.offload(self._gate.store.replays.finish, self._ident, answer)
            self.is_kept = True
        except StoreError:
            logger.warning("event=answer_not_kept")


def _with_body(body: bytes, request: Request) -> Receive:
    """Return a `receive` that gives the body, which has been read, and then what comes after it."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return await request.receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _send_again(kept: KeptAnswer, send: Send) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in kept.headers.items()]
    headers += [(b"content-length", str(len(kept.body)).encode()), (b"idempotent-replayed", b"true")]
    await send({"type": "http.response.start", "status": kept.status, "headers": headers})
    await send({"type": "http.response.body", "body": kept.body, "more_body": False})


def _refusal(standing: Standing) -> ApiError:
    if standing is Standing.RUNNING:
        return ApiError(
            409,
            "the first request with this Idempotency-Key is still running; try again soon",
            code="idempotency_key_in_use",
            param="Idempotency-Key",
            headers={"retry-after": "1"},
        )
    message = (
        "this Idempotency-Key was used with another body within the last ten minutes; use a new key"
        if standing is Standing.OTHER_BODY
        else f"the first answer had more than {MAX_ANSWER_BYTES} bytes and was not kept; use a new key"
    )
    return ApiError(
        409,
        message,
        code="idempotency_key_reused",
        param="Idempotency-Key",
        headers={"x-should-retry": "false"},
    )
