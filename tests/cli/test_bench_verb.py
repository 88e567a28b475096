from __future__ import annotations

import json

import pytest

from bise.plan import MachineLimits

LIMITS = MachineLimits(read_bytes_s=34e9, int8_ops_s=930e9, float_ops_s=220e9)


@pytest.fixture
def bench(cli, monkeypatch):
    """Run `bise bench` with the machine's limits put in place of measured ones."""
    monkeypatch.setattr("bise.bench.suite.measure_limits", lambda threads, probe: LIMITS)
    monkeypatch.setattr("bise.bench.suite.ReadProbe", lambda threads: lambda: 34e9)
    monkeypatch.setattr("bise.bench.suite.ArithmeticProbe", lambda threads: lambda: (930e9, 220e9))
    monkeypatch.setattr("bise.bench.suite.wait_until_idle", lambda limit_s: None)
    return lambda *args: cli("bench", "--threads", "1", "--rounds", "2", *args)


def test_the_last_line_is_one_document_with_provenance_and_every_case(bench):
    result = bench("--prompt", "8,16", "--gen", "2", "--batch", "1,3", "--context", "4")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    document = json.loads(lines[-1])
    cases = [
        (entry["op"], entry["prompt"], entry["batch"], entry["context"]) for entry in document["results"]
    ]
    assert cases == [("prefill", 8, 1, 0), ("prefill", 16, 1, 0), ("decode", 0, 1, 4), ("decode", 0, 3, 4)]
    assert all(entry["tokens_per_s"] > 0 and entry["rounds"] == 2 for entry in document["results"])
    assert {"commit", "cpu", "versions", "date", "command", "limits"} <= set(document)
    assert lines[0].split() == ["OP", "PROMPT", "BATCH", "CONTEXT", "ENGINE", "TOK/S", "GB/S", "OF", "LIMIT",
                                "BISE", "IS", "ROUNDS"]  # fmt: skip


def test_with_json_nothing_else_is_printed(bench):
    result = bench("--prompt", "4", "--gen", "0", "--json")
    assert result.code == 0
    assert len(result.out.splitlines()) == 1
    assert json.loads(result.out)["results"][0]["op"] == "prefill"


def test_a_peer_that_is_absent_is_told_in_the_table_and_the_document(bench, monkeypatch):
    monkeypatch.setattr("bise.bench.peers.find_spec", lambda name: None)
    result = bench("--prompt", "4", "--gen", "0", "--vs", "llama.cpp")
    line = "llama.cpp skipped: the package llama-cpp-python is not installed (pip install llama-cpp-python)"
    assert json.loads(result.out.splitlines()[-1])["skipped"] == [line]
    assert f"absent   {line}" in result.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vs", "vllm"], "'vllm' is not a known peer; known: llama.cpp, transformers, ctranslate2"),
        (["--batch", "1,x"], "is not a list of positive numbers such as 1,4,16"),
        (["--shape", "nope"], "'nope' is not a known shape; known: tinyllama"),
        (["--window", "64"], "--window and --layers need --shape"),
        (["--layers", "2"], "--window and --layers need --shape"),
        (["somewhere", "--shape", "s06"], "give either MODEL or --shape"),
        (["--roofline", "ops.png"], "'ops.png' must name an .svg file in a directory that exists"),
        (["--roofline", "no/such/ops.svg"], "must name an .svg file in a directory that exists"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(bench, args, message):
    result = bench(*args)
    assert result.code == 2
    assert message in result.err
    assert len(result.error_lines) == 1


def test_a_context_beyond_the_models_is_skipped_and_told(bench):
    result = bench("--prompt", "4", "--gen", "1", "--context", "1000000")
    assert result.code == 0
    document = json.loads(result.out.splitlines()[-1])
    assert [entry["op"] for entry in document["results"]] == ["prefill"]
    assert "exceed the model's context" in document["skipped"][0]


def test_weights_that_do_not_fit_are_refused_before_they_are_made(bench, monkeypatch):
    monkeypatch.setattr("bise.bench.engine_bench.available_memory", lambda: 1 << 30)
    result = bench("--shape", "mistral-7b", "--quant", "q4")
    assert result.code != 0
    assert "GiB for its weights, 1.0 GiB of memory are free" in result.err
    assert len(result.error_lines) == 1


def test_a_bench_that_can_measure_nothing_fails_with_the_reason_and_still_writes_its_document(
    bench, monkeypatch
):
    monkeypatch.setattr("bise.bench.engine_bench.require_weights", lambda source, quant, available: None)
    monkeypatch.setattr("bise.bench.engine_bench.available_memory", lambda: 1 << 10)
    result = bench("--prompt", "4", "--gen", "0")
    assert result.code == 2
    assert "nothing was measured: bise skipped for prefill of 4" in result.error_lines[-1]
    document = json.loads(result.out.splitlines()[-1])
    assert document["results"] == []
    assert "its KV cache needs" in document["skipped"][0]


def test_a_model_on_a_device_is_timed_beside_what_its_memory_allows(cli, home):
    pytest.importorskip("torch")
    result = cli("bench", "--dtype", "f32", "--threads", "1", "--rounds", "1", "--prompt", "4", "--gen", "2",
                 "--batch", "1,2", "--context", "3", "--quant", "q8")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out.splitlines()[-1])
    cases = [(entry["op"], entry["prompt"], entry["batch"]) for entry in document["results"]]
    assert cases == [("prefill", 4, 1), ("decode", 0, 1), ("decode", 0, 2)]
    assert all(entry["tokens_per_s"] > 0 for entry in document["results"])
    assert all(0 < entry["share_of_limit"] < 1 for entry in document["results"][1:])
    assert document["limits"]["device_gb_per_s"] > 0
    assert document["split"] == "none"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "cuda"], "device cuda is not there"),
        (["--dtype", "f32", "--vs", "llama.cpp"], "--vs is of the processor"),
        (["--dtype", "f32", "--shape", "s06"], "--shape is of the processor"),
    ],
)
def test_a_device_that_is_absent_or_cannot_do_it_is_refused_in_one_line(
    cli, home, monkeypatch, args, message
):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("bench", *args)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
