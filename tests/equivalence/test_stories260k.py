"""A trained checkpoint that this project did not make: stories260K, converted to Mistral's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bise.model.batch import training_batch
from bise.model.checkpoint import open_model
from bise.model.transformer import Transformer

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[3] / "shared/data/weights/stories260K"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not on this machine")

HALF_DIGIT = {"logits": 5.1e-6, "sum_abs": 5.1e-5, "nll": 5.1e-7}
"""expected.json is float64 over the same float32 weights, rounded to 5, 4 and 6 decimals."""


def convert_llama2c(checkpoint: Path, directory: Path) -> None:
    """Write a llama2.c version 0 checkpoint in Mistral's own layout; both keep rotary pairs together."""
    from safetensors.numpy import save_file

    content = checkpoint.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = np.frombuffer(content, "<i4", 7).tolist()
    assert vocab > 0, "a negative vocabulary means an output head of its own, which this file has not"
    kv_dim = dim // heads * kv_heads
    values = np.frombuffer(content, "<f4", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return values[position - size : position].reshape(shape)

    tensors = {"tok_embeddings.weight": take(vocab, dim)}
    parts = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    for name, shape in parts.items():
        for layer, part in enumerate(take(layers, *shape)):
            tensors[f"layers.{layer}.{name}.weight"] = part
    tensors["norm.weight"] = take(dim)
    params = {
        "dim": dim,
        "n_layers": layers,
        "head_dim": dim // heads,
        "hidden_dim": hidden,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": 1e-5,
        "vocab_size": vocab,
        "rope_theta": 10000.0,
        "max_seq_len": 512,
        "tied_embeddings": True,
    }
    directory.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(part) for name, part in tensors.items()},
        directory / "consolidated.safetensors",
    )
    (directory / "params.json").write_text(json.dumps(params))


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    from bise.kernels.torch import TorchOps

    directory = tmp_path_factory.mktemp("stories260K")
    convert_llama2c(FOLDER / "stories260K.bin", directory)
    source = open_model(directory)
    ops = TorchOps(torch.float64)
    weights = {name: ops.weight(tensor.floats(0, tensor.shape[0])) for name, tensor in source.tensors.items()}
    return Transformer(source.config, weights, ops)


def logits_of(model: Transformer, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        batch = training_batch(np.asarray([ids], np.int32), len(model.config.window_groups))
        return model.logits(model.forward(batch)).numpy()


@pytest.mark.parametrize("index", range(3))
def test_logits_equal_those_of_the_shared_folder(
    model: Transformer, expected: dict[str, Any], index: int
) -> None:
    case = expected["cases"][index]
    logits = logits_of(model, case["greedy_ids"])
    assert np.abs(logits[0, :16] - case["logits_first"]).max() <= HALF_DIGIT["logits"]
    last = logits[len(case["prompt_ids"]) - 1]
    for token, value in case["logits_last_prompt_top5"]:
        assert abs(last[token] - value) <= HALF_DIGIT["logits"]
    assert np.abs(np.abs(logits[:8]).sum(1) - case["logits_sum_abs"]).max() <= HALF_DIGIT["sum_abs"]


@pytest.mark.parametrize("index", range(3))
def test_greedy_ids_equal_those_of_the_shared_folder(
    model: Transformer, expected: dict[str, Any], index: int
) -> None:
    ids, prompt = expected["cases"][index]["greedy_ids"], expected["cases"][index]["prompt_ids"]
    chosen = logits_of(model, ids).argmax(1).tolist()
    assert chosen[len(prompt) - 1 : -1] == ids[len(prompt) :]


@pytest.mark.parametrize("index", [1, 2])
def test_prompt_likelihood_equals_that_of_the_shared_folder(
    model: Transformer, expected: dict[str, Any], index: int
) -> None:
    ids = expected["cases"][index]["prompt_ids"]
    logits = logits_of(model, ids)[:-1]
    log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    losses = log_sums - logits[np.arange(len(ids) - 1), ids[1:]]
    assert abs(losses.mean() - expected["cases"][index]["prompt_nll"]) <= HALF_DIGIT["nll"]
