"""Tool calls over every dialect: ids, whole deltas, choices that are enforced, histories that come back."""

from __future__ import annotations

import json
import re

import openai
import pytest
from mistralai.client import Mistral
from openai import OpenAI

ASK = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALLS = (
    'Let me see.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}, '
    '{"name": "weather", "arguments": {"city": "Köln 🎉"}}]'
)
CITIES = ["Paris", "Köln 🎉"]


@pytest.fixture
def client(live):
    live.engine.text = CALLS
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def test_a_whole_answer_has_calls_with_nine_character_ids(live, client):
    answer = client.chat.completions.create(model="stub", messages=ASK, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == CITIES
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.id) for call in calls)
    assert len({call.id for call in calls}) == 2


def test_content_is_null_beside_calls_alone(live, client):
    live.engine.text = CALLS.removeprefix("Let me see.")
    answer = client.chat.completions.create(model="stub", messages=ASK, tools=TOOLS)
    assert answer.choices[0].message.content is None


def test_a_stream_sends_each_call_whole_with_its_index(live, client):
    chunks = list(client.chat.completions.create(model="stub", messages=ASK, tools=TOOLS, stream=True))
    deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == [0, 1]
    assert [json.loads(delta.function.arguments)["city"] for delta in deltas] == CITIES
    assert all(delta.id and delta.function.name == "weather" for delta in deltas)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_mistral_client_reads_the_same_stream_and_sends_its_calls_back(live):
    live.engine.text = CALLS
    with Mistral(api_key="none", server_url=live.url) as client:
        chunks = [
            e.data for e in client.chat.stream(model="stub", messages=ASK, tools=TOOLS, tool_choice="auto")
        ]
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert [json.loads(call.function.arguments)["city"] for call in calls] == CITIES
        message = client.chat.complete(model="stub", messages=ASK, tools=TOOLS).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "sunny"}
            for call in message.tool_calls
        ]
        live.engine.text = "Sunny."
        live.engine.requests.clear()
        end = client.chat.complete(model="stub", messages=[*ASK, message, *results], tools=TOOLS)
        assert end.choices[0].message.content == "Sunny."


def test_the_responses_api_has_function_call_items(live, client):
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    answer = client.responses.create(model="stub", input="Weather?", tools=tools)
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    assert json.loads(answer.output[1].arguments) == {"city": "Paris"}
    events = list(client.responses.create(model="stub", input="Weather?", tools=tools, stream=True))
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments)["city"] for event in done] == CITIES
    assert [item.type for item in events[-1].response.output] == ["message", "function_call", "function_call"]
    live.engine.text = "Sunny."
    again = client.responses.create(
        model="stub",
        previous_response_id=answer.id,
        input=[{"type": "function_call_output", "call_id": answer.output[1].call_id, "output": "sunny"},
               {"type": "function_call_output", "call_id": answer.output[2].call_id, "output": "rain"}],
    )  # fmt: skip
    assert again.output_text == "Sunny."


