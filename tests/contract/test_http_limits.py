"""The HTTP layer: what is refused and how; connection and server survive it (RELIABILITY R3 to R7)."""

from __future__ import annotations

import time

import pytest
from raw_http import CHAT, Wire, ask, post

from bise.server.edge import Reach
from bise.server.limits import HttpLimits

CHAT_PATH = "/v1/chat/completions"


def test_every_answer_has_a_request_id_and_is_json(live):
    for reply in (
        live.get("/v1/models"),
        live.get("/nowhere"),
        live.post("/v1/models", {}),
        live.post(CHAT_PATH, {"model": 3}),
        live.get("/health"),
        live.get("/openapi.json"),
        live.post("/v1/moderations", {"model": "x", "input": "y"}),
    ):
        assert reply.headers["x-request-id"].startswith("req_")
        assert reply.headers["content-type"] == "application/json"
        assert reply.json()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", CHAT_PATH, 405, "method_not_allowed"),
        ("POST", "/v1/moderations", 501, "not_implemented"),
        ("GET", "/v1/agents/ag_1", 501, "not_implemented"),
        ("DELETE", "/v1/models/stub", 403, "permission_denied"),
    ],
)
def test_routes_that_are_not_there_answer_in_both_clients_forms(live, method, path, status, code):
    import httpx

    reply = httpx.request(method, live.url + path)
    assert reply.status_code == status
    body = reply.json()
    assert body["object"] == "error"
    assert body["code"] == body["error"]["code"] == code
    assert body["message"] == body["error"]["message"]
    assert "detail" not in body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"model":"stub","model":"other","messages":[]}', 400),
        (b'{"model":"stub","temperature":NaN}', 400),
        (b'{"a":' * 70 + b"1" + b"}" * 70, 400),
        (b'{"model":"stub","messages":[{"role":"user","content":"\\ud800"}]}', 400),
        (b'{"model":"stub","max_tokens":' + b"9" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"x":[' + b"1," * 600_000 + b"1]}", 400),
    ],
)
def test_bodies_that_are_no_clean_json_are_refused(live, body, status):
    reply = ask(live.port, post(CHAT_PATH, body))
    assert reply.status == status
    assert reply.json["code"] in ("invalid_json", "invalid_request")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"]
)
def test_other_content_types_are_refused(live, kind):
    import httpx

    reply = httpx.post(live.url + CHAT_PATH, content=CHAT, headers={"content-type": kind})
    assert reply.status_code == 415


def test_a_body_over_16_mib_is_refused_before_it_is_read_and_the_connection_lives(live):
    with Wire(live.port) as wire:
        size = (16 << 20) + 1
        wire.send(post(CHAT_PATH, b"", length=size))
        reply = wire.reply()
        assert (reply.status, reply.json["code"]) == (413, "request_too_large")
        assert wire.send(b"x" * size)
        wire.send(post(CHAT_PATH, CHAT))
        assert wire.reply().status == 200


def test_a_chunked_body_is_counted_as_it_comes(live):
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Wire(live.port) as wire:
        wire.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        block = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        for _ in range(17):
            wire.send(block)
        assert wire.reply().status == 413


