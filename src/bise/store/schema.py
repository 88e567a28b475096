"""The tables, as typed records. Their history is in `migrations/versions`; a test holds the two together.

Times are seconds since 1970 (UTC). Money is a whole number of 10^-12 currency units, `Decimal` in Python.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

MONEY_UNIT = Decimal("1e-12")
"""The smallest amount: a price with six decimals per million tokens is exact for one token."""

JsonObject = dict[str, Any]


class Money(TypeDecorator[Decimal]):
    """A Decimal in Python, a whole number of MONEY_UNIT in the database: sums are exact everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        """Return the whole number that is stored; amounts are rounded half to even at 10^-12."""
        return None if value is None else int(value.quantize(MONEY_UNIT, ROUND_HALF_EVEN).scaleb(12))

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Decimal | None:
        """Return the amount in currency units."""
        return None if value is None else Decimal(int(value)).scaleb(-12)


class Record(DeclarativeBase):
    """What all tables are made from."""


class SettingRecord(Record):
    """A fact about the whole database, such as its currency."""

    __tablename__ = "settings"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class KeyRecord(Record):
    """An API key; the key itself is nowhere, only its keyed hash."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    owner: Mapped[str] = mapped_column(String(200))
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    limits: Mapped[JsonObject] = mapped_column(JSON)
    rules: Mapped[list[JsonObject]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)


class ReservationRecord(Record):
    """Work a key was let in for: at first what it may use, later what it did; the last minute's are kept."""

    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"), index=True)
    at: Mapped[float] = mapped_column(Double)
    tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(Money)
    is_open: Mapped[bool]
    worker: Mapped[str] = mapped_column(String(200))
    lease_until: Mapped[float] = mapped_column(Double)


class SpendRecord(Record):
    """What a key used in one day (`2026-11-21`) or month (`2026-11`), in UTC."""

    __tablename__ = "spend"

    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"), primary_key=True)
    period: Mapped[str] = mapped_column(String(10), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[Decimal] = mapped_column(Money)


class PriceRecord(Record):
    """Prices of one model per million tokens; the model `*` stands for all others."""

    __tablename__ = "prices"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    input: Mapped[Decimal] = mapped_column(Money)
    cached: Mapped[Decimal] = mapped_column(Money)
    output: Mapped[Decimal] = mapped_column(Money)


class LedgerRecord(Record):
    """One request, once and for all: rows are added, never changed (triggers in the database see to it)."""

    __tablename__ = "ledger"
    __table_args__ = (Index("ix_ledger_idempotency", "owner", "idempotency_key"),)

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    at: Mapped[float] = mapped_column(Double, index=True)
    day: Mapped[str] = mapped_column(String(10), index=True)
    request_id: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(String(40), index=True)
    owner: Mapped[str] = mapped_column(String(200))
    endpoint: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    adapter: Mapped[str | None] = mapped_column(Text)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    queue_s: Mapped[float] = mapped_column(Double)
    prefill_s: Mapped[float] = mapped_column(Double)
    decode_s: Mapped[float] = mapped_column(Double)
    energy_j: Mapped[float | None] = mapped_column(Double)
    cost: Mapped[Decimal | None] = mapped_column(Money)
    house_cost: Mapped[Decimal | None] = mapped_column(Money)
    finish_reason: Mapped[str | None] = mapped_column(String(40))
    error_code: Mapped[str | None] = mapped_column(Text)
    rule: Mapped[str | None] = mapped_column(Text)
    idempotency_key: Mapped[str | None] = mapped_column(Text)


class FileRecord(Record):
    """A stored file; its content lies beside the database under the file's id."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), index=True)
    name: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(40))
    source: Mapped[str] = mapped_column(String(20))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    num_lines: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)


class BatchRecord(Record):
    """A batch job."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), index=True)
    key_id: Mapped[str | None] = mapped_column(String(40))
    endpoint: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(20), index=True)
    details: Mapped[JsonObject] = mapped_column("metadata", JSON)
    input_files: Mapped[list[str]] = mapped_column(JSON)
    window: Mapped[str | None] = mapped_column(String(20))
    errors: Mapped[list[JsonObject]] = mapped_column(JSON)
    total: Mapped[int] = mapped_column(BigInteger)
    succeeded: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    cancelled_at: Mapped[float | None] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double)
    output_file: Mapped[str | None] = mapped_column(String(40))
    error_file: Mapped[str | None] = mapped_column(String(40))


class BatchLineRecord(Record):
    """One request of a batch: where it lies in its file, and what became of it."""

    __tablename__ = "batch_lines"
    __table_args__ = (Index("ix_batch_lines_state", "batch_id", "state", "number"),)

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    custom_id: Mapped[str | None] = mapped_column(String(512))
    file_id: Mapped[str] = mapped_column(String(40))
    offset: Mapped[int] = mapped_column(BigInteger)
    size: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(10))
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None] = mapped_column(Double)
    status_code: Mapped[int | None]
    request_id: Mapped[str | None] = mapped_column(Text)
    response: Mapped[str | None] = mapped_column(Text)


class ResponseRecord(Record):
    """A finished response of /v1/responses and the conversation up to its end, as compressed JSON."""

    __tablename__ = "responses"
    __table_args__ = (Index("ix_responses_tenant", "tenant", "created_at", "size"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double, index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class ReplayRecord(Record):
    """A request with an Idempotency-Key: who works on it, later its answer, kept for a short time."""

    __tablename__ = "replays"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    body_hash: Mapped[str] = mapped_column(String(64))
    worker: Mapped[str] = mapped_column(String(200))
    until: Mapped[float] = mapped_column(Double, index=True)
    status: Mapped[int | None]
    headers: Mapped[JsonObject] = mapped_column(JSON)
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
