"""Puts the assistant together for one server: models, storage, people and the page."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from bise.assistant.accounts import Accounts
from bise.assistant.models import FleetModels
from bise.assistant.service import Assistant
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_page import StaticPage
from bise.server.assistant_people import Household, People
from bise.server.assistant_routes import assistant_router, page_router
from bise.server.assistant_usage import usage_router

if TYPE_CHECKING:
    from bise.assistant.models import ChatModels
    from bise.assistant.storage import Storage
    from bise.engine.fleet import Fleet


def assistant_routers(
    fleet: Fleet, storage: Storage, people: People | None = None, models: ChatModels | None = None
) -> list[APIRouter]:
    """Return the assistant's routes over `fleet` (or `models`), its conversations in `storage`.

    Answers that a dead process left half written are marked as interrupted here, so one process at a time may
    serve the assistant of one database.
    """
    assistant = Assistant(storage, models or FleetModels(fleet))
    accounts = Accounts(storage)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        # Answers that the grace time did not see to their end are kept as far as they were written.
        await assistant.close()

    return [
        APIRouter(lifespan=lifespan),
        assistant_router(lambda: assistant, people or Household(accounts)),
        accounts_router(accounts, people or Household(accounts)),
        usage_router(people or Household(accounts)),
        page_router(StaticPage()),
    ]
