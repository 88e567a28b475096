"""Chats with hosted models: what is asked of the host, and its answer checked, whole or streamed."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from starlette.responses import JSONResponse, Response

from bise.errors import RequestError
from bise.server.conversation import prefix_of, prepared, texts_of
from bise.server.hosted import BYTES_PER_TOKEN, MARK, HostedJob, content_text, usage_body_of
from bise.server.hosted_checks import Checks, fields_of, lie, reason_of, usage_of
from bise.server.hosted_client import HostedClient

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.server.chat_schema import ChatRequest
    from bise.server.service import Service

_PASSED = (
    "temperature", "top_p", "stop", "n", "presence_penalty", "frequency_penalty", "parallel_tool_calls",
    "reasoning_effort",
)  # fmt: skip
_REFUSED = (
    "top_k", "min_p", "typical_p", "repetition_penalty", "logit_bias", "min_tokens", "stop_token_ids",
    "ignore_eos", "logprobs", "prompt_logprobs", "prediction", "prompt_mode", "deadline_s",
    "truncate", "priority", "receipt",
)  # fmt: skip


async def chat_elsewhere(
    service: Service, request: Request, client: HostedClient, body: ChatRequest
) -> Response:
    """Answer a conversation with a hosted model."""
    from bise.server.sse import EventStream

    client.check_serves("chat")
    ticket = await service.gate.admit(request, scope="inference", model=body.model)
    job = HostedJob(service, request, ticket, client)
    try:
        checks, wanted = await service.offload(_chat_request, job, body)
        size = len(json.dumps(wanted, ensure_ascii=False).encode())
        most = int(wanted["max_tokens"]) * (body.n or 1)
        await ticket.reserve(model=job.model, prompt_tokens=size // BYTES_PER_TOKEN + 16, max_tokens=most)
        answer = HostedChat(job, body, checks, wanted)
        if body.stream and not (checks.holds_content or ticket.checks_output):
            events = answer.live()
        else:
            completion = await answer.whole()
            if not body.stream:
                await job.finish(answer.reason)
                return JSONResponse(completion, headers={**ticket.headers, **MARK})
            events = answer.replayed(completion)
        stream = EventStream(job, events, finish_reason=lambda: answer.reason)
        stream.headers.update(MARK)
        return stream
    except BaseException as error:
        await job.finish(None, error)
        raise


def _chat_request(job: HostedJob, body: ChatRequest) -> tuple[Checks, dict[str, Any]]:
    """Return what to check and what to send; in a thread. RequestError for what cannot be passed on."""
    for name in _REFUSED:
        if getattr(body, name, None):
            raise RequestError(f"{name} is not possible with a model that is hosted elsewhere", field=name)
    checks = Checks.of(body)
    messages = prepared(body.messages, safe_prompt=bool(body.safe_prompt))
    _check_roles(messages)
    job.ticket.check_input([text for message in messages for text in texts_of(message)])
    job.ticket.check_input([json.dumps(tool, ensure_ascii=False) for tool in body.tools or ()])
    spec = job.client.spec
    given = body.model_dump(exclude_none=True, by_alias=True, mode="json")
    wanted: dict[str, Any] = {name: given[name] for name in _PASSED if name in given}
    wanted |= {"model": spec.model, "messages": messages, "max_tokens": body.limit or spec.max_tokens}
    if (seed := body.chosen_seed) is not None:
        wanted["random_seed" if spec.dialect == "mistral" else "seed"] = seed
    if body.response_format is not None:
        wanted["response_format"] = given["response_format"]
    if body.tools:
        choice: Any = given.get("tool_choice", "auto")
        wanted["tools"] = [tool for tool in body.tools if _name(tool) in checks.arguments] or body.tools
        if isinstance(choice, dict) and "allowed_tools" in choice:
            choice = cast(dict[str, Any], choice)["allowed_tools"]["mode"]
        if choice in ("any", "required"):
            choice = "any" if spec.dialect == "mistral" else "required"
        wanted["tool_choice"] = choice
    return checks, wanted


def _check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise RequestError(f"messages[{index}].role is missing or unknown", field="messages")


def _name(tool: Mapping[str, Any]) -> str:
    return str(cast(dict[str, Any], tool.get("function", tool)).get("name"))


class HostedChat:
    """One answer of a hosted model on its way to the client, in our form and under our names."""

    def __init__(self, job: HostedJob, body: ChatRequest, checks: Checks, wanted: dict[str, Any]) -> None:
        self._job = job
        self._checks = checks
        self._wanted = wanted
        self._count = body.n or 1
        self._usage_chunk = body.wants_usage_chunk
        self._calls: dict[int, dict[int, dict[str, Any]]] = {}
        self.reason: str | None = None
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """Return the checked completion."""
        job = self._job
        answer = await job.run(job.client.ask("/chat/completions", self._wanted))
        job.usage = usage_of(answer)
        choices = await job.service.offload(self._checked, answer)
        self.reason = choices[0]["finish_reason"]
        return {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": job.model,
            "choices": choices, "usage": usage_body_of(job), "system_fingerprint": None,
        }  # fmt: skip

    def _checked(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(cast(list[object], choices)) != self._count:
            raise lie("sent another number of choices than was asked for")
        return [
            self._choice(index, fields_of(choice, "a choice"))
            for index, choice in enumerate(cast(list[object], choices))
        ]

    def _choice(self, index: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        message = fields_of(choice.get("message"), "a message")
        content = content_text(message.get("content"))
        calls = self._checks.checked_calls(message.get("tool_calls"), f"{self._id}/{index}")
        reason = reason_of(choice, len(calls))
        self._checks.check_content(content, reason, len(calls))
        if self._job.ticket.checks_output:
            begun = prefix_of(self._wanted["messages"]) or ""
            said = content if content.startswith(begun) else begun + content
            for text in (said, *(call["function"]["arguments"] for call in calls)):
                self._job.ticket.check_output(text)
        return {
            "index": index,
            "message": {
                "role": "assistant", "content": content if content or not calls else None,
                "tool_calls": calls or None, "refusal": None, "prefix": False,
            },
            "finish_reason": reason,
            "logprobs": None,
        }  # fmt: skip

    async def replayed(self, completion: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """Yield a checked completion as chunks."""
        from bise.server.sse import DONE

        for choice in completion["choices"]:
            message, index = choice["message"], choice["index"]
            yield self._chunk(index, {"role": "assistant", "content": message["content"] or ""})
            if message["tool_calls"]:
                yield self._chunk(index, {"tool_calls": message["tool_calls"]})
            yield self._last(index, choice["finish_reason"], is_last=index == self._count - 1)
        for data in self._usage_events():
            yield data
        yield DONE

    async def live(self) -> AsyncGenerator[bytes]:
        """Yield chunks as the host sends them; tool calls whole, once they have been checked."""
        from bise.server.sse import DONE

        job = self._job
        wanted = self._wanted | {"stream": True}
        if job.client.spec.dialect == "openai":
            wanted["stream_options"] = {"include_usage": True}
        host = job.client.stream("/chat/completions", wanted)
        ended: dict[int, str] = {}
        for index in range(self._count):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        try:
            while (value := await job.run(_next(host))) is not None:
                if value.get("usage"):
                    job.usage = usage_of(value)
                for choice in cast(list[object], value.get("choices") or []):
                    for data in self._piece(fields_of(choice, "a choice"), ended):
                        yield data
        finally:
            await host.aclose()
        if len(ended) != self._count:
            raise lie("sent an answer that did not end properly")
        if job.usage is None:
            raise lie("did not say how many tokens it used")
        for index in range(self._count):
            calls = [call for _, call in sorted(self._calls.get(index, {}).items())]
            checked = await job.service.offload(self._checks.checked_calls, calls, f"{self._id}/{index}")
            if checked:
                yield self._chunk(index, {"tool_calls": checked})
            reason = reason_of({"finish_reason": ended[index]}, len(checked))
            self.reason = self.reason or reason
            yield self._last(index, reason, is_last=index == self._count - 1)
        for data in self._usage_events():
            yield data
        yield DONE

    def _piece(self, choice: Mapping[str, Any], ended: dict[int, str]) -> list[bytes]:
        index = choice.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < self._count or index in ended:
            raise lie("sent pieces of a choice that nobody asked for")
        delta = fields_of(choice.get("delta") or {}, "a delta")
        held = self._calls.setdefault(index, {})
        for place, entry in enumerate(cast(list[object], delta.get("tool_calls") or [])):
            _add_call(held, place, fields_of(entry, "a tool call"))
        if choice.get("finish_reason") is not None:
            ended[index] = str(choice["finish_reason"])
        text = content_text(delta.get("content"))
        return [self._chunk(index, {"content": text})] if text else []

    def _usage_events(self) -> list[bytes]:
        from bise.server.sse import event

        if not self._usage_chunk or self._job.usage is None:
            return []
        return [event({**self._head(), "choices": [], "usage": usage_body_of(self._job)})]

    def _last(self, index: int, reason: str, *, is_last: bool) -> bytes:
        usage = None
        if is_last and self._usage_chunk is None and self._job.usage is not None:
            usage = usage_body_of(self._job)
        return self._chunk(index, {"content": ""}, reason, usage)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        usage: dict[str, object] | None = None,
    ) -> bytes:
        from bise.server.sse import event

        chunk: dict[str, object] = {
            **self._head(),
            "choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}],
        }
        if usage is not None or self._usage_chunk:
            chunk["usage"] = usage
        return event(chunk)

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id, "object": "chat.completion.chunk", "created": self._created,
            "model": self._job.model,
        }  # fmt: skip


async def _next(host: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(host, None)


def _add_call(held: dict[int, dict[str, Any]], place: int, entry: Mapping[str, Any]) -> None:
    """Put a piece of a tool call to what has come of it."""
    index = entry.get("index", place)
    if not isinstance(index, int) or not 0 <= index < 128:
        raise lie("sent a tool call with a bad index")
    call = held.setdefault(index, {"function": {"name": "", "arguments": ""}})
    function = fields_of(entry.get("function") or {}, "a tool call")
    for name in ("name", "arguments"):
        part = function.get(name) or ""
        call["function"][name] += json.dumps(part) if isinstance(part, dict) else str(part)
