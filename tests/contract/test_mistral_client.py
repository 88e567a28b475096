"""The current `mistralai` client against a live server: its models are the strictest form of the wire."""

from __future__ import annotations

import pytest
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live):
    with Mistral(api_key="none", server_url=live.url) as client:
        yield client


def test_a_chat_answer_passes_the_clients_validation(live, client):
    answer = client.chat.complete(model="stub", messages=ASK)
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 13)
    assert answer.model == "stub"


def test_a_stream_passes_and_ends_with_one_reason_and_one_usage(live, client):
    live.engine.text = "Grüße 🎉 aus 東京"
    chunks = [event.data for event in client.chat.stream(model="stub", messages=ASK)]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Grüße 🎉 aus 東京"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [len(live.engine.text.encode())]
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_prefix_is_part_of_the_answer_and_is_said_once(live, client):
    live.engine.text = " world"
    messages = [*ASK, {"role": "assistant", "content": "Hello ", "prefix": True}]
    answer = client.chat.complete(model="stub", messages=messages)
    assert answer.choices[0].message.content == "Hello world"
    chunks = [event.data for event in client.chat.stream(model="stub", messages=messages)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello world"
    assert live.engine.requests[0].continuation


def test_fill_in_the_middle_puts_the_suffix_first(live, client, scripted):
    live.engine.text = "    return a + b"
    answer = client.fim.complete(model="stub", prompt="def add(a, b):\n", suffix="\n\nprint(add(1, 2))")
    assert answer.choices[0].message.content == "    return a + b"
    ids = live.engine.requests[0].token_ids
    assert ids[:2] == (scripted.BOS, scripted.CONTROLS["[SUFFIX]"])
    chunks = [event.data for event in client.fim.stream(model="stub", prompt="x", suffix="y", max_tokens=3)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "   "
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models_are_base_cards_with_capabilities(live, client):
    listed = client.models.list().data
    assert [(card.id, card.type) for card in listed] == [("stub", "base")]
    assert listed[0].capabilities.completion_chat
    assert listed[0].capabilities.completion_fim
    card = client.models.retrieve(model_id="stub-latest")
    assert card.aliases == ["stub-latest"]
    assert card.max_context_length == live.engine.max_context


def test_models_are_listed_by_provider_and_name(client):
    def names(**filters):
        return [card.id for card in client.models.list(**filters).data]

    assert names(provider="bise") == names(model="stub") == names(model="stub-latest") == ["stub"]
    assert names(provider="someone-else") == names(model="other") == names(provider="bise", model="x") == []


def test_logprobs_have_bytes_and_token_ids(live, client):
    answer = client.chat.complete(model="stub", messages=ASK, logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.token_id, first.bytes_) == ("H", ord("H"), [ord("H")])
    assert len(first.top_logprobs) == 2
    chunks = [
        event.data
        for event in client.chat.stream(model="stub", messages=ASK, logprobs=True, prompt_logprobs=True)
    ]
    tokens = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert "".join(tokens) == "Hello, world!"
    scored = [c.choices[0].prompt_logprobs for c in chunks if c.choices[0].prompt_logprobs]
    assert len(scored) == 1
    assert len(scored[0].content) == 4


def test_mistrals_own_fields_reach_the_engine(live, client):
    client.chat.complete(
        model="stub",
        messages=[{"role": "system", "content": "Be brief."}, *ASK],
        random_seed=42,
        min_tokens=3,
        top_k=5,
        repetition_penalty=1.1,
        stop=["END"],
        safe_prompt=True,
        prediction={"type": "content", "content": "Hello"},
        metadata={"trace": "1"},
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    request = live.engine.requests[0]
    params = request.params
    assert (params.seed, params.min_tokens, params.top_k, params.stop) == (42, 3, 5, ("END",))
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.5, 0.25)
    assert request.prediction == tuple(b"Hello")
    said = bytes(i for i in request.token_ids if i < 256).decode()
    assert said.startswith("Always assist with care, respect, and truth.")
    assert "positivity.\n\nBe brief." in said


def test_an_error_is_the_clients_own_exception_with_the_message(live, client):
    with pytest.raises(SDKError) as caught:
        client.chat.complete(model="nope", messages=ASK)
    assert caught.value.status_code == 404
    assert "not served here" in caught.value.body
    with pytest.raises(SDKError) as caught:
        client.chat.complete(model="stub", messages=ASK, max_tokens=100_000)
    assert caught.value.status_code == 400
    assert "context_length_exceeded" in caught.value.body


def test_tool_ids_of_any_form_are_taken_and_paired(live, client, scripted):
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_abc-123", "function": {"name": "now", "arguments": {"zone": "utc"}}}],
        },
        {"role": "tool", "tool_call_id": "call_abc-123", "name": "now", "content": "12:00"},
    ]
    client.chat.complete(model="stub", messages=messages)
    said = bytes(i for i in live.engine.requests[0].token_ids if i < 256).decode()
    ids = said.split('"id": "')[1][:9]
    assert ids.isalnum()
    assert said.count(ids) == 2
