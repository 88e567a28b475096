import os
import random
import subprocess
import sys
import threading
from decimal import Decimal

import pytest
from sqlalchemy import event, select

from bise.errors import RateLimitError
from bise.store import limits as limits_module
from bise.store.database import Database
from bise.store.keys import KeyLimits
from bise.store.limits import Limits
from bise.store.schema import ReservationRecord, SpendRecord
from bise.store.worker import LEASE_S


@pytest.fixture
def limits(database, clock):
    return Limits(database, clock, worker="elsewhere:1:1")


def _key(keys, **limits):
    return keys.create("k", limits=KeyLimits(**limits))[0]


def _settle(database, limits, reservation, tokens, cost=Decimal(0)):
    with database.writing() as session:
        limits.settle(reservation, tokens, cost, session)


def test_exactly_the_configured_requests_pass_in_any_minute(keys, limits, database, clock):
    key = _key(keys, requests_per_minute=15)
    draw = random.Random(1)
    passed, refusals = [], []
    for _ in range(120):
        clock.pass_(draw.random() * 2)
        try:
            reservation = limits.reserve(key)
        except RateLimitError as error:
            refusals.append(error)
        else:
            _settle(database, limits, reservation, 1)
            passed.append(clock())
    assert all(0 < error.retry_after_s <= 60 for error in refusals)
    assert refusals
    for start in passed:
        assert sum(start <= at < start + 60 for at in passed) <= 15
    # And no fewer than allowed: whenever one was refused, fifteen had passed in the minute before.
    assert len(passed) >= 15 * int((clock() - passed[0]) / 60)


def test_a_request_passes_at_the_very_moment_it_was_told(keys, limits, clock):
    key = _key(keys, requests_per_minute=2)
    limits.reserve(key)
    clock.pass_(10)
    limits.reserve(key)
    with pytest.raises(RateLimitError) as caught:
        limits.reserve(key)
    assert caught.value.retry_after_s == pytest.approx(50)
    clock.pass_(caught.value.retry_after_s - 0.01)
    with pytest.raises(RateLimitError):
        limits.reserve(key)
    clock.pass_(0.02)
    limits.reserve(key)


def test_tokens_are_reserved_before_and_settled_after(keys, limits, database):
    key = _key(keys, tokens_per_minute=100)
    big = limits.reserve(key, 90)
    with pytest.raises(RateLimitError, match="100 tokens per minute"):
        limits.reserve(key, 11)
    _settle(database, limits, big, 30)
    limits.reserve(key, 70)
    with pytest.raises(RateLimitError):
        limits.reserve(key, 1)


def test_a_request_larger_than_the_limit_is_told_that_it_can_never_pass(keys, limits):
    key = _key(keys, tokens_per_minute=100, tokens_per_day=1000)
    with pytest.raises(RateLimitError, match="never pass") as caught:
        limits.reserve(key, 101)
    assert caught.value.retry_after_s is None


def test_tokens_can_be_reserved_once_the_prompt_is_counted(keys, limits, database):
    key = _key(keys, tokens_per_minute=100, requests_per_minute=2)
    first = limits.reserve(key)
    limits.extend(first, key, 60)
    second = limits.reserve(key)
    with pytest.raises(RateLimitError, match="tokens per minute"):
        limits.extend(second, key, 41)
    # What was refused gave its place back: the key may still send its second request.
    third = limits.extend(limits.reserve(key), key, 40)
    assert third.tokens.remaining == 0
    assert third.requests.remaining == 0


def test_tokens_per_day_hold_until_midnight_utc(keys, limits, database, clock):
    key = _key(keys, tokens_per_day=50)
    _settle(database, limits, limits.reserve(key, 50), 50)
    with pytest.raises(RateLimitError) as caught:
        limits.reserve(key, 1)
    assert caught.value.retry_after_s == 16 * 3600  # the fake clock starts at 08:00
    clock.pass_(16 * 3600)
    limits.reserve(key, 50)


