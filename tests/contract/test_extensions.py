"""What a request may say beyond the hosted APIs: deadlines, shortening, the cache; and what usage tells."""

from __future__ import annotations

import json

import openai
import pytest
from mistralai.client import Mistral
from openai import OpenAI

from bise.engine.placement import Placement

ASK = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "stub", "messages": ASK}
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "stub", "prompt": "Hi", "max_tokens": 1000},
    "/v1/fim/completions": {"model": "stub", "prompt": "a", "suffix": "b"},
    "/v1/responses": {"model": "stub", "input": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 1000},
}


def events(response) -> list[dict]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_deadline_that_passes_is_a_408_in_every_dialect(live, path):
    live.engine.endless, live.engine.token_s = True, 0.01
    refused = live.post(path, {**ROUTES[path], "deadline_s": 0.05})
    assert refused.status_code == 408
    assert refused.headers["x-should-retry"] == "false"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert "tokens of the answer" in error["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_that_meets_its_deadline_shows_what_there_is_and_ends_with_the_error(live, path):
    live.engine.endless, live.engine.token_s = True, 0.01
    response = live.post(path, {**ROUTES[path], "deadline_s": 0.1, "stream": True})
    assert response.status_code == 200
    *shown, last = events(response)
    assert "H" in json.dumps(shown, ensure_ascii=False)
    assert "deadline_s passed" in json.dumps(last)
    assert not any(choice.get("finish_reason") for part in shown for choice in part.get("choices", ()))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/fim/completions"])
def test_a_receipt_comes_only_when_it_is_asked_for(live, path):
    assert "receipt" not in live.post(path, ROUTES[path]).json()["choices"][0]
    told = events(live.post(path, {**ROUTES[path], "receipt": True, "stream": True}))
    choices = [choice for part in told for choice in part["choices"]]
    assert ["receipt" in choice for choice in choices] == [bool(c["finish_reason"]) for c in choices]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/v1/completions", {"max_tokens": 0, "echo": True}, "max_tokens 0"),
        ("/v1/completions", {"truncate": "oldest"}, "truncate"),
        ("/v1/chat/completions", {"truncate": "middle", "max_tokens": 5}, "truncate"),
        ("/v1/chat/completions", {"receipt": "yes"}, "receipt"),
    ],
)
def test_a_receipt_of_what_it_cannot_cover_is_refused_before_anything_runs(live, path, fields, words):
    refused = live.post(path, {**ROUTES[path], "receipt": True, **fields})
    assert refused.status_code == 400
    assert "receipt" in refused.json()["message"]
    assert words in refused.json()["message"]
    assert not live.engine.requests


def test_a_receipt_of_a_model_on_another_device_is_refused(live, monkeypatch):
    monkeypatch.setattr(live.fleet.model, "placement", Placement(device="cuda"))
    refused = live.post("/v1/chat/completions", {**CHAT, "receipt": True})
    assert refused.status_code == 400
    assert refused.json()["param"] == "receipt"
    assert "cuda" in refused.json()["message"]


@pytest.mark.parametrize("value", [0, -1, 86_401, "soon", True])
def test_a_deadline_out_of_range_is_refused(live, value):
    refused = live.post("/v1/chat/completions", {**CHAT, "deadline_s": value})
    assert refused.status_code == 400
    assert refused.json()["param"] == "deadline_s"


def test_the_clients_raise_on_a_deadline(live):
    live.engine.endless, live.engine.token_s = True, 0.01
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=2) as client:
        with pytest.raises(openai.APIStatusError, match="deadline_s") as caught:
            client.chat.completions.create(**CHAT, extra_body={"deadline_s": 0.05})
        assert caught.value.status_code == 408
        with pytest.raises(openai.APIError, match="deadline_s"):
            list(client.chat.completions.create(**CHAT, stream=True, extra_body={"deadline_s": 0.05}))
    assert len(live.engine.requests) == 2  # nothing was tried again
    import anthropic

    with (
        anthropic.Anthropic(api_key="none", base_url=live.url, max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError, match="deadline_s"),
    ):
        client.messages.create(**CHAT, max_tokens=500, extra_body={"deadline_s": 0.05})


