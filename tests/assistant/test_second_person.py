"""Owner checks on every route of the assistant. The routes come from the application itself: one that is not
told about here fails the test, so none can be forgotten.
"""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from bise.assistant.accounts import Accounts
from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import AuthenticationError, BiseError
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_people import Person
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response

SECRET = "marmalade"
ROOT = "/api/v1"
CONVERSATION = "/conversations/{conversation_id}"
MESSAGE = "/messages/{message_id}"

NOT_FOUND = {
    ("GET", CONVERSATION): None,
    ("PATCH", CONVERSATION): {"title": "mine"},
    ("DELETE", CONVERSATION): None,
    ("POST", f"{CONVERSATION}/restore"): {},
    ("GET", f"{CONVERSATION}/export"): None,
    ("POST", f"{CONVERSATION}/documents"): {},
    ("GET", f"{CONVERSATION}/documents/{{document_id}}"): None,
    ("GET", f"{CONVERSATION}/documents/{{document_id}}/passage"): None,
    ("DELETE", f"{CONVERSATION}/documents/{{document_id}}"): None,
    ("POST", f"{CONVERSATION}/context"): {},
    ("POST", f"{CONVERSATION}/messages"): {"text": "hi"},
    ("GET", MESSAGE): None,
    ("POST", f"{MESSAGE}/regenerate"): {},
    ("POST", f"{MESSAGE}/continue"): {},
    ("POST", f"{MESSAGE}/branch"): {},
    ("POST", f"{MESSAGE}/feedback"): {"feedback": 1},
    ("GET", "/runs/{run_id}/events"): None,
    ("DELETE", "/runs/{run_id}"): None,
    ("PATCH", "/personas/{persona_id}"): {"name": "mine"},
    ("DELETE", "/personas/{persona_id}"): None,
    ("POST", "/conversations/delete"): {"ids": ["{conversation_id}"]},
    ("POST", "/conversations/restore"): {"ids": ["{conversation_id}"]},
    ("POST", "/conversations/change"): {"ids": ["{conversation_id}"], "changes": {"pinned": True}},
}
"""Routes that name something of Ana's: for Bob it does not exist."""
OWN = {
    ("GET", "/bootstrap"): None,
    ("GET", "/conversations"): None,
    ("GET", "/conversations?q=marmalade"): None,
    ("GET", "/conversations?archived=true"): None,
    ("POST", "/conversations"): {},
    ("GET", "/export"): None,
    ("GET", "/folders"): None,
    ("GET", "/folders/conversations?name=marmalade"): None,
    ("POST", "/folders/rename"): {"name": "marmalade", "to": "mine"},
    ("GET", "/personas"): None,
    ("POST", "/personas"): {"name": "bob's"},
    ("GET", "/models"): None,
    ("PATCH", "/settings"): {"theme": "dark"},
}
"""Routes that answer with what is Bob's: nothing of Ana's is in it."""
ELSEWHERE = {
    ("POST", "/import"): "adds to one's own; tests/assistant/test_exchange.py",
    ("GET", "/events"): "never ends; test_a_tab_hears_of_its_own_owner_only",
    ("POST", "/first-account"): "tests/assistant/test_accounts.py",
    ("POST", "/sign-in"): "tests/assistant/test_accounts.py",
    ("POST", "/password"): "tests/assistant/test_accounts.py",
    ("POST", "/sign-out"): "tests/assistant/test_accounts.py",
}
FOR_ADMINS = {
    ("GET", "/accounts"): None,
    ("POST", "/accounts"): {"name": "eve", "password": "a long enough one"},
    ("PATCH", "/accounts/{account_id}"): {"role": "admin"},
}


class ByHeader:
    async def person(self, request):
        name = request.headers.get("x-person")
        if name is None:
            raise AuthenticationError("sign in")
        return Person(name, name, "user")

    async def check_first(self, request):
        raise AuthenticationError("sign in")


