"""`--adapter` and `bise embed`, with a real tiny model behind them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sized = importlib.import_module("sized_model")
sys.path.pop(0)

SIZE = sized.Size(dim=64, layers=2, heads=4, kv_heads=2, hidden=96, vocab=400, max_context=256)
PLAIN = ("--quant", "none", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(sized.write(tmp_path_factory.mktemp("model"), SIZE))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "tuned"
    path.mkdir()
    rng = np.random.default_rng(1)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    weights = {}
    for layer in range(2):
        for module, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            stem = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{stem}.lora_A.weight"] = rng.standard_normal((4, columns)).astype(np.float32)
            weights[f"{stem}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype(np.float32)
    save_file(weights, path / "adapter_model.safetensors")
    return str(path)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t1 t{index} and more"}) + "\n" for index in range(20)))
    return str(path)


def test_generate_goes_through_the_adapter(cli, model, adapter):
    args = ("generate", model, "-p", "some words", "-n", "12", "--temperature", "0", "--json", *PLAIN)
    plain, tuned = json.loads(cli(*args).out), json.loads(cli(*args, "--adapter", adapter).out)
    assert plain["token_ids"] != tuned["token_ids"]
    assert json.loads(cli(*args, "--adapter", adapter).out)["token_ids"] == tuned["token_ids"]


def test_score_goes_through_the_adapter(cli, model, adapter, rows):
    args = ("score", model, rows, "--json", *PLAIN)
    plain, tuned = cli(*args).out.splitlines(), cli(*args, "--adapter", adapter).out.splitlines()
    assert len(plain) == len(tuned) == 20
    assert all(
        json.loads(a)["perplexity"] != json.loads(b)["perplexity"] for a, b in zip(plain, tuned, strict=True)
    )


def test_an_adapter_that_is_not_there_is_one_line_and_exit_code_2(cli, model, tmp_path):
    result = cli("generate", model, "-p", "x", *PLAIN, "--adapter", str(tmp_path / "none"))
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "an adapter is a directory" in result.err


def test_texts_become_unit_vectors_in_the_order_of_the_file(cli, model, rows):
    lines = [json.loads(line) for line in cli("embed", model, rows, *PLAIN).out.splitlines()]
    vectors = np.array([line["embedding"] for line in lines])
    assert vectors.shape == (20, SIZE.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
    args = [part for content in reversed(texts) for part in ("--text", content)]
    alone = [json.loads(line) for line in cli("embed", model, *args, *PLAIN).out.splitlines()]
    assert alone == lines[::-1]


def test_pooling_and_adapter_change_a_vector(cli, model, adapter):
    args = ("embed", model, "--text", "three words here", *PLAIN)
    found = {cli(*args, *more).out for more in ((), ("--pooling", "last"), ("--adapter", adapter))}
    assert len(found) == 3
    assert cli(*args).out == cli(*args, "--pooling", "mean").out


def test_a_chat_cannot_be_embedded_and_says_so(cli, model, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    result = cli("embed", model, str(path), *PLAIN)
    assert result.code == 2
    assert "line 1 is a chat" in result.err
    assert cli("embed", *PLAIN).code == 2


def test_a_plan_counts_an_adapter(cli, model, adapter, monkeypatch):
    from bise.plan import MachineLimits

    limits = MachineLimits(read_bytes_s=1e9, int8_ops_s=1e9, float_ops_s=1e9)
    monkeypatch.setattr("bise.bench.limits.measure_limits", lambda threads: limits)
    told = json.loads(cli("plan", model, "--adapter", adapter, "--json").out)
    assert told["bytes"]["adapters"] == 2 * 4 * (16 * 64 + 64 * 4 + 16 * 96 + 64 * 4)
    assert "of LoRA matrices" in cli("plan", model, "--adapter", adapter).out
