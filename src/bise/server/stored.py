"""What the routes over the store share: finding it, telling who asks, reading query arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bise.errors import RequestError
from bise.server.access import Caller
from bise.server.gate import StoreGate
from bise.server.problem import ApiError

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request

MAX_PAGE = 10_000


def routers() -> Sequence[APIRouter]:
    """Return the routes over the store, for `create_app`."""
    from bise.server import (
        adapters_routes,
        admin_routes,
        batches_routes,
        entry,
        files_routes,
        fine_tuning,
        metrics_routes,
        usage_routes,
    )

    modules = (
        files_routes, batches_routes, fine_tuning, usage_routes, admin_routes, adapters_routes,
        metrics_routes, entry,
    )  # fmt: skip
    return [module.router for module in modules]


async def enter(request: Request, scope: str = "read") -> tuple[StoreGate, Caller]:
    """Return the gate over the store and who asks; refuses whoever may not. The first line of a route."""
    gate = request.app.state.service.gate
    if not isinstance(gate, StoreGate):
        await gate.authenticate(request)
        raise ApiError(501, "this server keeps no database", code="not_implemented")
    return gate, await gate.caller(request, scope)


def whole_argument(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Return a whole number from the query; RequestError names it when it is none or out of range."""
    text = request.query_params.get(name)
    if text is None:
        return default
    good = text.isascii() and text.isdecimal() and len(text) < 16
    if not good or not low <= int(text) <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}", field=name)
    return int(text)


def choice_argument(request: Request, name: str, choices: Sequence[str]) -> str | None:
    """Return one of `choices` from the query, None when it is absent; RequestError names it otherwise."""
    text = request.query_params.get(name)
    if text is not None and text not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}", field=name)
    return text


def choice_arguments(request: Request, name: str, choices: Sequence[str]) -> list[str]:
    """Return those of `choices` that the query names, it may be several times; RequestError for another."""
    found = request.query_params.getlist(name)
    if any(text not in choices for text in found):
        raise RequestError(f"{name} must be one of {', '.join(choices)}", field=name)
    return found


def only_arguments(request: Request, *known: str) -> None:
    """Refuse query arguments that a list does not know: a filter not applied would be a wrong list."""
    for name in request.query_params:
        if name not in known:
            raise RequestError(
                f"{name[:64]!r} is not an argument of this route; known: {', '.join(known) or 'none'}",
                field=name[:64],
            )


def page_arguments(request: Request) -> tuple[int, int]:
    """Return (offset, limit) from Mistral's `page` and `page_size` or OpenAI's `limit`."""
    if "page" in request.query_params or "page_size" in request.query_params:
        size = whole_argument(request, "page_size", 100, 1, MAX_PAGE)
        return whole_argument(request, "page", 0, 0, 1_000_000) * size, size
    return 0, whole_argument(request, "limit", 100, 1, MAX_PAGE)


def text_argument(request: Request, name: str, limit: int = 200) -> str | None:
    """Return a short text from the query, None when it is absent."""
    text = request.query_params.get(name)
    if text is not None and (len(text) > limit or not text.isprintable()):
        raise RequestError(f"{name} must be at most {limit} printable characters", field=name)
    return text