class House:
    """A server where Ana has one of everything, and one answer being written."""

    def __init__(self):
        self.storage = Memory()
        self.assistant = Assistant(self.storage, ScriptedModels(lambda _: SECRET * 400, pace_s=0.05))
        self.app = FastAPI()
        self.app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
        self.app.include_router(assistant_router(lambda: self.assistant, ByHeader()))
        self.app.include_router(accounts_router(Accounts(self.storage), ByHeader()))
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")

    async def send(self, method, path, body=None, *, person=None):
        headers = {} if person is None else {"x-person": person}
        return await self.client.request(method, ROOT + path, json=body, headers=headers)

    async def furnish(self, *, temporary):
        persona = await self.send("POST", "/personas", {"name": SECRET, "system": SECRET}, person="ana")
        talk = await self.send(
            "POST", "/conversations", {"title": SECRET, "temporary": temporary}, person="ana"
        )
        conversation = talk.json()["id"]
        await self.client.patch(
            f"{ROOT}/conversations/{conversation}", json={"folder": SECRET}, headers={"x-person": "ana"}
        )
        document = await self.client.post(
            f"{ROOT}/conversations/{conversation}/documents?name={SECRET}.txt",
            content=SECRET.encode(),
            headers={"x-person": "ana", "content-type": "application/octet-stream"},
        )
        asked = await self.send(
            "POST", f"/conversations/{conversation}/messages", {"text": SECRET}, person="ana"
        )
        return {
            "conversation_id": conversation,
            "document_id": document.json()["id"],
            "message_id": asked.json()["answer"]["id"],
            "run_id": asked.json()["answer"]["run_id"],
            "persona_id": persona.json()["id"],
            "account_id": "0" * 36,
        }

    def routes(self):
        for route in self.app.router.routes:
            for found in getattr(getattr(route, "original_router", None), "routes", [route]):
                if found.path.startswith(ROOT):
                    for method in found.methods - {"HEAD"}:
                        yield method, found.path.removeprefix(ROOT)


def run(scenario):
    async def inside():
        house = House()
        try:
            await scenario(house)
        finally:
            await house.client.aclose()
            await house.assistant.close()

    asyncio.run(inside())


def filled(value, names):
    if isinstance(value, str):
        return value.format(**names)
    if isinstance(value, list):
        return [filled(part, names) for part in value]
    if isinstance(value, dict):
        return {key: filled(part, names) for key, part in value.items()}
    return value


def test_this_file_tells_of_every_route():
    async def scenario(house):
        told = {*NOT_FOUND, *OWN, *ELSEWHERE, *FOR_ADMINS}
        there = set(house.routes())
        assert there == {(method, path.partition("?")[0]) for method, path in told}

    run(scenario)


@pytest.mark.parametrize("temporary", [False, True])
def test_a_second_person_finds_nothing_on_any_route(temporary):
    async def scenario(house):
        names = await house.furnish(temporary=temporary)
        for (method, path), body in NOT_FOUND.items():
            answer = await house.send(method, filled(path, names), filled(body, names), person="bob")
            assert answer.status_code == 404, (method, path, answer.text)
            assert SECRET not in answer.text
        for (method, path), body in OWN.items():
            answer = await house.send(method, path, body, person="bob")
            assert answer.status_code in (200, 201), (method, path, answer.text)
            assert SECRET not in answer.text, (method, path)
            assert not any(name in answer.text for name in names.values() if name != "0" * 36)
        for (method, path), body in FOR_ADMINS.items():
            answer = await house.send(method, filled(path, names), body, person="bob")
            assert answer.status_code == 403, (method, path, answer.text)
        kept = (await house.send("GET", f"/conversations/{names['conversation_id']}", person="ana")).json()
        assert (kept["conversation"]["title"], kept["conversation"]["folder"]) == (SECRET, SECRET)
        assert kept["messages"][1]["status"] in ("queued", "prefill", "running")

    run(scenario)


def test_nobody_gets_in_without_signing_in():
    async def scenario(house):
        names = await house.furnish(temporary=False)
        for (method, path), body in {**NOT_FOUND, **OWN, **FOR_ADMINS, ("GET", "/events"): None}.items():
            answer = await house.send(method, filled(path, names), filled(body, names))
            assert answer.status_code == 401, (method, path, answer.text)
            assert SECRET not in answer.text

    run(scenario)


def test_a_tab_hears_of_its_own_owner_only():
    async def scenario(house):
        tab = house.assistant.hub.listen("bob", 0.01)
        assert await anext(tab) is None
        await house.furnish(temporary=False)
        assert await anext(tab) is None
        await tab.aclose()

    run(scenario)
