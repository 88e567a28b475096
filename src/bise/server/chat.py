"""POST /v1/chat/completions: messages in, a message or a stream of chunks out, in a form that satisfies
Mistral's and OpenAI's clients alike.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.engine.request import Delta, Usage
from bise.engine.request import Request as EngineRequest
from bise.errors import RequestError
from bise.server.body import read_json
from bise.server.chat_schema import ChatRequest
from bise.server.conversation import Message, prefix_of, prepared
from bise.server.logprobs import chat_logprobs
from bise.server.openapi import documented
from bise.server.reading import Piece, Reader, Reading
from bise.server.service import Job, Service
from bise.server.sse import DONE, EventStream, event

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatRequest, "Answer a conversation.", streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request, ChatRequest)
    job = await service.open(request, model=body.model)
    try:
        chat = await ChatAnswer.start(job, body)
        if body.stream:
            return EventStream(job, chat.events(), finish_reason=chat.finish_reason)
        return await chat.whole()
    except BaseException as error:
        await job.finish(None, error)
        raise


class ChatAnswer:
    """One chat completion on its way."""

    def __init__(self, job: Job, body: ChatRequest, reading: Reading, prefix: str | None) -> None:
        self._job = job
        self._body = body
        self._reading = reading
        self._prefix = prefix
        self._readers = [reading.reader() for _ in range(body.n or 1)]
        self._reasons: list[str | None] = [None] * (body.n or 1)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @classmethod
    async def start(cls, job: Job, body: ChatRequest) -> ChatAnswer:
        """Encode the conversation and submit it. Raises RequestError for what cannot be honoured."""
        reading, prefix, requests = await job.service.offload(_plan, job, body)
        answer = cls(job, body, reading, prefix)
        await job.start(requests)
        return answer

    def finish_reason(self) -> str | None:
        """Return how it ended, for the ledger: the first choice's reason."""
        return self._reasons[0]

    async def whole(self) -> Response:
        """Wait for the end and return the completion."""
        answers = await self._job.collect()
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        generation = self._job.generation
        assert generation is not None
        body = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self._job.model,
            "choices": choices,
            "usage": usage_body(generation.usage()),
            "system_fingerprint": None,
            "seed": generation.seeds[0],
        }
        await self._job.finish(self.finish_reason())
        return JSONResponse(body)

    def _choice(self, index: int, answer: Delta) -> dict[str, object]:
        reader = self._readers[index]
        pieces = [*reader.feed(answer), *reader.end(answer)]
        content = (self._prefix or "") + "".join(piece.text for piece in pieces)
        thoughts = "".join(piece.thought for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        self._reasons[index] = reason = reader.finish_reason(answer)
        message: dict[str, object] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "tool_calls": calls or None,
            "refusal": None,
            "prefix": False,
        }
        if thoughts:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        choice: dict[str, object] = {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": self._logprobs(answer),
        }
        if self._body.prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(answer)
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._job.loaded.tokenizer, delta.logprobs, rivals=self._body.top_logprobs or 0)

    def _prompt_logprobs(self, delta: Delta) -> dict[str, object]:
        rivals = self._body.top_prompt_logprobs or 0
        return chat_logprobs(self._job.loaded.tokenizer, delta.prompt_logprobs, rivals=rivals)

    # Streams

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks: a role first, then pieces, one finish_reason per choice, usage once, [DONE]."""
        generation = self._job.generation
        assert generation is not None
        for index in range(len(self._readers)):
            yield self._chunk(index, {"role": "assistant", "content": self._prefix or ""})
        left = len(self._readers)
        async for index, delta in generation:
            self._job.check(delta)
            for data in self._delta_events(index, delta):
                yield data
            if delta.finish_reason is not None:
                left -= 1
                yield self._last_chunk(index, delta, is_last=not left)
        if self._body.wants_usage_chunk:
            yield event({**self._head(), "choices": [], "usage": usage_body(generation.usage())})
        yield DONE

    def _delta_events(self, index: int, delta: Delta) -> list[bytes]:
        reader = self._readers[index]
        pieces = reader.feed(delta)
        if delta.finish_reason is not None:
            pieces = [*pieces, *reader.end(delta)]
        bodies = [
            _piece_body(piece, reader) for piece in pieces if piece.text or piece.thought or piece.calls
        ]
        logprobs = self._logprobs(delta) if delta.logprobs else None
        extra: dict[str, object] = {}
        if self._body.prompt_logprobs and delta.prompt_logprobs:
            extra["prompt_logprobs"] = self._prompt_logprobs(delta)
        if not bodies and (logprobs or extra):
            bodies = [{"content": ""}]
        # All log-probs of a step go with its first chunk.
        return [
            self._chunk(
                index, body, logprobs=logprobs if not place else None, extra=extra if not place else {}
            )
            for place, body in enumerate(bodies)
        ]

    def _last_chunk(self, index: int, delta: Delta, *, is_last: bool) -> bytes:
        self._reasons[index] = reason = self._readers[index].finish_reason(delta)
        generation = self._job.generation
        assert generation is not None
        usage = None
        if is_last and self._body.wants_usage_chunk is None:
            usage = usage_body(generation.usage())
        return self._chunk(index, {"content": ""}, reason=reason, usage=usage)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, object] | None = None,
        usage: dict[str, object] | None = None,
        extra: dict[str, object] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": logprobs,
            **(extra or {}),
        }
        chunk = {**self._head(), "choices": [choice]}
        if usage is not None or self._body.wants_usage_chunk:
            chunk["usage"] = usage
        return event(chunk)

    def _head(self) -> dict[str, object]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._job.model,
        }


def _piece_body(piece: Piece, reader: Reader) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if piece.text:
        body["content"] = piece.text
    if piece.thought:
        body |= {"reasoning_content": piece.thought, "reasoning": piece.thought}
    if piece.calls:
        body["tool_calls"] = piece.calls
    return body


def _plan(job: Job, body: ChatRequest) -> tuple[Reading, str | None, list[EngineRequest]]:
    """Return how to read the answer, its prefix, and what to ask of the engine; in a thread of text work."""
    messages = prepared(body.messages, safe_prompt=bool(body.safe_prompt))
    reading = Reading.of(job.loaded, body)
    ids = encoded(job, messages, reading.shown_tools)
    prefix = prefix_of(messages)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.prompt_logprobs:
        logprobs = max(logprobs or 0, body.top_prompt_logprobs or 0)
    prediction = body.prediction.text if body.prediction else ""
    tokenizer = job.loaded.tokenizer
    requests = [
        EngineRequest(
            token_ids=ids,
            params=body.params(
                temperature=job.loaded.temperature, max_tokens=body.limit, logprobs=logprobs, choice=choice
            ),
            prompt_logprobs=bool(body.prompt_logprobs) and choice == 0,
            continuation=prefix is not None,
            prediction=tuple(tokenizer.encode(prediction)) if prediction else (),
            grammar=reading.grammar,
        )
        for choice in range(body.n or 1)
    ]
    return reading, prefix, requests


def encoded(job: Job, messages: Sequence[Message], tools: Sequence[Message] | None) -> tuple[int, ...]:
    """Return the prompt of a conversation. Raises RequestError for a model without a chat format."""
    template = job.loaded.template
    if template is None:
        raise RequestError(
            f"{job.model} has no chat template (a base model?); use /v1/completions", field="model"
        )
    job.check_size(sum(len(str(message.get("content", ""))) for message in messages))
    continues = messages[-1].get("role") == "assistant" and messages[-1].get("prefix") is True
    return tuple(template.encode(messages, tools, continue_final=continues))


def usage_body(usage: Usage | None) -> dict[str, object]:
    """Return the `usage` object: counts, and of the prompt how many tokens came from the cache."""
    if usage is None:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
