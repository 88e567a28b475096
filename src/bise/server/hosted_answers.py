"""Hosted models for the assistant: their answers as pieces, marked as leaving this machine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from bise.assistant.models import Job, ModelFacts, Piece
from bise.engine.request import Timings
from bise.errors import BiseError, RequestError
from bise.server.hosted import HostedModels, content_text
from bise.server.hosted_checks import fields_of, lie, reason_of, usage_of
from bise.server.problem import ApiError

if TYPE_CHECKING:
    from bise.engine.request import Usage
    from bise.server.hosted_client import HostedClient

_BYTES_PER_TOKEN = 4
_PARAMS = ("temperature", "top_p", "max_tokens")


class UpstreamError(BiseError):
    """The host of a model did not answer as it should."""

    code = "upstream_failed"


class HostedAnswers:
    """Asks hosted models on the assistant's behalf."""

    def __init__(self, hosted: HostedModels | None = None) -> None:
        self._hosted = hosted or HostedModels()

    def facts(self) -> list[ModelFacts]:
        """Return the hosted models as the assistant lists them."""
        return [
            ModelFacts(
                id=name,
                title=f"{name} (leaves this machine)",
                context=None,
                parameters=None,
                state="hosted",
                leaves_machine=True,
            )
            for name in self._hosted.names()
        ]

    def serves(self, model: str) -> bool:
        """Return True for a hosted model."""
        return self._hosted.get(model) is not None

    def guess(self, text: str) -> int:
        """Return about how many tokens a text has; only its host could count them."""
        return -(-len(text.encode()) // _BYTES_PER_TOKEN)

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer. Raises UpstreamError or RequestError."""
        client = self._hosted.get(job.model)
        assert client is not None
        if job.continues:
            raise RequestError(f"{job.model} is hosted elsewhere and cannot go on with an answer")
        try:
            async with aclosing(_pieces(client, _wanted(client, job))) as pieces:
                async for piece in pieces:
                    yield piece
        except ApiError as error:
            failure = UpstreamError(str(error))
            failure.code = error.code
            raise failure from error


def _wanted(client: HostedClient, job: Job) -> dict[str, Any]:
    spec = client.spec
    unknown = job.params.keys() - {*_PARAMS, "seed"}
    if unknown:
        raise RequestError(f"{min(unknown)} is not possible with a model that is hosted elsewhere")
    wanted: dict[str, Any] = {
        "model": spec.model, "messages": [dict(message) for message in job.messages],
        "max_tokens": spec.max_tokens, "stream": True,
    }  # fmt: skip
    wanted |= {name: job.params[name] for name in _PARAMS if job.params.get(name) is not None}
    if job.params.get("seed") is not None:
        wanted["random_seed" if spec.dialect == "mistral" else "seed"] = job.params["seed"]
    if spec.dialect == "openai":
        wanted["stream_options"] = {"include_usage": True}
    return wanted


async def _pieces(client: HostedClient, wanted: dict[str, Any]) -> AsyncGenerator[Piece]:
    begun = time.monotonic()
    first: float | None = None
    usage: Usage | None = None
    reason: str | None = None
    async with aclosing(client.stream("/chat/completions", wanted)) as events:
        async for event in events:
            if event.get("usage"):
                usage = usage_of(event)
            for entry in cast(Sequence[object], event.get("choices") or []):
                choice = fields_of(entry, "a choice")
                text = content_text(fields_of(choice.get("delta") or {}, "a delta").get("content"))
                if choice.get("finish_reason") is not None:
                    reason = reason_of(choice, 0)
                if text:
                    first = first or time.monotonic()
                    yield Piece(text=text, tokens=1)
    if reason is None or usage is None:
        raise lie("sent an answer that did not end properly")
    now = time.monotonic()
    yield Piece(
        finish_reason=reason,
        usage=usage,
        timings=Timings(queue_s=0.0, prefill_s=(first or now) - begun, decode_s=now - (first or now)),
    )
