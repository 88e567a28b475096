import random
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from bise.errors import RequestError
from bise.store.ledger import Ledger, LedgerRow


@pytest.fixture
def ledger(database, clock):
    return Ledger(database, clock)


def _row(**fields):
    values = {
        "request_id": "r",
        "key_id": None,
        "owner": "local",
        "endpoint": "/v1/chat/completions",
        "model": "m",
    }
    return LedgerRow(**{**values, **fields})


def test_sums_equal_what_was_recorded_exactly(ledger, clock, keys):
    draw = random.Random(5)
    ids = [keys.create(name)[0].id for name in ("ann", "bob")]
    rows = []
    for number in range(120):
        clock.pass_(3600)
        row = _row(
            request_id=f"r{number}",
            key_id=draw.choice(ids),
            model=draw.choice(["a", "b", "c"]),
            prompt_tokens=draw.randrange(10_000),
            completion_tokens=draw.randrange(5_000),
            cached_tokens=draw.randrange(100),
            cost=draw.choice([None, Decimal(draw.randrange(10**13)) / 10**12]),
            error_code=draw.choice([None, None, "abort"]),
        )
        ledger.record(row)
        rows.append(row)
    for by, group_of in (("key", lambda r: r.key_id), ("model", lambda r: r.model), (None, lambda r: "")):
        sums = {entry.group: entry for entry in ledger.sums(by)}
        assert set(sums) == {group_of(row) for row in rows}
        for group, entry in sums.items():
            mine = [row for row in rows if group_of(row) == group]
            assert entry.requests == len(mine)
            assert entry.prompt_tokens == sum(row.prompt_tokens for row in mine)
            assert entry.cached_tokens == sum(row.cached_tokens for row in mine)
            assert entry.completion_tokens == sum(row.completion_tokens for row in mine)
            assert entry.cost == sum((row.cost for row in mine if row.cost is not None), Decimal(0))
            assert entry.unpriced == sum(row.cost is None for row in mine)
            assert entry.errors == sum(row.error_code is not None for row in mine)
    days = ledger.sums("day")
    assert [entry.group for entry in days] == sorted({entry.group for entry in days})
    assert sum(entry.requests for entry in days) == 120
    assert {entry.name for entry in ledger.sums("key")} == {"ann", "bob"}


def test_an_empty_ledger_sums_to_nothing(ledger):
    (total,) = ledger.sums()
    assert (total.requests, total.prompt_tokens, total.cost) == (0, 0, 0)
    assert ledger.sums("model") == []


@pytest.mark.parametrize("statement", ["UPDATE ledger SET prompt_tokens = 0", "DELETE FROM ledger"])
def test_rows_can_be_neither_changed_nor_deleted(ledger, database, statement):
    ledger.record(_row(prompt_tokens=5))

    def tamper():
        with database.writing() as session:
            session.execute(text(statement))

    with pytest.raises(IntegrityError, match="append-only"):
        tamper()
    assert ledger.sums()[0].prompt_tokens == 5


def test_a_repeated_request_is_written_once_within_ten_minutes(ledger, clock):
    assert ledger.record(_row(idempotency_key="a", completion_tokens=3))
    assert not ledger.record(_row(idempotency_key="a", completion_tokens=3))
    assert ledger.record(_row(idempotency_key="a", owner="other"))
    assert ledger.record(_row(idempotency_key="b"))
    clock.pass_(601)
    assert ledger.record(_row(idempotency_key="a"))


def test_a_retry_after_a_failure_has_a_row_of_its_own(ledger):
    ledger.record(_row(idempotency_key="a", error_code="engine_error"))
    assert ledger.record(_row(idempotency_key="a"))


def test_an_attempt_that_was_abandoned_does_not_make_the_next_one_free(ledger):
    assert ledger.record(_row(idempotency_key="a", finish_reason="abort", completion_tokens=1))
    assert ledger.record(_row(idempotency_key="a", finish_reason="stop", completion_tokens=9))
    assert not ledger.record(_row(idempotency_key="a", finish_reason="stop", completion_tokens=9))
    assert ledger.sums()[0].completion_tokens == 10


def test_sums_can_be_narrowed_to_an_owner_and_a_span_of_time(ledger, clock):
    start = clock()
    ledger.record(_row(owner="ann", prompt_tokens=1))
    clock.pass_(10)
    ledger.record(_row(owner="ann", prompt_tokens=2))
    ledger.record(_row(owner="bob", prompt_tokens=4))
    assert ledger.sums(owner="ann")[0].prompt_tokens == 3
    assert ledger.sums(since=start + 10)[0].prompt_tokens == 6
    assert ledger.sums(until=start + 10)[0].prompt_tokens == 1


def test_an_unknown_group_is_refused(ledger):
    with pytest.raises(RequestError) as caught:
        ledger.sums("prompt; DROP TABLE ledger")
    assert caught.value.field == "by"


def test_rows_come_newest_first_in_pages(ledger):
    for number in range(5):
        ledger.record(_row(request_id=str(number), owner="ann" if number % 2 else "bob"))
    first = ledger.rows(limit=2)
    assert [row.request_id for row in first] == ["4", "3"]
    assert [row.request_id for row in ledger.rows(limit=2, before=first[-1].id)] == ["2", "1"]
    assert [row.request_id for row in ledger.rows(owner="ann")] == ["3", "1"]


def test_the_ledger_has_no_place_for_text(database):
    with database.reading() as session:
        row = session.execute(text("SELECT * FROM ledger"))
        assert not {"prompt", "text", "messages", "content", "body"} & set(row.keys())
