"""The ledger: one row per request, aborted ones too, written once and never changed. Holds no text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from bise.errors import RequestError
from bise.store.database import Database
from bise.store.limits import periods
from bise.store.schema import KeyRecord, LedgerRecord, Money

IDEMPOTENCY_S = 600.0
"""A request repeated with its Idempotency-Key within this time is the same request: it has one row."""
BATCH = "batch:"
"""What the idempotency keys of batch lines begin with; those of clients never do, being hashes."""
_WRITE = insert(LedgerRecord)
GROUPS = ("key", "model", "adapter", "day", "endpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """What one request used."""

    request_id: str
    key_id: str | None
    """None for someone on this machine without a key."""
    owner: str
    endpoint: str
    model: str
    """Empty when no model was found."""
    adapter: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Part of the prompt's."""
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    energy_j: float | None = None
    """None where the machine does not tell."""
    cost: Decimal | None = None
    """By the price book; None for a model without a price."""
    house_cost: Decimal | None = None
    """Energy and hardware; None when no rate is known."""
    finish_reason: str | None = None
    error_code: str | None = None
    rule: str | None = None
    """The guardrail that ended it."""
    idempotency_key: str | None = None

    @property
    def is_free(self) -> bool:
        """True for a cut off attempt at a batch line: only the one that brings its answer costs."""
        return self.finish_reason == "abort" and (self.idempotency_key or "").startswith(BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSum:
    """The sums of a group of rows."""

    group: str
    """The key's id, the model, the adapter, the day or the endpoint; empty for all rows."""
    name: str
    """What people call the group."""
    requests: int
    errors: int
    """Requests that ended with an error code."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    energy_j: float | None
    cost: Decimal
    unpriced: int
    """Requests whose model had no price; they are not in `cost`."""
    house_cost: Decimal | None

    def as_json(self) -> dict[str, Any]:
        """Return the sums; money as strings without exponent."""
        return {
            "group": self.group,
            "name": self.name,
            "requests": self.requests,
            "errors": self.errors,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "queue_s": round(self.queue_s, 6),
            "prefill_s": round(self.prefill_s, 6),
            "decode_s": round(self.decode_s, 6),
            "energy_j": self.energy_j,
            "cost": f"{self.cost:f}",
            "unpriced": self.unpriced,
            "house_cost": None if self.house_cost is None else f"{self.house_cost:f}",
        }


class Ledger:
    """The ledger of one database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def record(self, row: LedgerRow, session: Session | None = None, at: float | None = None) -> bool:
        """Write a row, in the caller's transaction when one is given.

        Return False, and write nothing, when it repeats a request that was answered in the last ten minutes,
        or a batch's line that was ever answered.
        """
        if session is None:
            with self._database.writing() as own:
                return self.record(row, own, at)
        now = self._clock() if at is None else at
        if row.idempotency_key is not None and self._is_repeated(session, row, now):
            return False
        values = {name: getattr(row, name) for name in LedgerRow.__slots__}
        session.connection().execute(_WRITE, {"at": now, "day": periods(now)[0], **values})
        return True

    def _is_repeated(self, session: Session, row: LedgerRow, now: float) -> bool:
        query = select(LedgerRecord.id).where(
            LedgerRecord.owner == row.owner,
            LedgerRecord.idempotency_key == row.idempotency_key,
            LedgerRecord.endpoint == row.endpoint,
            LedgerRecord.error_code.is_(None),
            # What was abandoned had no answer: the attempt that brings one must not be free.
            func.coalesce(LedgerRecord.finish_reason, "") != "abort",
        )
        if not (row.idempotency_key or "").startswith(BATCH):  # a batch may go on after any time
            query = query.where(LedgerRecord.at > now - IDEMPOTENCY_S)
        return session.scalars(query).first() is not None

    def sums(
        self,
        by: str | None = None,
        *,
        owner: str | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> list[UsageSum]:
        """Return the sums per group (see GROUPS), largest group of tokens first, days in order; None: one sum
        over everything. RequestError for an unknown group.

        `owner` narrows to one owner's rows, [`since`, `until`) to a span of time.
        """
        group = _group_column(by)
        conditions: list[ColumnElement[bool]] = []
        if owner is not None:
            conditions.append(LedgerRecord.owner == owner)
        if since is not None:
            conditions.append(LedgerRecord.at >= since)
        if until is not None:
            conditions.append(LedgerRecord.at < until)
        query = select(*([group] if group is not None else []), *_SUMS).where(*conditions)
        if group is not None:
            query = query.group_by(group)
        with self._database.reading() as session:
            rows = session.execute(query).all()
            names = _names(session) if by == "key" else None
        sums = [_sum(row if group is not None else ("", *row), names) for row in rows]
        sums = [entry for entry in sums if entry.requests or group is None]
        if by == "day":
            return sorted(sums, key=lambda entry: entry.group)
        return sorted(sums, key=lambda entry: (-entry.prompt_tokens - entry.completion_tokens, entry.group))

    def rows(
        self, *, owner: str | None = None, limit: int = 100, before: int | None = None
    ) -> list[LedgerRecord]:
        """Return the newest rows first; `before` is the id after which an earlier page ended."""
        query = select(LedgerRecord).order_by(LedgerRecord.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(LedgerRecord.owner == owner)
        if before is not None:
            query = query.where(LedgerRecord.id < before)
        with self._database.reading() as session:
            return list(session.scalars(query))


_SUMS = (
    func.count(LedgerRecord.id),
    func.count(LedgerRecord.error_code),
    func.sum(LedgerRecord.prompt_tokens),
    func.sum(LedgerRecord.cached_tokens),
    func.sum(LedgerRecord.completion_tokens),
    func.sum(LedgerRecord.queue_s),
    func.sum(LedgerRecord.prefill_s),
    func.sum(LedgerRecord.decode_s),
    func.sum(LedgerRecord.energy_j),
    func.sum(LedgerRecord.cost, type_=Money),
    func.count(LedgerRecord.cost),
    func.sum(LedgerRecord.house_cost, type_=Money),
)


def _group_column(by: str | None) -> InstrumentedAttribute[Any] | None:
    columns: dict[str, InstrumentedAttribute[Any]] = {
        "key": LedgerRecord.key_id,
        "model": LedgerRecord.model,
        "adapter": LedgerRecord.adapter,
        "day": LedgerRecord.day,
        "endpoint": LedgerRecord.endpoint,
    }
    if by is None:
        return None
    if by not in columns:
        raise RequestError(f"usage can be grouped by {', '.join(GROUPS)}, not by {by!r}", field="by")
    return columns[by]


def _sum(row: Sequence[Any], names: dict[str, str] | None) -> UsageSum:
    (
        group,
        requests,
        errors,
        prompt,
        cached,
        completion,
        queue,
        prefill,
        decode,
        energy,
        cost,
        priced,
        house,
    ) = row
    text = "" if group is None else str(group)
    return UsageSum(
        group=text,
        name=text if names is None else names.get(text, text or "local"),
        requests=requests,
        errors=errors,
        prompt_tokens=int(prompt or 0),
        cached_tokens=int(cached or 0),
        completion_tokens=int(completion or 0),
        queue_s=math.fsum([queue or 0.0]),
        prefill_s=math.fsum([prefill or 0.0]),
        decode_s=math.fsum([decode or 0.0]),
        energy_j=energy,
        cost=cost or Decimal(0),
        unpriced=requests - priced,
        house_cost=house,
    )


def _names(session: Session) -> dict[str, str]:
    return {row.id: row.name for row in session.execute(select(KeyRecord.id, KeyRecord.name))}
