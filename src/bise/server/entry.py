"""How its operator's browser gets in once keys exist: by a link with a pass that the server prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from bise.errors import AuthenticationError
from bise.server.access import LOCAL_OWNER, Caller
from bise.server.assistant_people import COOKIE, Household, Person
from bise.server.gate import PASS_COOKIE
from bise.server.metered_models import asking
from bise.server.openapi import documented

if TYPE_CHECKING:
    from bise.assistant.accounts import Accounts
    from bise.server.gate import StoreGate

router = APIRouter()

ASKS = ("/messages", "/regenerate", "/continue", "/summary")
"""Ends of the assistant's routes that begin an answer."""


@router.get("/enter", **documented(None, "Let the operator's browser in.", tag="operation"))
async def enter(request: Request) -> Response:
    """Exchange the pass of the printed link for a cookie and go to the page."""
    gate: StoreGate = request.app.state.service.gate
    given = request.query_params.get("pass", "")
    if not gate.is_pass(given):
        raise AuthenticationError("this link is not of the server that runs now")
    response = RedirectResponse("/", 303)
    response.set_cookie(PASS_COOKIE, given, httponly=True, samesite="strict", path="/")
    return response


class StorePeople:
    """The people of the assistant: those with an account, and those that the gate lets in."""

    def __init__(self, gate: StoreGate, accounts: Accounts) -> None:
        self._gate = gate
        self._household = Household(accounts)
        self.accounts = accounts

    async def person(self, request: Request) -> Person:
        """Return who is signed in, else whose key (or the operator's pass) was sent.

        Raises AuthenticationError; NoAccountError where the first account can be made; RateLimitError where
        an answer is asked for and could not begin now.
        """
        if request.method == "GET":
            return (await self._who(request))[0]
        person, caller = await self.known(request)
        asking.set(caller)
        if request.scope["path"].endswith(ASKS):
            await self._gate.check(caller)
        return person

    async def known(self, request: Request) -> tuple[Person, Caller]:
        """Return who asks and what they may use. Raises AuthenticationError."""
        person, caller = await self._who(request)
        return person, caller or await self._gate.caller_of_account(person.owner, person.name)

    async def _who(self, request: Request) -> tuple[Person, Caller | None]:
        """Return the person and, unless they have an account, what the gate knows of them."""
        has_key = "authorization" in request.headers or "x-api-key" in request.headers
        if not has_key and (
            COOKIE in request.cookies or not await self._gate.offload(self.accounts.is_empty)
        ):
            return await self._at_home(request)
        try:
            caller = await self._gate.caller(request, "inference")
        except AuthenticationError:
            if has_key or self._gate.is_from_here(request):
                raise
            return await self._at_home(request)
        name = "" if caller.key is None else caller.key.name
        return Person(caller.owner, name, "admin" if caller.is_admin else "user"), caller

    async def _at_home(self, request: Request) -> tuple[Person, Caller | None]:
        person = await self._household.person(request)
        if person.owner == LOCAL_OWNER:
            return person, Caller(owner=LOCAL_OWNER, scopes=frozenset({"inference"}))
        return person, None

    async def check_first(self, request: Request) -> None:
        """Refuse whoever the gate refuses: otherwise the first visitor of a public server would become its
        admin.
        """
        await self._gate.caller(request, "inference")

    async def forget(self, account_id: str) -> None:
        """Drop the account's limits and its name; what it used stays in the books under its id."""
        await self._gate.offload(self._gate.store.allowances.forget, account_id)
