"""POST /v1/chat/completions: messages in, a message or a stream of chunks out, in a form that satisfies
Mistral's and OpenAI's clients alike.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.engine.request import Delta, Usage
from bise.engine.request import Request as EngineRequest
from bise.errors import RequestError
from bise.server.body import read_json
from bise.server.chat_schema import ChatRequest
from bise.server.conversation import prefix_of, prepared, texts_of
from bise.server.fitting import fitted
from bise.server.hosted_chat import chat_elsewhere
from bise.server.logprobs import chat_logprobs
from bise.server.openapi import documented
from bise.server.reading import Piece, Reading
from bise.server.receipts import late_receipt_field, receipt_field
from bise.server.service import Job, Service
from bise.server.sse import DONE, EventStream, event

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatRequest, "Answer a conversation.", streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request, ChatRequest)
    if (client := service.hosted.get(body.model)) is not None:
        return await chat_elsewhere(service, request, client, body)
    job = await service.open(request, model=body.model)
    try:
        options = ChatOptions(
            choices=body.n or 1,
            rivals=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_rivals=(body.top_prompt_logprobs or 0) if body.prompt_logprobs else None,
            thinking_parts=job.is_mistral_client,
            usage_chunk=body.wants_usage_chunk,
        )
        plan = await job.plan(plan_chat, body, options)
        await job.start(plan.requests, receipt=body.receipt)
        chat = ChatAnswer(job, options, plan.reading, plan.prefix)
        return await chat.respond(stream=bool(body.stream))
    except BaseException as error:
        await job.finish(None, error)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the caller wants to see of an answer."""

    choices: int = 1
    rivals: int | None = None
    """Most likely tokens shown beside each log-prob; None: no log-probs."""
    prompt_rivals: int | None = None
    thinking_parts: bool = False
    """Thoughts are parts of the content, as Mistral's own client reads them."""
    usage_chunk: bool | None = None
    """See `SamplingFields.wants_usage_chunk`."""


