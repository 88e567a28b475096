"""Shared by the tests of the assistant: its routes over a memory that ends with the test."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import BiseError
from bise.server.assistant_people import Person
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response


class ByHeader:
    """Whoever the header names; Ann without one."""

    async def person(self, request):
        return Person(request.headers.get("x-person", "ann"), "", "user")


@pytest.fixture
def run():
    """Return a function that runs an async test with a client of a fresh site."""
    return _run


def _run(scenario):
    async def inside():
        assistant = Assistant(Memory(), ScriptedModels(lambda _: "Yes."))
        app = FastAPI()
        app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
        app.include_router(assistant_router(lambda: assistant, ByHeader()))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            await scenario(client)
        await assistant.close()

    asyncio.run(inside())
