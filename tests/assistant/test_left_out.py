"""Leaving out the oldest turns at a person's wish: what the model is asked, what the answer says of it."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI

from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import BiseError
from bise.server.assistant_people import OnePerson
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response

API = "/api/v1"


class _Listening(ScriptedModels):
    """Remember what they were asked."""

    def __init__(self):
        super().__init__(lambda _: "Yes.")
        self.asked = []

    async def stream(self, job):
        self.asked.append([message["content"] for message in job.messages])
        async for piece in super().stream(job):
            yield piece


def run(scenario):
    async def inside():
        models = _Listening()
        assistant = Assistant(Memory(), models)
        app = FastAPI()
        app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
        app.include_router(assistant_router(lambda: assistant, OnePerson()))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            made = await client.post(f"{API}/conversations", json={"title": "t"})
            await scenario(client, made.json()["id"], models, assistant)
        await assistant.close()

    asyncio.run(inside())


async def ask(client, assistant, conversation, text, parent=None, **fields):
    """Ask and wait for the answer; return question and answer."""
    body = {"text": text, "parent_id": parent, **fields}
    answer = await client.post(f"{API}/conversations/{conversation}/messages", json=body)
    assert answer.status_code == 201, answer.text
    asked = answer.json()
    run = assistant.run("local", asked["answer"]["run_id"])
    assert run.task is not None
    await run.task
    kept = await client.get(f"{API}/messages/{asked['answer']['id']}")
    return asked["message"], kept.json()


def test_the_oldest_turns_stay_out_of_this_prompt_and_of_those_after_it():
    async def scenario(client, conversation, models, assistant):
        first, one = await ask(client, assistant, conversation, "first")
        second, two = await ask(client, assistant, conversation, "second", one["id"])
        _, three = await ask(client, assistant, conversation, "third", two["id"], keep_from=second["id"])
        assert models.asked[-1] == ["second", "Yes.", "third"]
        assert three["parts"] == [{"type": "dropped", "messages": [first["id"], one["id"]]}]
        await ask(client, assistant, conversation, "fourth", three["id"])
        assert models.asked[-1] == ["second", "Yes.", "third", "Yes.", "fourth"]

    run(scenario)


def test_another_answer_leaves_out_the_same_turns_and_the_context_does_not_count_them():
    async def scenario(client, conversation, models, assistant):
        _, one = await ask(client, assistant, conversation, "first " * 100)
        before = (await client.post(f"{API}/conversations/{conversation}/context", json={})).json()["used"]
        second, two = await ask(client, assistant, conversation, "second", one["id"])
        _, three = await ask(client, assistant, conversation, "third", two["id"], keep_from=second["id"])
        again = (await client.post(f"{API}/messages/{three['id']}/regenerate", json={})).json()
        await assistant.run("local", again["run_id"]).task
        assert models.asked[-1] == ["second", "Yes.", "third"]
        after = (await client.post(f"{API}/conversations/{conversation}/context", json={})).json()["used"]
        assert after < before

    run(scenario)


def test_only_a_question_of_the_branch_can_be_the_first_to_stay():
    async def scenario(client, conversation, models, assistant):
        _, one = await ask(client, assistant, conversation, "first")
        for keep_from in (one["id"], "nobody"):
            body = {"text": "more", "parent_id": one["id"], "keep_from": keep_from}
            answer = await client.post(f"{API}/conversations/{conversation}/messages", json=body)
            assert answer.status_code == 400
            assert "keep_from" in answer.text

    run(scenario)
