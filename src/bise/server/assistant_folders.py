"""Folders and changes of many conversations at once, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from bise.assistant.folders import MAX_AT_ONCE, change_many, folders_of, in_folder, rename_folder
from bise.assistant.service import Assistant
from bise.server.assistant_people import Person


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Several(_Body):
    """Conversations, and what to set in all of them."""

    ids: list[str] = Field(max_length=MAX_AT_ONCE)
    changes: dict[str, Any]


class Renaming(_Body):
    """A folder's name and the one it gets; null dissolves it."""

    name: str = Field(max_length=200)
    to: str | None = Field(max_length=200)


def add_folders(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    """Add the routes to the assistant's router."""

    @router.get("/folders")
    async def folders(person: Person = who) -> dict[str, Any]:
        return {"folders": await folder_facts(assistant(), person.owner)}

    @router.get("/folders/conversations")
    async def conversations(name: str, person: Person = who) -> dict[str, Any]:
        found = await asyncio.to_thread(in_folder, assistant().disk.storage, person.owner, name)
        return {"conversations": [dataclasses.asdict(entry) for entry in found]}

    @router.post("/folders/rename")
    async def rename(body: Renaming, person: Person = who) -> dict[str, Any]:
        service = assistant()
        work = partial(rename_folder, service.disk.storage, person.owner, body.name, body.to)
        held = await asyncio.to_thread(work)
        service.hub.tell(person.owner, "reload")
        return {"changed": held}

    @router.post("/conversations/change")
    async def change(body: Several, person: Person = who) -> dict[str, Any]:
        service = assistant()
        work = partial(change_many, service.disk.storage, person.owner, body.ids, body.changes)
        changed = await asyncio.to_thread(work)
        service.hub.tell(person.owner, "reload")
        return {"changed": changed}

    @router.get("/models")
    async def models(person: Person = who) -> dict[str, Any]:
        return {"models": [dataclasses.asdict(facts) for facts in assistant().models.facts()]}


async def folder_facts(service: Assistant, owner: str) -> list[dict[str, Any]]:
    """Return the folders of `owner` in wire form."""
    found = await asyncio.to_thread(folders_of, service.disk.storage, owner)
    return [dataclasses.asdict(folder) for folder in found]
