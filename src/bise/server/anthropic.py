"""POST /v1/messages: Anthropic's form, which some coding agents speak."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.engine.request import Delta, Usage
from bise.server.anthropic_schema import NAMES, MessageCountRequest, MessagesRequest
from bise.server.blocks import Block, Blocks, Change, Kind
from bise.server.body import read_json
from bise.server.chat import ChatOptions, dropped_body, plan_chat
from bise.server.chat_schema import ChatRequest
from bise.server.counting import answer_count
from bise.server.faults import spoken_as
from bise.server.openapi import documented
from bise.server.problem import as_api_error, error_body
from bise.server.reading import Reader
from bise.server.service import Job, Service
from bise.server.sse import EventStream, event

router = APIRouter()


@router.post("/v1/messages", **documented(MessagesRequest, "Answer messages (Anthropic form).", streams=True))
async def create_message(request: Request) -> Response:
    """Answer messages in Anthropic's form."""
    service: Service = request.app.state.service
    body = await read_json(request, MessagesRequest)
    job = await service.open(request, model=body.model)
    try:
        with spoken_as(NAMES):
            plan = await job.plan(plan_chat, body.chat(), ChatOptions())
            generation = await job.start(plan.requests)
        answer = MessageAnswer(job, plan.reading.reader(job.loaded.tokenizer, generation.seeds[0]))
        if body.stream:
            return EventStream(
                job, answer.events(), finish_reason=answer.finish_reason, on_error=_error_event
            )
        return await answer.whole()
    except BaseException as error:
        await job.finish(None, error)
        raise


@router.post("/v1/messages/count_tokens", **documented(MessageCountRequest, "Count tokens (Anthropic form)."))
async def count_tokens(request: Request) -> Response:
    """Return how many tokens messages have."""
    body = await read_json(request, MessageCountRequest)

    async def chat(_: Job) -> ChatRequest:
        return body.as_chat()

    with spoken_as(NAMES):
        return await answer_count(request, body.model, chat, lambda count: {"input_tokens": count})


class MessageAnswer:
    """One message on its way."""

    def __init__(self, job: Job, reader: Reader) -> None:
        self._job = job
        self._reader = reader
        self._blocks = Blocks()
        self._last: Delta | None = None
        self._reason: str | None = None
        self._id = f"msg_{secrets.token_hex(12)}"

    def finish_reason(self) -> str | None:
        """Return how it ended, for the ledger."""
        return self._reason

    async def whole(self) -> Response:
        """Wait for the end and return the message."""
        (answer,) = await self._job.collect()
        for _ in self._changes(answer):
            pass
        generation = self._job.generation
        assert generation is not None
        body = self._message(generation.usage())
        body["content"] = [_block_body(block, block.text) for block in self._blocks.all]
        body |= self._stop()
        await self._job.finish(self._reason)
        return self._job.answer(body)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield message_start, the blocks, message_delta and message_stop."""
        generation = self._job.generation
        assert generation is not None
        yield event({"type": "message_start", "message": self._message(None)}, "message_start")
        async for _, delta in self._job.deltas():
            for data in self._changes(delta):
                yield data
        usage = _usage(generation.usage())
        yield event({"type": "message_delta", "delta": self._stop(), "usage": usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _changes(self, delta: Delta) -> Iterator[bytes]:
        pieces = self._reader.feed(delta)
        if delta.finish_reason is not None:
            pieces = [*pieces, *self._reader.end(delta)]
            self._reason = self._reader.finish_reason(delta)
            self._last = delta
        for change, block, text in self._blocks.add(pieces):
            yield _block_event(change, block, text)
        if delta.finish_reason is not None:
            for change, block, text in self._blocks.end():
                yield _block_event(change, block, text)

    def _stop(self) -> dict[str, Any]:
        match = self._last.stop_match if self._last else None
        if self._reason == "stop" and isinstance(match, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": match}
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": reasons.get(self._reason or "", "end_turn"), "stop_sequence": None}

    def _message(self, usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }


def _block_event(change: Change, block: Block, text: str) -> bytes:
    place: dict[str, Any] = {"index": block.index}
    if change is Change.OPENED:
        start = _block_body(block, "")
        return event({"type": "content_block_start", **place, "content_block": start}, "content_block_start")
    if change is Change.CLOSED:
        return event({"type": "content_block_stop", **place}, "content_block_stop")
    names = {
        Kind.TEXT: ("text_delta", "text"),
        Kind.THOUGHT: ("thinking_delta", "thinking"),
        Kind.CALL: ("input_json_delta", "partial_json"),
    }
    kind, field = names[block.kind]
    return event(
        {"type": "content_block_delta", **place, "delta": {"type": kind, field: text}}, "content_block_delta"
    )


def _block_body(block: Block, text: str) -> dict[str, Any]:
    if block.kind is Kind.TEXT:
        return {"type": "text", "text": text}
    if block.kind is Kind.THOUGHT:
        return {"type": "thinking", "thinking": text, "signature": ""}
    assert block.call is not None
    arguments: object = json.loads(text) if text else {}
    name = block.call["function"]["name"]
    return {"type": "tool_use", "id": block.call["id"], "name": name, "input": arguments}


def _usage(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        **dropped_body(usage),
    }


def _error_event(error: BaseException) -> bytes:
    return event(error_body(as_api_error(error), dialect="anthropic"), "error")
