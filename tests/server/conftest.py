"""A whole server in one process: the application over a store and a model that a test writes."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path

import httpx
import pytest


def load_test_module(folder: str, name: str):
    """Import a module of another test folder."""
    key = f"tests_{folder}_{name}"
    if key not in sys.modules:
        path = Path(__file__).parent.parent / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


class Clock:
    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


class Site:
    """The application and its store; requests run to their end before a method returns."""

    def __init__(
        self, folder: Path, url: str | None = None, hosted=None, chats=None, fleet=None, **gate_options
    ):
        """`chats` are the assistant's models; without them there is no assistant."""
        from bise.server.app import create_app
        from bise.server.batch_worker import BatchWorker
        from bise.server.gate import StoreGate
        from bise.server.stored import routers
        from bise.store.opening import Store

        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        files = folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        self.store = Store.open(
            url or str(folder / "bise.db"), folder=files, secret=folder / "secret", clock=self.clock
        )
        self.fleet = fleet or load_test_module("contract", "scripted").ScriptedFleet()
        self.engine = None if fleet else self.fleet.engine
        self.gate = StoreGate(
            self.store, canonical=lambda name: self.fleet.card(name).spec.name, **gate_options
        )
        pages = [] if chats is None else self._pages(chats, hosted)
        self.app = create_app(self.fleet, self.gate, routers=[*routers(), *pages], hosted=hosted)
        if pages:
            self.chats.service = self.app.service
        self.worker = BatchWorker(self.app, self.gate, is_draining=lambda: self.app.service.is_draining)
        self.client_address = "127.0.0.1"

    def _pages(self, chats, hosted):
        from bise.assistant.accounts import Accounts
        from bise.assistant.scripted import quick_hasher
        from bise.server.assistant_app import assistant_routers
        from bise.server.entry import StorePeople
        from bise.server.hosted_answers import HostedAnswers
        from bise.server.metered_models import MeteredModels

        self.chats = MeteredModels(chats, self.gate, HostedAnswers(hosted))
        people = StorePeople(self.gate, Accounts(self.store.database, quick_hasher()))
        return assistant_routers(self.store.database, people, self.chats)

    def key(self, name="k", **fields):
        """Make a key; return (what is known of it, the key)."""
        return self.store.keys.create(name, **fields)

    def request(self, method, path, key=None, headers=(), **options):
        headers = dict(headers) | ({"authorization": f"Bearer {key}"} if key else {})

        async def send():
            transport = httpx.ASGITransport(
                self.app, client=(self.client_address, 5), raise_app_exceptions=False
            )
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers, **options)

        return self.loop.run_until_complete(send())

    def get(self, path, key=None, **options):
        return self.request("GET", path, key, **options)

    def post(self, path, key=None, **options):
        return self.request("POST", path, key, **options)

    def chat(self, key=None, headers=(), **fields):
        body = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.post("/v1/chat/completions", key, headers=headers, json=body)

    def upload(self, key=None, content=b"{}\n", purpose="batch", name="in.jsonl"):
        return self.post("/v1/files", key, files={"file": (name, content)}, data={"purpose": purpose})

    def work(self, until, timeout=100.0):
        """Run the batch worker until `until()` is true."""

        async def run():
            await self.gate.start()
            self.worker.start()
            async with asyncio.timeout(timeout):
                while not until():
                    await asyncio.sleep(0.02)
            await self.worker.stop()

        self.loop.run_until_complete(run())

    def close(self):
        async def end():
            # What goes on behind an answer (its title) must not be left to the garbage collector, whose
            # complaint would be another test's.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self.gate.stop()

        self.loop.run_until_complete(end())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.app.service.close()
        self.store.close()
        self.loop.close()


@pytest.fixture(scope="module", autouse=True)
def _loopback_alone(no_authorities):
    """See `no_authorities`."""


@pytest.fixture(scope="session")
def postgres(free_port):
    yield from load_test_module("store", "conftest").running_postgres(free_port())


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def new_url(request):
    """Return a function that gives a site its database; `make postgres` runs all on PostgreSQL, too."""
    return (lambda: None) if request.param == "sqlite" else request.getfixturevalue("postgres").new_url


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    return load_test_module("store", "conftest").migrated_file(tmp_path_factory.mktemp("migrated"))


@pytest.fixture
def make_site(tmp_path, new_url, migrated):
    """Return a function that makes a site; see `Site`."""
    sites = []

    def make(**options):
        options.setdefault("url", new_url())
        folder = tmp_path / f"site{len(sites)}"
        if options["url"] is None:
            folder.mkdir(exist_ok=True)
            shutil.copy(migrated, folder / "bise.db")
        sites.append(Site(folder, **options))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site):
    return make_site()
