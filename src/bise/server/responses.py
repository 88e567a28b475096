"""POST /v1/responses: OpenAI's newer form, which Mistral's client speaks too."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.engine.request import Delta, Usage
from bise.errors import NotFoundError, RequestError
from bise.server.blocks import Block, Blocks, Change, Kind
from bise.server.body import read_json
from bise.server.chat import ChatOptions, dropped_body, plan_chat
from bise.server.chat_schema import ChatRequest
from bise.server.conversation import Message
from bise.server.counting import answer_count
from bise.server.faults import spoken_as
from bise.server.logprobs import chat_logprobs
from bise.server.openapi import documented
from bise.server.problem import ApiError, as_api_error
from bise.server.reading import Reader
from bise.server.responses_schema import NAMES, ResponsesRequest, check_include
from bise.server.service import Job, Service
from bise.server.shelf import Shelf
from bise.server.sse import EventStream, event
from bise.server.stored import choice_argument, only_arguments, text_argument, whole_argument
from bise.store.responses import StoredResponse

router = APIRouter()


@router.post("/v1/responses", **documented(ResponsesRequest, "Answer an input.", streams=True))
async def create_response(request: Request) -> Response:
    """Answer an input."""
    service: Service = request.app.state.service
    body = await read_json(request, ResponsesRequest)
    job = await service.open(request, model=body.model)
    try:
        messages = [*await _earlier(request, job, body), *body.new_messages()]
        rivals = (body.top_logprobs or 0) if body.wants_logprobs else None
        with spoken_as(NAMES):
            chat = body.as_chat(messages)
            plan = await job.plan(plan_chat, chat, ChatOptions(rivals=rivals))
            generation = await job.start(plan.requests)
        answer = ResponseAnswer(
            job,
            body,
            messages,
            plan.reading.reader(job.loaded.tokenizer, generation.seeds[0]),
            shelf_of(request),
        )
        if body.stream:
            return EventStream(
                job, answer.events(), finish_reason=answer.finish_reason, on_error=answer.failed_event
            )
        return await answer.whole()
    except BaseException as error:
        await job.finish(None, error)
        raise


@router.post("/v1/responses/input_tokens", **documented(ResponsesRequest, "Count an input's tokens."))
async def count_input_tokens(request: Request) -> Response:
    """Return how many tokens an input has."""
    body = await read_json(request, ResponsesRequest)

    async def chat(job: Job) -> ChatRequest:
        return body.as_chat([*await _earlier(request, job, body), *body.new_messages()])

    with spoken_as(NAMES):
        return await answer_count(
            request,
            body.model,
            chat,
            lambda count: {"object": "response.input_tokens", "input_tokens": count},
        )


@router.get("/v1/responses/{response_id}", **documented(None, "Read a stored response."))
async def retrieve_response(request: Request, response_id: str) -> Response:
    """Return a stored response."""
    only_arguments(request, "stream", "include", "include[]", "include_obfuscation", "starting_after")
    if choice_argument(request, "stream", ("true", "false")) == "true":
        raise RequestError(
            "a response that has ended is not streamed again; leave stream out", field="stream"
        )
    if "starting_after" in request.query_params:
        raise RequestError(
            "starting_after belongs to stream, which is not possible here", field="starting_after"
        )
    check_include([*request.query_params.getlist("include"), *request.query_params.getlist("include[]")])
    return JSONResponse((await _stored(request, response_id)).body)


@router.get("/v1/responses/{response_id}/input_items", **documented(None, "Read a response's input."))
async def list_input_items(request: Request, response_id: str) -> Response:
    """Return the input of a stored response, the last item first unless `order=asc`."""
    only_arguments(request, "limit", "order", "after", "include", "include[]")
    check_include([*request.query_params.getlist("include"), *request.query_params.getlist("include[]")])
    limit = whole_argument(request, "limit", 20, 1, 100)
    is_descending = choice_argument(request, "order", ("asc", "desc")) != "asc"
    after = text_argument(request, "after")
    items = (await _stored(request, response_id)).items
    items = items[::-1] if is_descending else items
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise NotFoundError(f"the input has no item {after!r}", field="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


@router.delete("/v1/responses/{response_id}", **documented(None, "Delete a stored response."))
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a stored response."""
    tenant = await _tenant(request)
    await shelf_of(request).delete(tenant, response_id)
    return JSONResponse({"id": response_id, "object": "response.deleted", "deleted": True})


