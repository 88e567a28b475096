"""Random tiny models of every family, saved by transformers, give the logits that transformers computes.

transformers upcasts norms, softmax and rotary angles to float32 whatever the model's dtype; its modules are
given a `torch` whose float32 is float64, so that the reference is float64 throughout.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bise.kernels import BLOCK_SIZE
from bise.model.batch import Batch, training_batch
from bise.model.checkpoint import open_model
from bise.model.source import ModelSource
from bise.model.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RELATIVE = 1e-9
"""Bound on max |difference| / max |logit| of the float64 backend; measured: below 1e-14."""

RELATIVE_FLOAT32 = 2e-5
"""The same for the cpu backend on float32 weights and KV cache; measured: below 6e-6."""

LENGTH = 41

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_no_window": ("Mistral", {"sliding_window": None}),
    "mistral_window_below_length": ("Mistral", {"sliding_window": 7}),
    "mistral_window_of_one": ("Mistral", {"sliding_window": 1}),
    "nemo_wide_heads": ("Mistral", {"sliding_window": None, "head_dim": 16, "rope_theta": 1e6}),
    "mistral_tied": ("Mistral", {"sliding_window": 9, "tie_word_embeddings": True}),
    "mistral_one_layer_one_head": (
        "Mistral",
        {
            "sliding_window": 5,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "hidden_size": 34,
        },
    ),
    "mistral_yarn_mscale": (
        "Mistral",
        {
            "sliding_window": None,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
    ),
    "ministral_interleaved": (
        "Ministral",
        {
            "sliding_window": 6,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "ministral_all_sliding": ("Ministral", {"sliding_window": 6, "head_dim": 10}),
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500000.0}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama_llama3": (
        "Llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama_yarn": (
        "Llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama_yarn_attention_factor": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "attention_factor": 1.3,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mixtral_8_experts_top_2": (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6},
    ),
    "mixtral_window_odd": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7, "tie_word_embeddings": True},
    ),
}


class _Float64Torch:
    """The torch module with float32 spelled float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def token_ids() -> np.ndarray:
    return np.random.default_rng(7).integers(3, BASE["vocab_size"], (2, LENGTH)).astype(np.int32)


