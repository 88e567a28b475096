"""The HTTP side of hosted models: asking another machine, within limits of time and size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bise.errors import RequestError
from bise.hub.client import is_loopback_host
from bise.server.hosted_checks import lie, parsed
from bise.server.problem import ApiError

if TYPE_CHECKING:
    import httpx

    from bise.hub.remotes import Remote

MAX_ANSWER = 32 << 20
MAX_LINE = 4 << 20
CONNECT_S = 10.0


class HostedClient:
    """Connections to one host. Made on no event loop; used on one."""

    def __init__(self, remote: Remote) -> None:
        import httpx

        self.spec = remote.spec
        headers = {"user-agent": "bise", "accept-encoding": "identity"}
        if remote.key is not None:
            headers["authorization"] = f"Bearer {remote.key}"
        is_local = is_loopback_host(urlsplit(self.spec.url).hostname or "")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(self.spec.timeout_s, connect=min(CONNECT_S, self.spec.timeout_s)),
            follow_redirects=False,  # the key and the prompt go to the named host alone
            trust_env=not is_local,
            headers=headers,
        )

    def check_serves(self, what: str) -> None:
        """Refuse what the host was not said to serve (RequestError, a 400)."""
        if what not in self.spec.serves:
            raise RequestError(
                f"{self.spec.name} is hosted elsewhere and serves {', '.join(self.spec.serves)} only, not "
                f"{what}; if its host has it, list it with `bise models add-remote --serves {what}`",
                field="model",
            )

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object that the host answers. Raises ApiError 400, 429, 502 or 504."""
        async with self._sent(path, body) as response:
            data = bytearray()
            async for chunk in self._chunks(response):
                data += chunk
                if len(data) > MAX_ANSWER:
                    raise lie("sent an answer that is too large")
            return parsed(bytes(data), "an answer")

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the objects of an event stream up to `[DONE]`; a stream that ends before it is refused."""
        async with self._sent(path, body) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise lie("sent no event stream, though one was asked for")
            size = 0
            buffer = b""
            async for chunk in self._chunks(response):
                size += len(chunk)
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                if size > MAX_ANSWER or len(buffer) > MAX_LINE:
                    raise lie("sent an answer that is too large")
                for line in lines:
                    data = line.strip()
                    if not data.startswith(b"data:"):
                        continue
                    data = data[5:].strip()
                    if data == b"[DONE]":
                        return
                    value = parsed(data, "an event")
                    if "error" in value:
                        raise lie("broke off its answer with an error")
                    yield value
            raise lie("broke off its answer")

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        """Yield the body as it comes; TimeoutError when it drips for too long, however lively."""
        loop = asyncio.get_running_loop()
        # No asyncio.timeout: each step of this generator may run in a task of its own.
        end = loop.time() + self.spec.timeout_s * 10
        async for chunk in response.aiter_raw():
            if loop.time() > end:
                raise TimeoutError
            yield chunk

    @asynccontextmanager
    async def _sent(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[httpx.Response]:
        import httpx

        try:
            async with AsyncExitStack() as stack:
                sent = self._client.stream("POST", f"{self.spec.url}{path}", json=body)
                async with asyncio.timeout(self.spec.timeout_s * 10):  # heads can drip, too
                    response = await stack.enter_async_context(sent)
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.headers)
                if response.headers.get("content-encoding", "identity") not in ("", "identity"):
                    raise lie("sent a packed answer, though it was asked not to")
                yield response
        except (httpx.TimeoutException, TimeoutError) as error:
            raise ApiError(
                504, "the model's host did not answer in time", code="upstream_timeout", headers=_NO_RETRY
            ) from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise ApiError(
                502, "the model's host cannot be reached or broke off its answer", code="upstream_unreachable"
            ) from error


_NO_RETRY = {"x-should-retry": "false"}


def _refusal(status: int, headers: Mapping[str, str]) -> ApiError:
    """Return what a host's refusal means for our client; its own words stay away, they may hold anything."""
    if status in (400, 413, 422):
        return ApiError(
            400,
            f"the model's host refuses this request ({status})",
            code="upstream_refused",
            headers=_NO_RETRY,
        )
    if status == 429:
        after = headers.get("retry-after", "")
        seconds = after if after.isdecimal() and len(after) < 6 else "5"
        return ApiError(
            429, "the model's host is busy", code="upstream_busy", headers={"retry-after": seconds}
        )
    if status in (401, 403):
        return ApiError(
            502, "the model's host refuses this server's key", code="upstream_key_refused", headers=_NO_RETRY
        )
    return ApiError(502, f"the model's host failed ({status})", code="upstream_failed", headers=_NO_RETRY)
