from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent


def load_neighbour(name: str):
    """Import a module that lies beside this file."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


load_neighbour("raw_http")
load_neighbour("http_fuzz")
load_neighbour("storm")


class LiveServer:
    """A server on loopback in a thread of its own, over any fleet."""

    def __init__(self, fleet, *, limits=None, gate=None, reach=None, grace_s: float = 5.0) -> None:
        from bise.server.app import create_app
        from bise.server.limits import HttpLimits
        from bise.server.serving import Serving, bind, url_of

        self.fleet = fleet
        limits = limits or HttpLimits()
        self.app = create_app(fleet, gate, limits=limits, reach=reach)
        self._listener = bind("127.0.0.1", 0)
        self.url = url_of(self._listener)
        self.port = self._listener.getsockname()[1]
        ready = threading.Event()
        self.serving = Serving(self.app, limits=limits, grace_s=grace_s, on_ready=ready.set)
        self.loop: asyncio.AbstractEventLoop | None = None

        def run() -> None:
            async def main() -> None:
                self.loop = asyncio.get_running_loop()
                await self.serving.serve(sockets=[self._listener])

            asyncio.run(main())

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(100)

    @property
    def engine(self):
        return self.fleet.engine

    def post(self, path: str, body, **options) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=100, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=100, **options)

    def stop(self) -> None:
        """Ask for a stop, as a signal would."""
        self.loop.call_soon_threadsafe(self.serving.stop)

    def join(self, timeout: float = 100) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        if self._thread.is_alive():
            self.stop()
            assert self.join(), "the server did not stop"
        self._listener.close()
        self.app.service.close()


@pytest.fixture(scope="module", autouse=True)
def _loopback_alone(no_authorities):
    """See `no_authorities`."""


@pytest.fixture
def scripted():
    """The module with the scripted model."""
    return load_neighbour("scripted")


@pytest.fixture
def serve(scripted):
    """Return a function that starts a live server; the scripted model's unless told otherwise."""
    servers: list[LiveServer] = []

    def start(fleet=None, **options) -> LiveServer:
        server = LiveServer(fleet or scripted.ScriptedFleet(), **options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def shared():
    """One live server over the scripted model for a whole module; tests set what it says."""
    server = LiveServer(load_neighbour("scripted").ScriptedFleet())
    yield server
    server.close()


@pytest.fixture
def live(shared):
    """The module's server, its model reset."""
    engine = shared.engine
    engine.text, engine.script, engine.token_s = "Hello, world!", None, 0.0
    engine.fails_with = engine.refuses_with = engine.failure = None
    engine.endless = False
    engine.cached_tokens = 0
    engine.requests.clear()
    engine.aborted = 0
    engine.go.set()
    return shared
