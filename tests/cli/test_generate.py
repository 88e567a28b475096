from __future__ import annotations

import json

import pytest


def test_text_streams_to_standard_output_alone(cli, fake, model_dir):
    result = cli("generate", str(model_dir), "--prompt", "hi")
    assert (result.code, result.out, result.err) == (0, "echo: hi\n", "")


def test_json_has_the_promised_fields(cli, fake, model_dir):
    result = cli("generate", str(model_dir), "--prompt", "hi", "--json", "--seed", "7")
    value = json.loads(result.out)
    assert value["text"] == "echo: hi"
    assert bytes(i - 3 for i in value["token_ids"]) == b"echo: hi"
    assert value["finish_reason"] == "stop"
    assert value["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 8,
        "total_tokens": 11,
    }
    assert value["timings"] == {"queue_s": 0.0, "prefill_s": 0.25, "decode_s": 0.5}
    assert value["model"] == "fake-1"
    assert value["seed"] == 7
    assert "logprobs" not in value


def test_a_random_seed_is_told(cli, fake, model_dir):
    first, second = (
        json.loads(cli("generate", str(model_dir), "-p", "a", "--json").out)["seed"] for _ in range(2)
    )
    assert first != second
    assert fake.engine.requests[1].params.seed == second


def test_logprobs_are_listed_per_token(cli, fake, model_dir):
    value = json.loads(cli("generate", str(model_dir), "-p", "a", "--json", "--logprobs", "1").out)
    assert len(value["logprobs"]) == len(value["token_ids"])
    assert value["logprobs"][0] == {
        "token_id": 104,
        "logprob": -0.5,
        "top": [{"token_id": 104, "logprob": -0.5}],
    }


def test_a_cut_text_is_said_to_be_cut(cli, fake, model_dir):
    result = cli("generate", str(model_dir), "-p", "abcdef", "-n", "4")
    assert result.out == "echo\n"
    assert "--max-tokens" in result.err


def test_a_dash_reads_the_prompt_from_standard_input_unchanged(cli, fake, model_dir):
    result = cli("generate", str(model_dir), "-p", "-", stdin="né\n".encode())
    assert result.out == "echo: né\n\n"


def test_standard_input_that_is_not_utf8_is_a_mistake(cli, fake, model_dir):
    result = cli("generate", str(model_dir), "-p", "-", stdin=b"a\xff")
    assert result.code == 2
    assert result.err == "bise: error: --prompt -: standard input is not UTF-8 (byte 1)\n"


def test_every_sampling_flag_reaches_the_engine(cli, fake, model_dir):
    cli(
        "generate", str(model_dir), "-p", "a", "-n", "5", "--temperature", "0.5", "--top-p", "0.9",
        "--top-k", "40",
        "--min-p", "0.1", "--typical-p", "0.8", "--repetition-penalty", "1.1", "--presence-penalty", "0.2",
        "--frequency-penalty", "0.3", "--seed", "9", "--stop", "x", "--stop", "y", "--ignore-eos",
    )  # fmt: skip
    params = fake.engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0.5, 0.9, 40)
    assert (params.min_p, params.typical_p, params.repetition_penalty) == (0.1, 0.8, 1.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, 0.3)
    assert (params.seed, params.stop, params.ignore_eos) == (9, ("x", "y"), True)


@pytest.mark.parametrize(
    "flags",
    [["--temperature", "nan"], ["--temperature", "-1"], ["--top-p", "0"], ["--top-p", "1.5"],
     ["--top-k", "-1"],
     ["--min-p", "2"], ["--seed", "-1"], ["-n", "-1"], ["--stop", ""], ["--json", "--logprobs", "21"]],
)  # fmt: skip
def test_values_out_of_range_are_refused_before_anything_is_loaded(cli, fake, model_dir, flags):
    result = cli("generate", str(model_dir), "-p", "a", *flags)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert not fake.engine.requests
    assert not fake.closed


def test_a_conversion_is_told_on_standard_error(cli, fake, model_dir):
    fake.notes = ("Q6_K is repacked as q8",)
    result = cli("generate", str(model_dir), "-p", "a")
    assert "note: Q6_K is repacked as q8" in result.err
    assert "note" not in result.out
