"""Puts the assistant together for one server: models, storage, people and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bise.assistant.models import FleetModels
from bise.assistant.service import Assistant
from bise.server.assistant_page import StaticPage
from bise.server.assistant_people import OnePerson, People
from bise.server.assistant_routes import assistant_router, page_router

if TYPE_CHECKING:
    from fastapi import APIRouter

    from bise.assistant.storage import Storage
    from bise.engine.fleet import Fleet


def assistant_routers(fleet: Fleet, storage: Storage, people: People | None = None) -> list[APIRouter]:
    """Return the assistant's routes over `fleet`, its conversations in `storage`.

    Answers that a dead process left half written are marked as interrupted here, so one process at a time may
    serve the assistant of one database.
    """
    assistant = Assistant(storage, FleetModels(fleet))
    return [assistant_router(lambda: assistant, people or OnePerson()), page_router(StaticPage())]
