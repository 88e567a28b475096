"""One client connection: uvicorn's httptools protocol with bounds on headers, time and what is thrown away.

What is refused here never becomes a request: it gets one JSON answer, then the connection closes, but only
after the client had a moment to read it (closing at once would reset the connection and lose the answer).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bise.server.limits import HttpLimits
from bise.server.problem import ApiError, error_body

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

_MAX_PIPELINED = 32
_QUIET = f"{__name__}.quiet"


class _RefusedError(Exception):
    """Stops the parser; the refusal is in the protocol."""


def connection_class(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """Return the protocol class that uvicorn is to use."""

    # uvicorn warns of every malformed request: strangers must not be able to fill the log.
    logging.getLogger(_QUIET).setLevel(logging.ERROR)

    class Bounded(BoundedConnection):
        bounds = limits

    return Bounded


class BoundedConnection(HttpToolsProtocol):
    """See the module. All methods run on the event loop."""

    bounds = HttpLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = logging.getLogger(_QUIET)
        self._in_head = True
        self._heads = 0
        """Heads that were complete."""
        self._head_bytes = 0
        self._header_bytes = 0
        self._refusal: ApiError | None = None
        self._is_lingering = False
        self._discarded = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        for timer in (self._head_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, or throw it away once the connection is refused."""
        if self._is_lingering:
            self._discard(len(data))
            return
        if self._in_head:
            self._start_head_timer()
        heads = self._heads
        was_in_head = self._in_head
        super().data_received(data)
        if self._is_lingering or self.transport.is_closing():
            return
        # Bytes of an unfinished head; where one was finished, its headers have been counted one by one.
        unfinished = was_in_head and self._in_head and heads == self._heads
        self._head_bytes = self._head_bytes + len(data) if unfinished else 0
        if self._head_bytes > self.bounds.headers + self.bounds.request_line:
            self._refusal = _headers_too_large(self.bounds)
            self.send_400_response("")

    def eof_received(self) -> None:
        """Let the transport close."""
        if self._is_lingering:
            self.transport.close()

    # The parser's side

    def on_message_begin(self) -> None:
        """Start counting a new head."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse(ApiError(400, "too many requests are pipelined", code="invalid_http"))
        super().on_message_begin()
        self.scope["bise.transport"] = self.transport  # type: ignore[typeddict-unknown-key]
        self._in_head = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        super().on_url(url)
        if len(self.url) > self.bounds.request_line:
            self._refuse(ApiError(414, "the request target is too long", code="uri_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        size = len(name) + len(value) + 4
        self._header_bytes += size
        bounds = self.bounds
        if (
            size > bounds.header_line
            or self._header_bytes > bounds.headers
            or len(self.headers) >= bounds.num_headers
        ):
            self._refuse(_headers_too_large(bounds))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check what decides where a message ends, then hand the request on."""
        self._in_head = False
        self._heads += 1
        self._stop_head_timer()
        self._check_framing()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take body, or throw it away when the answer is out already."""
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > self.bounds.discard:
                self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request."""
        self._in_head = True
        if self.cycle.response_complete:  # answered before the body was there: the clock starts only now
            self._discarded = 0
            self._stop_end_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Bound the time that the rest of an unwanted body may take."""
        if self.cycle.more_body and not self._in_head and not self.transport.is_closing():
            self._start_end_timer(self.bounds.body_s)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or what was refused, and close."""
        refusal = self._refusal or ApiError(400, "this is not a valid HTTP/1.1 request", code="invalid_http")
        if self._is_lingering or self.transport.is_closing():
            return
        cycle = cast(Any, self.cycle)  # uvicorn's annotation leaves out the None before the first request
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self.pipeline:
                # An answer is under way; a second one inside it would be read as its body.
                self.transport.close()
                return
            # The application's own answer, if it comes, must not follow this one.
            cycle.disconnected = True
            cycle.message_event.set()
        body = json.dumps(error_body(refusal)).encode()
        head = (
            f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            f"x-request-id: req_{secrets.token_hex(12)}\r\nx-content-type-options: nosniff\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._linger()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; cut it when its client reads nothing any more."""
        super().timeout_keep_alive_handler()
        self._start_end_timer(self.bounds.linger_s)

    # Ours

    def _refuse(self, refusal: ApiError) -> None:
        self._refusal = refusal
        raise _RefusedError

    def _check_framing(self) -> None:
        """Refuse messages whose end two readers could see at different places, and unknown versions."""
        assert self.parser is not None
        names = [name for name, _ in self.headers]
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        version = self.parser.get_http_version()
        lengths = names.count(b"content-length")
        problem: str | None = None
        if version not in ("1.0", "1.1"):
            problem = f"HTTP/{version} is not spoken here"
        elif codings and (codings != [b"chunked"] or version == "1.0"):
            problem = "the only transfer coding is chunked, given once"
        elif lengths + bool(codings) > 1:
            problem = "the length of the body is given twice"
        elif names.count(b"host") != 1 and not (version == "1.0" and b"host" not in names):
            problem = "exactly one Host header is needed"
        elif self.parser.should_upgrade() and (codings or lengths):
            problem = "a request with a body cannot ask for another protocol"
        if problem is not None:
            self._refuse(ApiError(400, problem, code="invalid_http"))

    def _linger(self) -> None:
        """Stop writing, read and forget for a moment, then close."""
        self._is_lingering = True
        self._discarded = 0
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_end_timer(self.bounds.linger_s)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > self.bounds.discard:
            self.transport.abort()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.headers_s, self._head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._refusal = ApiError(
            408,
            f"no whole request arrived within {self.bounds.headers_s:.0f} seconds",
            code="request_timeout",
        )
        self.send_400_response("")

    def _start_end_timer(self, seconds: float) -> None:
        self._stop_end_timer()
        self._end_timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_end_timer(self) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
            self._end_timer = None


def _headers_too_large(bounds: HttpLimits) -> ApiError:
    return ApiError(
        431,
        f"a request may have {bounds.num_headers} headers of {bounds.header_line} bytes each, "
        f"{bounds.headers} bytes together",
        code="headers_too_large",
    )
