"""A new chat that begins with what an old one said: its model writes a summary, which is the first message.

The summary is an answer like any other: it streams, can be stopped, continued and made again. Its part
`summary` says of which conversation it is, how far, and whether its model is a small one. What does not fit
the window at once is read piece after piece, each with the summary of those before it; nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from bise.assistant.conversations import Conversation
from bise.assistant.messages import LIVE, Message
from bise.assistant.models import ChatModels, ChatTurn, Job, ModelFacts
from bise.assistant.retrieval import DEFAULT_WINDOW
from bise.assistant.shelf import Shelf
from bise.assistant.titles import is_small, next_title
from bise.errors import ConflictError, RequestError

MAX_TOKENS = 1024
"""Of a summary, where the window has room for four times as many."""
LEAST_ROOM = 64
"""Tokens of the conversation that must fit one step, else a window is too small to sum anything up."""
JOIN_TOKENS = 4
"""What two texts together may have more than both apart."""
ASK = (
    "Sum up the conversation below, in its own language, so that it can go on without the original: facts, "
    "names, figures, decisions, open questions. Write the summary only."
)
EARLIER = "\n\nWhat came before it, in summary:\n\n"
BELOW = "\n\nThe conversation:\n\n"
RECALL: ChatTurn = {"role": "user", "content": "Sum up what we have said so far."}
"""The question that a summary answers, where it is read as a part of its conversation."""

Told = Callable[[int, int], None]
"""Told of pieces read, and all."""


def summary_part(message: Message) -> dict[str, Any] | None:
    """Return what a message says of being a summary; None for every other message."""
    return next((part for part in message.parts if part.get("type") == "summary"), None)


def summary_room(facts: ModelFacts) -> int:
    """Return how many tokens a summary by a model may have."""
    return min(MAX_TOKENS, (facts.context or DEFAULT_WINDOW) // 4)


def begin_summary(
    shelf: Shelf, owner: str, source: Conversation, facts: ModelFacts
) -> tuple[Conversation, Message]:
    """Make a conversation with the settings and documents of `source`, and in it the empty summary of what is
    on screen there.

    Raises ConflictError while that is being written, RequestError when nothing was said.
    """
    branch = shelf.messages.branch(owner, source.id)
    if any(message.status in LIVE for message in branch):
        raise ConflictError("the answer is still being written; stop it or wait")
    if not any(message.text.strip() for message in branch):
        raise RequestError("nothing was said in this conversation yet", field="conversation")
    made = shelf.conversations.create(
        owner,
        title=next_title(source.title),
        model=facts.id,
        system=source.system,
        params=source.params,
        folder=source.folder,
        persona_id=source.persona_id,
    )
    documents = [found.id for found in shelf.documents.listing(owner, source.id)]
    shelf.documents.copy(owner, source.id, made.id, documents)
    part = {
        "type": "summary",
        "conversation_id": source.id,
        "leaf": branch[-1].id,
        "title": source.title,
        "messages": len(branch),
        "is_small": is_small(facts),
    }
    params = {**source.params, "max_tokens": summary_room(facts)}
    answer = shelf.messages.begin(owner, made.id, model=facts.id, params=params, parts=[part])
    return shelf.conversations.get(owner, made.id), answer


def summary_job(job: Job, facts: ModelFacts) -> Job:
    """Return a job of writing a summary with the length that its model has room for."""
    return replace(job, params={**job.params, "max_tokens": summary_room(facts)})


async def summary_prompt(
    models: ChatModels,
    facts: ModelFacts,
    job: Job,
    messages: Sequence[Message],
    told: Told,
    *,
    begun: str = "",
    hint: str | None = None,
) -> list[ChatTurn]:
    """Return what the last step of a summary of `messages` is asked with, after the steps before it.

    `job` is that step, its messages still missing; `begun` is what there is of the summary already, `hint`
    how it is wanted. Raises RequestError where the window is too small.
    """
    ask = f"{ASK} {hint}" if hint else ASK
    room = summary_room(facts) + JOIN_TOKENS
    frame = await models.count(facts.id, [_asked(ask, "x", "x")]) + await models.count_text(facts.id, begun)
    pieces = await _pieces(models, facts.id, messages, (facts.context or DEFAULT_WINDOW) - frame - 2 * room)
    summary = ""
    for done, piece in enumerate(pieces[:-1]):
        told(done, len(pieces))
        step = replace(job, messages=(_asked(ASK, piece, summary),), continues=False, is_aside=True)
        async with aclosing(models.stream(step)) as written:
            summary = "".join([part.text async for part in written]).strip() or summary
    if len(pieces) > 1:
        told(len(pieces) - 1, len(pieces))
    start: list[ChatTurn] = [_asked(ask, pieces[-1], summary)]
    return [*start, {"role": "assistant", "content": begun}] if begun else start


def _asked(ask: str, piece: str, summary: str) -> ChatTurn:
    earlier = f"{EARLIER}{summary}" if summary else ""
    return {"role": "user", "content": f"{ask}{earlier}{BELOW}{piece}"}


async def _pieces(models: ChatModels, model: str, messages: Sequence[Message], room: int) -> list[str]:
    """Return a conversation in pieces of at most `room` tokens; a message that is longer is cut."""
    if room < LEAST_ROOM:
        raise RequestError(f"the window of {model} is too small for a summary; choose another", field="model")
    waiting = [
        f"{'User' if message.role == 'user' else 'Assistant'}: {message.text.strip()}"
        for message in reversed(messages)
        if message.text.strip()
    ]
    pieces: list[list[str]] = [[]]
    used = 0
    while waiting:
        text = waiting.pop()
        need = await models.count_text(model, text) + JOIN_TOKENS
        if need > room and len(text) > 1:
            waiting += reversed(_halves(text))
            continue
        if used + need > room and pieces[-1]:
            pieces.append([])
            used = 0
        pieces[-1].append(text)
        used += need
    return ["\n\n".join(piece) for piece in pieces]


def _halves(text: str) -> tuple[str, str]:
    """Return a text in two, cut between words where there are any near the middle."""
    middle = len(text) // 2
    cut = text.rfind(" ", middle // 2, middle) + 1 or middle
    return text[:cut], text[cut:]