def test_money_per_month_holds_until_the_first_and_counts_what_runs(keys, limits, database, clock):
    key = _key(keys, money_per_month=Decimal("1.00"))
    running = limits.reserve(key, 10, Decimal("0.60"))
    with pytest.raises(RateLimitError, match="money per month"):
        limits.reserve(key, 10, Decimal("0.40000000001"))
    _settle(database, limits, running, 10, Decimal("0.999999999999"))
    limits.reserve(key, 1, Decimal("0.000000000001"))
    with pytest.raises(RateLimitError) as caught:
        limits.reserve(key, 1, Decimal("0.000000000001"))
    clock.pass_(caught.value.retry_after_s)
    limits.reserve(key, 10, Decimal(1))


def test_no_more_than_the_allowed_requests_run_at_once(keys, limits, database):
    key = _key(keys, concurrency=2)
    first = limits.reserve(key)
    limits.reserve(key)
    with pytest.raises(RateLimitError, match="2 requests at the same time"):
        limits.reserve(key)
    _settle(database, limits, first, 5)
    limits.reserve(key)


def test_a_limit_of_zero_closes_the_key(keys, limits):
    for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"):
        with pytest.raises(RateLimitError):
            limits.reserve(_key(keys, **{name: 0}))


def test_one_keys_limits_do_not_touch_anothers(keys, limits):
    poor, rich = _key(keys, requests_per_minute=1), _key(keys, requests_per_minute=5)
    limits.reserve(poor)
    with pytest.raises(RateLimitError):
        limits.reserve(poor)
    for _ in range(5):
        limits.reserve(rich)
    for _ in range(50):
        limits.reserve(_key(keys))


def test_the_numbers_of_the_headers_agree_with_what_passes(keys, limits, clock):
    key = _key(keys, requests_per_minute=5, tokens_per_minute=1000)
    for left in (4, 3, 2, 1, 0):
        reservation = limits.reserve(key, 100)
        assert (reservation.requests.limit, reservation.requests.remaining) == (5, left)
        assert reservation.tokens.remaining == 1000 - 100 * (5 - left)
        clock.pass_(1)
    with pytest.raises(RateLimitError):
        limits.reserve(key, 1)
    assert limits.reserve(_key(keys)).requests is None


def test_limits_hold_across_a_restart(keys, database, database_url, clock):
    key = _key(keys, requests_per_minute=3, tokens_per_day=100)
    limits = Limits(database, clock)
    _settle(database, limits, limits.reserve(key, 40), 40)
    again = Database.open(database_url)
    restarted = Limits(again, clock)
    restarted.reserve(key, 60)
    with pytest.raises(RateLimitError, match="tokens per day"):
        restarted.reserve(key, 1)
    again.close()


