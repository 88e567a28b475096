"""Who asks: the person behind a request to the assistant, and whether it may come from where it does."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, Protocol, cast

from bise.errors import AuthenticationError, ModelFileError, PermissionDeniedError, RequestError
from bise.jsonfile import parse_json

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.assistant.accounts import Accounts

LOCAL_OWNER = "local"
"""Owner of everything where one person uses the assistant without an account."""
COOKIE = "bise_session"
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Nesting and values of a JSON body; imports have bounds of their own."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class People(Protocol):
    """Tells people apart."""

    async def person(self, request: Request) -> Person:
        """Return who asks. Raises AuthenticationError when nobody is signed in."""
        ...

    async def check_first(self, request: Request) -> None:
        """Refuse whoever may not make the first account, which is an admin's."""
        ...

    async def forget(self, account_id: str) -> None:
        """Drop what else is kept of an account that was deleted."""
        ...


class Person:
    """Someone who uses the assistant."""

    def __init__(self, owner: str, name: str, role: str) -> None:
        self.owner = owner
        self.name = name
        self.role = role


class OnePerson:
    """A single person without a password; only for a server that is reached over loopback."""

    async def person(self, request: Request) -> Person:
        """Return the one person. Raises PermissionDeniedError for a host name that is not loopback's: a page
        elsewhere could have made its own name point here (DNS rebinding).
        """
        if request.client is not None and not _is_here(request.client.host):
            raise PermissionDeniedError("this assistant has no accounts and answers this machine only")
        host = host_name(request)
        if host not in _LOOPBACK and not host.endswith(".localhost"):
            raise PermissionDeniedError(
                f"this assistant answers on localhost only, not as '{host[:80]}'; start bise serve with "
                "accounts to reach it from elsewhere"
            )
        return Person(LOCAL_OWNER, "", "admin")

    async def check_first(self, request: Request) -> None:
        """Refuse whoever is not the one person."""
        await self.person(request)

    async def forget(self, account_id: str) -> None:
        """Do nothing: there is nothing else."""


class NoAccountError(AuthenticationError):
    """Nobody has an account yet: the first one to make one becomes the admin."""

    code = "no_account"


class Household:
    """People with accounts; as long as there is none, one person on this machine needs none."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self._alone = OnePerson()

    async def person(self, request: Request) -> Person:
        """Return who is signed in. Raises AuthenticationError."""
        token = request.cookies.get(COOKIE)
        if token is None and await asyncio.to_thread(self.accounts.is_empty):
            if request.client is not None and not _is_here(request.client.host):
                raise NoAccountError("make the first account; it becomes the admin's")
            return await self._alone.person(request)
        if token is None:
            raise AuthenticationError("sign in first")
        account = await asyncio.to_thread(self.accounts.whose, token)
        return Person(account.id, account.name, account.role)

    async def check_first(self, request: Request) -> None:
        """Let everyone who can reach this server."""

    async def forget(self, account_id: str) -> None:
        """Do nothing: there is nothing else."""


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def host_name(request: Request) -> str:
    """Return the host that the browser asked for, without its port."""
    host = request.headers.get("host", "").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def check_origin(request: Request) -> None:
    """Refuse what another site's page sends. Raises PermissionDeniedError."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise PermissionDeniedError("this request came from another site's page")
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != request.headers.get("host", "").lower():
        raise PermissionDeniedError("this request came from another site's page")
    if request.method in ("POST", "PUT", "PATCH"):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        # A form can send three content types without asking first; none of them is taken here.
        if has_body and kind not in ("application/json", "application/octet-stream", "application/x-ndjson"):
            raise PermissionDeniedError(f"content type '{kind[:40]}' is not taken; send application/json")


async def check_body(request: Request) -> None:
    """Refuse what readers disagree about, or what no database can keep: in JSON duplicate keys, NaN, halves
    of surrogate pairs, absurd depth; anywhere NUL. Raises RequestError.
    """
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
        raise RequestError("the address has a NUL character", field="path")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.url.path.endswith("/import"):
        return
    data = await request.body()
    if not data:
        return

    def check() -> None:
        try:
            value = parse_json(data, "body", max_depth=MAX_DEPTH, max_values=MAX_VALUES)
            if b"\\u0000" in data and _has_nul(value):
                raise RequestError("the body has a NUL character (U+0000)", field="body")
        except (ModelFileError, RecursionError) as error:
            reason = str(error).removeprefix("body: ") if isinstance(error, ModelFileError) else "too deep"
            raise RequestError(f"the body {reason}", field="body") from None

    await asyncio.to_thread(check)


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, list):
        return any(_has_nul(part) for part in cast("list[object]", value))
    if isinstance(value, dict):
        return any(_has_nul(part) for pair in cast("dict[str, object]", value).items() for part in pair)
    return False