@router.post(
    "/v1/responses/{response_id}/cancel", **documented(None, "Refuse: nothing runs in the background.")
)
async def cancel_response(request: Request, response_id: str) -> Response:
    """Refuse to cancel: a response that can be named has ended."""
    await _stored(request, response_id)
    raise RequestError(
        "only background responses can be cancelled, and this server runs none; close the connection instead",
        field="response_id",
    )


@router.post("/v1/responses/compact", **documented(None, "Refuse: nothing is compacted here."))
async def compact_response(request: Request) -> Response:
    """Refuse to compact."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    raise ApiError(
        501,
        "/v1/responses/compact is not implemented: this server never rewrites a conversation",
        code="not_implemented",
        headers={"x-should-retry": "false"},
    )


def shelf_of(request: Request) -> Shelf:
    """Return the server's shelf of responses."""
    shelf: Shelf = request.app.state.shelf
    return shelf


async def _tenant(request: Request) -> str:
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    ticket = await service.gate.admit(request, scope="read", model=None)
    await ticket.finish(model=None, usage=None, timings=None, finish_reason="stop")
    return ticket.tenant


async def _stored(request: Request, response_id: str) -> StoredResponse:
    return await shelf_of(request).get(await _tenant(request), response_id)


async def _earlier(request: Request, job: Job, body: ResponsesRequest) -> list[Message]:
    if body.previous_response_id is None:
        return []
    try:
        stored = await shelf_of(request).get(job.ticket.tenant, body.previous_response_id)
    except NotFoundError as error:
        raise NotFoundError(str(error), field="previous_response_id") from None
    job.has_history = True
    return list(stored.messages)


