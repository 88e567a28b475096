"""What a model is asked with: instructions, the branch, documents or the passages that fit the question."""

from __future__ import annotations

from typing import Any

from bise.assistant.left_out import left_out
from bise.assistant.messages import Turn
from bise.assistant.models import ModelFacts
from bise.assistant.retrieval import Progress, Retrieval
from bise.assistant.shelf import Shelf
from bise.assistant.summaries import RECALL, summary_part


async def build_prompt(
    retrieval: Retrieval,
    shelf: Shelf,
    owner: str,
    facts: ModelFacts,
    turn: Turn,
    hint: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Return the messages that a run is asked with, and the passages of documents among them.

    `hint` says how to answer; `progress` is told of embeddings, without it none are made.
    """
    messages: list[dict[str, str]] = []
    system = turn.conversation.system.strip()
    if system:
        messages.append({"role": "system", "content": system})
    absent = left_out((*turn.history, turn.answer))
    history = [
        message
        for message in turn.history
        if message.id not in absent and (message.role == "user" or message.text)
    ]
    texts = [message.text for message in history]
    if hint and texts:
        texts[-1] = f"{texts[-1]}\n\n{hint}"
    sources: list[dict[str, Any]] = []
    if any(message.documents for message in history):
        begun = turn.answer.sources if turn.answer.text else ()
        texts, sources = await retrieval.fill(
            shelf.documents, owner, facts, history, texts, begun=begun, progress=progress
        )
    for message, text in zip(history, texts, strict=True):
        if summary_part(message) is not None:
            messages.append({**RECALL})
        messages.append({"role": message.role, "content": text})
    if turn.answer.text:
        messages += [{**RECALL}] if summary_part(turn.answer) is not None else []
        messages.append({"role": "assistant", "content": turn.answer.text})
    return _joined(messages), sources


def _joined(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages with neighbours of one role as one: imports have them, chat formats do not."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            content = f"{joined[-1]['content']}\n\n{message['content']}"
            joined[-1] = {"role": message["role"], "content": content}
        else:
            joined.append(message)
    return joined
