"""Conversations that are longer than the context, shortened by whole turns when the caller asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from bise.engine.truncation import truncate_messages
from bise.errors import RequestError
from bise.server.conversation import Message

if TYPE_CHECKING:
    from bise.server.chat_schema import ChatRequest
    from bise.server.service import Job


def encoded(job: Job, messages: Sequence[Message], tools: Sequence[Message] | None) -> tuple[int, ...]:
    """Return the prompt of a conversation. Raises RequestError for a model without a chat format."""
    job.check_size(_num_bytes(messages))
    return _encode(job, messages, tools)


def fitted(
    job: Job, body: ChatRequest, messages: Sequence[Message], tools: Sequence[Message] | None
) -> tuple[int, ...]:
    """Return the prompt of a conversation as `body.truncate` allows to shorten it; what goes is counted in
    `job.dropped_tokens`.

    Raises ContextOverflowError, with both numbers, when not even the system messages and the last turn fit.
    """
    room = job.loaded.engine.max_context - (body.limit or 0)
    if body.truncate is None or room < 1:  # no prompt at all would fit: the engine says so
        return encoded(job, messages, tools)

    def count(part: Sequence[object]) -> int:
        kept = cast(Sequence[Message], part)
        if len(kept) < len(messages) and not job.may_fit(size := _num_bytes(kept)):
            return max(room + 1, size // job.traits.longest_token)  # too many, whatever they are
        return len(_encode(job, kept, tools))

    cut = truncate_messages(messages, room, body.truncate, count)
    job.dropped_tokens = cut.num_dropped_tokens
    return _encode(job, cast(Sequence[dict[str, Any]], cut.messages), tools)


def _encode(job: Job, messages: Sequence[Message], tools: Sequence[Message] | None) -> tuple[int, ...]:
    template = job.loaded.template
    if template is None:
        raise RequestError(
            f"{job.model} has no chat template (a base model?); use /v1/completions", field="model"
        )
    continues = messages[-1].get("role") == "assistant" and messages[-1].get("prefix") is True
    return tuple(template.encode(messages, tools, continue_final=continues))


def _num_bytes(messages: Sequence[Message]) -> int:
    return sum(len(str(message.get("content", ""))) for message in messages)