@pytest.mark.parametrize("path", ROUTES)
def test_the_cache_is_used_unless_a_request_says_no(live, path):
    for value, used in ((None, True), (True, True), (False, False)):
        assert live.post(path, {**ROUTES[path], "use_prefix_cache": value}).status_code == 200
        assert live.engine.requests[-1].use_prefix_cache is used


def test_predicted_and_cached_tokens_are_in_usage_whole_and_streamed(live):
    live.engine.cached_tokens = 2
    prediction = {"type": "content", "content": "Hello, world! And more"}
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        whole = client.chat.completions.create(**CHAT, prediction=prediction).usage
        last = list(client.chat.completions.create(
            **CHAT, prediction=prediction, stream=True, stream_options={"include_usage": True}
        ))[-1].usage  # fmt: skip
    assert whole == last
    details = whole.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (13, 9)
    assert whole.prompt_tokens_details.cached_tokens == 2
    assert whole.completion_tokens == 13
    with Mistral(api_key="none", server_url=live.url) as client:
        told = client.chat.complete(**CHAT, prediction=prediction).usage.model_dump()
        assert told["completion_tokens_details"]["accepted_prediction_tokens"] == 13
        pieces = list(client.chat.stream(**CHAT, prediction=prediction))
        assert pieces[-1].data.usage.model_dump() == told


def test_choices_add_their_predicted_tokens(live):
    prediction = {"type": "content", "content": "Hello, world!"}
    usage = live.post("/v1/chat/completions", {**CHAT, "n": 3, "prediction": prediction}).json()["usage"]
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 39


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_told_in_every_dialect(live, stream):
    live.engine.cached_tokens = 2
    for path, body in ROUTES.items():
        answer = live.post(path, {**body, "stream": stream})
        parts = events(answer) if stream else [answer.json()]
        text = json.dumps(parts)
        name = "cache_read_input_tokens" if path == "/v1/messages" else "cached_tokens"
        assert f'"{name}": 2' in text, path


def turns(count: int) -> list[dict]:
    pairs = [
        [
            {"role": "user", "content": f"question {k:02d} {'x' * 80}"},
            {"role": "assistant", "content": f"answer {k:02d}"},
        ]
        for k in range(count)
    ]
    return [
        {"role": "system", "content": "Be brief."},
        *[message for pair in pairs for message in pair],
        {"role": "user", "content": "the last one"},
    ]


def prompt_of(live) -> str:
    return bytes(i for i in live.engine.requests[-1].token_ids if i < 256).decode()


@pytest.mark.parametrize(("mode", "first"), [("oldest", False), ("middle", True)])
def test_a_long_conversation_is_shortened_by_whole_turns_on_request(live, mode, first):
    body = {"model": "stub", "messages": turns(60), "max_tokens": 100}
    refused = live.post("/v1/chat/completions", body)
    assert refused.status_code == 400
    assert refused.json()["code"] == "context_length_exceeded"
    assert "4096" in refused.json()["message"]
    whole = live.post("/v1/tokenize", {"model": "stub", "messages": turns(30)}).json()["count"]
    assert whole < 4096 < 2 * whole
    usage = live.post("/v1/chat/completions", {**body, "truncate": mode}).json()["usage"]
    prompt = prompt_of(live)
    assert usage["prompt_tokens"] + 100 <= 4096 < usage["prompt_tokens"] + 100 + 110
    assert usage["dropped_tokens"] > 1000
    assert ("question 00" in prompt) is first
    assert prompt.count("question") == prompt.count("answer")
    assert prompt.startswith("Be brief.")
    assert prompt.endswith("the last one")


