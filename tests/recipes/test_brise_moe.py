"""The recipe of brise-moe on a tiny brise: experts that begin as the dense layer, files that others read."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("zstandard")

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "brise-moe"), str(RECIPES / "brise"), str(RECIPES)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from export import write_configs, write_tokenizer, write_weights  # noqa: E402
from network import Network, Weights, initial_weights  # noqa: E402
from pictures import shares  # noqa: E402
from publish import apart, card, measured  # noqa: E402
from routing import expert_use  # noqa: E402
from tokenizer import train as train_tokenizer  # noqa: E402
from train import Progress, Rows, Trainer  # noqa: E402
from upcycle import SHARED, STAGE, upcycled, upcycled_config  # noqa: E402

from bise.cli.session import chat_ids  # noqa: E402
from bise.config import ModelConfig  # noqa: E402
from bise.engine.load import load_model  # noqa: E402
from bise.engine.request import Request, SamplingParams  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.model.batch import training_batch  # noqa: E402
from bise.model.checkpoint import open_model  # noqa: E402
from bise.model.transformer import Transformer  # noqa: E402

DENSE = ModelConfig(
    family="mistral", dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, hidden_dim=192,
    vocab_size=320, max_context=64, windows=(8, 8), tied_embeddings=True,
)  # fmt: skip
IDS = np.random.default_rng(3).integers(20, 320, (2, 33)).astype(np.int32)


@pytest.fixture(scope="module")
def dense() -> Weights:
    return {name: weight * 4 for name, weight in initial_weights(DENSE, 5).items()}


def logits(config: ModelConfig, weights: Weights) -> torch.Tensor:
    model = Transformer(config, weights, TorchOps())
    with torch.no_grad():
        return model.logits(model.forward(training_batch(IDS, 1)))


def test_the_experts_begin_as_the_dense_model(dense: Weights) -> None:
    config = upcycled_config(DENSE)
    assert config.hidden_dim == (DENSE.hidden_dim + SHARED) // 2
    sparse = upcycled(DENSE, dense, 1)
    assert torch.allclose(logits(config, sparse), logits(DENSE, dense), atol=1e-4)
    broken = dict(sparse) | {"layers.0.experts.0.w2": sparse["layers.0.experts.0.w2"] * 1.1}
    assert not torch.allclose(logits(config, broken), logits(DENSE, dense), atol=1e-4)
    firsts = [sparse[f"layers.0.experts.{expert}.w1"] for expert in range(0, 8, 2)]
    assert not torch.equal(firsts[0], firsts[1]), "the pairs are cut in different ways"


def test_training_parts_the_pairs_and_keeps_all_experts_in_use(dense: Weights, tmp_path: Path) -> None:
    values = np.random.default_rng(5)
    np.save(tmp_path / "polish.ids.npy", values.integers(20, 320, (12, 33)).astype(np.uint16))
    np.save(tmp_path / "polish.learned.npy", np.ones((12, 33), np.bool_))
    config = upcycled_config(DENSE)
    trainer = Trainer(config, upcycled(DENSE, dense, 1), Progress(stage="moe"))
    network = Network(config, trainer.weights, 12, 32, balance=0.1)
    stage = replace(STAGE, row_tokens=32, rows_per_step=12, peak_lr=2e-2, warmup_steps=1)
    texts = {"rows": np.load(tmp_path / "polish.ids.npy")}
    before = expert_use(config, trainer.weights, texts)["rows"]
    assert all(layer[0] == layer[1] for layer in before)
    losses = [trainer.step(network.loss, [Rows(tmp_path, "polish", 12, 0)], stage) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.3
    use = expert_use(config, trainer.weights, texts)["rows"]
    assert any(abs(layer[0] - layer[1]) > 0.01 for layer in use), "a pair is chosen together at first only"
    assert min(map(min, use)) > 0.06
    assert max(map(max, use)) < 0.22


def test_the_files_are_a_mixtral_to_transformers_and_to_the_engine(dense: Weights, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = upcycled_config(DENSE)
    sparse = {name: weight.bfloat16().float() for name, weight in upcycled(DENSE, dense, 1).items()}
    sparse["layers.1.router"] = (
        torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    )
    train_tokenizer(iter(["a small wind", "12 + 7"] * 9), 320).save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "moe"
    out.mkdir()
    write_weights(out, config, sparse)
    write_configs(out, config)
    write_tokenizer(tmp_path, out)
    theirs = transformers.MixtralForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        scores = theirs(torch.from_numpy(IDS[:, :].astype(np.int64))).logits
    ours = logits(config, sparse).view(*IDS.shape, -1)
    assert torch.allclose(scores, ours, atol=2e-4)
    loaded = load_model(out, quant="none", threaded=False)
    try:
        request = Request(
            token_ids=tuple(IDS[0].tolist()), params=SamplingParams(max_tokens=0), prompt_logprobs=True
        )
        served = loaded.engine.submit(request).result().prompt_logprobs
    finally:
        loaded.close()
    wanted = ours[0].log_softmax(-1)[torch.arange(32), torch.from_numpy(IDS[0, 1:].astype(np.int64))]
    found = torch.tensor([entry.logprob for entry in served if entry is not None])
    assert torch.allclose(found, wanted, atol=1e-3)


def test_the_card_tells_the_use_and_what_was_measured(tmp_path: Path) -> None:
    even, other = [[0.125] * 8] * 2, [[0.25] * 4 + [0.0] * 4] * 2
    assert apart(even, even) == 0
    assert apart(even, other) == 0.5
    found = {
        "loss": {kind: {"nats_per_token": 2.5} for kind in ("text", "chat")},
        "exact_match": {"x": {"rows": 4, "matched": 1, "numbers": 3, "number_matched": 2}},
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(found))
    use = {"prose": even, "chat": even, "sums": other}
    text = card(DENSE, upcycled_config(DENSE), 7, use, measured(path, path))
    assert "| brise-moe | 2.500 | 2.500 | 1 of 4 | 2 of 3 |" in text
    assert "sums 0.0 to 25.0 %" in text
    assert "Between prose and sums 50 %" in text
    assert measured(None, path) == "Not yet.\n"
    ET.fromstring(shares(use))


def test_the_weights_in_the_repository_talk() -> None:
    model = RECIPES / "brise-moe" / "q4"
    config = open_model(model).config
    assert (config.family, config.num_experts, config.experts_per_token) == ("mixtral", 8, 2)
    loaded = load_model(model, threaded=False)
    try:
        prompt = chat_ids(loaded, [{"role": "user", "content": "Who are you?"}])
        request = Request(token_ids=prompt, params=SamplingParams(temperature=0, max_tokens=40))
        text = loaded.engine.submit(request).result().text
    finally:
        loaded.close()
    assert "brise" in text