class ChatAnswer:
    """One chat completion on its way; made when the job has been started."""

    def __init__(self, job: Job, options: ChatOptions, reading: Reading, prefix: str | None = None) -> None:
        self._job = job
        self._options = options
        self._openers = [_Opener(prefix) for _ in range(options.choices)]
        assert job.generation is not None
        self._readers = [reading.reader(job.loaded.tokenizer, seed) for seed in job.generation.seeds]
        self._reasons: list[str | None] = [None] * options.choices
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    async def respond(self, *, stream: bool) -> Response:
        """Return the answer of the job, which has been started."""
        if stream:
            return EventStream(self._job, self.events(), finish_reason=self.finish_reason)
        return await self.whole()

    def finish_reason(self) -> str | None:
        """Return how it ended, for the ledger: the first choice's reason."""
        return self._reasons[0]

    async def whole(self) -> Response:
        """Wait for the end and return the completion."""
        answers = await self._job.collect()
        response = await self._job.render(lambda: self._completion(answers))
        await self._job.finish(self.finish_reason())
        return response

    def _completion(self, answers: Sequence[Delta]) -> dict[str, object]:
        generation = self._job.generation
        assert generation is not None
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self._job.model,
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage_body(generation.usage()),
            "system_fingerprint": None,
            "seed": generation.seeds[0],
        }

    def _choice(self, index: int, answer: Delta) -> dict[str, object]:
        reader = self._readers[index]
        pieces = [*reader.feed(answer), *reader.end(answer)]
        opener = self._openers[index]
        content = opener.text + opener.rest("".join(piece.text for piece in pieces))
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
        if thoughts and self._options.thinking_parts:
            message["content"] = [_thinking(thoughts), {"type": "text", "text": content}]
        elif thoughts:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        choice: dict[str, object] = {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": self._logprobs(answer),
        }
        if self._options.prompt_rivals is not None and answer.prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(answer)
        assert self._job.generation is not None
        return choice | receipt_field(self._job.generation, index)

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._options.rivals is None:
            return None
        return chat_logprobs(self._job.loaded.tokenizer, delta.logprobs, rivals=self._options.rivals)

    def _prompt_logprobs(self, delta: Delta) -> dict[str, object]:
        rivals = self._options.prompt_rivals or 0
        return chat_logprobs(self._job.loaded.tokenizer, delta.prompt_logprobs, rivals=rivals)

    # Streams

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks: a role first, then pieces, one finish_reason per choice, usage once, [DONE]."""
        generation = self._job.generation
        assert generation is not None
        for index in range(len(self._readers)):
            yield self._chunk(index, {"role": "assistant", "content": self._openers[index].text})
        left = len(self._readers)
        async for index, delta in self._job.deltas():
            for data in self._delta_events(index, delta):
                yield data
            if delta.finish_reason is not None:
                left -= 1
                receipt = await late_receipt_field(self._job, index)
                yield self._last_chunk(index, delta, receipt, is_last=not left)
        if self._options.usage_chunk:
            yield event({**self._head(), "choices": [], "usage": usage_body(generation.usage())})
        yield DONE

    def _delta_events(self, index: int, delta: Delta) -> list[bytes]:
        reader = self._readers[index]
        pieces = reader.feed(delta)
        if delta.finish_reason is not None:
            pieces = [*pieces, *reader.end(delta)]
        opener = self._openers[index]
        pieces = [replace(piece, text=opener.rest(piece.text)) for piece in pieces]
        parts = self._options.thinking_parts
        bodies = [
            _piece_body(piece, thinking_parts=parts)
            for piece in pieces
            if piece.text or piece.thought or piece.calls
        ]
        logprobs = self._logprobs(delta) if delta.logprobs else None
        extra: dict[str, object] = {}
        if self._options.prompt_rivals is not None and delta.prompt_logprobs:
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

    def _last_chunk(self, index: int, delta: Delta, extra: dict[str, object], *, is_last: bool) -> bytes:
        self._reasons[index] = reason = self._readers[index].finish_reason(delta)
        generation = self._job.generation
        assert generation is not None
        usage = None
        if is_last and self._options.usage_chunk is None:
            usage = usage_body(generation.usage())
        return self._chunk(index, {"content": ""}, reason=reason, usage=usage, extra=extra)

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
        if usage is not None or self._options.usage_chunk:
            chunk["usage"] = usage
        return event(chunk)

    def _head(self) -> dict[str, object]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._job.model,
        }


class _Opener:
    """The prefix that an answer begins with. Chat formats drop the spaces at its end, so the first ones of
    the text that follows stand for them.
    """

    def __init__(self, prefix: str | None) -> None:
        self.text = prefix or ""
        self._due = len(self.text) - len(self.text.rstrip(" "))

    def rest(self, text: str) -> str:
        """Return the next text without the spaces that the prefix has already."""
        while self._due and text.startswith(" "):
            text = text[1:]
            self._due -= 1
        if text:
            self._due = 0
        return text


def _thinking(text: str) -> dict[str, object]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def _piece_body(piece: Piece, *, thinking_parts: bool) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if piece.thought and thinking_parts:
        text = [{"type": "text", "text": piece.text}] if piece.text else []
        body["content"] = [_thinking(piece.thought), *text]
    elif piece.text:
        body["content"] = piece.text
    if piece.thought and not thinking_parts:
        body |= {"reasoning_content": piece.thought, "reasoning": piece.thought}
    if piece.calls:
        body["tool_calls"] = piece.calls
    return body


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPlan:
    """What to ask of the engine for a conversation, and how to read its answer."""

    requests: list[EngineRequest]
    reading: Reading
    prefix: str | None
    """The text that the answer goes on from."""


def plan_chat(job: Job, body: ChatRequest, options: ChatOptions) -> ChatPlan:
    """Encode a conversation; in a thread of text work. Raises RequestError for what cannot be honoured."""
    messages = prepared(body.messages, safe_prompt=bool(body.safe_prompt))
    job.ticket.check_input([text for message in messages for text in texts_of(message)])
    job.ticket.check_input([json.dumps(tool, ensure_ascii=False) for tool in body.tools or ()])
    reading = Reading.of(job, body)
    prefix = prefix_of(messages)
    if prefix:  # the answer is the whole message, its beginning included
        job.around = lambda _, text: ("", f"{prefix}{_Opener(prefix).rest(text)}", "")
    if prefix and body.response_format is not None and reading.grammar is not None:
        # The whole answer begins with the prefix; behind it the grammar would begin anew.
        raise RequestError(
            "response_format and a prefix cannot be kept together: the answer would not obey it; drop one",
            field="response_format",
        )
    ids = fitted(job, body, messages, reading.shown_tools)
    shown = [count for count in (options.rivals, options.prompt_rivals) if count is not None]
    prediction = body.prediction.text if body.prediction else ""
    requests = [
        EngineRequest(
            token_ids=ids,
            params=body.params(
                temperature=job.loaded.temperature,
                max_tokens=body.limit,
                logprobs=max(shown, default=None),
                choice=choice,
            ),
            prompt_logprobs=options.prompt_rivals is not None and choice == 0,
            continuation=prefix is not None,
            prediction=tuple(job.loaded.tokenizer.encode(prediction)) if prediction else (),
            grammar=reading.grammar,
            **body.run_options,
        )
        for choice in range(options.choices)
    ]
    return ChatPlan(requests=requests, reading=reading, prefix=prefix)


def usage_body(usage: Usage | None) -> dict[str, object]:
    """Return the `usage` object: counts, of the prompt how many tokens came from the cache, and of a
    prediction how many came true. Rejected ones are not part of the output here.
    """
    if usage is None:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_prediction_tokens,
            "rejected_prediction_tokens": usage.rejected_prediction_tokens,
        },
        **dropped_body(usage),
    }


def dropped_body(usage: Usage) -> dict[str, object]:
    """Return `dropped_tokens` of a request whose prompt was shortened at its own wish; nothing otherwise."""
    return {"dropped_tokens": usage.dropped_tokens} if usage.dropped_tokens else {}
