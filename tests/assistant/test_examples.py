"""Questions that the operator wrote for the empty screen."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from bise.assistant.examples import checked_examples
from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import ConfigError
from bise.server.assistant_people import OnePerson
from bise.server.assistant_routes import assistant_router


def test_the_page_gets_them_with_its_first_request():
    async def scenario():
        assistant = Assistant(Memory(), ScriptedModels(lambda _: "ok"))
        app = FastAPI()
        app.include_router(
            assistant_router(lambda: assistant, OnePerson(), checked_examples([" Who  are you?"]))
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            assert (await client.get("/bootstrap")).json()["examples"] == ["Who are you?"]
        await assistant.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("texts", [["a"] * 5, [""], ["  "], ["x" * 201], ["two\nlines"]])
def test_one_that_cannot_be_shown_is_refused(texts):
    with pytest.raises(ConfigError, match="example"):
        checked_examples(texts)
