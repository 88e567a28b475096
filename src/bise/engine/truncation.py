"""Dropping parts of a prompt, on request only: what is used and what is dropped always add up.

Over token ids for whoever counts tokens, over whole messages for whoever has a conversation. Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bise.errors import ContextOverflowError

Truncation = Literal["oldest", "middle"]
"""What goes first: the oldest part, or the middle, so that the beginning and the end stay."""

Message = Mapping[str, object]
"""A chat message: `role` and what belongs to it."""


def truncate_tokens(
    token_ids: Sequence[int], limit: int, mode: Truncation, keep: int = 0
) -> tuple[tuple[int, ...], int]:
    """Return at most `limit` of `token_ids`, order kept, and how many were dropped.

    The first `keep` tokens (BOS, system prompt) always stay. `oldest` drops what follows them; `middle` drops
    as much from the middle of the rest, leaving half of what stays (rounded up) at its end. Raises
    ContextOverflowError when the kept tokens alone leave no room for another one.

    Example: 0 .. 9, limit 6, keep 1: oldest gives 0 5 6 7 8 9, middle gives 0 1 2 7 8 9; 4 dropped.
    """
    if len(token_ids) <= limit:
        return tuple(token_ids), 0
    room = limit - keep
    if room < 1:
        raise ContextOverflowError(
            f"truncate_keep {keep} leaves no room for the rest of the prompt, where {max(limit, 0)} of its "
            f"{len(token_ids)} tokens fit; keep fewer or ask for fewer tokens",
            field="truncate_keep",
        )
    leading = 0 if mode == "oldest" else room // 2
    used = (*token_ids[: keep + leading], *token_ids[len(token_ids) - (room - leading) :])
    return used, len(token_ids) - len(used)


@dataclass(frozen=True, slots=True)
class MessageCut:
    """A conversation that fits, and what had to go for that."""

    messages: tuple[Message, ...]
    dropped: tuple[int, ...]
    """Indices of the messages that were dropped, ascending."""
    num_tokens: int
    """Tokens of what stays."""
    num_dropped_tokens: int
    """Tokens of the whole conversation less those of what stays."""


def truncate_messages(
    messages: Sequence[Message], limit: int, mode: Truncation, count: Callable[[Sequence[Message]], int]
) -> MessageCut:
    """Return the conversation with as few whole turns dropped as bring it to `limit` tokens by `count`.

    A turn is a user message and everything up to the next one: an answer never loses its question, nor a tool
    result its call. System messages and the last turn always stay. `oldest` drops turns from the beginning;
    `middle` from the middle, nearest to it first, so that the beginning and the end stay. `count` must not
    grow when messages go; it is called about log2(turns) times. Raises ContextOverflowError, with both
    numbers, when even what always stays exceeds the limit.
    """
    total = count(messages)
    if total <= limit:
        return MessageCut(tuple(messages), (), total, 0)
    order = _drop_order(_turns(messages), mode)

    def without(num_turns: int) -> MessageCut:
        dropped = {index for turn in order[:num_turns] for index in turn}
        left = tuple(message for index, message in enumerate(messages) if index not in dropped)
        used = count(left)
        return MessageCut(left, tuple(sorted(dropped)), used, total - used)

    best = without(len(order))
    if best.num_tokens > limit:
        raise ContextOverflowError(
            f"the conversation has {total} tokens, {limit} fit, and its system messages and last turn alone "
            f"have {best.num_tokens}; shorten them or ask for fewer tokens",
            field="messages",
        )
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        cut = without(middle)
        if cut.num_tokens <= limit:
            best, high = cut, middle
        else:
            low = middle + 1
    return best


def _turns(messages: Sequence[Message]) -> list[list[int]]:
    """Return the indices of each turn's messages, system messages left out."""
    turns: list[list[int]] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role in ("system", "developer"):
            continue
        if role == "user" or not turns:
            turns.append([])
        turns[-1].append(index)
    return turns


def _drop_order(turns: Sequence[list[int]], mode: Truncation) -> list[list[int]]:
    """Return the turns that may be dropped, in the order in which they go; the last one may not."""
    old = list(turns[:-1])
    if mode == "oldest":
        return old
    middle = (len(old) - 1) / 2
    # Of two equally near the middle the older goes first.
    order = sorted(range(len(old)), key=lambda index: (abs(index - middle), index))
    return [old[index] for index in order]
