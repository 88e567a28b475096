"""`bise serve` as a process of its own with the embedded model, driven by the real clients."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from mistralai.client import Mistral
from openai import OpenAI

ASK = [{"role": "user", "content": "Name a river."}]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """All that were started; the last one serves, unless a test has ended it."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def process(processes, tmp_path_factory):
    if not processes or processes[-1].poll() is not None:  # in whichever order the tests come
        home = tmp_path_factory.mktemp("home")
        environment = os.environ | {"BISE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "bise", "serve", "--port", "0", "--grace", "5"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        line = processes[-1].stdout.readline()
        processes[-1].url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    return processes[-1]


@pytest.fixture
def client(process):
    with OpenAI(api_key="none", base_url=f"{process.url}/v1", max_retries=0) as client:
        yield client


def say(client, **fields) -> str:
    answer = client.chat.completions.create(**{"model": "brise", "messages": ASK, "max_tokens": 16, **fields})
    return answer.choices[0].message.content


def test_the_card_tells_the_temperature_that_is_used(client):
    from bise.hub.embedded import embedded_path
    from bise.model.generation import suggested_temperature

    card = client.models.retrieve("brise").model_dump()
    assert card["default_model_temperature"] == suggested_temperature(embedded_path())


def test_a_seed_gives_the_same_text_alone_and_among_others(client):
    alone = [say(client, seed=seed, temperature=1.0) for seed in range(4)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda seed: say(client, seed=seed % 4, temperature=1.0), range(16)))
    assert crowd == alone * 4


def test_a_stream_is_the_whole_answer_in_pieces(client):
    chunks = client.chat.completions.create(
        model="brise", messages=ASK, max_tokens=16, seed=3, temperature=1.0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == say(
        client, seed=3, temperature=1.0
    )


def test_a_schema_is_kept(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "long": {"type": "boolean"}},
        "required": ["name", "long"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema, "strict": True}}
    value = json.loads(say(client, response_format=form, max_tokens=80, seed=1))
    assert set(value) == {"name", "long"}
    assert isinstance(value["long"], bool)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"type": "choice", "choice": ["the Loire", "the Rhône"]}, "the (Loire|Rhône)"),
        ({"type": "lark", "lark": 'start: "a" start | "b"'}, "a*b"),
    ],
)
def test_a_pattern_a_choice_and_a_grammar_are_kept(client, form, pattern):
    for seed in range(3):
        text = say(client, extra_body={"response_format": form}, temperature=2.0, max_tokens=12, seed=seed)
        assert re.fullmatch(pattern, text)


def test_a_pattern_that_cannot_be_kept_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, extra_body={"response_format": {"type": "regex", "regex": "(a)\\1"}})
    assert caught.value.param == "response_format.regex"


def test_a_demanded_call_comes(client):
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    answer = client.chat.completions.create(
        model="brise",
        messages=ASK,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)


def replayed(receipt: dict, folder) -> str | None:
    """Write a receipt as a user would; return what differs when the embedded model runs it again."""
    from bise.engine.load import load_model
    from bise.engine.receipt import model_differences, output_difference, read_receipt, replay_request
    from bise.hub.embedded import embedded_path

    path = folder / "receipt.json"
    path.write_text(json.dumps(receipt))
    wanted = read_receipt(path)
    loaded = load_model(embedded_path(), quant=wanted.quant, kv=wanted.kv, threads=1)
    try:
        assert not model_differences(wanted, loaded)
        done = loaded.engine.submit(replay_request(wanted)).result()
        return output_difference(wanted, done.logprobs, done.finish_reason.value)
    finally:
        loaded.close()


RIVERS = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["Loire", "Seine"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"n": {"enum": [1]}}}}}
]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.7, "top_p": 0.9, "seed": 5, "logprobs": True, "top_logprobs": 2, "stop": ["a"]},
        {"tools": TOOLS, "tool_choice": "any", "max_tokens": 60},
        {"frequency_penalty": 0.5, "max_tokens": None, "response_format": RIVERS},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_of_every_choice_is_confirmed(client, tmp_path, fields, stream):
    ask = {"model": "brise", "messages": ASK, "max_tokens": 12, **fields}
    answer = client.chat.completions.create(**ask, stream=stream, extra_body={"receipt": True})
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    receipts = {choice.index: choice.receipt for choice in choices if choice.finish_reason}
    assert sorted(receipts) == list(range(fields.get("n", 1)))
    assert replayed(receipts[max(receipts)], tmp_path) is None
    assert replayed(receipts[0] | {"output_sha256": "0" * 64}, tmp_path)


