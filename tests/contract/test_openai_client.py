"""The current `openai` client against a live server."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live):
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def test_a_chat_answer_has_the_clients_literal_fields(live, client):
    answer = client.chat.completions.create(model="stub", messages=ASK)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 18
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert type(answer).model_validate(answer.model_dump(), strict=True)


@pytest.mark.parametrize("wanted", [None, True, False])
def test_streamed_usage_comes_once_and_never_on_an_empty_chunk_unasked(live, client, wanted):
    options = {} if wanted is None else {"stream_options": {"include_usage": wanted}}
    chunks = list(client.chat.completions.create(model="stub", messages=ASK, stream=True, **options))
    told = [chunk for chunk in chunks if chunk.usage]
    assert len(told) == (0 if wanted is False else 1)
    assert [len(chunk.choices) for chunk in told] == ([] if wanted is False else [0 if wanted else 1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world!"
    assert len({(c.id, c.created) for c in chunks}) == 1


def test_several_choices_have_their_own_seeds_and_one_prompt_in_the_usage(live, client):
    answer = client.chat.completions.create(model="stub", messages=ASK, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [r.params.seed for r in live.engine.requests] == [5, 6, 7]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 39)
    chunks = list(client.chat.completions.create(model="stub", messages=ASK, n=2, stream=True))
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "Hello, world!"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert sum(chunk.usage is not None for chunk in chunks) == 1


def test_a_stop_string_cuts_streams_and_whole_answers_alike(live, client):
    live.engine.text = "one STO two STOP three"
    whole = client.chat.completions.create(model="stub", messages=ASK, stop=["STOP"])
    assert whole.choices[0].message.content == "one STO two "
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="stub", messages=ASK, stop="STOP", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one STO two "


def test_sampling_fields_reach_the_engine(live, client):
    client.chat.completions.create(
        model="stub",
        messages=ASK,
        max_completion_tokens=4,
        temperature=1.5,
        top_p=0.9,
        logit_bias={"65": -100, "66": 3},
        seed=-1,
        user="someone",
    )
    params = live.engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p) == (4, 1.5, 0.9)
    assert params.logit_bias == {65: -100, 66: 3}
    assert params.seed == 2**64 - 1


def test_roles_developer_and_null_fields_are_taken(live, client, scripted):
    messages = [
        {"role": "developer", "content": "Be kind."},
        *ASK,
        {"role": "assistant", "content": "Yes?", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "Go on"}], "name": "ann"},
    ]
    client.chat.completions.create(model="stub", messages=messages)
    assert scripted.CONTROLS["[SYSTEM_PROMPT]"] in live.engine.requests[0].token_ids


def test_completions_take_texts_and_tokens_and_echo_with_logprobs(live, client):
    live.engine.text = " the sea"
    answer = client.completions.create(
        model="stub", prompt="I see", max_tokens=4, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert answer.object == "text_completion"
    assert choice.text == "I see the"
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["<s>", *"I see the"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, *range(9)]
    assert len(choice.logprobs.top_logprobs[3]) == 2
    many = client.completions.create(model="stub", prompt=[[72, 105], [72]], n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage.prompt_tokens == 3
    texts = client.completions.create(model="stub", prompt=["a", "b"], max_tokens=2)
    assert [choice.text for choice in texts.choices] == [" t", " t"]


def test_completions_score_a_prompt_without_producing_anything(live, client):
    answer = client.completions.create(model="stub", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "abc"
    assert len(answer.choices[0].logprobs.tokens) == 4
    assert answer.usage.completion_tokens == 0


def test_completions_stream_with_echo(live, client):
    chunks = list(client.completions.create(model="stub", prompt="abc", echo=True, stream=True, max_tokens=5))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcHello"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(chunk.usage is not None for chunk in chunks) == 1


def test_a_stream_with_echo_scores_the_whole_prompt(live, client):
    live.engine.text = " the sea"
    asked = {"model": "stub", "prompt": "I see", "max_tokens": 4, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in chunks if part for value in getattr(part, name)] == getattr(whole, name)


def test_best_of_keeps_the_likeliest(live, client):
    answer = client.completions.create(model="stub", prompt="abc", best_of=3, n=1, max_tokens=3)
    assert len(answer.choices) == 1
    assert answer.usage.completion_tokens == 9


def test_a_completion_with_a_suffix_fills_the_gap(live, client, scripted):
    client.completions.create(model="stub", prompt="def f():", suffix="return x", max_tokens=3)
    assert live.engine.requests[0].token_ids[1] == scripted.CONTROLS["[SUFFIX]"]


def test_models_can_be_listed_and_read(live, client):
    assert [model.id for model in client.models.list()] == ["stub"]
    model = client.models.retrieve("stub")
    assert (model.object, model.owned_by, model.created) == ("model", "bise", 1_700_000_000)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"temperature": 3}),
        (openai.BadRequestError, {"max_tokens": 100_000}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"messages": [{"role": "robot", "content": "x"}]}),
        (openai.BadRequestError, {"n": 17}),
        (openai.BadRequestError, {"top_logprobs": 3}),
        (openai.BadRequestError, {"extra_body": {"audio": {"voice": "x"}}}),
    ],
)
def test_mistakes_become_the_clients_exceptions_before_a_stream_begins(live, client, kind, fields):
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(
                **{"model": "stub", "messages": ASK, "stream": stream, **fields},
            )
        assert caught.value.request_id.startswith("req_")
        assert caught.value.body["message"]
        assert caught.value.code


def test_deleting_a_base_model_is_refused(live, client):
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("stub")


def test_an_engine_failure_in_a_stream_is_an_exception_in_the_client(live, client):
    from bise.errors import NonFiniteError

    live.engine.fails_with = NonFiniteError("the logits are not finite")
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="stub", messages=ASK, stream=True))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="stub", messages=ASK)
    live.engine.fails_with = None
    assert client.chat.completions.create(model="stub", messages=ASK).choices


def test_a_full_queue_is_429_with_retry_after(live, client):
    from bise.errors import QueueFullError

    live.engine.refuses_with = QueueFullError("8 requests are waiting already; try again later")
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="stub", messages=ASK)
    assert int(caught.value.response.headers["retry-after"]) >= 1
