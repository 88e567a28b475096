"""The outermost layer of the application: what holds for every request whatever its route.

Request ids, foreign hosts and origins, body size and time, the drain before a stop, and the promise that
every answer is JSON with a status of its own, whatever happens inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bise.server.limits import HttpLimits
from bise.server.problem import ApiError, as_api_error, error_response
from bise.server.turns import Turns

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_CORS_HEADERS = (
    (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version"),
    (b"access-control-max-age", b"600"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Under which names the server may be called, and by which web pages."""

    hosts: frozenset[str] = frozenset()
    """Names besides localhost; addresses are always good, because DNS rebinding needs a name."""
    origins: frozenset[str] = frozenset()
    """Origins of other sites whose pages may call this server (CORS), such as `https://chat.example`."""

    def check_host(self, host: str) -> None:
        """Refuse a Host header that is none of ours."""
        name = _host_name(host)
        if name == "localhost" or name.endswith(".localhost") or name in self.hosts or _is_address(name):
            return
        raise ApiError(
            403,
            "the Host header names a host that this server does not serve; start it with --allow-host NAME",
            code="host_not_allowed",
        )

    def allows_origin(self, origin: str, host: str) -> bool:
        """Return True for a page of a named foreign site; False for our own pages; refuse all others."""
        if origin in self.origins:
            return True
        parts = urlsplit(origin)
        if parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower():
            return False
        raise ApiError(
            403,
            "pages of another origin may not call this server; start it with --allow-origin ORIGIN",
            code="origin_not_allowed",
        )


class Edge:
    """Wraps the application; see the module."""

    def __init__(
        self,
        app: AsgiApp,
        *,
        limits: HttpLimits,
        reach: Reach,
        is_draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._limits = limits
        self._reach = reach
        self._is_draining = is_draining
        self._turns = Turns()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        try:
            headers = _single_headers(scope)
            self._reach.check_host(headers.get(b"host", ""))
            origin = headers.get(b"origin")
            if origin is not None and self._reach.allows_origin(origin, headers.get(b"host", "")):
                answer.extra += [
                    (b"access-control-allow-origin", origin.encode("latin-1")),
                    (b"vary", b"origin"),
                ]
                if scope["method"] == "OPTIONS":
                    await _preflight(answer)
                    return
            if self._is_draining() and scope["path"] != "/health":
                raise ApiError(
                    503, "the server is stopping", code="server_stopping", headers={"retry-after": "5"}
                )
            if scope["path"] != "/health":
                await self._turns.take(_caller(scope))
            await self._app(scope, self._bounded(scope, headers, receive), answer.send)
        except Exception as error:  # the root of a request: whatever comes up here gets an answer of its own
            refusal = as_api_error(error)
            if refusal.status == 500 and not isinstance(error, ApiError):
                logger.exception("event=request_failed request_id=%s path=%s", request_id, scope["path"])
            if answer.started:
                return
            await error_response(refusal, path=scope["path"])(scope, receive, answer.send)

    def _bounded(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, str], receive: Receive
    ) -> Receive:
        """Return a `receive` that refuses a body that is too long or too slow."""
        limit = self._limits.body_of(scope["path"])
        declared = headers.get(b"content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise _too_large(limit)
        deadline = asyncio.get_running_loop().time() + self._limits.body_s
        size = 0
        whole = False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline if limit == self._limits.body else None):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self._limits.body_s:.0f} seconds",
                    code="request_timeout",
                    headers={"connection": "close", "x-should-retry": "false"},
                ) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            return message

        return bounded


class _Answer:
    """Adds the headers of every answer and remembers whether it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.started = False
        self.extra = [
            (b"x-request-id", request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            present = {name for name, _ in message["headers"]}
            message["headers"] = [
                *message["headers"], *((n, v) for n, v in self.extra if n not in present)
            ]  # fmt: skip
        await self._send(message)


async def _preflight(answer: _Answer) -> None:
    await answer.send({"type": "http.response.start", "status": 204, "headers": list(_CORS_HEADERS)})
    await answer.send({"type": "http.response.body", "body": b""})


def _single_headers(scope: MutableMapping[str, Any]) -> dict[bytes, str]:
    """Return the headers that decisions are made by; refuse one that is given twice."""
    found: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in (b"host", b"origin", b"content-length", b"content-type", b"authorization"):
            if name in found:
                raise ApiError(400, f"the header {name.decode()} is given twice", code="invalid_header")
            found[name] = value.decode("latin-1")
    return found


def _caller(scope: MutableMapping[str, Any]) -> str:
    """Return what tells callers apart before anyone knows who they are."""
    for name, value in scope["headers"]:
        if name in (b"authorization", b"x-api-key", b"cookie"):
            return str(value, "latin-1")
    return str((scope.get("client") or ("",))[0])


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes",
        code="request_too_large",
        headers={"x-should-retry": "false"},
    )


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port; "" for what is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.path or parts.query or parts.fragment or parts.username is not None:
            return ""
        parts.port  # noqa: B018  # raises for a bad port
        return (parts.hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
