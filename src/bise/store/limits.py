"""Limits per key that hold across processes and restarts: what a request may use is reserved before it runs,
and settled to what it did use when it ends. Reservations need not outlast a power failure, which ends their
requests, too; what was used does.

Requests and tokens per minute count over the 60 seconds before now, not over minutes of the clock, so no
more than the limit passes in any minute. Days and months are those of UTC.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.orm import Session

from bise.errors import PermissionDeniedError, RateLimitError
from bise.store.database import Database
from bise.store.keys import KeyInfo, KeyLimits
from bise.store.schema import KeyRecord, Money, ReservationRecord, SpendRecord
from bise.store.worker import LEASE_S, is_dead, this_worker

MINUTE_S = 60.0
_AT_ONCE = 500
"""Reservations named in one statement: databases bound the parameters of one."""
BUSY_RETRY_S = 1.0
"""What a key at its concurrency is told: nobody knows when its running requests end."""


# Statements that every request runs, built once: building one costs more than running it.
_held, _spent = ReservationRecord, SpendRecord
_is_of_key = _held.key_id == bindparam("its_key")
# A time ahead of now was written before the clock was set back; it would block the key till then.
_is_recent = (_held.at > bindparam("since")) & (_held.at <= bindparam("until"))
_LOCK = select(KeyRecord.id).where(KeyRecord.id == bindparam("its_key")).with_for_update()
_PLACE = insert(_held)
_CHANGE = update(_held).where(_held.id == bindparam("its_id"))
_FORGET = delete(_held).where(~_held.is_open | (_held.lease_until <= bindparam("now")), ~_is_recent)
_RECENT = select(_held.at, _held.tokens).where(_is_of_key, _is_recent).order_by(_held.at, _held.id)
_SPEND_FIRST = insert(_spent)
_SPEND_MORE = (
    update(_spent)
    .where(_spent.key_id == bindparam("its_key"), _spent.period == bindparam("its_period"))
    .values(
        requests=_spent.requests + 1,
        tokens=_spent.tokens + bindparam("more"),
        cost=_spent.cost + bindparam("dearer", type_=Money()),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a key has of one limit per minute: the numbers of the `x-ratelimit` headers."""

    limit: int
    remaining: int
    reset_s: float
    """Seconds until all of it is there again, if nothing else comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A place that a request holds until it is settled."""

    id: str
    key_id: str
    requests: Allowance | None
    tokens: Allowance | None
    booked: int = 0
    """Tokens that are set aside for it."""


UNPLACED = ""
"""Id of the reservation of what belongs to a request and is none itself, such as a conversation's title."""


