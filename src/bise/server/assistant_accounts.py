"""Signing in and out, and the accounts of a household, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.assistant.accounts import SIGNED_IN_S, Accounts
from bise.assistant.service import Assistant
from bise.errors import AuthenticationError, PermissionDeniedError, RequestError
from bise.server.assistant_people import COOKIE, LOCAL_OWNER, People, Person, check_body, check_origin

logger = logging.getLogger(__name__)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Credentials(_Body):
    """A name and a password."""

    name: str = Field(max_length=200)
    password: str = Field(max_length=2000)


class PasswordChange(_Body):
    """One's own password, and the new one."""

    old: str = Field(max_length=2000)
    new: str = Field(max_length=2000)


class NewAccount(Credentials):
    """An account to make."""

    role: str = "user"


class AccountChange(_Body):
    """What to change in an account."""

    role: str | None = None
    disabled: bool | None = None
    password: str | None = Field(default=None, max_length=2000)


def accounts_router(accounts: Accounts, people: People, assistant: Callable[[], Assistant]) -> APIRouter:
    """Return the routes; only an admin sees, changes and deletes accounts."""

    async def same_site(request: Request) -> None:
        check_origin(request)
        await check_body(request)

    router = APIRouter(prefix="/api/v1", include_in_schema=False, dependencies=[Depends(same_site)])

    async def admin(request: Request) -> Person:
        person = await people.person(request)
        if person.role != "admin":
            raise PermissionDeniedError("only an admin may do this")
        return person

    boss: Any = Depends(admin)

    _add_doors(router, accounts, people)

    @router.get("/accounts")
    async def listing(person: Person = boss) -> dict[str, Any]:
        return {
            "accounts": [dataclasses.asdict(found) for found in await asyncio.to_thread(accounts.listing)]
        }

    @router.post("/accounts", status_code=201)
    async def create(body: NewAccount, person: Person = boss) -> dict[str, Any]:
        made = await asyncio.to_thread(accounts.create, body.name, body.password, body.role)
        return dataclasses.asdict(made)

    @router.patch("/accounts/{account_id}")
    async def change(account_id: str, body: AccountChange, person: Person = boss) -> dict[str, Any]:
        changed = await asyncio.to_thread(lambda: accounts.change(account_id, **body.model_dump()))
        return dataclasses.asdict(changed)

    @router.delete("/accounts/{account_id}")
    async def delete(account_id: str, name: str = "", person: Person = boss) -> dict[str, Any]:
        found = await asyncio.to_thread(accounts.get, account_id)
        if name.strip().casefold() != found.name:
            raise RequestError(
                "name must repeat the account's name: deleting it cannot be undone", field="name"
            )
        # First nobody can begin anything there any more, then what runs ends, then all of it goes.
        await asyncio.to_thread(lambda: accounts.change(account_id, disabled=True))
        await assistant().forget(account_id)
        conversations = await asyncio.to_thread(accounts.delete, account_id)
        await people.forget(account_id)
        logger.info("event=account_deleted account=%s conversations=%d", account_id, conversations)
        return {"id": account_id, "conversations": conversations}

    return router


def _add_doors(router: APIRouter, accounts: Accounts, people: People) -> None:
    @router.post("/first-account", status_code=201)
    async def first(request: Request, body: Credentials) -> Response:
        await people.check_first(request)
        await asyncio.to_thread(lambda: accounts.create_first(body.name, body.password, adopts=LOCAL_OWNER))
        return await _signed_in(accounts, request, body)

    @router.post("/sign-in")
    async def sign_in(request: Request, body: Credentials) -> Response:
        return await _signed_in(accounts, request, body)

    @router.post("/sign-out", status_code=204)
    async def sign_out(request: Request) -> Response:
        token = request.cookies.get(COOKIE)
        if token is not None:
            await asyncio.to_thread(accounts.sign_out, token)
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path="/")
        return response

    @router.post("/password", status_code=204)
    async def password(request: Request, body: PasswordChange) -> None:
        token = request.cookies.get(COOKIE)
        if token is None:
            raise AuthenticationError("sign in first")
        await asyncio.to_thread(accounts.change_password, token, body.old, body.new)


async def _signed_in(accounts: Accounts, request: Request, body: Credentials) -> Response:
    address = "" if request.client is None else request.client.host
    account, token = await asyncio.to_thread(
        lambda: accounts.sign_in(body.name, body.password, address=address)
    )
    response = JSONResponse({"name": account.name, "role": account.role})
    response.set_cookie(
        COOKIE,
        token,
        max_age=int(SIGNED_IN_S),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return response
