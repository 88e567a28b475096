"""Grammars in the engine: outputs keep them next to free rows, with the same bits, and end properly."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from bise.engine.grammar import GrammarSpec
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.engine.speculation import Speculation
from bise.errors import RequestError
from bise.grammar.tools import tool_calls_spec
from bise.text.messages import ToolSpec
from bise.text.tool_calls import CallForm, CallReader

EOS = 257
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = GrammarSpec.json_schema(SCHEMA)


def ask(grammar: GrammarSpec | None, prompt: str = "hello", **params) -> Request:
    wanted = {"max_tokens": 60, "seed": 1, "temperature": 2.0, **params}
    return Request(token_ids=(256, *prompt.encode()), params=SamplingParams(**wanted), grammar=grammar)


def test_every_output_of_a_random_model_is_valid(hash_engine):
    engine, _ = hash_engine()
    for seed in range(6):
        done = engine.submit(ask(PERSON, seed=seed, max_tokens=24 + 8 * seed)).result()
        jsonschema.validate(json.loads(done.text), SCHEMA)


def test_a_row_with_a_grammar_has_the_same_bits_alone_and_among_others(hash_engine):
    requests = [
        ask(PERSON, "one", logprobs=2),
        ask(None, "two", logprobs=2),
        ask(GrammarSpec.regex("[0-9]{5,9}"), "three", logprobs=2, top_k=20, repetition_penalty=1.3),
        ask(PERSON, "four", logprobs=2, temperature=0),
    ]
    alone = [hash_engine()[0].submit(request).result() for request in requests]
    engine, _ = hash_engine()
    handles = [engine.submit(request) for request in requests]
    for one, handle in zip(alone, handles, strict=True):
        together = handle.result()
        assert (together.token_ids, together.logprobs) == (one.token_ids, one.logprobs)
        assert together.finish_reason is one.finish_reason


def test_speculation_changes_nothing_under_a_grammar(hash_engine):
    spec = GrammarSpec.regex("(abcabcabd,){1,6}")
    plain = hash_engine()[0].submit(ask(spec)).result()
    guessing, _ = hash_engine(speculation=Speculation())
    request = ask(spec)
    predicted = Request(
        token_ids=request.token_ids, params=request.params, grammar=spec, prediction=tuple(b"abcabcabd," * 5)
    )
    assert guessing.submit(predicted).result().token_ids == plain.token_ids


def test_log_probs_are_those_of_the_model_itself(hash_engine):
    engine, _ = hash_engine()
    done = engine.submit(ask(GrammarSpec.regex("[a-z]{4}"), logprobs=0)).result()
    prompt = (256, *b"hello", *done.token_ids)
    scored = engine.submit(
        Request(token_ids=prompt, params=SamplingParams(max_tokens=0, logprobs=0), prompt_logprobs=True)
    ).result()
    assert done.logprobs == scored.prompt_logprobs[-len(done.token_ids) :]


def test_a_complete_output_stops_at_once_and_without_a_token_for_it(hash_engine):
    engine, _ = hash_engine()
    done = engine.submit(ask(GrammarSpec.choice(["yes", "no"]))).result()
    assert done.text in ("yes", "no")
    assert len(done.token_ids) == len(done.text)
    assert (done.finish_reason, done.stop_match) == (FinishReason.STOP, None)


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 3}, {"max_tokens": 1}])
def test_a_grammar_of_the_empty_text_alone_gives_the_empty_text(hash_engine, params):
    engine, _ = hash_engine()
    for grammar in (GrammarSpec.regex("^$"), GrammarSpec.lark('start: ""')):
        assert engine.submit(ask(grammar, **params)).result().text == ""


def test_an_output_that_the_limit_cut_short_is_complete_and_says_so(hash_engine):
    engine, _ = hash_engine()
    done = engine.submit(ask(GrammarSpec.regex("[a-z]{2,90}!"), max_tokens=5)).result()
    assert re.fullmatch("[a-z]{2,4}!", done.text)
    assert done.finish_reason is FinishReason.LENGTH


def test_a_limit_below_the_shortest_output_is_refused_with_the_number(hash_engine):
    engine, _ = hash_engine()
    with pytest.raises(RequestError, match=r"max_tokens 6 .* takes 7 tokens"):
        engine.submit(ask(GrammarSpec.choice(["sunrise", "moonlight"]), max_tokens=6))
    assert (
        engine.submit(ask(GrammarSpec.choice(["sunrise", "moonlight"]), max_tokens=7)).result().text
        == "sunrise"
    )


def test_the_end_of_text_comes_only_where_the_output_is_complete(hash_engine):
    engine, _ = hash_engine()
    request = ask(GrammarSpec.regex("([a-z]{3})+"), logit_bias={EOS: 100.0}, temperature=0)
    done = engine.submit(request).result()
    assert (len(done.text), done.finish_reason, done.stop_match) == (3, FinishReason.STOP, EOS)
    later = engine.submit(
        ask(GrammarSpec.regex("([a-z]{3})+"), logit_bias={EOS: 100.0}, temperature=0, min_tokens=4)
    ).result()
    assert len(later.text) == 6


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop": ("a",)}, "stop"),
        ({"stop_token_ids": (97,)}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_would_cut_an_output_is_refused_beside_a_grammar(hash_engine, params, field):
    engine, _ = hash_engine()
    with pytest.raises(RequestError) as refused:
        engine.submit(ask(PERSON, **params))
    assert refused.value.field == field


def test_a_schema_that_cannot_be_kept_is_refused_before_any_token_with_its_place(hash_engine):
    engine, model = hash_engine()
    schema = {"type": "object", "properties": {"a/b": {"type": "array", "contains": {}}}}
    with pytest.raises(RequestError) as refused:
        engine.submit(ask(GrammarSpec.json_schema(schema, field="response_format.json_schema.schema")))
    assert refused.value.field == "response_format.json_schema.schema#/properties/a~1b/contains"
    assert not model.batches


def test_a_grammar_whose_shortest_output_cannot_be_written_is_refused_by_its_field(hash_engine):
    engine, _ = hash_engine()
    with pytest.raises(RequestError, match="cut greedily") as refused:
        engine.submit(ask(GrammarSpec.lark("start: /[0-9]+/ /[0-9]/", field="response_format.lark")))
    assert refused.value.field == "response_format.lark"


class CallingTokenizer:
    """Bytes, but 0 is [TOOL_CALLS], 1 is [ARGS], 256 is BOS and 257 ends a text."""

    vocab_size = 258
    bos_id = 256
    adds_bos = True
    stop_ids = frozenset({EOS})
    space_prefix = False

    def control_id(self, name: str) -> int | None:
        return {"[TOOL_CALLS]": 0, "[ARGS]": 1, "<s>": 256, "</s>": EOS}.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if 1 < token_id < 256 else b""


TOOLS = [ToolSpec(name="look", description="", parameters=SCHEMA)]


def calling(hash_engine, choice: str, script=None, **params):
    engine, _ = hash_engine(tokenizer=CallingTokenizer(), script=script)
    spec = tool_calls_spec(CallForm.NAMED, TOOLS, choice, parallel=False)
    reader = CallReader(CallForm.NAMED, CallingTokenizer(), seed=1)
    text, calls, last = "", [], None
    for delta in engine.submit(ask(spec, "Q", **params)):
        read = reader.push(delta.token_ids, delta.text)
        text += read.text
        calls += read.calls
        last = delta
    read = reader.finish()
    assert not read.broken
    return text + read.text, [*calls, *read.calls], last


@pytest.mark.parametrize("choice", ["any", "required"])
def test_a_demanded_call_comes_at_once_and_fits_its_schema(hash_engine, choice):
    text, calls, last = calling(hash_engine, choice, max_tokens=90)
    assert (text, [call.name for call in calls]) == ("", ["look"])
    jsonschema.validate(json.loads(calls[0].arguments), SCHEMA)
    assert re.fullmatch("[a-zA-Z0-9]{9}", calls[0].id)
    assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_with_auto_the_text_before_a_call_is_free_and_the_call_is_held(hash_engine):
    script = {ord("Q"): ord("h"), ord("h"): ord("i"), ord("i"): 0}
    text, calls, _ = calling(hash_engine, "auto", script, max_tokens=90, stop=("{",))
    assert (text, len(calls)) == ("hi", 1)
    jsonschema.validate(json.loads(calls[0].arguments), SCHEMA)


def test_with_auto_a_call_that_no_longer_fits_is_not_begun(hash_engine):
    script = {ord("Q"): ord("h"), ord("h"): ord("i"), ord("i"): 0}
    _, calls, last = calling(hash_engine, "auto", script, max_tokens=20)
    assert (calls, last.finish_reason is FinishReason.ABORT) == ([], False)


def test_with_none_the_model_cannot_begin_a_call(hash_engine):
    script = {ord("Q"): 0, **dict.fromkeys(range(2, 81), 0)}
    _, calls, _ = calling(hash_engine, "none", script, max_tokens=30)
    assert calls == []