def test_100000_chunks_of_one_byte_do_not_hold_up_others(live):
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = CHAT[:-1] + b" " * 100_000 + b"}"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    assert live.get("/health").status_code == 200  # the first one takes longer
    with Wire(live.port) as wire:
        wire.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        start = time.perf_counter()
        assert live.get("/health").status_code == 200
        waited = time.perf_counter() - start
        assert wire.reply().status == 200
    assert waited < 1.0


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (17 << 10) + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + (b"X: " + b"a" * 8000 + b"\r\n") * 10 + b"\r\n",
            431,
        ),
        (b"GET /" + b"a" * (17 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (8 << 20), 431),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/2.7\r\nHost: localhost\r\n\r\n", 400),
        (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Name: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            400,
        ),
        (b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (
            b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    ],
)
def test_malformed_heads_get_one_json_answer_and_the_connection_closes(live, head, status):
    with Wire(live.port) as wire:
        wire.send(head)
        reply = wire.reply()
        assert reply.status == status, reply
        assert reply.json["error"]["message"]
        assert wire.closed()
    assert live.get("/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(live):
    with Wire(live.port) as wire:
        wire.send(post(CHAT_PATH, CHAT) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"chat.completion" in wire.reply().body
        assert wire.reply().json["status"] == "ok"


def test_expect_continue_is_answered(live):
    with Wire(live.port) as wire:
        data = post(CHAT_PATH, CHAT, "Expect: 100-continue")
        head, _, body = data.partition(b"\r\n\r\n")
        wire.send(head + b"\r\n\r\n")
        wire.send(body)
        assert wire.reply().status == 200


def test_a_client_that_sends_no_request_is_closed_after_the_header_time(serve):
    server = serve(limits=HttpLimits(headers_s=0.2, linger_s=0.2))
    with Wire(server.port) as idle, Wire(server.port) as half:
        half.send(b"GET /health HTTP/1.1\r\nHost: lo")
        for wire in (idle, half):
            assert wire.reply().status == 408
            assert wire.closed()


def test_a_body_that_does_not_come_is_408(serve):
    server = serve(limits=HttpLimits(body_s=0.2))
    with Wire(server.port) as wire:
        wire.send(post(CHAT_PATH, CHAT[:10], length=len(CHAT)))
        assert wire.reply().status == 408


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:80", 200),
        ("models.internal", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("evil.example#localhost", 403),
        ("", 403),
    ],
)
def test_only_known_hosts_are_served(serve, host, status):
    server = serve(reach=Reach(hosts=frozenset({"models.internal"})))
    reply = ask(server.port, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert reply.status == status


def test_pages_of_other_origins_are_refused_unless_named(serve):
    server = serve(reach=Reach(origins=frozenset({"https://chat.example"})))
    own = server.get("/v1/models", headers={"origin": server.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    for origin in ("https://evil.example", "null", "http://localhost:1", "https://chat.example.evil"):
        refused = server.get("/v1/models", headers={"origin": origin})
        assert (refused.status_code, refused.json()["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in refused.headers
    named = server.get("/v1/models", headers={"origin": "https://chat.example"})
    assert named.headers["access-control-allow-origin"] == "https://chat.example"


def test_unknown_fields_are_logged_once_and_known_ones_never_ignored(live, caplog):
    body = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}], "frobnicate": 1}
    for _ in range(3):
        assert live.post(CHAT_PATH, body).status_code == 200
    assert sum("frobnicate" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "guided_regex": "a+"}),
        ("/v1/completions", {"prompt": "Hi", "response_format": {"type": "json_object"}}),
        ("/v1/fim/completions", {"prompt": "Hi", "n": 2}),
        ("/v1/responses", {"input": "Hi", "stop": ["x"]}),
        ("/v1/responses", {"input": "Hi", "receipt": True}),
        ("/v1/embeddings", {"input": "Hi", "truncate_prompt_tokens": 3}),
    ],
)
def test_a_field_that_is_honoured_elsewhere_is_refused_where_it_is_not(live, path, fields):
    reply = live.post(path, {"model": "stub", **fields})
    name = list(fields)[-1]
    assert (reply.status_code, reply.json()["code"], reply.json()["param"]) == (
        400,
        "unsupported_field",
        name,
    )
    idle = {**fields, name: 1 if name == "n" else None}
    assert live.post(path, {"model": "stub", **idle}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"stop": ["ok", ""]}, "stop[1] must not be empty"),
        ({"stop": "x" * 300}, "stop has 300 characters; at most 256 are allowed"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function is missing"),
    ],
)
def test_a_refusal_names_the_very_part_that_is_wrong(live, fields, place):
    reply = live.post(CHAT_PATH, {"model": "stub", "messages": [{"role": "user", "content": "Hi"}], **fields})
    assert reply.status_code == 400
    assert reply.json()["message"] == place


def test_a_text_far_beyond_the_context_is_refused_without_being_encoded(live, monkeypatch):
    body = {"model": "stub", "messages": [{"role": "user", "content": "x" * 4_000_000}]}
    tokenizer, sizes = live.fleet.model.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **how: sizes.append(len(text)) or encode(text, **how)
    )
    reply = live.post(CHAT_PATH, body)
    assert sum(sizes) < 100_000
    assert (reply.status_code, reply.json()["code"]) == (400, "context_length_exceeded")
    assert str(live.engine.max_context) in reply.json()["message"]
