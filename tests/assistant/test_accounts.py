"""Accounts over HTTP: the first is the admin, cookies are strict, nobody reads another's conversations."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import httpx
import pytest
from argon2 import PasswordHasher, extract_parameters
from fastapi import FastAPI
from sqlalchemy import text

from bise.assistant.accounts import Accounts
from bise.assistant.scripted import ScriptedModels, quick_hasher
from bise.assistant.service import Assistant
from bise.assistant.storage import Memory
from bise.errors import AuthenticationError, BiseError, ConflictError, RateLimitError
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_people import Household
from bise.server.assistant_routes import assistant_router
from bise.server.problem import error_response

PASSWORD = "a long enough one"


def household(scenario, client_address=("127.0.0.1", 1)):
    async def inside():
        storage = Memory()
        accounts = Accounts(storage, quick_hasher())
        assistant = Assistant(storage, ScriptedModels(lambda _: "ok"))
        app = FastAPI()
        app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
        app.include_router(assistant_router(lambda: assistant, Household(accounts)))
        app.include_router(accounts_router(accounts, Household(accounts), lambda: assistant))

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


def test_wrong_passwords_must_wait_and_the_last_admin_stays(monkeypatch):
    still = SimpleNamespace(
        time=time.time, monotonic=lambda: 5.0
    )  # the wait does not end while it is looked at
    monkeypatch.setattr("bise.assistant.accounts.time", still)
    accounts = Accounts(Memory(), quick_hasher())
    ana = accounts.create_first("ana", PASSWORD)
    for _ in range(5):
        with pytest.raises(BiseError, match="wrong"):
            accounts.sign_in("ana", "not this one")
    with pytest.raises(RateLimitError, match="try again in") as caught:
        accounts.sign_in("ana", PASSWORD)
    assert 0 < caught.value.retry_after_s <= 1
    assert accounts.sign_in("ana", PASSWORD, address="192.0.2.9")[0].name == "ana"
    with pytest.raises(ConflictError, match="one admin"):
        accounts.change(ana.id, role="user")


def test_a_new_password_needs_the_old_one_and_signs_other_browsers_out():
    async def scenario(browser):
        ana, phone = browser(), browser()
        await ana.post("/first-account", json={"name": "ana", "password": PASSWORD})
        await phone.post("/sign-in", json={"name": "ana", "password": PASSWORD})
        new = "another long enough one"
        assert (await ana.post("/password", json={"old": "wrong", "new": new})).status_code == 403
        assert (await ana.post("/password", json={"old": PASSWORD, "new": "short"})).status_code == 400
        assert (await ana.post("/password", json={"old": PASSWORD, "new": new})).status_code == 204
        assert (await ana.get("/bootstrap")).status_code == 200
        assert (await phone.get("/bootstrap")).status_code == 401
        assert (await phone.post("/sign-in", json={"name": "ana", "password": PASSWORD})).status_code == 401
        assert (await phone.post("/sign-in", json={"name": "ana", "password": new})).status_code == 200
        assert (await browser().post("/password", json={"old": new, "new": PASSWORD})).status_code == 401

    household(scenario)


def test_only_argon2id_is_kept_of_a_password_and_a_hash_of_a_cookie():
    storage = Memory()
    accounts = Accounts(storage)
    accounts.create_first("ana", PASSWORD)
    _, token = accounts.sign_in("ana", PASSWORD)
    with storage.reading() as session:
        (stored,) = session.scalars(text("SELECT password_hash FROM accounts"))
        (kept,) = session.scalars(text("SELECT token_hash FROM sign_ins"))
    assert stored.startswith("$argon2id$")
    assert token not in kept
    assert PASSWORD not in stored


def test_a_name_that_does_not_exist_costs_what_a_wrong_password_costs(monkeypatch):
    accounts = Accounts(Memory())
    accounts.create_first("ana", PASSWORD)
    checked = []
    verify = PasswordHasher.verify

    def noted(hasher, stored, password):
        checked.append(extract_parameters(stored))
        return verify(hasher, stored, password)

    monkeypatch.setattr(PasswordHasher, "verify", noted)
    for name in ("ana", "nobody"):
        with pytest.raises(AuthenticationError):
            accounts.sign_in(name, "not this one")
    assert checked[0] == checked[1]
    assert checked[0].memory_cost >= 64 << 10


def test_an_admin_deletes_an_account_with_all_it_had_once_its_name_was_repeated():
    async def scenario(browser):
        ana, bob = browser(), browser()
        await ana.post("/first-account", json={"name": "ana", "password": PASSWORD})
        made = (await ana.post("/accounts", json={"name": "bob", "password": PASSWORD})).json()
        await bob.post("/sign-in", json={"name": "bob", "password": PASSWORD})
        await bob.post("/conversations", json={"title": "Mine"})
        await bob.post("/conversations", json={"title": "Passing", "temporary": True})
        await bob.post("/personas", json={"name": "Poet"})
        await bob.patch("/settings", json={"theme": "dark"})
        path = f"/accounts/{made['id']}"
        assert (await bob.delete(f"{path}?name=bob")).status_code == 403
        for query in ("", "?name=ana"):
            refused = await ana.delete(path + query)
            assert (refused.status_code, "cannot be undone" in refused.text) == (400, True)
        assert (await bob.get("/bootstrap")).status_code == 200
        gone = await ana.delete(f"{path}?name=Bob")
        assert (gone.status_code, gone.json()) == (200, {"id": made["id"], "conversations": 1})
        assert (await bob.get("/bootstrap")).status_code == 401
        assert (await ana.delete(f"{path}?name=bob")).status_code == 404
        await ana.post("/accounts", json={"name": "bob", "password": PASSWORD})
        await bob.post("/sign-in", json={"name": "bob", "password": PASSWORD})
        boot = (await bob.get("/bootstrap")).json()
        assert (boot["conversations"], boot["personas"], boot["settings"]) == ([], [], {})

    household(scenario)


def test_the_last_admin_cannot_be_deleted_and_stays_signed_in():
    async def scenario(browser):
        ana = browser()
        await ana.post("/first-account", json={"name": "ana", "password": PASSWORD})
        (account,) = (await ana.get("/accounts")).json()["accounts"]
        assert (await ana.delete(f"/accounts/{account['id']}?name=ana")).status_code == 409
        assert (await ana.get("/bootstrap")).json()["person"] == {"name": "ana", "role": "admin"}

    household(scenario)


def test_a_role_that_changes_counts_from_the_next_request_on():
    async def scenario(browser):
        ana, bob = browser(), browser()
        await ana.post("/first-account", json={"name": "ana", "password": PASSWORD})
        made = (await ana.post("/accounts", json={"name": "bob", "password": PASSWORD})).json()
        await bob.post("/sign-in", json={"name": "bob", "password": PASSWORD})
        assert (await bob.get("/accounts")).status_code == 403
        changed = await ana.patch(f"/accounts/{made['id']}", json={"role": "admin"})
        assert changed.json()["role"] == "admin"
        assert (await bob.get("/accounts")).status_code == 200
        assert (await ana.patch(f"/accounts/{made['id']}", json={"role": "king"})).status_code == 400

    household(scenario)
