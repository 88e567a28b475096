"""Conversations and tools in OpenAI form: every fault is an error that names its place."""

from __future__ import annotations

import pytest

from bise.errors import RequestError
from bise.text.messages import Thinking, parse_messages, parse_tools

USER = {"role": "user", "content": "hi"}


def assistant(**fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": None} | fields


def call(**fields: object) -> dict[str, object]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}} | fields


MESSAGE_FAULTS = [
    ([], "messages"),
    ("hi", "messages"),
    ([USER, "hi"], "messages[1]"),
    ([USER, {}], "messages[1].role"),
    ([USER, {"role": "robot", "content": "x"}], "messages[1].role"),
    ([USER, {"role": 5, "content": "x"}], "messages[1].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "thinking", "thinking": 1}]}], "messages[0].content[0].thinking"),
    ([USER | {"name": "Ann"}], "messages[0].name"),
    ([USER | {"colour": "red"}], "messages[0].colour"),
    ([USER | {"tool_calls": [call()]}], "messages[0].tool_calls"),
    ([USER, assistant(tool_calls="f")], "messages[1].tool_calls"),
    ([USER, assistant(tool_calls=["f"])], "messages[1].tool_calls[0]"),
    ([USER, assistant(tool_calls=[call(type="code")])], "messages[1].tool_calls[0].type"),
    ([USER, assistant(tool_calls=[call(id=5)])], "messages[1].tool_calls[0].id"),
    ([USER, assistant(tool_calls=[call(function=None)])], "messages[1].tool_calls[0].function"),
    (
        [USER, assistant(tool_calls=[call(function={"name": "a b"})])],
        "messages[1].tool_calls[0].function.name",
    ),
    (
        [USER, assistant(tool_calls=[call(function={"name": "f\n"})])],
        "messages[1].tool_calls[0].function.name",
    ),
    (
        [USER, assistant(tool_calls=[call(function={"name": "f", "arguments": 5})])],
        "messages[1].tool_calls[0].function.arguments",
    ),
    ([USER, assistant(content="x", prefix="yes")], "messages[1].prefix"),
    (
        [USER, assistant(content=[{"type": "thinking", "thinking": "t"}], reasoning="r")],
        "messages[1].reasoning_content",
    ),
    ([USER, {"role": "tool", "content": "x", "tool_call_id": 7}], "messages[1].tool_call_id"),
]
TOOL_FAULTS = [
    ({}, "tools"),
    (["f"], "tools[0]"),
    ([{"type": "retrieval"}], "tools[0].type"),
    ([{"type": "function"}], "tools[0].function"),
    ([{"function": {}}], "tools[0].function.name"),
    ([{"function": {"name": "x" * 65}}], "tools[0].function.name"),
    ([{"function": {"name": "f", "description": 5}}], "tools[0].function.description"),
    ([{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
    ([{"function": {"name": "f", "parameters": {"type": "nonsense"}}}], "tools[0].function.parameters"),
    ([{"function": {"name": "f", "parameters": {"pattern": 5}}}], "tools[0].function.parameters"),
    ([{"function": {"name": "f", "parameters": {"x": {1, 2}}}}], "tools[0].function.parameters"),
    ([{"function": {"name": "f", "returns": "x"}}], "tools[0].function.returns"),
]


@pytest.mark.parametrize(("messages", "place"), MESSAGE_FAULTS, ids=[place for _, place in MESSAGE_FAULTS])
def test_a_fault_of_a_message_is_named_by_its_place(messages, place):
    with pytest.raises(RequestError) as caught:
        parse_messages(messages, continue_final=False)
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(("tools", "place"), TOOL_FAULTS, ids=[place for _, place in TOOL_FAULTS])
def test_a_fault_of_a_tool_is_named_by_its_place(tools, place):
    with pytest.raises(RequestError) as caught:
        parse_tools(tools)
    assert str(caught.value).startswith(place)
    assert caught.value.field is not None


def test_deeply_nested_parameters_are_refused():
    schema: dict[str, object] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(RequestError, match=r"tools\[0\]\.function\.parameters"):
        parse_tools([{"function": {"name": "f", "parameters": schema}}])
    while schema:  # freed one by one: a deep chain overflows the stack of the interpreter's own deallocation
        schema = schema["not"]


def test_only_an_assistants_message_can_be_continued():
    with pytest.raises(RequestError, match=r"messages\[0\]\.role"):
        parse_messages([USER], continue_final=True)


def test_developer_counts_as_system_and_unused_null_fields_are_no_fault():
    messages = [
        {"role": "developer", "content": "x"},
        assistant(content="y", refusal=None, annotations=[], audio=None),
    ]
    parsed = parse_messages(messages, continue_final=True)
    assert [message.role for message in parsed] == ["system", "assistant"]
    assert parsed[-1].prefix


def test_reasoning_comes_before_the_answer():
    parsed = parse_messages([USER, assistant(content="y", reasoning_content="r"), USER], continue_final=False)
    assert parsed[1].content == (Thinking("r"), "y")
