"""Accounts over HTTP: the first is the admin, cookies are strict, nobody reads another's conversations."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from bise.assistant.accounts import Accounts
from bise.assistant.scripted import ScriptedModels
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import BiseError, ConflictError, PermissionDeniedError
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_people import Household
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response

PASSWORD = "a long enough one"


def household(scenario, client_address=("127.0.0.1", 1)):
    async def inside():
        storage = Memory()
        accounts = Accounts(storage)
        assistant = Assistant(storage, ScriptedModels(lambda _: "ok"))
        app = FastAPI()
        app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
        app.include_router(assistant_router(lambda: assistant, Household(accounts)))
        app.include_router(accounts_router(accounts, Household(accounts)))

        def browser():
            transport = httpx.ASGITransport(app, client=client_address)
            return httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1")

        await scenario(browser)
        await assistant.close()

    asyncio.run(inside())


def test_the_first_account_is_the_admins_and_keeps_what_was_there():
    async def scenario(browser):
        ana = browser()
        made = (await ana.post("/conversations", json={"title": "Mine"})).json()
        signed = await ana.post("/first-account", json={"name": "Ana", "password": PASSWORD})
        assert signed.json() == {"name": "ana", "role": "admin"}
        cookie = signed.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        boot = (await ana.get("/bootstrap")).json()
        assert [entry["id"] for entry in boot["conversations"]] == [made["id"]]
        assert (await browser().get("/bootstrap")).status_code == 401
        again = await browser().post("/first-account", json={"name": "eve", "password": PASSWORD})
        assert again.status_code == 409

    household(scenario)


def test_from_elsewhere_nothing_is_there_before_the_first_account():
    async def scenario(browser):
        answer = await browser().get("/bootstrap")
        assert (answer.status_code, answer.json()["code"]) == (401, "no_account")

    household(scenario, client_address=("192.0.2.7", 1))


def test_a_user_is_no_admin_and_finds_nothing_of_others():
    async def scenario(browser):
        ana, bob = browser(), browser()
        await ana.post("/first-account", json={"name": "ana", "password": PASSWORD})
        made = (await ana.post("/conversations", json={})).json()
        assert (await ana.post("/accounts", json={"name": "bob", "password": PASSWORD})).status_code == 201
        assert (await bob.post("/sign-in", json={"name": "BOB", "password": PASSWORD})).status_code == 200
        assert (await bob.get(f"/conversations/{made['id']}")).status_code == 404
        assert (await bob.get("/accounts")).status_code == 403
        account = (await ana.get("/accounts")).json()["accounts"][1]
        await ana.patch(f"/accounts/{account['id']}", json={"disabled": True})
        assert (await bob.get("/bootstrap")).status_code == 401
        await ana.post("/sign-out", json={})
        assert (await ana.get("/bootstrap")).status_code == 401

    household(scenario)


def test_wrong_passwords_must_wait_and_the_last_admin_stays():
    accounts = Accounts(Memory())
    ana = accounts.create_first("ana", PASSWORD)
    for _ in range(5):
        with pytest.raises(BiseError, match="wrong"):
            accounts.sign_in("ana", "not this one")
    with pytest.raises(PermissionDeniedError, match="try again in"):
        accounts.sign_in("ana", PASSWORD)
    with pytest.raises(ConflictError, match="one admin"):
        accounts.change(ana.id, role="user")