@pytest.mark.parametrize("fields", [{"best_of": 3, "n": 2}, {"echo": True}, {"stream": True, "logprobs": 1}])
def test_a_receipt_of_a_continued_text_is_confirmed(client, tmp_path, fields):
    ask = {"model": "brise", "prompt": ["Once upon", "A river"], "max_tokens": 9, "temperature": 0.9}
    answer = client.completions.create(**ask, **fields, extra_body={"receipt": True})
    if fields.get("stream"):
        ended = [choice for chunk in answer for choice in chunk.choices if choice.finish_reason]
    else:
        ended = answer.choices
    assert len(ended) == 2 * fields.get("n", 1)
    assert replayed(ended[-1].receipt, tmp_path) is None
    assert len({choice.receipt["output_sha256"] for choice in ended}) == len(ended)


def test_mistrals_client_gets_a_receipt_of_a_filled_gap(process, tmp_path):
    ask = {"model": "brise", "prompt": "def f(", "suffix": "return x", "max_tokens": 8, "receipt": True}
    answer = httpx.post(f"{process.url}/v1/fim/completions", json=ask).json()
    assert replayed(answer["choices"][0]["receipt"], tmp_path) is None


def test_embeddings_are_unit_vectors_of_the_mean_or_of_the_last_token(client):
    def ask(texts, **fields):
        rows = client.embeddings.create(
            model="brise", input=texts, encoding_format="float", extra_body=fields
        ).data
        return [row.embedding for row in rows]

    (mean,), (last,) = ask("a river"), ask("a river", pooling="last")
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(last) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(mean, last, atol=1e-3)
    texts = ["a river", "and then a much longer text about a river", "x"]
    assert ask(texts, pooling="last")[0] == last
    assert ask(texts)[0] == mean


@pytest.mark.parametrize("words", [700, 20_000])
def test_a_text_too_long_to_embed_is_refused_as_the_input_with_both_numbers(client, words):
    with pytest.raises(
        openai.BadRequestError, match=r"\d{4,} tokens .*exceeds the context of 1024"
    ) as caught:
        client.embeddings.create(model="brise", input="a long word " * words)
    assert caught.value.param == "input"


@pytest.mark.parametrize("mode", ["oldest", "middle"])
def test_a_text_of_several_contexts_is_shortened_on_request_and_refused_without(client, mode):
    ask = {"model": "brise", "prompt": "a long word and " * 2000, "max_tokens": 10}
    with pytest.raises(openai.BadRequestError, match="exceeds the context of 1024 tokens"):
        client.completions.create(**ask)
    usage = client.completions.create(**ask, extra_body={"truncate": mode}).usage
    assert usage.prompt_tokens == 1024 - 10
    whole = client.post("/tokenize", body={"model": "brise", "prompt": ask["prompt"]}, cast_to=object)
    assert usage.prompt_tokens + usage.model_extra["dropped_tokens"] == whole["count"]


def test_mistrals_client_fills_a_gap_and_continues_a_prefix(process):
    with Mistral(api_key="none", server_url=process.url) as client:
        assert client.fim.complete(model="brise", prompt="def f(", suffix="return x", max_tokens=4).choices
        messages = [*ASK, {"role": "assistant", "content": "The river", "prefix": True}]
        answer = client.chat.complete(model="brise", messages=messages, max_tokens=6, temperature=0)
        assert answer.choices[0].message.content.startswith("The river")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client):
    import openai

    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens.*1024") as caught:
        say(client, messages=[{"role": "user", "content": "word " * 1500}])
    assert caught.value.code == "context_length_exceeded"


def test_a_signal_stops_the_process_with_exit_code_0(process, client):
    assert say(client)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0