def test_received_tokens_are_used_or_dropped(live):
    messages = turns(40)
    with_room = live.post(
        "/v1/chat/completions", {"model": "stub", "messages": messages[:2], "max_tokens": 9}
    )
    assert "dropped_tokens" not in with_room.json()["usage"]
    body = {"model": "stub", "messages": messages, "truncate": "oldest"}
    total = None
    for limit in (100, 2000, 3500):
        usage = live.post("/v1/chat/completions", {**body, "max_tokens": limit}).json()["usage"]
        total = total or usage["prompt_tokens"] + usage["dropped_tokens"]
        assert usage["prompt_tokens"] + usage["dropped_tokens"] == total


def test_a_last_turn_that_does_not_fit_is_refused_with_both_numbers(live):
    messages = [*turns(3), {"role": "assistant", "content": "ok"}, {"role": "user", "content": "y" * 4050}]
    refused = live.post(
        "/v1/chat/completions",
        {"model": "stub", "messages": messages, "max_tokens": 90, "truncate": "oldest"},
    )
    assert refused.status_code == 400
    assert refused.json()["code"] == "context_length_exceeded"
    assert "4006 fit" in refused.json()["message"]


def test_truncate_needs_to_know_how_much_room_the_answer_takes(live):
    refused = live.post("/v1/chat/completions", {**CHAT, "truncate": "oldest"})
    assert refused.status_code == 400
    assert "max_tokens" in refused.json()["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/fim/completions", {"truncate": "oldest"}),
        ("/v1/completions", {"truncate": "oldest", "echo": True}),
        ("/v1/completions", {"truncate": "oldest", "suffix": "b"}),
        ("/v1/responses", {"truncate": "oldest"}),
        ("/v1/chat/completions", {"truncate": "newest", "max_tokens": 5}),
    ],
)
def test_truncate_is_refused_where_it_cannot_be_kept(live, path, fields):
    refused = live.post(path, {**ROUTES[path], **fields})
    assert refused.status_code == 400
    assert "truncat" in refused.json()["message"]


def test_the_other_dialects_shorten_too(live):
    messages = turns(60)
    answer = live.post(
        "/v1/messages",
        {
            "model": "stub",
            "system": "Be brief.",
            "messages": messages[1:],
            "max_tokens": 50,
            "truncate": "oldest",
        },
    ).json()
    assert answer["usage"]["dropped_tokens"] > 1000
    answer = live.post(
        "/v1/responses", {"model": "stub", "input": messages, "max_output_tokens": 50, "truncation": "auto"}
    ).json()
    assert answer["truncation"] == "auto"
    assert answer["usage"]["dropped_tokens"] > 1000
    refused = live.post("/v1/responses", {"model": "stub", "input": messages, "max_output_tokens": 50})
    assert refused.status_code == 400


def test_the_real_engine_keeps_deadlines_and_counts_what_it_drops(serve):
    from bise.engine.fleet import Fleet
    from bise.engine.model_spec import ModelSpec
    from bise.hub.embedded import embedded_path

    with Fleet([ModelSpec(name="brise", path=embedded_path(), context=128, threads=1)]) as fleet:
        server = serve(fleet)
        ask = {"model": "brise", "prompt": "Once upon a time " * 40, "max_tokens": 20}
        assert server.post("/v1/completions", ask).json()["code"] == "context_length_exceeded"
        usage = server.post("/v1/completions", {**ask, "truncate": "middle"}).json()["usage"]
        count = server.post("/v1/tokenize", {"model": "brise", "prompt": ask["prompt"]}).json()["count"]
        assert usage["prompt_tokens"] == 108
        assert usage["prompt_tokens"] + usage["dropped_tokens"] == count
        late = server.post(
            "/v1/completions",
            {"model": "brise", "prompt": "Hi", "max_tokens": 100, "ignore_eos": True, "deadline_s": 0.001},
        )
        assert (late.status_code, late.json()["code"]) == (408, "deadline_exceeded")