class ResponseAnswer:
    """One response on its way."""

    def __init__(
        self, job: Job, body: ResponsesRequest, messages: list[Message], reader: Reader, shelf: Shelf
    ) -> None:
        self._job = job
        self._body = body
        self._messages = messages
        self._reader = reader
        self._shelf = shelf
        self._blocks = Blocks()
        self._items: list[dict[str, Any]] = []
        self._reason: str | None = None
        self._number = 0
        self.id = f"resp_{secrets.token_hex(20)}"
        self._created = int(time.time())

    def finish_reason(self) -> str | None:
        """Return how it ended, for the ledger."""
        return self._reason

    async def whole(self) -> Response:
        """Wait for the end and return the response."""
        (answer,) = await self._job.collect()
        for _ in self._changes(answer):
            pass
        if self._body.wants_logprobs:
            self._attach_logprobs(answer)
        body = await self._ended_body()
        await self._job.finish(self._reason)
        return self._job.answer(body)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events from response.created to response.completed or response.incomplete."""
        start = self._response("in_progress", None)
        yield self._event("response.created", response=start)
        yield self._event("response.in_progress", response=start)
        async for _, delta in self._job.deltas():
            for data in self._changes(delta):
                yield data
        body = await self._ended_body()
        name = "response.incomplete" if self._reason == "length" else "response.completed"
        yield self._event(name, response=body)

    def failed_event(self, error: BaseException) -> bytes:
        """Return the last event of a stream that failed."""
        refusal = as_api_error(error)
        body = self._response("failed", None)
        body["error"] = {"code": "server_error", "message": refusal.message}
        return self._event("response.failed", response=body)

    def _changes(self, delta: Delta) -> Iterator[bytes]:
        """Read a delta and return the events that it causes."""
        pieces = self._reader.feed(delta)
        if delta.finish_reason is not None:
            pieces = [*pieces, *self._reader.end(delta)]
            self._reason = self._reader.finish_reason(delta)
        logprobs = self._logprobs(delta)
        for change, block, text in self._blocks.add(pieces):
            yield from self._block_events(change, block, text, logprobs)
            if change is Change.GREW and block.kind is Kind.TEXT:
                logprobs = []
        if delta.finish_reason is not None:
            for change, block, text in self._blocks.end():
                yield from self._block_events(change, block, text, [])

    def _block_events(
        self, change: Change, block: Block, text: str, logprobs: list[dict[str, Any]]
    ) -> Iterator[bytes]:
        if change is Change.OPENED:
            self._items.append(_item(block))
            yield self._event(
                "response.output_item.added", output_index=block.index, item=_open_item(self._items[-1])
            )
        place: dict[str, Any] = {"item_id": self._items[block.index]["id"], "output_index": block.index}
        if block.kind is Kind.CALL:
            yield from self._call_events(change, block, text, place)
            return
        place["content_index"] = 0
        kind = "output_text" if block.kind is Kind.TEXT else "reasoning_text"
        if change is Change.OPENED:
            yield self._event("response.content_part.added", **place, part=_part(block.kind, ""))
        elif change is Change.GREW:
            extra = {"logprobs": logprobs} if block.kind is Kind.TEXT else {}
            yield self._event(f"response.{kind}.delta", **place, delta=text, **extra)
        else:
            item = self._items[block.index]
            item["status"] = "incomplete" if self._reason == "length" else "completed"
            item["content"] = [_part(block.kind, block.text)]
            extra = {"logprobs": list[object]()} if block.kind is Kind.TEXT else {}
            yield self._event(f"response.{kind}.done", **place, text=block.text, **extra)
            yield self._event("response.content_part.done", **place, part=item["content"][0])
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _call_events(self, change: Change, block: Block, text: str, place: dict[str, Any]) -> Iterator[bytes]:
        if change is Change.GREW:
            yield self._event("response.function_call_arguments.delta", **place, delta=text)
        elif change is Change.CLOSED:
            item = self._items[block.index]
            item |= {"status": "completed", "arguments": block.text}
            yield self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=block.text
            )
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, /, **fields: object) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        shown = chat_logprobs(self._job.loaded.tokenizer, delta.logprobs, rivals=self._body.top_logprobs or 0)
        content: Any = shown["content"]
        return content

    def _attach_logprobs(self, answer: Delta) -> None:
        for item in self._items:
            if item["type"] == "message":
                item["content"][0]["logprobs"] = self._logprobs(answer)
                return

    async def _ended_body(self) -> dict[str, Any]:
        """Return the finished response, stored unless the caller does not want it."""
        generation = self._job.generation
        assert generation is not None
        status = "incomplete" if self._reason == "length" else "completed"
        body = self._response(status, generation.usage())
        if self._body.store is not False:
            await self._shelf.put(
                self._job.ticket.tenant,
                StoredResponse(
                    body=body,
                    items=input_items(self._body),
                    messages=[*self._messages, *answer_messages(self._items)],
                ),
            )
        return body

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        body = self._body
        text = body.text.model_dump(exclude_none=True) if body.text else {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._job.model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": self._job.loaded.temperature if body.temperature is None else body.temperature,
            "text": {"format": text.get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_shown_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": _usage(usage, self._reader.num_thought_tokens),
            "user": body.user,
        }


def input_items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the input as a list of items with ids."""
    if isinstance(body.input, str):
        part = {"type": "input_text", "text": body.input}
        return [{"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "user", "content": [part]}]
    return [{"id": f"msg_{secrets.token_hex(12)}", "type": "message", **item} for item in body.input]


def answer_messages(items: list[dict[str, Any]]) -> list[Message]:
    """Return an answer's items as the chat message that a later turn sees."""
    text = "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in items
        if item["type"] == "function_call"
    ]
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    return [message] if text or calls else []


def _item(block: Block) -> dict[str, Any]:
    number = secrets.token_hex(12)
    if block.kind is Kind.CALL:
        assert block.call is not None
        return {
            "id": f"fc_{number}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": block.call["id"],
            "name": block.call["function"]["name"],
            "arguments": "",
        }
    if block.kind is Kind.THOUGHT:
        return {
            "id": f"rs_{number}",
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }
    return {
        "id": f"msg_{number}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _open_item(item: dict[str, Any]) -> dict[str, Any]:
    return dict(item)


def _part(kind: Kind, text: str) -> dict[str, Any]:
    if kind is Kind.THOUGHT:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"strict": None, "parameters": None, "description": None, **tool}


def _usage(usage: Usage | None, num_thought_tokens: int) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **dropped_body(usage),
    }
