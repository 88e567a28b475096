"""Answers kept for requests that are repeated with the same Idempotency-Key: a repeat computes nothing.

The process that works on a request holds it by a lease; when that process has died anyone may begin anew.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError

from bise.store.database import Database
from bise.store.ledger import IDEMPOTENCY_S
from bise.store.schema import ReplayRecord
from bise.store.worker import LEASE_S, is_dead, this_worker

MAX_ANSWER_BYTES = 16 << 20
"""Larger answers are not kept; their repeats are refused."""


class Standing(Enum):
    """What a request with an Idempotency-Key finds."""

    FIRST = auto()
    """Nothing: it is the first, and `finish` or `release` must follow."""
    RUNNING = auto()
    """The first attempt has no answer yet."""
    OTHER_BODY = auto()
    """The key was used with another body."""
    NOT_KEPT = auto()
    """The first attempt was answered, but with too many bytes to keep."""
    KEPT = auto()
    """The first answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """An answer as it was sent."""

    status: int
    headers: dict[str, str]
    body: bytes


class Replays:
    """The kept answers of one database."""

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, worker: str | None = None
    ) -> None:
        """`worker` names this process."""
        self._database = database
        self._clock = clock
        self._worker = worker or this_worker()
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, ident: str, body_hash: str) -> tuple[Standing, KeptAnswer | None]:
        """Return how a request stands, with the answer when it is KEPT; FIRST claims it for this process.

        `ident` stands for owner, route and key together, `body_hash` for the body.
        """
        try:
            record = self._find_or_claim(ident, body_hash)
        except IntegrityError:  # another process claimed it in this moment
            return Standing.RUNNING, None
        if record is None:
            return Standing.FIRST, None
        if record.body_hash != body_hash:
            return Standing.OTHER_BODY, None
        if record.status is None:
            return Standing.RUNNING, None
        if record.answer is None:
            return Standing.NOT_KEPT, None
        body = zlib.decompress(record.answer)
        return Standing.KEPT, KeptAnswer(status=record.status, headers=record.headers, body=body)

    def _find_or_claim(self, ident: str, body_hash: str) -> ReplayRecord | None:
        """Return the record that is there; None when this process has claimed the request."""
        now = self._clock()
        with self._database.writing() as session:
            session.execute(delete(ReplayRecord).where(ReplayRecord.until <= now))
            query = select(ReplayRecord).where(ReplayRecord.id == ident).with_for_update()
            record = session.scalars(query).one_or_none()
            if record is not None and record.status is None and is_dead(record.worker):
                session.delete(record)
                session.flush()
                record = None
            if record is not None:
                return record
            session.add(
                ReplayRecord(
                    id=ident, body_hash=body_hash, worker=self._worker, until=now + LEASE_S, headers={}
                )
            )
            session.flush()
        with self._lock:
            self._open.add(ident)
        return None

    def finish(self, ident: str, answer: KeptAnswer) -> None:
        """Keep the answer of a claimed request for ten minutes."""
        is_small = len(answer.body) <= MAX_ANSWER_BYTES
        values = {
            "status": answer.status,
            "headers": answer.headers,
            "answer": zlib.compress(answer.body, 1) if is_small else None,
            "until": self._clock() + IDEMPOTENCY_S,
        }
        with self._database.writing() as session:
            session.execute(update(ReplayRecord).where(*self._mine(ident)).values(**values))
        self._forget(ident)

    def release(self, ident: str) -> None:
        """Give a claimed request up: there was no answer worth keeping, a repeat begins anew."""
        self._forget(ident)
        with self._database.writing() as session:
            session.execute(delete(ReplayRecord).where(*self._mine(ident)))

    def renew(self) -> None:
        """Say that this process is still at work on what it claimed; call it every LEASE_S / 3."""
        with self._lock:
            idents = list(self._open)
        if not idents:
            return
        with self._database.writing() as session:
            for ident in idents:
                later = {"until": self._clock() + LEASE_S}
                session.execute(update(ReplayRecord).where(*self._mine(ident)).values(**later))

    def _forget(self, ident: str) -> None:
        with self._lock:
            self._open.discard(ident)

    def _mine(self, ident: str):  # noqa: ANN202  # the expressions' types have no short name
        return (
            ReplayRecord.id == ident,
            ReplayRecord.worker == self._worker,
            ReplayRecord.status.is_(None),
        )
