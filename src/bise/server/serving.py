"""Running the application on a socket: start, readiness, the drain before a stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from bise.errors import ConfigError
from bise.server.app import Application
from bise.server.connection import connection_class
from bise.server.limits import HttpLimits

logger = logging.getLogger(__name__)

_BACKLOG = 2048
"""Connections that may wait to be accepted."""
_ACCEPTED_AT_ONCE = 16
"""Connections that the event loop accepts before it looks at the others again."""
_TICK_S = 0.05
_MAX_FILES = 1 << 16
_SWITCH_S = 0.0005


def prepare_process() -> None:
    """Set this process up for many connections and two busy threads; for a process that only serves.

    As many files as the system allows, since each connection is one and 1,024 is a usual limit. Whoever waits
    for the interpreter gets it after half a millisecond instead of five, so that the engine's thread does not
    hold up the event loop. What was loaded so far stays out of garbage collection: a full one stops everybody
    for a tenth of a second.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()


def release_process() -> None:
    """Let everything be collected again, so that a process that ends gives its models back in order."""
    gc.unfreeze()


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises ConfigError when the address is taken."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host and --port",
            field="port",
        ) from error


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Serving(uvicorn.Server):
    """A server whose stop lets running requests finish; see `stop`."""

    def __init__(
        self,
        app: Application,
        *,
        limits: HttpLimits,
        grace_s: float = 30.0,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]  # an ASGI application by its face
            http=connection_class(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_ACCEPTED_AT_ONCE,
            timeout_keep_alive=int(limits.keep_alive_s),
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._service = app.service
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and tell that the server is ready."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():  # the loop takes its `backlog` for both; only one of them is small
            listener.listen(_BACKLOG)
        if self._on_ready is not None:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop on a signal: the first one drains, a second one ends at once. Exit code 0 either way."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Refuse new requests with 503, let running ones finish for the grace time, end them, close."""
        if self._draining is None:
            logger.info("event=stopping running=%d", len(self._service.jobs))
            self._service.is_draining = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._grace_s = 0.0

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while self._service.jobs and loop.time() - start < self._grace_s:
            await asyncio.sleep(_TICK_S)
        try:
            async with asyncio.timeout(2.0):
                await self._service.end_jobs()
        except TimeoutError:
            logger.warning("event=stopped_with_requests count=%d", len(self._service.jobs))
        self.should_exit = True
