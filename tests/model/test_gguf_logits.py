"""A GGUF and the Hugging Face model it was made from give the same logits and the same weights."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bise.model.batch import training_batch
from bise.model.checkpoint import open_model
from bise.model.gguf import open_gguf
from bise.model.rope import rope_frequencies
from bise.model.source import ModelSource
from bise.model.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parent))
files = importlib.import_module("gguf_files")
Spec, write, yarn_keys = files.Spec, files.write, files.yarn_keys


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return HF projection rows as llama.cpp's converter stores them."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama3_factors(factor: float, original: int, head_dim: int) -> np.ndarray:
    """Return the rope_freqs tensor that llama.cpp's converter derives from llama3 scaling (low 1, high 4)."""
    wavelength = 2 * np.pi * 10000.0 ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@pytest.mark.parametrize("case", ["window", "yarn", "llama3", "tied"])
def test_logits_of_a_dense_gguf_equal_hugging_faces(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options: dict[str, object] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 80,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case == "tied",
    }
    spec = Spec(tied=case == "tied")
    kind = "Llama"
    if case == "window":
        kind, options["sliding_window"] = "Mistral", 5
        spec.keys = lambda writer: writer.add_sliding_window(5)
    if case == "yarn":
        spec.keys = yarn_keys
        options["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
        }
    if case == "llama3":
        spec.rope_factors = llama3_factors(8.0, 64, 32)
        options["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    config = getattr(transformers, f"{kind}Config")(**options, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.float64).eval()
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.double() for name, value in state.items()})
    values = {}
    for name in spec.shapes():
        parts = name.split(".")
        hf = HF_NAMES.get(name) or f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.weight"
        array = state[hf].numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(parts[2] if len(parts) > 2 else "")
        values[name] = interleaved(array, heads).copy() if heads else array
    write(tmp_path / "m.gguf", spec, values)
    ids = np.random.default_rng(3).integers(0, 80, (1, 100)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.as_tensor(ids.astype(np.int64))).logits[0].numpy()
        ours = logits(open_gguf(tmp_path / "m.gguf"), ids)
    # Hugging Face forms the rotary angles in float32; everything else is float64 on both sides.
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()
    model.float().save_pretrained(tmp_path / "hf")
    check_same_model(open_gguf(tmp_path / "m.gguf"), open_model(tmp_path / "hf"))


def check_same_model(left: ModelSource, right: ModelSource) -> None:
    """Assert that two containers hold one model: architecture, rotary frequencies, every weight's bits."""
    assert replace(left.config, family="", rope_scaling=None) == replace(
        right.config, family="", rope_scaling=None
    )
    frequencies, factors = zip(rope_frequencies(left.config), rope_frequencies(right.config), strict=True)
    np.testing.assert_allclose(frequencies[0], frequencies[1], rtol=2e-7)
    assert factors[0] == pytest.approx(factors[1], rel=1e-12)
    assert list(left.tensors) == list(right.tensors)
    for name, tensor in left.tensors.items():
        rows = tensor.shape[0]
        assert tensor.floats(0, rows).tobytes() == right.tensors[name].floats(0, rows).tobytes(), name


def logits(source: ModelSource, ids: np.ndarray) -> np.ndarray:
    """Return logits [L, V] of one row of ids [1, L] through the float64 oracle."""
    import torch

    from bise.kernels.torch import TorchOps

    ops = TorchOps(torch.float64)
    weights = {name: ops.weight(tensor.floats(0, tensor.shape[0])) for name, tensor in source.tensors.items()}
    model = Transformer(source.config, weights, ops)
    batch = training_batch(ids, len(source.config.window_groups))
    return model.logits(model.forward(batch)).numpy()


def test_logits_of_a_mixture_gguf_equal_hugging_faces(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=80,
        max_position_embeddings=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config).to(torch.float64).eval()
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.double() for name, value in state.items()})
    spec = Spec(experts=4, keys=lambda writer: writer.add_rope_freq_base(1e6))
    values = {}
    for name in spec.shapes():
        parts = name.split(".")
        stem = parts[2] if len(parts) > 2 else ""
        prefix = f"model.layers.{parts[1]}." if stem else ""
        if stem == "ffn_gate_inp":
            values[name] = state[prefix + "mlp.gate.weight"].numpy()
        elif stem in ("ffn_gate_exps", "ffn_up_exps"):
            both = state[prefix + "mlp.experts.gate_up_proj"].numpy()
            values[name] = np.ascontiguousarray(both[:, :96] if stem == "ffn_gate_exps" else both[:, 96:])
        elif stem == "ffn_down_exps":
            values[name] = state[prefix + "mlp.experts.down_proj"].numpy()
        else:
            array = state[HF_NAMES.get(name) or f"{prefix}{HF_NAMES[stem]}.weight"].numpy()
            heads = {"attn_q": 4, "attn_k": 2}.get(stem)
            values[name] = interleaved(array, heads).copy() if heads else array
    write(tmp_path / "m.gguf", spec, values)
    ids = np.random.default_rng(3).integers(0, 80, (1, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.as_tensor(ids.astype(np.int64))).logits[0].numpy()
        ours = logits(open_gguf(tmp_path / "m.gguf"), ids)
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()
