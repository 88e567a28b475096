"""Answers kept for repeated requests, on every database."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bise.store.replays import MAX_ANSWER_BYTES, KeptAnswer, Replays, Standing

ANSWER = KeptAnswer(status=200, headers={"content-type": "application/json"}, body=b'{"a": 1}')


@pytest.fixture
def replays(database, clock):
    return Replays(database, clock)


def test_a_repeat_finds_the_first_answer_until_its_time_is_over(replays, clock):
    assert replays.claim("a", "body") == (Standing.FIRST, None)
    assert replays.claim("a", "body") == (Standing.RUNNING, None)
    replays.finish("a", ANSWER)
    assert replays.claim("a", "body") == (Standing.KEPT, ANSWER)
    assert replays.claim("b", "body")[0] is Standing.FIRST
    clock.pass_(600)
    assert replays.claim("a", "body")[0] is Standing.FIRST


def test_another_body_is_told_apart_while_it_runs_and_afterwards(replays):
    replays.claim("a", "body")
    assert replays.claim("a", "other") == (Standing.OTHER_BODY, None)
    replays.finish("a", ANSWER)
    assert replays.claim("a", "other") == (Standing.OTHER_BODY, None)


def test_what_was_given_up_begins_anew(replays):
    replays.claim("a", "body")
    replays.release("a")
    assert replays.claim("a", "other")[0] is Standing.FIRST


def test_an_answer_too_large_to_keep_is_not_computed_twice(replays):
    replays.claim("a", "body")
    replays.finish("a", KeptAnswer(status=200, headers={}, body=bytes(MAX_ANSWER_BYTES + 1)))
    assert replays.claim("a", "body") == (Standing.NOT_KEPT, None)


def test_a_lease_holds_while_it_is_renewed_and_no_longer(database, clock):
    mine, other = Replays(database, clock), Replays(database, clock, worker="far/away:1:2")
    other.claim("a", "body")
    clock.pass_(50)
    other.renew()
    clock.pass_(50)
    assert mine.claim("a", "body")[0] is Standing.RUNNING
    clock.pass_(61)
    assert mine.claim("a", "body")[0] is Standing.FIRST
    other.finish("a", ANSWER)  # too late: the request is not its own any more
    assert mine.claim("a", "body")[0] is Standing.RUNNING


def test_a_process_that_died_on_this_machine_holds_nothing(database, clock):
    code = "from bise.store.worker import this_worker; print(this_worker())"
    dead = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    Replays(database, clock, worker=dead).claim("a", "body")
    assert Replays(database, clock).claim("a", "body")[0] is Standing.FIRST
