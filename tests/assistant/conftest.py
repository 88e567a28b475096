"""Shared by the tests of the assistant: its routes over a memory that ends with the test."""

from __future__ import annotations

import asyncio
import functools
from contextvars import ContextVar

import httpx
import pytest
from fastapi import FastAPI

from bise.assistant.accounts import Accounts
from bise.assistant.scripted import ScriptedModels, quick_hasher
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import AuthenticationError, BiseError
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_people import Person
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response


class ByHeader:
    """Whoever the header names; without one `nobody`, or an error where that is None."""

    def __init__(self, nobody="local"):
        self.nobody = nobody

    async def person(self, request):
        name = request.headers.get("x-person", self.nobody)
        if name is None:
            raise AuthenticationError("sign in")
        return Person(name, name, "user")

    async def check_first(self, request):
        raise AuthenticationError("sign in")


class Listening(ScriptedModels):
    """Remember what they were asked."""

    def __init__(self, script=lambda _: "Yes.", **options):
        super().__init__(script, **options)
        self.jobs = []

    @property
    def asked(self):
        return [[message["content"] for message in job.messages] for job in self.jobs]

    async def stream(self, job):
        self.jobs.append(job)
        async for piece in super().stream(job):
            yield piece


asked: ContextVar[Site] = ContextVar("asked")
"""The site that a request came to."""


class OfSite:
    """Stands for what the asked site calls `name`."""

    def __init__(self, name):
        self.__name = name

    def __getattr__(self, name):
        return getattr(getattr(asked.get(), self.__name), name)


@functools.cache
def shared_app():
    """Return the application of all sites: its routes take a tenth of a second to make."""
    app, people = FastAPI(), OfSite("people")
    app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
    app.include_router(assistant_router(lambda: asked.get().assistant, people))
    app.include_router(accounts_router(OfSite("accounts"), people, lambda: asked.get().assistant))
    return app


class Site(httpx.AsyncClient):
    """A client of one server, and the assistant behind it."""

    def __init__(self, models=None, storage=None, people=None):
        self.models = models or ScriptedModels(lambda _: "Yes.")
        self.storage = storage or Memory()
        self.assistant = Assistant(self.storage, self.models)
        self.accounts = Accounts(self.storage, quick_hasher())
        self.people = people or ByHeader()
        self.app = shared_app()
        super().__init__(transport=httpx.ASGITransport(self._answer), base_url="http://localhost:8000")

    async def _answer(self, scope, receive, send):
        asked.set(self)
        await self.app(scope, receive, send)

    async def ask(self, text="How does the bise form?", conversation=None, **fields):
        """Ask without waiting for the answer; return the conversation's id and what was answered."""
        if conversation is None:
            conversation = (await self.post("/api/v1/conversations", json={})).json()["id"]
        body = {"text": text, **fields}
        answer = await self.post(f"/api/v1/conversations/{conversation}/messages", json=body)
        assert answer.status_code == 201, answer.text
        return conversation, answer.json()

    async def ended(self, answer):
        """Wait for an answer's run and return the answer as it was kept."""
        run = self.assistant.runs.get(answer["run_id"])
        assert run.task is not None
        await asyncio.wait([run.task])
        return (await self.get(f"/api/v1/messages/{answer['id']}")).json()

    async def events(self, run_id, after=0, most=None):
        found = []
        path = f"/api/v1/runs/{run_id}/events?after={after}"
        async with self.stream("GET", path) as response:
            assert response.status_code == 200
            event = {}
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    continue
                if line:
                    name, _, value = line.partition(": ")
                    event[name] = value
                elif event:
                    found.append(event)
                    event = {}
                    if most is not None and len(found) >= most:
                        break
        return found

    async def page(self, conversation, **query):
        answer = await self.get(f"/api/v1/conversations/{conversation}", params=query)
        return answer.json()

    async def close(self):
        await self.aclose()
        await self.assistant.close()


@pytest.fixture
def listening():
    """Return models that remember what they were asked."""
    return Listening


@pytest.fixture
def nobody_by_default():
    """Return people who must say who they are."""
    return ByHeader(None)


@pytest.fixture
def open_site():
    """Return what makes a site; close it."""
    return Site


@pytest.fixture
def run():
    """Return a function that runs an async test with a fresh site, which is its own client."""

    def outside(scenario, **options):
        async def inside():
            site = Site(**options)
            try:
                await scenario(site)
            finally:
                await site.close()

        asyncio.run(inside())

    return outside
