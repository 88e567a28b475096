"""The assistant over HTTP: conversations, runs as server-sent events, and the page itself.

Every route asks `people` who is there and passes the owner on; nothing here decides on models or storage.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bise import __version__
from bise.assistant.conversations import Conversation, cursor_after
from bise.assistant.exchange import as_json, as_markdown, import_file
from bise.assistant.runs import Event, Run
from bise.assistant.service import Assistant
from bise.assistant.shelf import Shelf
from bise.errors import RequestError, quoted
from bise.server.assistant_documents import add_documents, document_facts
from bise.server.assistant_folders import add_folders, folder_facts
from bise.server.assistant_page import PAGE_HEADERS, StaticPage
from bise.server.assistant_people import People, Person, check_body, check_origin
from bise.server.assistant_personas import add_personas, persona_facts

HEARTBEAT_S = 5.0
HINTS = {
    "shorter": "Answer more briefly than before.",
    "longer": "Answer in more detail than before.",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewConversation(_Body):
    """Fields of a new conversation."""

    title: str = ""
    model: str | None = None
    system: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    folder: str | None = None
    persona_id: str | None = None
    temporary: bool = False


class Question(_Body):
    """A question to ask."""

    text: str
    parent_id: str | None = None
    client_id: str | None = Field(default=None, max_length=64)
    model: str | None = None
    documents: list[str] = Field(default_factory=list, max_length=100)
    run: bool = True
    keep_from: str | None = None
    """The first question that the answer shall read; what comes before it is left out."""


class Again(_Body):
    """How to answer again."""

    model: str | None = None
    hint: str | None = None
    params: dict[str, Any] | None = None


class Summary(_Body):
    """How to sum a conversation up."""

    model: str | None = None


class Judgement(_Body):
    """What a person thinks of an answer."""

    feedback: int | None


class Ids(_Body):
    """Several conversations."""

    ids: list[str] = Field(max_length=1000)


def assistant_router(
    assistant: Callable[[], Assistant], people: People, examples: Sequence[str] = ()
) -> APIRouter:
    """Return all routes under /api/v1; `assistant` is called per request, so it may be made at start-up.

    `examples` are questions that the empty screen offers.
    """

    async def person(request: Request, response: Response) -> Person:
        check_origin(request)
        response.headers["cache-control"] = "no-store"
        found = await people.person(request)
        await check_body(request)
        return found

    who: Any = Depends(person)
    router = APIRouter(prefix="/api/v1", include_in_schema=False)
    _add_conversations(router, assistant, who, examples)
    _add_changes(router, assistant, who)
    _add_exchange(router, assistant, who)
    _add_edits(router, assistant, who)
    _add_settings(router, assistant, who)
    add_documents(router, assistant, who)
    _add_messages(router, assistant, who)
    _add_runs(router, assistant, who)
    add_folders(router, assistant, who)
    add_personas(router, assistant, who)
    return router


def page_router(page: StaticPage) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/c/{conversation_id}")
    def index(request: Request, conversation_id: str = "") -> Response:
        return page.answer(request, "index.html")

    @router.get("/assets/{name}")
    def asset(request: Request, name: str) -> Response:
        return page.answer(request, f"assets/{name}")

    @router.get("/mark.svg")
    @router.get("/manifest.webmanifest")
    def extra(request: Request) -> Response:
        return page.answer(request, request.url.path.removeprefix("/"))

    return router


def _add_conversations(
    router: APIRouter, assistant: Callable[[], Assistant], who: Any, examples: Sequence[str]
) -> None:
    @router.get("/bootstrap")
    async def bootstrap(person: Person = who) -> dict[str, Any]:
        service = assistant()
        listing = await asyncio.to_thread(service.disk.conversations.listing, person.owner)
        return {
            "version": __version__,
            "person": {"name": person.name, "role": person.role},
            "models": [dataclasses.asdict(facts) for facts in service.models.facts()],
            "examples": [*examples],
            "settings": await service.preferences(person.owner),
            "conversations": [dataclasses.asdict(found) for found in listing],
            "cursor": cursor_after(listing),
            "folders": await folder_facts(service, person.owner),
            "personas": await persona_facts(service, person.owner),
            "runs": [_run_facts(run) for run in service.runs.live(person.owner)],
        }

    @router.get("/conversations")
    async def conversations(
        person: Person = who,
        cursor: Annotated[str | None, Query(max_length=100)] = None,
        q: Annotated[str, Query(max_length=500)] = "",
        archived: bool = False,
        folder: Annotated[str | None, Query(max_length=200)] = None,
    ) -> dict[str, Any]:
        shelf = assistant().disk
        if q.strip():
            matches = await asyncio.to_thread(
                lambda: shelf.conversations.search(person.owner, q, cursor=cursor)
            )
            found = [dataclasses.asdict(entry) for entry in matches.found]
            return {"conversations": found, "cursor": matches.cursor}
        found = await asyncio.to_thread(
            lambda: shelf.conversations.listing(person.owner, cursor=cursor, archived=archived, folder=folder)
        )
        return {
            "conversations": [dataclasses.asdict(entry) for entry in found],
            "cursor": cursor_after(found),
        }


def _add_changes(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.post("/conversations", status_code=201)
    async def create(body: NewConversation, person: Person = who) -> dict[str, Any]:
        return dataclasses.asdict(await assistant().create(person.owner, **body.model_dump()))

    @router.post("/conversations/delete")
    async def delete_many(body: Ids, person: Person = who) -> dict[str, Any]:
        await assistant().delete(person.owner, body.ids)
        return {"deleted": len(body.ids)}

    @router.post("/conversations/restore")
    async def restore_many(body: Ids, person: Person = who) -> dict[str, Any]:
        for conversation_id in body.ids:
            await assistant().restore(person.owner, conversation_id)
        return {"restored": len(body.ids)}

    @router.get("/conversations/{conversation_id}")
    async def read(
        conversation_id: str,
        person: Person = who,
        leaf: str | None = None,
        before: str | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 40,
    ) -> dict[str, Any]:
        service = assistant()
        shelf = await service.shelf_of(person.owner, conversation_id)
        found = await asyncio.to_thread(shelf.conversations.get, person.owner, conversation_id)
        documents = await asyncio.to_thread(shelf.documents.listing, person.owner, conversation_id)
        page = await service.page(person.owner, conversation_id, leaf=leaf, before=before, limit=limit)
        return {
            "conversation": dataclasses.asdict(found) | {"temporary": service.is_temporary(shelf)},
            "documents": [document_facts(document) for document in documents],
            **dataclasses.asdict(page),
        }


def _add_exchange(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.get("/conversations/{conversation_id}/export")
    async def export(conversation_id: str, person: Person = who, form: str = "markdown") -> Response:
        shelf = await assistant().shelf_of(person.owner, conversation_id)
        found = await asyncio.to_thread(shelf.conversations.get, person.owner, conversation_id)
        if form == "json":
            whole = await asyncio.to_thread(_whole, shelf, person.owner, found)
            return _download(json.dumps(whole, ensure_ascii=False, indent=1), "json")
        if form != "markdown":
            raise RequestError(f"form must be markdown or json, got {quoted(form)}", field="form")
        branch = await asyncio.to_thread(shelf.messages.branch, person.owner, conversation_id)
        return _download(as_markdown(found, branch), "md")

    @router.get("/export")
    async def export_all(person: Person = who) -> Response:
        shelf = assistant().disk

        async def lines() -> AsyncGenerator[bytes]:
            for archived in (False, True):
                cursor: str | None = None
                while True:
                    list_page = partial(shelf.conversations.listing, cursor=cursor, archived=archived)
                    page = await asyncio.to_thread(list_page, person.owner)
                    for found in page:
                        whole = await asyncio.to_thread(_whole, shelf, person.owner, found)
                        yield (_json(whole) + "\n").encode()
                    cursor = cursor_after(page)
                    if cursor is None:
                        break

        name = {"content-disposition": "attachment; filename=bise-conversations.ndjson"}
        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=PAGE_HEADERS | name)

    @router.post("/import", status_code=201)
    async def import_(request: Request, person: Person = who) -> dict[str, Any]:
        service = assistant()
        with tempfile.TemporaryFile() as file:  # a large one must not stand in memory
            async for piece in request.stream():
                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(file.seek, 0)
            report = await asyncio.to_thread(import_file, service.disk.storage, person.owner, file)
        service.hub.tell(person.owner, "reload")
        return dataclasses.asdict(report)


def _add_edits(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.patch("/conversations/{conversation_id}")
    async def change(conversation_id: str, body: dict[str, Any], person: Person = who) -> dict[str, Any]:
        return dataclasses.asdict(await assistant().change(person.owner, conversation_id, body))

    @router.delete("/conversations/{conversation_id}", status_code=204)
    async def delete(conversation_id: str, person: Person = who) -> None:
        await assistant().delete(person.owner, [conversation_id])

    @router.post("/conversations/{conversation_id}/restore")
    async def restore(conversation_id: str, person: Person = who) -> dict[str, Any]:
        return dataclasses.asdict(await assistant().restore(person.owner, conversation_id))


def _add_settings(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.patch("/settings")
    async def settings(body: dict[str, Any], person: Person = who) -> dict[str, Any]:
        return await assistant().change_preferences(person.owner, body)


def _add_messages(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.post("/conversations/{conversation_id}/messages", status_code=201)
    async def ask(conversation_id: str, body: Question, person: Person = who) -> dict[str, Any]:
        question, answer = await assistant().ask(person.owner, conversation_id, **body.model_dump())
        return {
            "message": dataclasses.asdict(question),
            "answer": None if answer is None else dataclasses.asdict(answer),
        }

    @router.post("/conversations/{conversation_id}/summary", status_code=201)
    async def sum_up(conversation_id: str, body: Summary, person: Person = who) -> dict[str, Any]:
        made, answer = await assistant().sum_up(person.owner, conversation_id, body.model)
        return {"conversation": dataclasses.asdict(made), "answer": dataclasses.asdict(answer)}

    @router.get("/messages/{message_id}")
    async def message(message_id: str, person: Person = who) -> dict[str, Any]:
        service = assistant()
        _, found = await service.message(person.owner, message_id)
        return dataclasses.asdict(service.live(found))

    @router.post("/messages/{message_id}/regenerate", status_code=201)
    async def regenerate(message_id: str, body: Again, person: Person = who) -> dict[str, Any]:
        hint = None if body.hint is None else HINTS.get(body.hint, body.hint)
        answer = await assistant().answer_again(
            person.owner, message_id, model=body.model, hint=hint, params=body.params
        )
        return dataclasses.asdict(answer)

    @router.post("/messages/{message_id}/continue", status_code=201)
    async def go_on(message_id: str, person: Person = who) -> dict[str, Any]:
        return dataclasses.asdict(await assistant().go_on(person.owner, message_id))

    @router.post("/messages/{message_id}/branch", status_code=201)
    async def branch(message_id: str, person: Person = who) -> dict[str, Any]:
        return dataclasses.asdict(await assistant().branch_off(person.owner, message_id))

    @router.post("/messages/{message_id}/feedback")
    async def feedback(message_id: str, body: Judgement, person: Person = who) -> dict[str, Any]:
        shelf, _ = await assistant().message(person.owner, message_id)
        rated = await asyncio.to_thread(shelf.messages.rate, person.owner, message_id, body.feedback)
        return dataclasses.asdict(rated)


def _add_runs(router: APIRouter, assistant: Callable[[], Assistant], who: Any) -> None:
    @router.get("/runs/{run_id}/events")
    async def follow(request: Request, run_id: str, person: Person = who, after: int = 0) -> Response:
        run = assistant().run(person.owner, run_id)
        last = request.headers.get("last-event-id", "")
        position = int(last) if last.isdecimal() and len(last) < 12 else after
        return _stream(_run_events(run, position))

    @router.delete("/runs/{run_id}", status_code=204)
    async def stop(run_id: str, person: Person = who) -> None:
        await assistant().stop(person.owner, run_id)

    @router.get("/events")
    async def events(person: Person = who) -> Response:
        return _stream(_tab_events(assistant(), person.owner))


def _whole(shelf: Shelf, owner: str, conversation: Conversation) -> dict[str, Any]:
    """Return a conversation with everything in it, for an export."""
    listed = shelf.documents.listing(owner, conversation.id)
    documents = [shelf.documents.get(owner, conversation.id, found.id) for found in listed]
    return as_json(conversation, shelf.messages.all(owner, conversation.id), documents)


def _download(text: str, ending: str) -> Response:
    kind = "application/json" if ending == "json" else "text/markdown; charset=utf-8"
    name = {"content-disposition": f"attachment; filename=bise-conversation.{ending}"}
    return Response(text, media_type=kind, headers=PAGE_HEADERS | name)


def _stream(events: AsyncGenerator[bytes]) -> Response:
    headers = {**PAGE_HEADERS, "cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _run_events(run: Run, after: int) -> AsyncGenerator[bytes]:
    yield b": here\n\n"
    async for events in run.follow(after, HEARTBEAT_S):
        if events is None:
            yield b": still here\n\n"
        else:
            yield b"".join(_event_bytes(run, event) for event in events)


def _event_bytes(run: Run, event: Event) -> bytes:
    if event.kind == "piece":
        body: dict[str, Any] = {
            "id": f"chatcmpl-{run.id}",
            "object": "chat.completion.chunk",
            "model": run.job.model,
            "choices": [{"index": 0, "delta": event.body, "finish_reason": None}],
        }
        return f"id: {event.seq}\ndata: {_json(body)}\n\n".encode()
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {_json(event.body)}\n\n".encode()


async def _tab_events(assistant: Assistant, owner: str) -> AsyncGenerator[bytes]:
    yield b"event: hello\ndata: {}\n\n"
    async for event in assistant.hub.listen(owner, HEARTBEAT_S):
        if event is None:
            yield b": still here\n\n"
        else:
            yield f"event: change\ndata: {_json(event)}\n\n".encode()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _run_facts(run: Run) -> dict[str, Any]:
    return {"id": run.id, "conversation_id": run.conversation_id, "message_id": run.message_id}