class Limits:
    """Reserves and settles for the keys of one database."""

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, worker: str | None = None
    ) -> None:
        """`clock` returns seconds since 1970; `worker` names this process."""
        self._database = database
        self._clock = clock
        self._worker = worker or this_worker()

    def reserve(self, key: KeyInfo, tokens: int = 0, cost: Decimal = Decimal(0)) -> Reservation:
        """Let one request of a key in, for at most `tokens` and `cost`.

        Raises RateLimitError, with the seconds after which it can pass, when a limit forbids it; refused
        requests count for nothing.
        """
        now = self._clock()
        with self._database.writing(is_lasting=False) as session:
            _lock(session, key.id)
            state = self._state(session, key, now)
            state.check(tokens, cost, is_new=True)
            reservation_id = secrets.token_hex(16)
            place = {
                "id": reservation_id,
                "key_id": key.id,
                "at": now,
                "tokens": tokens,
                "cost": cost,
                "is_open": True,
                "worker": self._worker,
                "lease_until": now + LEASE_S,
            }
            session.connection().execute(_PLACE, place)
        return state.reservation(reservation_id, tokens, num_new=1)

    def extend(
        self,
        reservation: Reservation,
        key: KeyInfo,
        tokens: int,
        cost: Decimal = Decimal(0),
        *,
        least: int | None = None,
        token_cost: Decimal = Decimal(0),
    ) -> Reservation:
        """Reserve tokens and money for a request that holds a place without any yet.

        A request that can do with fewer says so: of `tokens` at least `least` are booked, as many as the key
        has left, and each one less costs `token_cost` less. Raises RateLimitError when a limit forbids it;
        the place is then given up and counts for nothing.
        """
        if not counts_tokens(key.limits):
            return replace(reservation, booked=tokens)  # what it used is written when it ends
        now = self._clock()
        refusal: RateLimitError | None = None
        with self._database.writing(is_lasting=False) as session:
            _lock(session, key.id)
            state = self._state(session, key, now)
            if least is not None:
                wanted = tokens
                tokens = max(least, tokens - state.excess(tokens, cost, token_cost))
                cost -= (wanted - tokens) * token_cost
            try:
                state.check(tokens, cost, is_new=False)
            except RateLimitError as error:
                refusal = error
                session.execute(delete(ReservationRecord).where(ReservationRecord.id == reservation.id))
            else:
                held = {"tokens": tokens, "cost": cost, "lease_until": now + LEASE_S}
                _update(session, reservation.id, held)
        if refusal is not None:
            raise refusal
        return state.reservation(reservation.id, tokens, num_new=0)

    def check(
        self, key: KeyInfo, tokens: int = 0, cost: Decimal = Decimal(0), *, is_new: bool = True
    ) -> None:
        """Raise RateLimitError when the key could not begin a request now; reserves nothing.

        Without `is_new` only tokens and money are looked at, not the number of requests.
        """
        now = self._clock()
        with self._database.writing(is_lasting=False) as session:
            _lock(session, key.id)
            self._state(session, key, now).check(tokens, cost, is_new=is_new)

    def used(self, key: KeyInfo) -> dict[str, str | int]:
        """Return what counts against each of a key's limits now; money as a string."""
        now = self._clock()
        with self._database.writing(is_lasting=False) as session:
            _lock(session, key.id)
            state = self._state(session, key, now, is_whole=True)
        return {
            "requests_per_minute": len(state.recent),
            "tokens_per_minute": sum(tokens for _, tokens in state.recent),
            "tokens_per_day": state.day_tokens,
            "money_per_month": f"{state.month_cost:f}",
            "concurrency": state.num_open,
        }

    def settle(
        self,
        reservation: Reservation,
        tokens: int,
        cost: Decimal,
        session: Session,
        *,
        at: float | None = None,
        is_billed: bool = True,
    ) -> None:
        """Replace what was reserved by what was used, inside the caller's transaction.

        A request that is not billed, because it repeats another, still counts against the minute; what has no
        place (UNPLACED) counts against days and months alone.
        """
        now = self._clock() if at is None else at
        _lock(session, reservation.key_id)
        _update(session, reservation.id, {"tokens": tokens, "cost": cost, "is_open": False})
        if not is_billed:
            return
        connection = session.connection()
        for period in periods(now):
            spent = {"its_key": reservation.key_id, "its_period": period, "more": tokens, "dearer": cost}
            if not connection.execute(_SPEND_MORE, spent).rowcount:
                first = {"key_id": reservation.key_id, "period": period, "requests": 1}
                connection.execute(_SPEND_FIRST, {**first, "tokens": tokens, "cost": cost})

    def hold(self, reservation: Reservation, session: Session) -> None:
        """Let no other transaction settle or reserve for the same key until the caller's has ended."""
        _lock(session, reservation.key_id)

    def renew(self, reservation_ids: Sequence[str]) -> None:
        """Say that this process is still at work on these, and forget what no limit counts any more; call it
        every LEASE_S / 3.
        """
        held, now = ReservationRecord, self._clock()
        with self._database.writing(is_lasting=False) as session:
            for first in range(0, len(reservation_ids), _AT_ONCE):
                some = reservation_ids[first : first + _AT_ONCE]
                session.execute(update(held).where(held.id.in_(some)).values(lease_until=now + LEASE_S))
            session.connection().execute(_FORGET, {"now": now, **_minute(now)})

    def _state(self, session: Session, key: KeyInfo, now: float, *, is_whole: bool = False) -> _State:
        """Return what the key holds and has used.

        A key may have thousands of requests open: the database adds them up, the last minute's alone are read
        one by one, and all of it only where a limit, or `is_whole`, asks for it.
        """
        limits = key.limits
        counts_spend = is_whole or limits.tokens_per_day is not None or limits.money_per_month is not None
        num_open, open_tokens, open_cost = 0, 0, Decimal(0)
        if counts_spend or limits.concurrency is not None:
            num_open, open_tokens, open_cost = _take_stock(session, key, now)
        recent: list[tuple[float, int]] = []
        if is_whole or limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
            found = session.connection().execute(_RECENT, {"its_key": key.id, **_minute(now)})
            recent = [(at, tokens) for at, tokens in found]
        spend_day = spend_month = None
        if counts_spend:
            spend_day, spend_month = (session.get(SpendRecord, (key.id, period)) for period in periods(now))
        return _State(
            key=key,
            now=now,
            recent=recent,
            num_open=num_open,
            day_tokens=(spend_day.tokens if spend_day else 0) + open_tokens,
            month_cost=(spend_month.cost if spend_month else Decimal(0)) + open_cost,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a key has in use at one moment, as far as its limits ask."""

    key: KeyInfo
    now: float
    recent: list[tuple[float, int]]
    """(time, tokens) of the requests of the last minute, oldest first; empty where nobody asked for them."""
    num_open: int
    day_tokens: int
    month_cost: Decimal

    def check(self, tokens: int, cost: Decimal, *, is_new: bool) -> None:
        """Raise RateLimitError for the first limit that a request would break."""
        limits = self.key.limits
        if is_new and limits.concurrency is not None and self.num_open >= limits.concurrency:
            # A limit of 0 closes a key; waiting does not open it.
            retry = BUSY_RETRY_S if limits.concurrency else None
            raise _refusal("concurrency", "requests at the same time", limits.concurrency, retry)
        if is_new and limits.requests_per_minute is not None:
            self._check_minute("requests_per_minute", limits.requests_per_minute, [1] * len(self.recent), 1)
        if limits.tokens_per_minute is not None:
            used = [tokens for _, tokens in self.recent]
            self._check_minute("tokens_per_minute", limits.tokens_per_minute, used, tokens)
        if limits.tokens_per_day is not None and not _fits(self.day_tokens, tokens, limits.tokens_per_day):
            raise _refusal(
                "tokens_per_day",
                "tokens per day",
                limits.tokens_per_day,
                _until(self.now, "day") if tokens <= limits.tokens_per_day else None,
            )
        if limits.money_per_month is not None and not _fits(self.month_cost, cost, limits.money_per_month):
            raise _refusal(
                "money_per_month",
                "money per month",
                limits.money_per_month,
                _until(self.now, "month") if cost <= limits.money_per_month else None,
            )

    def excess(self, tokens: int, cost: Decimal, token_cost: Decimal) -> int:
        """Return how many of `tokens` go beyond what is left of any limit."""
        limits = self.key.limits
        over = 0
        if limits.tokens_per_minute is not None:
            over = max(over, sum(used for _, used in self.recent) + tokens - limits.tokens_per_minute)
        if limits.tokens_per_day is not None:
            over = max(over, self.day_tokens + tokens - limits.tokens_per_day)
        if limits.money_per_month is not None and token_cost:
            beyond = self.month_cost + cost - limits.money_per_month
            over = max(over, math.ceil(beyond / token_cost))
        return over

    def reservation(self, reservation_id: str, tokens: int, *, num_new: int) -> Reservation:
        """Return the place that was given, with what is left after it."""
        limits = self.key.limits
        recent = [*self.recent, (self.now, tokens)]
        return Reservation(
            id=reservation_id,
            key_id=self.key.id,
            requests=self._allowance(limits.requests_per_minute, len(self.recent) + num_new, recent),
            tokens=self._allowance(limits.tokens_per_minute, sum(count for _, count in recent), recent),
            booked=tokens,
        )

    def _allowance(
        self, limit: int | None, used: int, recent: Sequence[tuple[float, int]]
    ) -> Allowance | None:
        if limit is None:
            return None
        last = max((at for at, _ in recent), default=self.now)
        return Allowance(
            limit=limit, remaining=max(0, limit - used), reset_s=max(0.0, last + MINUTE_S - self.now)
        )

    def _check_minute(self, name: str, limit: int, used: list[int], wanted: int) -> None:
        """Raise unless `wanted` more fit; the oldest entries fall out of the minute first."""
        total = sum(used)
        if _fits(total, wanted, limit):
            return
        retry: float | None = None
        for (at, _), count in zip(self.recent, used, strict=True):
            total -= count
            if _fits(total, wanted, limit):
                retry = at + MINUTE_S - self.now
                break
        raise _refusal(name, name.replace("_", " "), limit, retry)


def counts_tokens(limits: KeyLimits) -> bool:
    """Return True where a limit depends on how many tokens a request may use."""
    counted = (limits.tokens_per_minute, limits.tokens_per_day, limits.money_per_month)
    return any(limit is not None for limit in counted)


def _fits(used: int | Decimal, wanted: int | Decimal, limit: int | Decimal) -> bool:
    """Return True when a request may start: one that does not know its need yet needs something left."""
    return used + wanted <= limit if wanted else used < limit


def _refusal(field: str, what: str, limit: object, retry_after_s: float | None) -> RateLimitError:
    way_out = (
        "it can never pass" if retry_after_s is None else f"try again in {max(1, round(retry_after_s))} s"
    )
    return RateLimitError(
        f"this key may use {limit} {what} and would exceed that; {way_out}",
        field=field,
        retry_after_s=retry_after_s,
    )


def periods(now: float) -> tuple[str, str]:
    """Return the day and the month of a time, in UTC: `2026-11-21`, `2026-11`."""
    day = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
    return day, day[:7]


def _until(now: float, period: str) -> float:
    moment = datetime.fromtimestamp(now, UTC)
    start = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        end = start + timedelta(days=1)
    else:
        end = (start.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (end - moment).total_seconds()


def _minute(now: float) -> dict[str, float]:
    """Return what `_is_recent` asks for."""
    return {"since": now - MINUTE_S, "until": now + MINUTE_S}


def _lock(session: Session, key_id: str) -> None:
    """Let one transaction at a time work on a key (SQLite does so for all keys anyway)."""
    if session.connection().execute(_LOCK, {"its_key": key_id}).one_or_none() is None:
        raise PermissionDeniedError("the key is not in the database any more")


def _take_stock(session: Session, key: KeyInfo, now: float) -> tuple[int, int, Decimal]:
    """Return (requests, tokens, cost) that a key has open, and close what nobody will ever settle, since its
    process is gone.
    """
    held = ReservationRecord
    is_held = (held.key_id == key.id) & held.is_open
    sums = session.execute(
        select(held.worker, func.count(), func.sum(held.tokens), func.sum(held.cost))
        .where(is_held, held.lease_until > now)
        .group_by(held.worker)
    ).all()
    dead = [worker for worker, *_ in sums if is_dead(worker)]
    session.execute(
        update(held).where(is_held, (held.lease_until <= now) | held.worker.in_(dead)).values(is_open=False)
    )
    alive = [row for row in sums if row[0] not in dead]
    return (
        sum(count for _, count, _, _ in alive),
        sum(int(tokens) for _, _, tokens, _ in alive),
        sum((cost for *_, cost in alive), Decimal(0)),
    )


def _update(session: Session, reservation_id: str, values: Mapping[str, object]) -> None:
    session.connection().execute(_CHANGE, {"its_id": reservation_id, **values})
