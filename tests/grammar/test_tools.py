"""Tool-call grammars accept what mistral-common writes, token for token, and only calls that fit."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from bise.errors import RequestError
from bise.grammar.compiler import compile_grammar
from bise.grammar.follower import Follower
from bise.grammar.tools import tool_calls_spec
from bise.grammar.vocabulary import Vocabulary
from bise.text.messages import ToolSpec
from bise.text.tokenizer import load_tokenizer
from bise.text.tool_calls import CallForm, CallReader, call_form

sys.path.insert(0, str(Path(__file__).parent.parent / "text"))
templates = importlib.import_module("test_mistral_template")
sys.path.pop(0)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
ARGUMENTS = {"city": "São Paulo", "days": 3}


@pytest.mark.parametrize("form", [version for version in templates.VERSIONS if version != "v1"])
def test_the_calls_of_mistral_common_are_in_the_grammar_and_are_read_back(form, tmp_path):
    file = templates.write_tokenizer(form, tmp_path)
    theirs, ours = MistralTokenizer.from_file(str(file)), load_tokenizer(tmp_path, 40_000)
    call = ToolCall(id="abcDEF123", function=FunctionCall(name="look", arguments=json.dumps(ARGUMENTS)))
    request = ChatCompletionRequest(
        tools=[Tool(function=Function(name="look", description="", parameters=SCHEMA))],
        messages=[
            UserMessage(content="q"),
            AssistantMessage(content=None, tool_calls=[call]),
            ToolMessage(content="sun", name="look", tool_call_id="abcDEF123"),
        ],
    )
    ids = theirs.encode_chat_completion(request).tokens
    trigger, end = ours.control_id("[TOOL_CALLS]"), ours.control_id("</s>")
    written = ids[ids.index(trigger) :]
    written = written[: written.index(end)]
    vocabulary = Vocabulary(ours, ours.vocab_size)
    spec = tool_calls_spec(
        call_form(form, ours), [ToolSpec(name="look", description="", parameters=SCHEMA)], "any"
    )
    follower = Follower(compile_grammar(spec, vocabulary), vocabulary)
    assert follower.validate(written) == len(written)
    assert [follower.take(token, 500) for token in written] == written
    assert follower.may_end
    assert not follower.gave_up, "the mask engine does not know the call"
    reader = CallReader(call_form(form, ours), ours)
    reader.push(written, "")
    (read,) = reader.finish().calls
    assert (read.name, json.loads(read.arguments)) == ("look", ARGUMENTS)
    assert call_form(form, ours) in (CallForm.LIST, CallForm.NAMED) or read.id == "abcDEF123"


def test_a_named_tool_is_the_only_one_that_can_be_called(vocabulary):
    tools = [ToolSpec(name=name, description="", parameters={}) for name in ("a", "b")]
    spec = tool_calls_spec(CallForm.NAMED, tools, name="b", parallel=False)
    follower = Follower(compile_grammar(spec, vocabulary), vocabulary)
    assert follower.allowed(100).tolist() == [vocabulary.control("[TOOL_CALLS]", "tools")]
    follower.take(follower.allowed(100)[0], 100)
    assert [vocabulary.pieces[token] for token in follower.allowed(100)] == [b"b"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"choice": "always"}, "tool_choice"),
        ({"name": "absent"}, "tool_choice"),
        ({"choice": "auto", "form": CallForm.BARE}, "tool_choice"),
    ],
)
def test_choices_that_cannot_be_kept_are_refused(options, field):
    tools = [ToolSpec(name="a", description="", parameters={})]
    with pytest.raises(RequestError) as refused:
        tool_calls_spec(**{"form": CallForm.NAMED, "tools": tools, **options})
    assert refused.value.field == field


def test_the_schema_of_a_tool_is_named_in_the_refusal(vocabulary):
    tools = [
        ToolSpec(name="a", description="", parameters={}),
        ToolSpec(name="b", description="", parameters={"properties": {"x": {"not": {}}}}),
    ]
    with pytest.raises(RequestError) as refused:
        compile_grammar(tool_calls_spec(CallForm.NAMED, tools), vocabulary)
    assert refused.value.field == "tools[1].function.parameters#/properties/x/not"
