"""Hosted models beside local ones: same routes and checks, one ledger row, whatever the host does."""

from __future__ import annotations

import importlib.util
import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from bise.errors import ConfigError
from bise.hub.remotes import Remote, RemoteSpec, add_remote, choose_remotes, remotes_path
from bise.store.prices import Price

_SPEC = importlib.util.spec_from_file_location("hosted_stub", Path(__file__).with_name("hosted_stub.py"))
stub = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stub)
KEY, USAGE, Upstream = stub.KEY, stub.USAGE, stub.Upstream
call, chunks, completion, events = stub.call, stub.chunks, stub.completion, stub.events

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "schema": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
    },
}


@pytest.fixture
def upstream():
    server = Upstream()
    yield server
    server.close()


@pytest.fixture
def place(make_site, upstream):
    return make_place(make_site, upstream)


def make_place(make_site, upstream, timeout_s=10.0):
    from bise.server.hosted import HostedModels

    spec = RemoteSpec(name="far", url=upstream.url, model="big", key_env="X", timeout_s=timeout_s)
    return make_site(hosted=HostedModels([Remote(spec=spec, key=KEY)]))


def chat(place, **fields):
    return place.chat(model="far", **fields)


def rows(place):
    return place.store.ledger.rows() if hasattr(place.store.ledger, "rows") else []


def test_an_answer_of_a_hosted_model_looks_like_ours_and_says_that_it_left(place, upstream):
    response = chat(place, max_tokens=9, temperature=0.5, seed=3)
    assert response.status_code == 200, response.text
    assert response.headers["x-bise-leaves-machine"] == "true"
    body = response.json()
    assert body["model"] == "far"
    assert body["choices"][0]["message"]["content"] == "Hi there"
    assert body["usage"]["total_tokens"] == 15
    path, headers, sent = upstream.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert sent == {
        "model": "big", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0.5,
        "seed": 3,
    }  # fmt: skip


def test_a_local_answer_does_not_say_that_it_left(place):
    assert "x-bise-leaves-machine" not in place.chat().headers


def test_the_list_of_models_marks_it(place):
    cards = {card["id"]: card for card in place.get("/v1/models").json()["data"]}
    assert cards["far"]["leaves_this_machine"] is True
    assert "leaves_this_machine" not in cards["stub"]
    assert place.get("/v1/models/far").json() == cards["far"]
    assert KEY not in place.get("/v1/models").text


def test_a_request_is_in_the_ledger_at_its_price(place):
    place.store.prices.set(Price(model="far", input=Decimal(2), cached=Decimal(1), output=Decimal(6)))
    _, key = place.key()
    assert place.chat(key, model="far").status_code == 200
    row = place.get("/v1/usage?by=model", key).json()
    assert "far" in json.dumps(row)
    assert "0.00005" in json.dumps(row)  # (10 * 2 + 5 * 6) / 10^6


def test_a_stream_comes_through_with_usage_once(place, upstream):
    upstream.answer = events({"role": "assistant", "content": "Hi "}, {"content": "there"})
    response = chat(place, stream=True, stream_options={"include_usage": True})
    assert response.headers["x-bise-leaves-machine"] == "true"
    parts = chunks(response)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in parts if c["choices"])
    assert text == "Hi there"
    assert [c["usage"]["total_tokens"] for c in parts if c.get("usage")] == [15]
    assert {c["model"] for c in parts} == {"far"}


def test_tool_calls_are_passed_on_whole_and_with_ids_of_nine_characters(place, upstream):
    upstream.answer = completion(None, call('{"city": "Oslo"}'), "tool_calls")
    choice = chat(place, tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["message"]["tool_calls"][0]["id"]) == 9
    pieces = [{"name": "weather", "arguments": '{"ci'}, {"arguments": 'ty": "Oslo"}'}]
    upstream.answer = events(
        *({"tool_calls": [{"index": 0, "function": p}]} for p in pieces), reason="tool_calls"
    )
    parts = [c["choices"][0] for c in chunks(chat(place, tools=[TOOL], stream=True)) if c["choices"]]
    calls = [part["delta"]["tool_calls"] for part in parts if part["delta"].get("tool_calls")]
    assert [c[0]["function"]["arguments"] for c in calls] == ['{"city": "Oslo"}']
    assert parts[-1]["finish_reason"] == "tool_calls"