def save_model(case: str, directory: Path) -> np.ndarray:
    """Save a random float32 model of `case`; return the float64 logits [S, L, V] of `token_ids`."""
    family, overrides = CASES[case]
    name = family.lower()
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    rope = importlib.import_module("transformers.modeling_rope_utils")
    config = getattr(transformers, f"{family}Config")(**{**BASE, **overrides})
    torch.manual_seed(sum(map(ord, case)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that windows, scaling and routing show in the logits; norms stay near one.
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "torch", _Float64Torch())
        patch.setattr(rope, "torch", _Float64Torch())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        model = model.double()
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        with torch.no_grad():
            logits = model(torch.as_tensor(token_ids(), dtype=torch.int64)).logits
    assert logits.dtype == torch.float64
    return logits.numpy()


def torch_float64() -> Any:
    from bise.kernels.torch import TorchOps

    return TorchOps(torch.float64)


def cpu_float32() -> Any:
    return pytest.importorskip("bise.kernels.cpu", exc_type=ImportError).CpuOps(2)


BACKENDS: dict[str, tuple[Callable[[], Any], bool, float]] = {
    "torch": (torch_float64, False, RELATIVE),
    "torch-paged": (torch_float64, True, RELATIVE),
    "cpu-paged": (cpu_float32, True, RELATIVE_FLOAT32),
}
"""Backend name to (maker of its ops, whether K and V go through pages, bound on the relative difference)."""


class Cache:
    """Pages of every layer, in float32 at least."""

    def __init__(self, source: ModelSource, ops: Any, num_blocks: int) -> None:
        config = source.config
        self._pages = [
            ops.pages(num_blocks, config.num_kv_heads, config.head_dim, "f32")
            for _ in range(config.num_layers)
        ]

    def layer(self, index: int) -> Any:
        return self._pages[index]


def paged_batch(num_groups: int) -> Batch:
    """Return `token_ids` as one step; sequence s holds blocks 2s + 1 and 2s, in this order."""
    batch = training_batch(token_ids(), num_groups)
    rows = np.arange(2 * LENGTH, dtype=np.int32)
    sequence, position = rows // LENGTH, rows % LENGTH
    meta = replace(
        batch.attention[0],
        block_table=np.asarray([[1, 0], [3, 2]], np.int32),
        slots=(2 * sequence + 1 - position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE,
    )
    return replace(batch, attention=(meta,) * num_groups)


def logits_of(source: ModelSource, ops: Any, *, is_paged: bool) -> np.ndarray:
    """Return a backend's logits [S, L, V] of `token_ids`."""
    weights: dict[str, Any] = {}
    for name, tensor in source.tensors.items():
        make = ops.vector if len(tensor.shape) == 1 else ops.weight
        weights[name] = make(tensor.floats(0, tensor.shape[0]))
    model = Transformer(source.config, weights, ops)
    num_groups = len(source.config.window_groups)
    batch = paged_batch(num_groups) if is_paged else training_batch(token_ids(), num_groups)
    with torch.no_grad():
        hidden = model.forward(batch, Cache(source, ops, 4) if is_paged else None)
        logits = np.asarray(model.logits(hidden))
    return logits.reshape(*token_ids().shape, -1)


def torch_logits(source: ModelSource) -> np.ndarray:
    return logits_of(source, torch_float64(), is_paged=False)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


Saved = Callable[[str], tuple[Path, np.ndarray]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a function from a case to (directory, float64 logits of transformers), made once."""
    torch.set_num_threads(1)  # tiny products: threads only get in the way of the tests beside this one
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def get(case: str) -> tuple[Path, np.ndarray]:
        if case not in made:
            directory = tmp_path_factory.mktemp(case)
            made[case] = directory, save_model(case, directory)
        return made[case]

    return get


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(saved: Saved, case: str, backend: str) -> None:
    directory, expected = saved(case)
    source = open_model(directory)
    assert source.kind == "safetensors"
    make_ops, is_paged, bound = BACKENDS[backend]
    assert relative_difference(logits_of(source, make_ops(), is_paged=is_paged), expected) <= bound


@pytest.mark.parametrize("case", ["mistral_window_below_length", "ministral_interleaved", "nemo_wide_heads"])
def test_a_window_of_another_width_changes_the_logits(saved: Saved, case: str, tmp_path: Path) -> None:
    directory, expected = saved(case)
    config = json.loads((directory / "config.json").read_text())
    config["sliding_window"] = (config["sliding_window"] or LENGTH) - 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(directory / "model.safetensors", tmp_path)
    assert relative_difference(torch_logits(open_model(tmp_path)), expected) > 1e-4


def write_mistral_layout(source: ModelSource, directory: Path) -> None:
    """Write the weights of `source` in Mistral's own layout: its names, rotary pairs as neighbouring rows."""
    from safetensors.numpy import save_file

    config = source.config
    names = {
        "attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "router": "feed_forward.gate",
        "wq": "attention.wq", "wk": "attention.wk", "wv": "attention.wv", "wo": "attention.wo",
        "w1": "feed_forward.w1", "w2": "feed_forward.w2", "w3": "feed_forward.w3",
    }  # fmt: skip
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in source.tensors.items():
        values = tensor.floats(0, tensor.shape[0])
        parts = name.split(".")
        if parts[-1] in ("wq", "wk"):
            halves = values.reshape(-1, 2, config.head_dim // 2, config.dim)
            values = halves.transpose(0, 2, 1, 3).reshape(values.shape)
        if len(parts) == 3:
            name = f"layers.{parts[1]}.{names[parts[2]]}"
        elif len(parts) == 5:
            name = f"layers.{parts[1]}.feed_forward.experts.{parts[3]}.{parts[4]}"
        tensors[name + ".weight"] = np.ascontiguousarray(values)
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "sliding_window": list(config.windows) if len(set(config.windows)) > 1 else config.windows[0],
        "tied_embeddings": config.tied_embeddings,
    }
    if config.is_moe:
        params["moe"] = {"num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    directory.mkdir()
    save_file(tensors, directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    "case",
    [
        "mistral_window_below_length",
        "nemo_wide_heads",
        "mistral_tied",
        "ministral_interleaved",
        "mixtral_8_experts_top_2",
    ],
)
def test_the_same_weights_in_mistrals_own_layout_give_equal_logits(
    saved: Saved, case: str, tmp_path: Path
) -> None:
    directory, expected = saved(case)
    write_mistral_layout(open_model(directory), tmp_path / "native")
    source = open_model(tmp_path / "native")
    assert source.kind == "mistral"
    assert relative_difference(torch_logits(source), expected) <= RELATIVE


def test_fused_experts_on_disk_equal_separate_ones(saved: Saved, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory, expected = saved("mixtral_8_experts_top_2")
    separate = load_file(directory / "model.safetensors")
    fused: dict[str, np.ndarray] = {}
    for name, values in separate.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = values
    for layer in range(3):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        experts = [{p: separate[f"{prefix}{e}.{p}.weight"] for p in ("w1", "w2", "w3")} for e in range(8)]
        target = f"model.layers.{layer}.mlp.experts."
        fused[target + "gate_up_proj"] = np.stack([np.concatenate((e["w1"], e["w3"])) for e in experts])
        fused[target + "down_proj"] = np.stack([e["w2"] for e in experts])
    save_file(fused, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    assert relative_difference(torch_logits(open_model(tmp_path)), expected) <= RELATIVE
