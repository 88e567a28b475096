"""Responses that can be read or continued later: the newest ones, in memory, each for its own key only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from bise.errors import NotFoundError
from bise.server.conversation import Message

MAX_RESPONSES = 1000
MAX_CHARS = 64 << 20
"""Of all kept texts together, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A finished response and the conversation up to its end."""

    tenant: str
    body: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[Message]


class Shelf:
    """Keeps the newest responses; the oldest make room. For one event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._chars = 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response, unless it alone is larger than the shelf."""
        size = sum(len(str(message)) for message in response.messages) + len(str(response.body))
        if size > self._max_chars:
            return
        self._kept[response.tenant, response.body["id"]] = response, size
        self._chars += size
        while len(self._kept) > self._max_responses or self._chars > self._max_chars:
            _, (_, gone) = self._kept.popitem(last=False)
            self._chars -= gone

    def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response. Raises NotFoundError when it is gone, unknown or another key's."""
        found = self._kept.get((tenant, response_id))
        if found is None:
            raise NotFoundError(
                "there is no such response here (only the newest are kept, and only until a restart)",
                field="response_id",
            )
        return found[0]

    def drop(self, tenant: str, response_id: str) -> None:
        """Forget a response."""
        _, size = self._kept.pop((tenant, response_id), (None, 0))
        self._chars -= size
