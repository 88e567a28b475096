"""Hosted models at /v1/completions and /v1/fim/completions, for hosts that have them (`--serves`).

Answers are asked for whole and checked; a stream is made of the whole answer.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, cast

from starlette.responses import JSONResponse, Response

from bise.errors import RequestError
from bise.server.hosted import MARK, HostedJob, content_text, usage_body_of
from bise.server.hosted_checks import fields_of, lie, reason_of, usage_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.server.hosted_client import HostedClient
    from bise.server.service import Service
    from bise.server.text_schema import CompletionRequest, FimRequest

DEFAULT_MAX_TOKENS = 16
_BYTES_PER_TOKEN = 3
_PASSED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_REFUSED = (
    "top_k", "min_p", "typical_p", "repetition_penalty", "logit_bias", "min_tokens", "stop_token_ids",
    "ignore_eos", "truncate", "deadline_s", "echo", "logprobs", "best_of", "receipt",
)  # fmt: skip


async def complete_elsewhere(
    service: Service, request: Request, client: HostedClient, body: CompletionRequest
) -> Response:
    """Continue texts with a hosted model."""
    client.check_serves("completions")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("prompt must be text for a model that is hosted elsewhere", field="prompt")
    texts = cast(list[str], prompts)
    count = len(texts) * (body.n or 1)
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    wanted = _wanted(client, body, limit) | {"prompt": body.prompt, "n": body.n or 1}
    if body.suffix:
        wanted["suffix"] = body.suffix

    def read(job: HostedJob, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        choices = _choices(answer, count)
        read = [
            {"text": content_text(choice.get("text")), "reason": reason_of(choice, 0)} for choice in choices
        ]
        for index, choice in enumerate(read):
            before = texts[index // (body.n or 1)]
            job.ticket.check_output(choice["text"], before=before, after=body.suffix or "")
        return read

    def form(job: HostedJob, choices: list[dict[str, Any]]) -> dict[str, Any]:
        made = [
            {"index": index, "text": choice["text"], "logprobs": None, "finish_reason": choice["reason"]}
            for index, choice in enumerate(choices)
        ]
        return _head("cmpl", "text_completion", job) | {"choices": made, "usage": usage_body_of(job)}

    asked = _Asked(body, [*texts, body.suffix or ""], "/completions", wanted, limit * count)
    return await _answer(service, request, client, asked, read, form)


async def fill_elsewhere(
    service: Service, request: Request, client: HostedClient, body: FimRequest
) -> Response:
    """Fill the gap between a prompt and a suffix with a hosted model."""
    client.check_serves("fim")
    limit = body.max_tokens or client.spec.max_tokens
    is_mistral = client.spec.dialect == "mistral"
    wanted = _wanted(client, body, limit) | {"prompt": body.prompt, "suffix": body.suffix or ""}

    def read(job: HostedJob, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        (choice,) = _choices(answer, 1)
        source = (
            fields_of(choice.get("message"), "a message").get("content") if is_mistral else choice.get("text")
        )
        text = content_text(source)
        job.ticket.check_output(text, before=body.prompt, after=body.suffix or "")
        return [{"text": text, "reason": reason_of(choice, 0)}]

    def form(job: HostedJob, choices: list[dict[str, Any]]) -> dict[str, Any]:
        message = {"role": "assistant", "content": choices[0]["text"], "tool_calls": None, "refusal": None}
        choice = {
            "index": 0, "message": message, "finish_reason": choices[0]["reason"], "logprobs": None,
        }  # fmt: skip
        head = _head("chatcmpl", "chat.completion", job)
        return head | {"choices": [choice], "usage": usage_body_of(job)}

    path = "/fim/completions" if is_mistral else "/completions"
    asked = _Asked(body, [body.prompt, body.suffix or ""], path, wanted, limit)
    return await _answer(service, request, client, asked, read, form)


class _Asked:
    """What is asked of the host."""

    def __init__(
        self,
        body: CompletionRequest | FimRequest,
        texts: list[str],
        path: str,
        wanted: dict[str, Any],
        max_tokens: int,
    ) -> None:
        self.body = body
        self.texts = texts
        self.path = path
        self.wanted = wanted
        self.max_tokens = max_tokens


async def _answer(
    service: Service, request: Request, client: HostedClient, asked: _Asked, read: Any, form: Any
) -> Response:
    from bise.server.sse import EventStream

    ticket = await service.gate.admit(request, scope="inference", model=asked.body.model)
    job = HostedJob(service, request, ticket, client)
    try:
        await service.offload(ticket.check_input, asked.texts)
        size = len(json.dumps(asked.texts, ensure_ascii=False).encode())
        prompt = size // _BYTES_PER_TOKEN + 16
        await ticket.reserve(model=job.model, prompt_tokens=prompt, max_tokens=asked.max_tokens)
        answer = await job.run(client.ask(asked.path, asked.wanted))
        job.usage = usage_of(answer)
        choices = await service.offload(read, job, answer)
        whole, reason = form(job, choices), str(choices[0]["reason"])
        if not asked.body.stream:
            await job.finish(reason)
            return JSONResponse(whole, headers={**ticket.headers, **MARK})
        events = _events(whole, asked.body.wants_usage_chunk)
        stream = EventStream(job, events, finish_reason=lambda: reason)
        stream.headers.update(MARK)
        return stream
    except BaseException as error:
        await job.finish(None, error)
        raise


async def _events(whole: Mapping[str, Any], usage_chunk: bool | None) -> AsyncGenerator[bytes]:
    """Yield a whole answer as chunks: each choice in one, usage once, [DONE]."""
    from bise.server.sse import DONE, event

    head = {name: value for name, value in whole.items() if name not in ("choices", "usage")}
    if "chat" in str(head["object"]):
        head["object"] = "chat.completion.chunk"
    for index, choice in enumerate(whole["choices"]):
        chunk = dict(choice)
        if "message" in chunk:
            chunk["delta"] = {"role": "assistant", "content": chunk.pop("message")["content"]}
        is_last = index == len(whole["choices"]) - 1
        usage = {"usage": whole["usage"] if usage_chunk is None and is_last else None}
        yield event({**head, "choices": [chunk], **(usage if usage_chunk or is_last else {})})
    if usage_chunk:
        yield event({**head, "choices": [], "usage": whole["usage"]})
    yield DONE


def _wanted(client: HostedClient, body: CompletionRequest | FimRequest, limit: int) -> dict[str, Any]:
    for name in _REFUSED:
        if getattr(body, name, None):
            raise RequestError(f"{name} is not possible with a model that is hosted elsewhere", field=name)
    wanted: dict[str, Any] = {"model": client.spec.model, "max_tokens": limit}
    wanted |= {name: getattr(body, name) for name in _PASSED if getattr(body, name) is not None}
    if body.stops:
        wanted["stop"] = list(body.stops)
    if (seed := body.chosen_seed) is not None:
        wanted["random_seed" if client.spec.dialect == "mistral" else "seed"] = seed
    return wanted


def _choices(answer: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(cast(list[object], choices)) != count:
        raise lie("sent another number of choices than was asked for")
    return [fields_of(choice, "a choice") for choice in cast(list[object], choices)]


def _head(prefix: str, kind: str, job: HostedJob) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
        "model": job.model,
    }  # fmt: skip
