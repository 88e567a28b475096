"""Finished responses of /v1/responses, so that they can be read and continued later, also after a restart.

Each belongs to the key that made it, is gone after thirty days, and makes room for newer ones of its key.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from bise.errors import NotFoundError
from bise.store.database import Database, is_sound_id
from bise.store.schema import ResponseRecord

KEEP_S = 30 * 86_400.0
MAX_RESPONSES = 10_000
"""Of one key; the oldest make room."""
MAX_BYTES = 256 << 20
"""Of one key's responses together, compressed; the oldest make room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A finished response and the conversation up to its end."""

    body: dict[str, Any]
    """As it was sent; its `id` is the response's."""
    items: list[dict[str, Any]]
    """The input."""
    messages: list[dict[str, Any]]
    """All turns so far, without instructions."""


class Responses:
    """The responses of one database."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float] = time.time,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._database = database
        self._clock = clock
        self._max_responses = max_responses
        self._max_bytes = max_bytes

    def put(self, tenant: str, response: StoredResponse) -> None:
        """Keep a response; what has expired goes, and of this tenant what is too much."""
        content = zlib.compress(json.dumps(asdict(response)).encode(), 1)
        now = self._clock()
        with self._database.writing() as session:
            session.execute(delete(ResponseRecord).where(ResponseRecord.expires_at <= now))
            session.add(
                ResponseRecord(
                    id=response.body["id"],
                    tenant=tenant,
                    created_at=now,
                    expires_at=now + KEEP_S,
                    size=len(content),
                    content=content,
                )
            )
            session.flush()
            self._make_room(session, tenant)

    def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response. Raises NotFoundError when it is gone, unknown or another tenant's."""
        with self._database.reading() as session:
            record = self._find(session, tenant, response_id)
        return StoredResponse(**json.loads(zlib.decompress(record.content)))

    def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response. Raises NotFoundError as `get` does."""
        with self._database.writing() as session:
            session.delete(self._find(session, tenant, response_id))

    def _find(self, session: Session, tenant: str, response_id: str) -> ResponseRecord:
        query = select(ResponseRecord).where(
            ResponseRecord.id == response_id,
            ResponseRecord.tenant == tenant,
            ResponseRecord.expires_at > self._clock(),
        )
        record = session.scalars(query).one_or_none() if is_sound_id(response_id) else None
        if record is None:
            raise NotFoundError(
                f"no response of this key has the id {response_id[:64]!r}; they are kept for "
                f"{KEEP_S / 86_400:.0f} days",
                field="response_id",
            )
        return record

    def _make_room(self, session: Session, tenant: str) -> None:
        """Remove the tenant's oldest responses until count and bytes are within bounds."""
        mine = ResponseRecord.tenant == tenant
        totals = select(func.count(), func.coalesce(func.sum(ResponseRecord.size), 0)).where(mine)
        count, size = session.execute(totals).one()
        oldest = (
            select(ResponseRecord.id, ResponseRecord.size).where(mine).order_by(ResponseRecord.created_at)
        )
        while count > 1 and (count > self._max_responses or size > self._max_bytes):
            gone, bytes_ = session.execute(oldest.limit(1)).one()
            session.execute(delete(ResponseRecord).where(ResponseRecord.id == gone))
            count, size = count - 1, size - bytes_
