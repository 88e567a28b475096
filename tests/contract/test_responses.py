"""POST /v1/responses with both clients that speak it."""

from __future__ import annotations

import openai
import pytest
from mistralai.client import Mistral
from openai import OpenAI


@pytest.fixture
def client(live):
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def said(live, index: int = -1) -> str:
    return bytes(i for i in live.engine.requests[index].token_ids if i < 256).decode()


def test_a_response_has_text_and_usage_details(live, client):
    answer = client.responses.create(model="stub", input="Hi", instructions="Be brief.", metadata={"a": "b"})
    assert answer.output_text == "Hello, world!"
    assert answer.status == "completed"
    assert answer.usage.output_tokens == 13
    assert answer.usage.input_tokens_details.cached_tokens == 0
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert said(live).startswith("Be brief.")
    assert type(answer).model_validate(answer.model_dump(), strict=True)


def test_events_come_in_order_and_add_up(live, client):
    live.engine.text = "Grüße 🎉"
    events = list(client.responses.create(model="stub", input="Hi", stream=True))
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Grüße 🎉"
    assert events[-1].response.output_text == "Grüße 🎉"
    assert events[-1].response.usage.output_tokens == len("Grüße 🎉".encode())


def test_the_mistral_client_reads_the_same_events(live):
    with Mistral(api_key="none", server_url=live.url) as client:
        whole = client.responses.create(model="stub", input="Hi")
        assert whole.output[0].content[0].text == "Hello, world!"
        frames = list(client.responses.create(model="stub", input="Hi", stream=True))
        assert frames[0].event == "response.created"
        assert frames[-1].event == "response.completed"
        assert frames[-1].data.response.output[0].content[0].text == "Hello, world!"
        assert client.responses.count_input_tokens(model="stub", input="Hi").input_tokens == 5


def test_a_response_cut_by_the_limit_is_incomplete(live, client):
    answer = client.responses.create(model="stub", input="Hi", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model="stub", input="Hi", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_response_can_be_continued_read_and_deleted(live, client):
    first = client.responses.create(model="stub", input="My name is Ann.")
    second = client.responses.create(model="stub", input="Who am I?", previous_response_id=first.id)
    assert "My name is Ann." in said(live)
    assert "Hello, world!" in said(live)
    assert client.responses.retrieve(second.id).output_text == "Hello, world!"
    assert client.responses.input_items.list(second.id).data[0].content[0].text == "Who am I?"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="stub", input="x", previous_response_id=first.id)
    hidden = client.responses.create(model="stub", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(hidden.id)


def test_a_response_that_has_ended_cannot_be_cancelled(live, client):
    answer = client.responses.create(model="stub", input="Hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    refused = live.post("/v1/responses/compact", {"model": "stub"})
    assert (refused.status_code, refused.json()["code"]) == (501, "not_implemented")


def test_histories_with_calls_become_turns_of_the_chat_format(live, client, scripted):
    client.responses.create(
        model="stub",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
            {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "12:00"},
        ],
    )
    assert scripted.CONTROLS["[TOOL_CALLS]"] in live.engine.requests[0].token_ids
    assert "12:00" in said(live)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": []},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        {"background": True},
        {"truncation": "auto"},
        {"tools": [{"type": "web_search"}]},
        {"temperature": 9},
        {"conversation": "conv_1"},
    ],
)
def test_what_cannot_be_honoured_is_400(live, client, fields):
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**{"model": "stub", "input": "Hi", **fields})


def test_an_engine_failure_ends_the_stream_with_response_failed(live, client):
    from bise.errors import NonFiniteError

    live.engine.fails_with = NonFiniteError("the logits are not finite")
    events = list(client.responses.create(model="stub", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert "not finite" in events[-1].response.error.message
