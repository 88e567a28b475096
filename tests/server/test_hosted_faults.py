"""Hosts that are slow, broken or lie as no schema foresees: a clear refusal, one row, nothing left."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
import time
from pathlib import Path

import pytest

from bise.assistant.models import Job
from bise.assistant.scripted import ScriptedModels
from bise.hub.remotes import Remote, RemoteSpec
from bise.server.hosted import HostedModels
from bise.store.keys import KeyLimits
from bise.store.rules import Rule

_SPEC = importlib.util.spec_from_file_location("hosted_stub", Path(__file__).with_name("hosted_stub.py"))
stub = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stub)
KEY, USAGE, Upstream = stub.KEY, stub.USAGE, stub.Upstream
call, chunks, completion, events = stub.call, stub.chunks, stub.completion, stub.events


@pytest.fixture
def upstream():
    server = Upstream()
    yield server
    server.close()


@pytest.fixture
def place(make_site, upstream):
    return make_place(make_site, upstream)


def make_place(make_site, upstream, **fields):
    fields = {"timeout_s": 10.0, "serves": ("chat", "embeddings", "completions", "fim"), **fields}
    spec = RemoteSpec(name="far", url=upstream.url, model="big", key_env="X", **fields)
    models = ScriptedModels(lambda _: "local", names=("stub",))
    return make_site(hosted=HostedModels([Remote(spec=spec, key=KEY)]), chats=models)


def raw(head: bytes, body: bytes = b"", *, reset=False):
    """Return an answer in plain bytes after which the connection is closed or reset."""

    def answer(handler):
        handler.wfile.write(head + b"\r\n\r\n" + body)
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR) if not reset else handler.connection.close()

    return answer


def dripping(data: bytes, pause_s: float):
    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause_s)

    return answer


OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream"
GOOD = json.dumps(completion()).encode()


def said(**message):
    body = completion()
    body["choices"][0]["message"] |= message
    return body


WHOLE_FAULTS = {
    "more promised than sent": raw(OK + b"\r\ncontent-length: 9999", GOOD),
    "cut in the middle": raw(OK + b"\r\ncontent-length: 40", GOOD),
    "bad chunks": raw(OK + b"\r\ntransfer-encoding: chunked", b"zz\r\nhello\r\n"),
    "reset": raw(OK + b"\r\ncontent-length: 9999", GOOD, reset=True),
    "no http": raw(b"SSH-2.0-OpenSSH_9"),
    "html": raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/html", b"<html>sign in</html>"),
    "nothing": raw(b"HTTP/1.1 204 No Content"),
    "bytes that are no text": raw(OK, b'{"choices": "\xff\xfe"}'),
    "packed": raw(OK + b"\r\ncontent-encoding: gzip", b"\x1f\x8b\x08\x00rubbish"),
    "nan": raw(OK, GOOD.replace(b"10", b"NaN")),
    "the same key twice": raw(OK, GOOD.replace(b'"model"', b'"id": "y", "model"', 1)),
    "deeply nested": raw(OK, b'{"a":' * 50_000),
    "a number of many digits": raw(OK, GOOD.replace(b"10", b"1" * 20_000)),
    "usage of truth values": completion(usage={"prompt_tokens": True, "completion_tokens": False}),
    "usage of parts": completion(usage={"prompt_tokens": 1.5, "completion_tokens": 2}),
    "usage beyond all bounds": completion(usage={"prompt_tokens": 10**12, "completion_tokens": 1}),
    "more cached than there is": completion(usage=USAGE | {"prompt_tokens_details": {"cached_tokens": 11}}),
    "no reason": completion(reason=None),
    "two choices": completion() | {"choices": completion()["choices"] * 2},
    "choices that are none": completion() | {"choices": [None]},
    "a list of numbers as content": said(content=[1, 2]),
    "a call without a function": said(tool_calls=[{"id": "a"}]),
    "calls that are a text": said(tool_calls="rm -rf"),
}


def assert_clear(place, response, code=(502, 504)):
    assert response.status_code in code, response.text
    error = response.json()["error"]
    assert error["code"] in (
        "bad_upstream_answer",
        "upstream_unreachable",
        "upstream_failed",
        "upstream_timeout",
    )
    assert KEY not in response.text
    assert not place.app.service.jobs
    (row,) = place.store.ledger.rows()
    assert row.error_code == error["code"]


@pytest.mark.parametrize("name", WHOLE_FAULTS)
def test_whatever_a_host_sends_is_refused_clearly_and_recorded_once(name, place, upstream):
    upstream.answer = WHOLE_FAULTS[name]
    assert_clear(place, place.chat(model="far"))
    upstream.answer = completion()
    assert place.chat(model="far").status_code == 200


STREAM_FAULTS = {
    "a line without end": raw(SSE, b"data: " + b"x" * (5 << 20)),
    "reset after a piece": raw(SSE, events({"content": "a"})[:60], reset=True),
    "a piece that is a list": raw(SSE, b"data: [1]\n\n"),
    "a delta that is a text": raw(SSE, b'data: {"choices": [{"index": 0, "delta": "x"}]}\n\n'),
    "a choice that nobody wants": raw(SSE, b'data: {"choices": [{"index": 7, "delta": {}}]}\n\n'),
    "a negative choice": raw(SSE, b'data: {"choices": [{"index": -1, "delta": {}}]}\n\n'),
    "pieces after the end": events({"content": "a"}).replace(
        b"data: [DONE]", b'data: {"choices": [{"index": 0, "delta": {"content": "more"}}]}\n\ndata: [DONE]'
    ),
    "a call with a huge index": events({"tool_calls": [{"index": 10**6, "function": {"name": "x"}}]}),
    "calls nobody allowed": events({"tool_calls": [{"index": 0, "function": {"name": "x"}}]}),
    "json instead of a stream": completion(),
    "only comments": raw(SSE, b": ping\n\n" * 10),
    "a stream of nothing": raw(SSE),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_a_stream_that_goes_wrong_ends_with_an_error_and_one_row(name, place, upstream):
    upstream.answer = STREAM_FAULTS[name]
    response = place.chat(model="far", stream=True)
    assert "error" in chunks(response)[-1], response.text[:300]
    assert not place.app.service.jobs
    (row,) = place.store.ledger.rows()
    assert row.error_code


def test_a_host_that_drips_for_ever_has_an_end(make_site, upstream):
    place = make_place(make_site, upstream, timeout_s=0.2)
    upstream.answer = dripping(events(*[{"content": "a"}] * 500), 0.01)  # for six minutes
    begun = time.monotonic()
    response = place.chat(model="far", stream=True)
    assert chunks(response)[-1]["error"]["code"] == "upstream_timeout"
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_streams_are_read_in_every_form_that_the_standard_allows(end, place, upstream):
    data = events({"content": "a"}, {"content": "ü"}).replace(b"data: ", b"data:").replace(b"\n", end)
    upstream.answer = raw(SSE + b"; charset=utf-8", b": hello" + end + end + b"event: message" + end + data)
    parts = chunks(place.chat(model="far", stream=True))
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in parts) == "aü"


VECTOR_FAULTS = {
    "infinite": raw(OK, b'{"data": [{"embedding": [1e999]}], "usage": {"prompt_tokens": 1}}'),
    "truth": {"data": [{"embedding": [True]}], "usage": {"prompt_tokens": 1}},
    "empty": {"data": [{"embedding": []}], "usage": {"prompt_tokens": 1}},
    "of another length than asked for": {"data": [{"embedding": [0.5] * 3}], "usage": {"prompt_tokens": 1}},
    "too many": {"data": [{"embedding": [0.5] * 2}] * 2, "usage": {"prompt_tokens": 1}},
}


@pytest.mark.parametrize("name", VECTOR_FAULTS)
def test_vectors_that_are_none_are_refused(name, place, upstream):
    upstream.answer = VECTOR_FAULTS[name]
    body = {"model": "far", "input": "x", "dimensions": 2}
    assert_clear(place, place.post("/v1/embeddings", json=body))


def text_answer(*texts):
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    return {"choices": choices, "usage": USAGE}


def test_a_completion_goes_to_a_host_that_has_them(place, upstream):
    upstream.answer = text_answer("lo", "la")
    body = {"model": "far", "prompt": "Hel", "n": 2, "max_tokens": 5, "stop": "x"}
    response = place.post("/v1/completions", json=body)
    assert response.headers["x-bise-leaves-machine"] == "true"
    assert [choice["text"] for choice in response.json()["choices"]] == ["lo", "la"]
    path, _, sent = upstream.seen[0]
    assert path == "/v1/completions"
    assert sent == {"model": "big", "prompt": "Hel", "n": 2, "max_tokens": 5, "stop": ["x"]}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = chunks(place.post("/v1/completions", json=body | options))
    assert [p["choices"][0]["text"] for p in parts if p["choices"]] == ["lo", "la"]
    assert [p["usage"]["total_tokens"] for p in parts if p.get("usage")] == [15]


@pytest.mark.parametrize("dialect", ["openai", "mistral"])
def test_a_gap_is_filled_by_a_host_of_either_dialect(dialect, make_site, upstream):
    place = make_place(make_site, upstream, dialect=dialect)
    upstream.answer = text_answer("mid") if dialect == "openai" else completion("mid")
    response = place.post("/v1/fim/completions", json={"model": "far", "prompt": "a", "suffix": "c"})
    assert response.json()["choices"][0]["message"]["content"] == "mid"
    path, _, sent = upstream.seen[0]
    assert path == ("/v1/completions" if dialect == "openai" else "/v1/fim/completions")
    assert (sent["prompt"], sent["suffix"]) == ("a", "c")


def test_what_a_host_was_not_said_to_serve_is_refused_and_says_how(make_site, upstream):
    place = make_place(make_site, upstream, serves=("chat",))
    for path, body in {
        "/v1/completions": {"prompt": "x"},
        "/v1/fim/completions": {"prompt": "x"},
        "/v1/embeddings": {"input": "x"},
    }.items():
        response = place.post(path, json={"model": "far", **body})
        assert (response.status_code, "--serves" in response.text) == (400, True)
    assert upstream.seen == []
    card = place.get("/v1/models/far").json()
    assert (card["serves"], card["capabilities"]["completion_fim"]) == (["chat"], False)


@pytest.mark.parametrize(
    "body", [{"prompt": [1, 2]}, {"prompt": "x", "echo": True}, {"prompt": "x", "logprobs": 1}]
)
def test_what_cannot_be_passed_on_is_refused(body, place, upstream):
    assert place.post("/v1/completions", json={"model": "far", **body}).status_code == 400
    assert upstream.seen == []


def test_guardrails_read_what_hosts_say_in_calls_and_behind_prefixes(place, upstream):
    _, key = place.key(rules=[Rule(name="word", pattern="sec.?ret", stage="output")])
    tool = {"type": "function", "function": {"name": "say", "parameters": {"type": "object"}}}
    upstream.answer = completion(None, call('{"x": "s\\u0065cret"}', "say"), "tool_calls")
    assert place.chat(key, model="far", tools=[tool]).status_code == 400
    upstream.answer = completion("ret")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sec", "prefix": True}]
    refused = place.chat(key, model="far", messages=messages)
    assert (refused.status_code, "word" in refused.text) == (400, True)
    assert {row.rule for row in place.store.ledger.rows()} == {"word"}


def test_the_assistant_lists_hosted_models_last_and_marked(place):
    facts = place.get("/api/v1/bootstrap").json()["models"]
    assert [entry["id"] for entry in facts] == ["stub", "far"]
    assert facts[1]["leaves_machine"] is True
    assert "leaves this machine" in facts[1]["title"]
    assert facts[0]["leaves_machine"] is False


def _stream(place, **fields):
    async def run():
        job = Job(model="far", messages=({"role": "user", "content": "x"},), **fields)
        return [piece async for piece in place.chats.stream(job)]

    return place.loop.run_until_complete(run())


def test_the_assistant_answers_with_a_hosted_model_and_its_row(place, upstream):
    upstream.answer = events({"content": "Hi "}, {"content": "there"})
    pieces = _stream(place, params={"temperature": 0.5, "seed": 4})
    assert "".join(piece.text for piece in pieces) == "Hi there"
    assert pieces[-1].usage.completion_tokens == 5
    sent = upstream.seen[0][2]
    assert (sent["temperature"], sent["seed"], sent["model"]) == (0.5, 4, "big")
    (row,) = place.store.ledger.rows()
    assert (row.model, row.endpoint, row.prompt_tokens) == ("far", "assistant", 10)


@pytest.mark.parametrize("answer", [events({"content": "a"}, done=False)[:-60], completion()])
def test_a_hosted_answer_that_breaks_off_is_an_error_in_the_assistant(answer, place, upstream):
    upstream.answer = answer
    with pytest.raises(Exception, match="the model's host"):
        _stream(place)
    assert place.store.ledger.rows()[0].error_code == "bad_upstream_answer"


def test_limits_hold_for_hosted_models(place, upstream):
    _, key = place.key(limits=KeyLimits(tokens_per_day=20))
    assert place.chat(key, model="far", max_tokens=50).status_code == 429
    assert upstream.seen == []
