"""Puts the assistant together for one server: models, storage, people and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from bise.assistant.examples import checked_examples
from bise.assistant.service import Assistant
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_page import StaticPage
from bise.server.assistant_routes import assistant_router, page_router
from bise.server.assistant_usage import usage_router

if TYPE_CHECKING:
    from bise.assistant.models import ChatModels
    from bise.assistant.storage import Storage
    from bise.server.entry import StorePeople


def assistant_routers(
    storage: Storage, people: StorePeople, models: ChatModels, examples: Sequence[str] = ()
) -> list[APIRouter]:
    """Return the assistant's routes over `models`, its conversations in `storage`.

    `examples` are questions that the empty screen offers. Answers that a dead process left half written are
    marked as interrupted here, so one process at a time may serve the assistant of one database.
    """
    assistant = Assistant(storage, models)
    shown = checked_examples(examples)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        house = asyncio.create_task(assistant.keep_house())
        yield
        house.cancel()
        # Answers that the grace time did not see to their end are kept as far as they were written.
        await assistant.close()

    return [
        APIRouter(lifespan=lifespan),
        assistant_router(lambda: assistant, people, shown),
        accounts_router(people.accounts, people, lambda: assistant),
        usage_router(people, models),
        page_router(StaticPage()),
    ]
