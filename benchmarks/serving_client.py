"""A streaming client that costs little: one connection per answer, every piece of text with its time.

It speaks just enough HTTP/1.1 to measure servers on the same machine without taking much of it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """What became of one request; times are seconds of `time.perf_counter`."""

    asked: float
    pieces: list[tuple[float, str]] = field(default_factory=list)
    """(when it came, text), texts that are not empty."""
    usage: dict[str, Any] | None = None
    ended: float | None = None
    """When the stream was complete; None for one that was cut or failed."""
    status: int = 0
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def first_s(self) -> float | None:
        """Time to the first text; None when none came."""
        return self.pieces[0][0] - self.asked if self.pieces else None


class _Stream(asyncio.Protocol):
    """Reads one answer."""

    def __init__(self, request: bytes, answer: Answer) -> None:
        self._request = request
        self._answer = answer
        self._raw = bytearray()
        self._body = bytearray()
        self._in_head = True
        self._is_chunked = False
        self._left = 0
        """Bytes of the current chunk that are still to come, its line end included."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # pyright: ignore[reportAttributeAccessIssue]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            if self._answer.ended is None and self._answer.error is None:
                self._answer.error = f"the connection broke: {exc or 'closed'}"
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if self._in_head and not self._read_head():
            return
        if self._is_chunked:
            self._unchunk()
        else:
            self._body += self._raw
            self._raw.clear()
        while (end := self._body.find(b"\n\n")) >= 0:
            event = bytes(self._body[:end])
            del self._body[: end + 2]
            self._event(event, now)
        if self._answer.ended is not None:
            self._transport.close()

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._raw[:end]).lower()
        del self._raw[: end + 4]
        self._in_head = False
        self._is_chunked = b"transfer-encoding: chunked" in head
        self._answer.status = int(head.split(b" ", 2)[1])
        if self._answer.status != 200:
            self._answer.error = f"status {self._answer.status}"
        return True

    def _unchunk(self) -> None:
        raw = self._raw
        while raw:
            if self._left == 0:
                end = raw.find(b"\r\n")
                if end < 0:
                    return
                size = int(bytes(raw[:end]).split(b";")[0], 16)
                del raw[: end + 2]
                self._left = size + 2
            taken = min(self._left, len(raw))
            text = max(0, min(taken, self._left - 2))
            self._body += raw[:text]
            del raw[:taken]
            self._left -= taken

    def _event(self, event: bytes, now: float) -> None:
        for line in event.splitlines():
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                self._answer.ended = now
                continue
            value = json.loads(line[6:])
            if "error" in value:
                self._answer.error = str(value["error"])[:200]
                continue
            if value.get("usage"):
                self._answer.usage = value["usage"]
            for choice in value.get("choices", ()):
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    self._answer.pieces.append((now, text))


def post(url: str, path: str, body: dict[str, Any], key: str | None = None) -> bytes:
    """Return the bytes of a request, made with an API key where one is given."""
    data = json.dumps(body).encode()
    authorization = "" if key is None else f"authorization: Bearer {key}\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: application/json\r\n"
        f"{authorization}content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


async def ask(url: str, path: str, body: dict[str, Any], *, answer: Answer | None = None) -> Answer:
    """Send a streaming request and return the answer once it is over; cancelling it cuts the connection.

    `answer` is filled as the text comes.
    """
    answer = Answer(time.perf_counter()) if answer is None else answer
    await run(url, post(url, path, body), answer)
    return answer


async def run(url: str, request: bytes, answer: Answer) -> None:
    """Send bytes and fill `answer` with what comes back."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    try:
        transport, stream = await loop.create_connection(
            lambda: _Stream(request, answer), parts.hostname, parts.port
        )
    except OSError as error:
        answer.error = f"no connection: {error}"
        return
    try:
        await stream.done
    finally:
        transport.abort()


def allow_connections(count: int) -> None:
    """Let this process hold `count` connections, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def quantile(values: list[float], share: float) -> float | None:
    """Return the value that `share` of the values do not exceed; None without values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None