def test_limits_hold_across_workers_at_the_same_time(keys, database_url, clock):
    key = _key(keys, requests_per_minute=25, tokens_per_minute=10_000)
    databases = [Database.open(database_url) for _ in range(4)]
    passed = []

    def work(database):
        limits = Limits(database, clock)
        for _ in range(10):
            try:
                passed.append(limits.reserve(key, 1))
            except RateLimitError:
                continue

    threads = [threading.Thread(target=work, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()
    assert len(passed) == 25


def test_what_a_dead_process_held_is_free_at_once(keys, database, clock):
    key = _key(keys, concurrency=1)
    done = subprocess.run(
        [sys.executable, "-c", "from bise.store.worker import this_worker; print(this_worker())"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    Limits(database, clock, worker=done.stdout.strip()).reserve(key)
    Limits(database, clock).reserve(key)
    with pytest.raises(RateLimitError):
        Limits(database, clock).reserve(key)


def test_what_a_lost_machine_held_is_free_when_its_lease_ends(keys, limits, clock):
    key = _key(keys, concurrency=1)
    held = limits.reserve(key)
    clock.pass_(LEASE_S - 1)
    limits.renew([held.id])
    clock.pass_(LEASE_S - 1)
    with pytest.raises(RateLimitError):
        limits.reserve(key)
    clock.pass_(2)
    limits.reserve(key)


def test_a_clock_that_was_set_back_does_not_lock_a_key_out(keys, limits, database, clock):
    key = _key(keys, requests_per_minute=1)
    _settle(database, limits, limits.reserve(key), 1)
    clock.pass_(-3600)
    limits.reserve(key)


def test_settled_requests_add_up_exactly(keys, limits, database):
    key = _key(keys)
    for count in range(1, 8):
        _settle(database, limits, limits.reserve(key, 100), count, Decimal(count) / 1_000_000_000_000)
    with database.reading() as session:
        day = session.get(SpendRecord, (key.id, "2027-01-15"))
        month = session.get(SpendRecord, (key.id, "2027-01"))
        assert not session.scalars(select(ReservationRecord).where(ReservationRecord.is_open)).all()
    for record in (day, month):
        assert (record.requests, record.tokens, record.cost) == (7, 28, Decimal("28e-12"))


def test_a_thousand_open_requests_are_added_up_without_looking_at_each(keys, database, clock, monkeypatch):
    asked = []
    monkeypatch.setattr(limits_module, "is_dead", lambda worker: bool(asked.append(worker)))
    limits = Limits(database, clock, worker="here:1:1")
    key = _key(keys, tokens_per_day=2001, concurrency=1001)
    with database.writing() as session:
        session.add_all(
            ReservationRecord(
                id=f"r{number}", key_id=key.id, at=clock(), tokens=2, cost=Decimal("0.000000000001"),
                is_open=True, worker="here:1:1", lease_until=clock() + LEASE_S,
            )
            for number in range(1000)
        )  # fmt: skip
    read = []

    def note(record, _):
        read.append(record)

    event.listen(ReservationRecord, "load", note)
    try:
        limits.reserve(key, tokens=1)
        with pytest.raises(RateLimitError, match="requests at the same time"):
            limits.reserve(key)
        clock.pass_(LEASE_S / 2)
        limits.renew([f"r{number}" for number in range(1000)])
        clock.pass_(LEASE_S / 2 + 1)
        assert limits.used(key) | {"requests_per_minute": 0, "tokens_per_minute": 0} == {
            "requests_per_minute": 0,
            "tokens_per_minute": 0,
            "tokens_per_day": 2000,
            "money_per_month": "0.000000001000",
            "concurrency": 1000,
        }
    finally:
        event.remove(ReservationRecord, "load", note)
    assert not read
    assert len(asked) == 3


def test_a_key_without_limits_on_tokens_has_its_tokens_written_when_they_are_known(keys, limits, database):
    key = _key(keys, concurrency=2)
    held = limits.reserve(key)
    with database.writing():  # nobody else can write meanwhile
        booked = limits.extend(held, key, 500, Decimal(1))
    assert (booked.booked, booked.id) == (500, held.id)
    _settle(database, limits, booked, 7)
    assert limits.used(key)["tokens_per_day"] == 7


def test_renewing_forgets_what_no_limit_counts_any_more(keys, limits, database, clock):
    key = _key(keys, concurrency=10)
    settled, abandoned, running = limits.reserve(key), limits.reserve(key), limits.reserve(key)
    _settle(database, limits, settled, 1)

    def left():
        with database.reading() as session:
            return set(session.scalars(select(ReservationRecord.id)))

    clock.pass_(LEASE_S / 3)
    limits.renew([running.id])
    assert left() == {settled.id, abandoned.id, running.id}  # the last minute counts, and leases hold
    clock.pass_(LEASE_S - 1)
    fresh = limits.reserve(key)
    limits.renew([running.id])
    assert left() == {running.id, fresh.id}
    assert limits.used(key)["concurrency"] == 2
