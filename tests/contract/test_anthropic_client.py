"""POST /v1/messages with Anthropic's own client."""

from __future__ import annotations

import pytest

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live):
    import anthropic

    with anthropic.Anthropic(api_key="none", base_url=live.url, max_retries=0) as client:
        yield client


def test_a_message_has_blocks_and_usage(live, client):
    answer = client.messages.create(model="stub", max_tokens=50, messages=ASK, system="Be brief.")
    assert answer.content[0].text == "Hello, world!"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == 13
    said = bytes(i for i in live.engine.requests[0].token_ids if i < 256).decode()
    assert said.startswith("Be brief.")


def test_a_stream_adds_up_to_the_same_message(live, client):
    with client.messages.stream(model="stub", max_tokens=50, messages=ASK) as stream:
        assert "".join(stream.text_stream) == "Hello, world!"
        final = stream.get_final_message()
    assert final.content[0].text == "Hello, world!"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 13)


def test_stops_and_limits_are_told(live, client):
    answer = client.messages.create(model="stub", max_tokens=50, messages=ASK, stop_sequences=["wor"])
    assert (answer.stop_reason, answer.content[0].text) == ("stop_sequence", "Hello, ")
    assert answer.stop_sequence == "wor"
    assert client.messages.create(model="stub", max_tokens=2, messages=ASK).stop_reason == "max_tokens"


def test_an_assistants_beginning_is_continued(live, client):
    live.engine.text = " world"
    messages = [*ASK, {"role": "assistant", "content": "Hello"}]
    answer = client.messages.create(model="stub", max_tokens=9, messages=messages)
    assert answer.content[0].text == " world"
    assert live.engine.requests[0].continuation


def test_tokens_can_be_counted(live, client):
    assert client.messages.count_tokens(model="stub", messages=ASK).input_tokens == 5


def test_mistakes_are_the_clients_exceptions(live, client):
    import anthropic

    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nope", max_tokens=5, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="stub", max_tokens=0, messages=ASK)
    image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(anthropic.BadRequestError, match="text"):
        client.messages.create(model="stub", max_tokens=5, messages=[{"role": "user", "content": [image]}])
