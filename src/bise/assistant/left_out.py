"""Turns that are left out of a prompt because a person asked for it, so that a question fits the window.

The answer says which, in a part `dropped`; they stay left out in the turns after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from bise.assistant.messages import Message
from bise.errors import RequestError


def left_out(messages: Sequence[Message]) -> frozenset[str]:
    """Return the ids of all messages that answers among `messages` leave out."""
    return frozenset(
        cast("str", key)
        for message in messages
        for part in message.parts
        if part.get("type") == "dropped"
        for key in part["messages"]
    )


def kept(messages: Sequence[Message]) -> list[Message]:
    """Return the messages of a branch that its last answer read, or would read."""
    absent = left_out(messages)
    return [message for message in messages if message.id not in absent]


def dropped_part(history: Sequence[Message], keep_from: str) -> dict[str, Any]:
    """Return the part of an answer to the end of `history` that reads from the message `keep_from` on.

    Raises RequestError unless that is a question of `history`.
    """
    for index, message in enumerate(history):
        if message.id == keep_from and message.role == "user":
            return {"type": "dropped", "messages": [earlier.id for earlier in history[:index]]}
    raise RequestError("keep_from names no question of this branch", field="keep_from")
