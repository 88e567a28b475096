"""Server-sent events: a stream that ends its request whatever becomes of the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bise.server.hosted import HostedJob
from bise.server.problem import as_api_error, error_body
from bise.server.service import ClientGoneError, Job

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
STREAM_FAILED = "bise.stream_failed"
"""Set in the ASGI scope by a stream that had to tell of a failure after its status."""
_PING = b": ping\n\n"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def event(value: Mapping[str, object], name: str | None = None) -> bytes:
    """Return one event with a JSON object as its data, and an `event:` line when it has a name."""
    data = _JSON.encode(value)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()


def error_event(error: BaseException) -> bytes:
    """Return the last event of a chat stream that failed: both clients raise on it."""
    refusal = as_api_error(error)
    return event(error_body(refusal)) + DONE


class EventStream(Response):
    """Sends a job's events and finishes the job: at the end, on failure, and when the client leaves.

    `events` yields whole events; the reason that it leaves in `job` counts for the ledger. A failure inside
    becomes `on_error`'s event, because the status has been sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Job | HostedJob,
        events: AsyncIterator[bytes],
        *,
        finish_reason: Callable[[], str | None],
        on_error: Callable[[BaseException], bytes] = error_event,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no", **job.ticket.headers})
        del self.headers["content-length"]
        self._job = job
        self._events = events
        self._finish_reason = finish_reason
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        limits = self._job.service.limits
        sender = _Sender(scope, send, limits.ping_s, limits.stalled_reader_s)
        pings = asyncio.create_task(sender.ping())
        failure: BaseException | None = None
        try:
            await sender.start(self.status_code, self.raw_headers)
            try:
                async for data in self._events:
                    await sender.send(data)
            except (ClientGoneError, TimeoutError):
                raise
            except Exception as error:  # the 200 is out: all that is left is to tell in the stream
                failure = error
                scope[STREAM_FAILED] = True
                if as_api_error(error).status >= 500:
                    logger.warning("event=stream_failed code=%s", as_api_error(error).code, exc_info=error)
                await sender.send(self._on_error(error))
            await self._job.finish(self._finish_reason(), failure)
            await sender.end()
        except (ClientGoneError, TimeoutError, OSError):
            self._job.leave()
            _cut(scope)
        except BaseException as error:
            failure = failure or error
            raise
        finally:
            pings.cancel()
            await self._job.finish(self._finish_reason(), failure)
            with contextlib.suppress(Exception):
                await aclose(self._events)


async def aclose(events: AsyncIterator[bytes]) -> None:
    """Close an asynchronous generator."""
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


def _cut(scope: Scope) -> None:
    """Drop the connection of a client that does not read: closing it politely would wait for ever."""
    transport: asyncio.Transport | None = scope.get("bise.transport")
    if transport is not None:
        transport.abort()


class _Sender:
    """Sends parts of one body; a send that blocks too long raises TimeoutError."""

    def __init__(self, scope: Scope, send: Send, ping_s: float, stalled_s: float) -> None:
        self._transport: asyncio.Transport | None = scope.get("bise.transport")
        self._send = send
        self._ping_s = ping_s
        self._stalled_s = stalled_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._open = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._open = True

    async def send(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and transport.is_closing():
            raise ClientGoneError
        self._last = self._loop.time()
        message = {"type": "http.response.body", "body": data, "more_body": True}
        if transport is not None and not transport.get_write_buffer_size():
            # Nothing waits to be read, so this cannot block and needs no clock: one per token costs.
            await self._send(message)
            return
        async with asyncio.timeout(self._stalled_s):
            await self._send(message)

    async def end(self) -> None:
        self._open = False
        async with asyncio.timeout(self._stalled_s):
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ping(self) -> None:
        """Keep a silent stream alive for proxies and impatient clients."""
        while True:
            await asyncio.sleep(self._ping_s)
            if self._open and self._loop.time() - self._last >= self._ping_s:
                with contextlib.suppress(
                    TimeoutError, ClientGoneError
                ):  # the stream's own sends notice that, too
                    await self.send(_PING)