LIES = {
    "no usage": ({}, completion(usage=None)),
    "negative usage": ({}, completion(usage={"prompt_tokens": -1, "completion_tokens": 1})),
    "no choices": ({}, {"usage": USAGE}),
    "no object": ({}, ["x"]),
    "number as content": ({}, completion(content=7)),
    "unknown end": ({}, completion(reason="magic")),
    "json that is none": ({"response_format": {"type": "json_object"}}, completion("sure!")),
    "array for object": ({"response_format": {"type": "json_object"}}, completion("[1]")),
    "schema broken": ({"response_format": SCHEMA}, completion('{"age": "old"}')),
    "arguments no json": ({"tools": [TOOL]}, completion(None, call("city=Oslo"))),
    "arguments no object": ({"tools": [TOOL]}, completion(None, call("[1]"))),
    "arguments break the schema": ({"tools": [TOOL]}, completion(None, call('{"town": 1}'))),
    "foreign tool": ({"tools": [TOOL]}, completion(None, call("{}", "rm"))),
    "call without tools": ({}, completion(None, call("{}"))),
    "no call though forced": ({"tools": [TOOL], "tool_choice": "any"}, completion("no")),
    "call though none": ({"tools": [TOOL], "tool_choice": "none"}, completion(None, call('{"city": "x"}'))),
    "two calls": (
        {"tools": [TOOL], "parallel_tool_calls": False},
        completion(None, call('{"city": "x"}') * 2),
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_host_is_a_clear_502(name, place, upstream):
    fields, upstream.answer = LIES[name]
    response = chat(place, **fields)
    assert response.status_code == 502, response.text
    assert response.json()["error"]["code"] == "bad_upstream_answer"
    if "response_format" in fields:
        assert chat(place, stream=True, **fields).status_code == 502


def test_a_good_answer_in_a_form_is_streamed_after_its_check(place, upstream):
    upstream.answer = completion('{"age": 3}')
    parts = chunks(chat(place, stream=True, response_format=SCHEMA))
    assert parts[0]["choices"][0]["delta"]["content"] == '{"age": 3}'


@pytest.mark.parametrize(
    ("status", "wanted", "code"),
    [(400, 400, "upstream_refused"), (401, 502, "upstream_key_refused"), (404, 502, "upstream_failed"),
     (429, 429, "upstream_busy"), (500, 502, "upstream_failed"), (302, 502, "upstream_failed")],
)  # fmt: skip
def test_a_hosts_refusal_has_a_status_of_its_own_and_none_of_its_words(status, wanted, code, place, upstream):
    upstream.status, upstream.answer = status, {"error": f"key {KEY} at /etc"}
    upstream.headers = {"location": "http://127.0.0.1:1/"}
    for stream in (False, True):
        response = chat(place, stream=stream)
        assert code in response.text
        assert KEY not in response.text
        assert stream or response.status_code == wanted


def test_a_slow_host_is_a_504(make_site, upstream):
    upstream.answer = lambda handler: time.sleep(1)
    response = chat(make_place(make_site, upstream, timeout_s=0.2))
    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")


def test_a_host_that_is_gone_is_a_502(place, upstream):
    upstream.close()
    assert chat(place).json()["error"]["code"] == "upstream_unreachable"


@pytest.mark.parametrize(
    "answer",
    [events({"content": "a"}, done=False)[:-60], events({"content": "a"}, usage=None), b"data: {nope\n\n",
     b'data: {"error": {"message": "x"}}\n\n', events({"content": "a"}, reason=None)],
)  # fmt: skip
def test_a_broken_stream_ends_with_an_error(answer, place, upstream):
    upstream.answer = answer
    assert chunks(chat(place, stream=True))[-1]["error"]["code"] == "bad_upstream_answer"


def test_what_a_host_cannot_be_asked_is_refused_not_dropped(place, upstream):
    for fields in ({"top_k": 5}, {"logprobs": True}, {"logit_bias": {"1": 1}}):
        assert chat(place, **fields).status_code == 400
    response = place.post("/v1/completions", json={"model": "far", "prompt": "x"})
    assert response.status_code == 400
    assert upstream.seen == []


def test_embeddings_are_checked_too(place, upstream):
    upstream.answer = {"data": [{"embedding": [0.1, 0.2]}], "usage": {"prompt_tokens": 2}}
    response = place.post("/v1/embeddings", json={"model": "far", "input": "x"})
    assert response.json()["data"][0]["embedding"] == [0.1, 0.2]
    upstream.answer["data"][0]["embedding"] = ["a"]
    assert place.post("/v1/embeddings", json={"model": "far", "input": "x"}).status_code == 502


def test_the_list_holds_the_name_of_the_variable_and_never_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FAR_KEY", KEY)
    add_remote(RemoteSpec(name="far", url="https://api.example/v1/", model="big", key_env="FAR_KEY"))
    assert KEY not in remotes_path().read_text()
    assert remotes_path().stat().st_mode & 0o077 == 0
    remote = choose_remotes(("far",))[0]
    assert remote.key == KEY
    assert KEY not in repr(remote)
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(ConfigError, match="FAR_KEY is not set"):
        choose_remotes(("far",))


@pytest.mark.parametrize(
    "fields", [{"url": "http://api.example/v1"}, {"key_env": "sk-123"}, {"name": "../x"}]
)
def test_a_bad_entry_is_refused(fields):
    with pytest.raises(ConfigError):
        RemoteSpec(
            **{"name": "far", "url": "https://api.example/v1", "model": "big", "key_env": None, **fields}
        )
