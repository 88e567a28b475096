"""Places and deadlines: who is refused, with what advice, and who ends in time."""

import threading
from collections import deque

import pytest

from bise.engine.admission import MAX_RETRY_S, Places
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.errors import ConfigError, QueueFullError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def ask(max_tokens=8, **fields) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return Request(token_ids=(256, *b"hello"), params=params, **fields)


def refused(places, tenant="a") -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        places.take(tenant)
    return caught.value


def test_retry_after_is_the_time_in_which_places_became_free():
    clock = Clock()
    places = Places(1, 1, clock)
    for _ in range(5):
        places.take("a")
        clock.now += 3.0
        places.free("a")
    places.take("a")
    clock.now += 3.0
    assert refused(places).retry_after_s == pytest.approx(3.0)


def test_a_queue_that_stands_still_asks_for_more_patience():
    clock = Clock()
    places = Places(1, 1, clock)
    places.take("a")
    places.free("a")
    places.take("a")
    clock.now += 40.0
    assert refused(places).retry_after_s == pytest.approx(40.0)
    clock.now += 1e6
    assert refused(places).retry_after_s == MAX_RETRY_S


def test_before_anything_was_measured_a_second_is_advised():
    places = Places(1, 1, Clock())
    places.take("a")
    assert refused(places).retry_after_s == 1.0


def test_a_tenant_at_its_bound_leaves_room_for_others_and_waits_for_their_turns():
    clock = Clock()
    places = Places(10, 2, clock)
    for tenant in "aabc":
        places.take(tenant)
    clock.now += 6.0
    places.free("c")
    places.take("c")
    clock.now += 2.0
    error = refused(places)
    assert "2 requests of this key are waiting" in str(error)
    assert error.retry_after_s == pytest.approx(2.0 * 3)
    places.take("b")


@pytest.mark.parametrize("name", ["max_queue", "max_tenant_queue"])
def test_a_queue_without_places_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        Places(**{"max_queue": 1, "max_tenant_queue": 1, "clock": Clock(), name: 0})


def test_the_engine_refuses_one_tenant_and_serves_another(hash_engine):
    engine, _ = hash_engine(max_queue=4, max_tenant_queue=2)
    for _ in range(2):
        engine.submit(ask(tenant="a"))
    with pytest.raises(QueueFullError, match="of this key"):
        engine.submit(ask(tenant="a"))
    assert len(engine.submit(ask(tenant="b")).result().token_ids) == 8
    assert len(engine.submit(ask(tenant="a")).result().token_ids) == 8


def test_a_running_request_ends_at_its_deadline_with_what_it_has(hash_engine):
    clock = Clock()
    engine, _ = hash_engine(clock=clock)
    handle = engine.submit(ask(100, deadline_s=5.0))
    whole = engine.submit(ask(100))
    for _ in range(3):
        engine.step()
    clock.now += 4.9
    engine.step()
    clock.now += 0.1
    engine.step()
    done = handle.result()
    assert done.finish_reason is FinishReason.DEADLINE
    assert done.token_ids == whole.result().token_ids[:4]
    assert done.usage.completion_tokens == 4
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_a_waiting_request_ends_at_its_deadline_too(hash_engine):
    clock = Clock()
    engine, _ = hash_engine(clock=clock, max_sequences=1)
    running, waiting = engine.submit(ask(50)), engine.submit(ask(50, deadline_s=1.0))
    engine.step()
    clock.now += 1.0
    engine.step()
    deltas = list(waiting)
    assert deltas[-1].finish_reason is FinishReason.DEADLINE
    assert deltas[-1].error is None
    assert deltas[-1].usage.completion_tokens == 0
    assert len(running.result().token_ids) == 50
    assert engine.stats().prompt_tokens == 6, "a request that never ran computed nothing"


def test_deadlines_of_requests_that_are_over_are_forgotten(hash_engine):
    engine, _ = hash_engine()
    for _ in range(200):
        engine.submit(ask(1, deadline_s=1e6)).result()
    assert len(engine._deadlines) <= 64


def test_a_request_that_comes_and_goes_while_the_inbox_is_taken_in_harms_nobody(hash_engine):
    engine, _ = hash_engine()

    class Late(deque):
        """Looks empty once; right then another thread submits a request and cancels it."""

        def __bool__(self):
            if len(self) or late:
                return bool(len(self))
            late.append(engine.submit(ask()))
            late[0].cancel()
            return False

    late = []
    engine._arrived = Late()
    engine._thread = threading.current_thread()  # a cancellation waits in the inbox, as with a thread
    engine._take_inbox()
    engine.step()
    engine._thread = None
    assert list(late[0])[-1].finish_reason is FinishReason.ABORT
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