def test_the_anthropic_form_has_tool_use_blocks(live):
    import anthropic

    live.engine.text = CALLS
    tools = [{"name": "weather", "description": "d", "input_schema": PARAMETERS}]
    with anthropic.Anthropic(api_key="none", base_url=live.url, max_retries=0) as client:
        answer = client.messages.create(model="stub", max_tokens=500, messages=ASK, tools=tools)
        assert answer.stop_reason == "tool_use"
        assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
        assert [block.input["city"] for block in answer.content[1:]] == CITIES
        with client.messages.stream(model="stub", max_tokens=500, messages=ASK, tools=tools) as stream:
            final = stream.get_final_message()
        assert [block.input["city"] for block in final.content[1:]] == CITIES
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in answer.content[1:]
        ]
        turns = [*ASK, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        live.engine.text = "Sunny."
        end = client.messages.create(model="stub", max_tokens=50, messages=turns, tools=tools)
        assert end.content[0].text == "Sunny."


@pytest.mark.parametrize(
    ("choice", "trigger"),
    [
        ("auto", "[TOOL_CALLS]"),
        (None, "[TOOL_CALLS]"),
        ("none", "[TOOL_CALLS]"),
        ("required", None),
        ("any", None),
        ({"type": "function", "function": {"name": "weather"}}, None),
    ],
)
def test_the_choice_becomes_a_grammar(live, client, choice, trigger):
    body = {"model": "stub", "messages": ASK, "tools": TOOLS}
    reply = live.post("/v1/chat/completions", body | ({"tool_choice": choice} if choice else {}))
    assert reply.status_code == 200
    grammar = live.engine.requests[0].grammar
    assert grammar.trigger == trigger
    assert grammar.kind.value == ("free" if choice == "none" else "tool_calls")


def test_parallel_calls_can_be_turned_off(live, client):
    client.chat.completions.create(model="stub", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
    assert json.loads(live.engine.requests[0].grammar.source)["parallel"] is False


def test_allowed_tools_narrow_what_may_be_called(live, client):
    second = {"type": "function", "function": {"name": "time", "parameters": {}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    client.chat.completions.create(
        model="stub",
        messages=ASK,
        tools=[*TOOLS, second],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )
    source = json.loads(live.engine.requests[0].grammar.source)
    assert [tool["name"] for tool in source["tools"]] == ["time"]


def test_allowed_tools_that_do_not_exist_are_refused(live, client):
    function = {"type": "function", "function": {"name": "wether"}}
    allowed = {"mode": "auto", "tools": [*TOOLS, function]}
    with pytest.raises(openai.BadRequestError, match="wether"):
        client.chat.completions.create(
            model="stub",
            messages=ASK,
            tools=TOOLS,
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        )


def test_a_prefix_beside_a_format_is_refused_because_the_whole_would_not_obey_it(live, client):
    begun = [*ASK, {"role": "assistant", "content": "{", "prefix": True}]
    with pytest.raises(openai.BadRequestError, match="prefix"):
        client.chat.completions.create(model="stub", messages=begun, response_format={"type": "json_object"})


def test_formats_become_grammars(live, client):
    schema = {"name": "answer", "strict": True, "schema": PARAMETERS}
    client.chat.completions.create(
        model="stub", messages=ASK, response_format={"type": "json_schema", "json_schema": schema}
    )
    grammar = live.engine.requests[0].grammar
    assert (json.loads(grammar.source), grammar.strict) == (PARAMETERS, True)
    client.chat.completions.create(model="stub", messages=ASK, response_format={"type": "json_object"})
    assert json.loads(live.engine.requests[1].grammar.source) == {"type": "object"}


def test_strict_means_to_mistrals_client_what_it_means_there(live):
    schema = {"name": "answer", "strict": True, "schema_definition": {"type": "object", "properties": {}}}
    with Mistral(api_key="none", server_url=live.url) as client:
        client.chat.complete(
            model="stub", messages=ASK, response_format={"type": "json_schema", "json_schema": schema}
        )
    grammar = live.engine.requests[0].grammar
    assert (json.loads(grammar.source)["type"], grammar.strict) == ("object", False)


def test_calls_cut_off_by_the_limit_are_no_calls(live, client):
    answer = client.chat.completions.create(model="stub", messages=ASK, tools=TOOLS, max_tokens=40)
    assert answer.choices[0].finish_reason == "length"
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": {"type": "function", "function": {"name": "nope"}}},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "strange"}}}]},
    ],
)
def test_what_cannot_be_enforced_is_refused(live, client, fields):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{"model": "stub", "messages": ASK, "tools": TOOLS, **fields})


def test_thoughts_are_told_apart_in_each_clients_way(serve, scripted):
    model = scripted.ScriptedModel(chat_format="v13-tekken", without=())
    server = serve(scripted.ScriptedFleet(model))
    model.engine.text = "[THINK]Hm, wörld 🎉.[/THINK]Hello!"
    with OpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        message = client.chat.completions.create(model="stub", messages=ASK).choices[0].message
        assert (message.content, message.reasoning_content) == ("Hello!", "Hm, wörld 🎉.")
        chunks = list(client.chat.completions.create(model="stub", messages=ASK, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "Hello!"
        assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "Hm, wörld 🎉."
        response = client.responses.create(model="stub", input="Hi")
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.usage.output_tokens_details.reasoning_tokens == len("Hm, wörld 🎉.".encode())
    with Mistral(api_key="none", server_url=server.url) as client:
        content = client.chat.complete(model="stub", messages=ASK).choices[0].message.content
        assert content[0].thinking[0].text == "Hm, wörld 🎉."
        assert content[1].text == "Hello!"
        back = [*ASK, {"role": "assistant", "content": content}, {"role": "user", "content": "Go on"}]
        assert client.chat.complete(model="stub", messages=back).choices
        assert list(client.chat.stream(model="stub", messages=ASK))
