"""Refusals name the field as the client sent it and show what was seen; counts are what is billed."""

from __future__ import annotations

import pytest

ASK = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "stub", "messages": ASK}
RESPONSE = {"model": "stub", "input": "Hi"}
BAD_FORMAT = {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "b"}
MESSAGE = {"model": "stub", "messages": ASK, "max_tokens": 3}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", {**CHAT, "n": 0}, "n", "n must be at least 1, got 0"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, "temperature", "must be a number, not 'hot'"),
        ("chat/completions", {**CHAT, "logprobs": 1}, "logprobs", "must be true or false, not 1"),
        ("chat/completions", {**CHAT, "store": True}, "store", "store is true; known: false"),
        ("chat/completions", {**CHAT, "tool_choice": "any"}, "tool_choice", "tool_choice needs tools"),
        ("chat/completions", {**CHAT, "seed": 1, "random_seed": 2}, "seed", "differ"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object", "schema": {}}},
         "response_format.schema", "is not known here"),
        ("chat/completions", {"model": "stub"}, "messages", "messages is missing"),
        ("responses", {**RESPONSE, "text": BAD_FORMAT},
         "text.format.schema#/type", "text.format.schema"),
        ("responses", {**RESPONSE, "max_output_tokens": 99_999}, "max_output_tokens", "exceed the context"),
        ("responses", {**RESPONSE, "reasoning": {"effort": "high"}}, "reasoning.effort", "does not think"),
        ("responses", {**RESPONSE, "input": [RESULT]},
         "input.role", "a conversation starts with user or system"),
        ("responses", {**RESPONSE, "tools": [{"type": "function", "name": "a b"}]},
         "tools[0].name", "letters"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_clients_own_field(live, path, body, param, words):
    answer = live.post(f"/v1/{path}", body)
    assert answer.status_code == 400
    assert answer.json()["param"] == answer.json()["error"]["param"] == param
    assert words in answer.json()["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"name": "f", "input_schema": {"type": 5}}]}, "tools[0].input_schema is no JSON Schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must be"),
        ({"thinking": {"type": "enabled"}}, "thinking: this model does not think"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ],
)
def test_a_refusal_of_messages_speaks_anthropics_names(live, fields, words):
    answer = live.post("/v1/messages", {**MESSAGE, **fields})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_tool_result_must_answer_a_call_and_tools_have_different_names(live):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [*ASK, {"role": "assistant", "tool_calls": [call]}]
    wrong = [*history, {"role": "tool", "tool_call_id": "ihgfedcba", "content": "1"}]
    answer = live.post("/v1/chat/completions", {**CHAT, "messages": wrong})
    assert (answer.status_code, answer.json()["param"]) == (400, "messages[2].tool_call_id")
    tool = {"type": "function", "function": {"name": "f"}}
    answer = live.post("/v1/chat/completions", {**CHAT, "tools": [tool, tool]})
    assert (answer.status_code, answer.json()["param"]) == (400, "tools")


def test_a_name_is_told_to_the_model_before_the_content(live):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    messages = [{"role": "user", "content": parts, "name": "ann"}]
    for _ in range(2):
        assert live.post("/v1/chat/completions", {**CHAT, "messages": messages}).status_code == 200
    said = bytes(token for token in live.engine.requests[0].token_ids if token < 256).decode()
    assert said.startswith("ann: Hello")
    assert live.engine.requests[0].token_ids == live.engine.requests[1].token_ids


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
def test_counted_tokens_are_those_that_the_request_uses(live, choice):
    live.engine.text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]' if choice == "required" else "Hi"
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    body = {**RESPONSE, "instructions": "Be brief.", "tools": tools, "tool_choice": choice}
    counted = live.post("/v1/responses/input_tokens", body).json()["input_tokens"]
    assert live.post("/v1/responses", body).json()["usage"]["input_tokens"] == counted
    kinds = {"none": "none", "auto": "auto", "required": "any"}
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    body = {**MESSAGE, "tools": tools, "tool_choice": {"type": kinds[choice]}, "max_tokens": 40}
    counted = live.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    assert live.post("/v1/messages", body).json()["usage"]["input_tokens"] == counted
