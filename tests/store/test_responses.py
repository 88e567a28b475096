"""Stored responses, on every database."""

from __future__ import annotations

import pytest

from bise.errors import NotFoundError
from bise.store.responses import KEEP_S, Responses, StoredResponse


def made(name: str, text: str = "Grüße 🎉") -> StoredResponse:
    return StoredResponse(body={"id": name, "text": text}, items=[{"id": "i"}], messages=[{"content": text}])


@pytest.fixture
def responses(database, clock):
    return Responses(database, clock, max_responses=3, max_bytes=10_000)


def test_a_response_comes_back_as_it_was_for_its_own_key_only(database, clock, responses):
    responses.put("one", made("resp_1"))
    assert Responses(database, clock).get("one", "resp_1") == made("resp_1")
    for tenant, name in (("two", "resp_1"), ("one", "resp_2"), ("one", "' OR 1=1 --"), ("one", "x" * 5000)):
        with pytest.raises(NotFoundError, match="no response of this key"):
            responses.get(tenant, name)
        with pytest.raises(NotFoundError):
            responses.delete(tenant, name)
    responses.delete("one", "resp_1")
    with pytest.raises(NotFoundError):
        responses.get("one", "resp_1")


def test_a_response_expires(responses, clock):
    responses.put("one", made("resp_1"))
    clock.pass_(KEEP_S - 1)
    assert responses.get("one", "resp_1")
    clock.pass_(1)
    with pytest.raises(NotFoundError):
        responses.get("one", "resp_1")


def test_the_oldest_of_the_same_key_make_room(responses, clock):
    responses.put("two", made("resp_other"))
    for number in range(5):
        clock.pass_(1)
        responses.put("one", made(f"resp_{number}"))
    assert responses.get("two", "resp_other")
    for number in range(5):
        if number < 2:
            with pytest.raises(NotFoundError):
                responses.get("one", f"resp_{number}")
        else:
            assert responses.get("one", f"resp_{number}")


def test_large_responses_make_room_by_their_bytes(responses, clock):
    import random

    noise = "".join(chr(random.Random(1).randrange(32, 55_000)) for _ in range(2))
    big = "".join(chr(random.Random(n).randrange(32, 55_000)) for n in range(3000)) + noise
    responses.put("one", made("resp_1", big))
    clock.pass_(1)
    responses.put("one", made("resp_2", big))
    with pytest.raises(NotFoundError):
        responses.get("one", "resp_1")
    assert responses.get("one", "resp_2").body["text"] == big
