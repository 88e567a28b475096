"""Owner checks on every route of the assistant. The routes come from the application itself: one that is not
told about here fails the test, so none can be forgotten.
"""

from __future__ import annotations

import pytest

from bise.assistant.scripted import ScriptedModels

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
    ("POST", f"{CONVERSATION}/summary"): {},
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
    ("DELETE", "/accounts/{account_id}"): None,
}


@pytest.fixture
def house(run, nobody_by_default):
    """Return a function that runs an async test with a site where everybody says who they are."""
    models = ScriptedModels(lambda _: SECRET * 400, pace_s=0.05)
    return lambda scenario: run(scenario, models=models, people=nobody_by_default)


async def send(site, method, path, body=None, *, person=None):
    headers = {} if person is None else {"x-person": person}
    return await site.request(method, ROOT + path, json=body, headers=headers)


async def furnish(site, *, temporary):
    """Give Ana one of everything, and one answer being written; return their ids."""
    persona = await send(site, "POST", "/personas", {"name": SECRET, "system": SECRET}, person="ana")
    talk = await send(site, "POST", "/conversations", {"title": SECRET, "temporary": temporary}, person="ana")
    conversation = talk.json()["id"]
    await send(site, "PATCH", f"/conversations/{conversation}", {"folder": SECRET}, person="ana")
    document = await site.post(
        f"{ROOT}/conversations/{conversation}/documents?name={SECRET}.txt",
        content=SECRET.encode(),
        headers={"x-person": "ana", "content-type": "application/octet-stream"},
    )
    asked = await send(
        site, "POST", f"/conversations/{conversation}/messages", {"text": SECRET}, person="ana"
    )
    return {
        "conversation_id": conversation,
        "document_id": document.json()["id"],
        "message_id": asked.json()["answer"]["id"],
        "run_id": asked.json()["answer"]["run_id"],
        "persona_id": persona.json()["id"],
        "account_id": "0" * 36,
    }


def routes(app):
    for route in app.router.routes:
        for found in getattr(getattr(route, "original_router", None), "routes", [route]):
            if found.path.startswith(ROOT):
                for method in found.methods - {"HEAD"}:
                    yield method, found.path.removeprefix(ROOT)


def filled(value, names):
    if isinstance(value, str):
        return value.format(**names)
    if isinstance(value, list):
        return [filled(part, names) for part in value]
    if isinstance(value, dict):
        return {key: filled(part, names) for key, part in value.items()}
    return value


def test_this_file_tells_of_every_route(house):
    async def scenario(site):
        told = {*NOT_FOUND, *OWN, *ELSEWHERE, *FOR_ADMINS}
        there = set(routes(site.app))
        assert there == {(method, path.partition("?")[0]) for method, path in told}

    house(scenario)


@pytest.mark.parametrize("temporary", [False, True])
def test_a_second_person_finds_nothing_on_any_route(temporary, house):
    async def scenario(site):
        names = await furnish(site, temporary=temporary)
        for (method, path), body in NOT_FOUND.items():
            answer = await send(site, method, filled(path, names), filled(body, names), person="bob")
            assert answer.status_code == 404, (method, path, answer.text)
            assert SECRET not in answer.text
        for (method, path), body in OWN.items():
            answer = await send(site, method, path, body, person="bob")
            assert answer.status_code in (200, 201), (method, path, answer.text)
            assert SECRET not in answer.text, (method, path)
            assert not any(name in answer.text for name in names.values() if name != "0" * 36)
        for (method, path), body in FOR_ADMINS.items():
            answer = await send(site, method, filled(path, names), body, person="bob")
            assert answer.status_code == 403, (method, path, answer.text)
        kept = (await send(site, "GET", f"/conversations/{names['conversation_id']}", person="ana")).json()
        assert (kept["conversation"]["title"], kept["conversation"]["folder"]) == (SECRET, SECRET)
        assert kept["messages"][1]["status"] in ("queued", "prefill", "running")

    house(scenario)


def test_nobody_gets_in_without_signing_in(house):
    async def scenario(site):
        names = await furnish(site, temporary=False)
        for (method, path), body in {**NOT_FOUND, **OWN, **FOR_ADMINS, ("GET", "/events"): None}.items():
            answer = await send(site, method, filled(path, names), filled(body, names))
            assert answer.status_code == 401, (method, path, answer.text)
            assert SECRET not in answer.text

    house(scenario)


def test_a_tab_hears_of_its_own_owner_only(house):
    async def scenario(site):
        tab = site.assistant.hub.listen("bob", 0.01)
        assert await anext(tab) is None
        await furnish(site, temporary=False)
        assert await anext(tab) is None
        await tab.aclose()

    house(scenario)
