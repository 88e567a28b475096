"""Personas over HTTP: named instructions that a person keeps and gives to conversations."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from bise.assistant.service import Assistant
from bise.server.assistant_people import Person


def add_personas(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    """Add the routes to the assistant's router; bodies hold name, system, model and params."""

    @router.get("/personas")
    async def personas(person: Person = who) -> dict[str, Any]:
        return {"personas": await persona_facts(assistant(), person.owner)}

    @router.post("/personas", status_code=201)
    async def create(body: dict[str, Any], person: Person = who) -> dict[str, Any]:
        service = assistant()
        made = await asyncio.to_thread(service.personas.create, person.owner, body)
        service.hub.tell(person.owner, "personas")
        return dataclasses.asdict(made)

    @router.patch("/personas/{persona_id}")
    async def change(persona_id: str, body: dict[str, Any], person: Person = who) -> dict[str, Any]:
        service = assistant()
        changed = await asyncio.to_thread(service.personas.change, person.owner, persona_id, body)
        service.hub.tell(person.owner, "personas")
        return dataclasses.asdict(changed)

    @router.delete("/personas/{persona_id}", status_code=204)
    async def delete(persona_id: str, person: Person = who) -> None:
        service = assistant()
        await asyncio.to_thread(service.personas.delete, person.owner, persona_id)
        service.hub.tell(person.owner, "personas")


async def persona_facts(service: Assistant, owner: str) -> list[dict[str, Any]]:
    """Return the personas of `owner` in wire form."""
    return [dataclasses.asdict(found) for found in await asyncio.to_thread(service.personas.listing, owner)]
