"""Documents of a conversation, and what fills its context, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from bise.assistant.context import view_context
from bise.assistant.documents import Document, excerpt
from bise.assistant.left_out import kept
from bise.assistant.service import Assistant
from bise.server.assistant_people import Person


class Draft(BaseModel):
    """A question that is being typed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    draft: str = ""
    model: str | None = None


def add_documents(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    """Add the routes to the assistant's router."""

    @router.post("/conversations/{conversation_id}/documents", status_code=201)
    async def add_document(
        request: Request,
        conversation_id: str,
        name: Annotated[str, Query(max_length=300)] = "file",
        person: Person = who,
    ) -> dict[str, Any]:
        service = assistant()
        await service.shelf_of(person.owner, conversation_id)
        content = await request.body()
        return document_facts(await service.add_document(person.owner, conversation_id, name, content))

    @router.get("/conversations/{conversation_id}/documents/{document_id}")
    async def document(conversation_id: str, document_id: str, person: Person = who) -> dict[str, Any]:
        shelf = await assistant().shelf_of(person.owner, conversation_id)
        found = await asyncio.to_thread(shelf.documents.get, person.owner, conversation_id, document_id)
        return document_facts(found) | {"text": found.text, "pages": found.pages}

    @router.get("/conversations/{conversation_id}/documents/{document_id}/passage")
    async def passage(
        conversation_id: str,
        document_id: str,
        person: Person = who,
        start: int = 0,
        end: int = 1,
        around: Annotated[int, Query(ge=0, le=20_000)] = 600,
    ) -> dict[str, Any]:
        shelf = await assistant().shelf_of(person.owner, conversation_id)
        found = await asyncio.to_thread(shelf.documents.get, person.owner, conversation_id, document_id)
        return {"document": document_facts(found)} | excerpt(found, start, end, around)

    @router.delete("/conversations/{conversation_id}/documents/{document_id}", status_code=204)
    async def remove(conversation_id: str, document_id: str, person: Person = who) -> None:
        shelf = await assistant().shelf_of(person.owner, conversation_id)
        await asyncio.to_thread(shelf.documents.delete, person.owner, conversation_id, document_id)

    @router.post("/conversations/{conversation_id}/context")
    async def context(conversation_id: str, body: Draft, person: Person = who) -> dict[str, Any]:
        service = assistant()
        shelf = await service.shelf_of(person.owner, conversation_id)
        found = await asyncio.to_thread(shelf.conversations.get, person.owner, conversation_id)
        facts = service.model_facts(body.model or found.model)
        branch = await asyncio.to_thread(shelf.messages.branch, person.owner, conversation_id)
        branch = [service.live(message) for message in branch]
        prompt: list[dict[str, str]] = []
        if branch:
            turn = await asyncio.to_thread(shelf.messages.turn, person.owner, branch[-1].id)
            live = dataclasses.replace(turn, answer=branch[-1])
            if branch[-1].role == "user":
                live = dataclasses.replace(
                    turn, history=tuple(branch), answer=dataclasses.replace(branch[-1], text="")
                )
            prompt, _ = await service.prompt(shelf, person.owner, live)
            branch = kept(branch)
        view = await view_context(
            service.models, facts, system=found.system, branch=branch, prompt=prompt, draft=body.draft
        )
        return dataclasses.asdict(view)


def document_facts(document: Document) -> dict[str, Any]:
    """Return a document in wire form, without its text."""
    names = ("id", "name", "kind", "tokens", "chars")
    return {name: getattr(document, name) for name in names}
