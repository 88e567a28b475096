"""Who leaves, stalls or stops: requests end, slots come back, the server goes on or goes in good order."""

from __future__ import annotations

import json
import threading
import time

import pytest
import storm
from raw_http import CHAT, STREAM, Wire, ask, post

from bise.errors import EngineError
from bise.server.limits import HttpLimits
from bise.server.ticket import OpenGate, OpenTicket

PATH = "/v1/chat/completions"


def wait_for(condition) -> None:
    """Wait as long as it may take on any machine: what is lost does not come back later (`endless`)."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < 60, "the condition never held"
        threading.Event().wait(0.01)


def settled(live) -> bool:
    return live.engine.running == 0 and live.fleet.leases == 0 and not live.app.service.jobs


@pytest.mark.parametrize("mode", storm.MODES, ids=lambda mode: mode.__name__)
def test_a_client_that_leaves_frees_its_slot(live, mode):
    import random

    live.engine.endless = True
    live.engine.token_s = 0.001
    live.engine.text = "x"
    for seed in range(2):
        mode(live.port, "stub", random.Random(seed))
    # This one is accepted behind those who left: from now on what they sent is counted, and must go away.
    assert live.get("/health").status_code == 200
    idle = {"status": "ok", "running": 0, "waiting": 0, "requests": 0}
    wait_for(lambda: live.get("/health").json() == idle and settled(live))


def test_a_storm_leaves_nothing_behind(live):
    live.engine.text = "ok"
    before = storm.baseline(live.port, "stub")
    live.engine.endless, live.engine.token_s = True, 0.001
    storm.round_of(live.port, "stub", clients=56, seed=1)
    assert storm.until_idle(live.port, 60.0) is not None
    live.engine.endless, live.engine.token_s = False, 0.0
    assert storm.baseline(live.port, "stub") == before
    assert settled(live)


@pytest.mark.slow
def test_three_storms_of_200_leave_nothing_behind(live):
    live.engine.endless, live.engine.token_s = True, 0.001
    for seed in range(3):
        storm.round_of(live.port, "stub", clients=200, seed=seed)
        assert storm.until_idle(live.port, 60.0) is not None
    assert settled(live)


class CountingTicket(OpenTicket):
    def __init__(self, rows: list) -> None:
        self.rows = rows

    async def finish(self, **row) -> None:
        self.rows.append(row)


class CountingGate(OpenGate):
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.admitted = 0

    async def admit(self, request, *, scope, model):
        self.admitted += 1
        return CountingTicket(self.rows)


def test_every_request_has_one_row_however_it_ends(serve):
    gate = CountingGate()
    server = serve(gate=gate)
    server.post(PATH, json.loads(CHAT))
    server.post(PATH, {**json.loads(CHAT), "max_tokens": 3, "stream": True})
    server.post(PATH, {**json.loads(CHAT), "model": "nope"})
    server.post(PATH, {**json.loads(CHAT), "max_tokens": 10**6})
    server.post("/v1/completions", {"model": "stub", "prompt": ["a", "b"], "n": 2})
    server.engine.endless, server.engine.token_s = True, 0.001

    def leave(body, number):
        made = server.engine.made
        with Wire(server.port) as wire:
            wire.send(post(PATH, body))
            wait_for(lambda: server.engine.made > made)
        wait_for(lambda: len(gate.rows) == number)

    leave(STREAM, 6)
    leave(CHAT, 7)
    wait_for(lambda: len(gate.rows) == gate.admitted == 7)
    reasons = [(row["finish_reason"], row["error_code"], row["model"]) for row in gate.rows]
    assert reasons == [
        ("stop", None, "stub"),
        ("length", None, "stub"),
        ("error", "model_not_found", None),
        ("error", "context_length_exceeded", "stub"),
        ("stop", None, "stub"),
        ("abort", None, "stub"),
        ("abort", None, "stub"),
    ]
    assert [row["usage"] and row["usage"].completion_tokens for row in gate.rows[:5]] == [
        13,
        3,
        None,
        None,
        52,
    ]
    assert gate.rows[4]["usage"].prompt_tokens == 4
    assert all(row["usage"].completion_tokens > 0 for row in gate.rows[5:])


def test_a_reader_that_stalls_is_given_up(serve):
    server = serve(limits=HttpLimits(stalled_reader_s=0.3))
    server.engine.endless, server.engine.text = True, "x" * 1000
    server.engine.max_context = 1 << 20
    with Wire(server.port, receive_buffer=2048) as wire:
        wire.send(storm.body("stub", stream=True, tokens=1 << 19, logprobs=True, top_logprobs=20))
        wait_for(lambda: server.engine.running == 1)
        wait_for(lambda: settled(server))
    assert server.engine.aborted == 1


def test_a_silent_stream_is_kept_alive_by_comments(serve):
    server = serve(limits=HttpLimits(ping_s=0.05))
    server.engine.go.clear()
    with Wire(server.port, timeout=60) as wire:
        wire.send(post(PATH, STREAM))
        said = b""
        while b"data: [DONE]\n\n" not in said:
            more = wire.socket.recv(2000)
            assert more
            said += more
            if b": ping\n\n" in said:
                server.engine.go.set()  # without a comment it would never end


def test_a_stop_lets_streams_finish_and_refuses_new_requests(serve):
    server = serve(grace_s=60.0)
    server.engine.text = "x" * 30
    server.engine.go.clear()
    with Wire(server.port) as running, Wire(server.port) as idle:
        running.send(post(PATH, STREAM))
        wait_for(lambda: server.engine.running == 1)
        server.stop()
        wait_for(lambda: server.app.service.is_draining)
        idle.send(post(PATH, CHAT))
        refused = idle.reply()
        assert (refused.status, refused.json["code"]) == (503, "server_stopping")
        assert int(refused.headers["retry-after"]) > 0
        health = ask(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (health.status, health.json["status"]) == (503, "stopping")
        server.engine.go.set()
        reply = running.reply()
        assert reply.body.count(b"x") >= 30
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in reply.body
    assert server.join()


def test_after_the_grace_time_streams_end_with_an_error_event(serve):
    server = serve(grace_s=0.2)
    server.engine.endless, server.engine.token_s, server.engine.text = True, 0.01, "x"
    with Wire(server.port) as stream, Wire(server.port) as plain:
        stream.send(post(PATH, STREAM))
        plain.send(post(PATH, CHAT))
        wait_for(lambda: server.engine.running == 2)
        server.stop()
        events = stream.reply().body.split(b"\n\n")
        assert json.loads(events[-3].removeprefix(b"data: "))["error"]["code"] == "server_stopping"
        assert events[-2] == b"data: [DONE]"
        assert plain.reply().status == 503
    assert server.join()


def test_a_dead_engine_is_visible_in_health_and_replaced(live):
    live.post(PATH, json.loads(CHAT))
    before = live.fleet.reloads
    live.engine.failure = EngineError("the engine stopped for good")
    reply = live.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "engine_failed")
    assert reply.json()["failed_models"] == ["stub"]
    wait_for(lambda: live.get("/health").status_code == 200)
    assert live.fleet.reloads == before + 1


def test_a_request_to_a_dead_engine_waits_for_the_new_one(live):
    live.post(PATH, json.loads(CHAT))
    live.engine.failure = EngineError("the engine stopped for good")
    assert live.post(PATH, json.loads(CHAT)).status_code == 200
    assert live.engine.failure is None
    assert settled(live)


def test_a_model_that_cannot_be_loaded_is_503_and_tells_no_path(live):
    from bise.errors import ModelFileError

    live.fleet.fails_with = ModelFileError("/secret/x.safetensors: is cut off", field="/secret/x.safetensors")
    try:
        reply = live.post(PATH, json.loads(CHAT))
    finally:
        live.fleet.fails_with = None
    assert (reply.status_code, reply.json()["code"]) == (503, "model_unavailable")
    assert "secret" not in reply.text


def test_health_answers_while_large_bodies_are_read(live):
    text = "long words and spaces " * 50_000
    body = post(
        PATH, json.dumps({"model": "stub", "messages": [{"role": "user", "content": text}] * 4}).encode()
    )
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            ask(live.port, body)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    worst = 0.0
    try:
        for _ in range(20):
            start = time.perf_counter()
            ask(live.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            worst = max(worst, time.perf_counter() - start)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert worst < 1.0, f"an answer took {worst:.3f} s"
