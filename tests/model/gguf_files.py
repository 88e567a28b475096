"""Writes small GGUF models with the gguf package, for the tests that read them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bise.formats import FORMATS

gguf = pytest.importorskip("gguf")

SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
    "IQ4_NL": (0,),
}


@dataclass
class Spec:
    """A tiny model to write: sizes, storage type per tensor stem, and anything extra."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 96
    vocab: int = 80
    experts: int = 0
    stacked: bool = True
    tied: bool = False
    arch: str = "llama"
    types: dict[str, str] = field(default_factory=dict)
    keys: Callable[[object], None] = lambda writer: None
    rope_factors: np.ndarray | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape as a GGUF names them."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.dim)}
        for layer in range(self.layers):
            block = f"blk.{layer}."
            shapes[block + "attn_norm.weight"] = (self.dim,)
            shapes[block + "attn_q.weight"] = (self.heads * self.head_dim, self.dim)
            shapes[block + "attn_k.weight"] = (self.kv_heads * self.head_dim, self.dim)
            shapes[block + "attn_v.weight"] = (self.kv_heads * self.head_dim, self.dim)
            shapes[block + "attn_output.weight"] = (self.dim, self.heads * self.head_dim)
            shapes[block + "ffn_norm.weight"] = (self.dim,)
            matrices = {
                "gate": (self.hidden, self.dim),
                "up": (self.hidden, self.dim),
                "down": (self.dim, self.hidden),
            }
            if self.experts:
                shapes[block + "ffn_gate_inp.weight"] = (self.experts, self.dim)
            for name, shape in matrices.items():
                if self.experts and self.stacked:
                    shapes[f"{block}ffn_{name}_exps.weight"] = (self.experts, *shape)
                elif self.experts:
                    shapes.update({f"{block}ffn_{name}.{e}.weight": shape for e in range(self.experts)})
                else:
                    shapes[f"{block}ffn_{name}.weight"] = shape
        shapes["output_norm.weight"] = (self.dim,)
        if not self.tied:
            shapes["output.weight"] = (self.vocab, self.dim)
        return shapes


def stored(name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Return values as rows of bytes of a type; random blocks where the gguf package cannot quantise."""
    rows = values.reshape(-1, values.shape[-1])
    if kind not in SCALES:
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    entry = FORMATS[kind]
    rng = np.random.default_rng(len(name))
    blocks = rng.integers(
        0, 256, (len(rows), rows.shape[1] // entry.block_length, entry.block_bytes), dtype=np.uint8
    )
    for at in SCALES[kind]:
        blocks[:, :, at : at + 2] = (rng.uniform(1e-4, 2e-4, (*blocks.shape[:2], 1)).astype("<f2")).view(
            np.uint8
        )
    return blocks.reshape(len(rows), -1)


def write(
    path: Path, spec: Spec, values: dict[str, np.ndarray] | None = None, **splits: int
) -> dict[str, np.ndarray]:
    """Write a model of random (or the given) weights; return the weights before storage."""
    writer = gguf.GGUFWriter(path, spec.arch, **splits)
    writer.add_name("Tiny Mistral")
    writer.add_license("apache-2.0")
    writer.add_block_count(spec.layers)
    writer.add_context_length(256)
    writer.add_embedding_length(spec.dim)
    writer.add_feed_forward_length(spec.hidden)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    if spec.head_dim * spec.heads != spec.dim:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(spec.vocab)
    if spec.experts:
        writer.add_expert_count(spec.experts)
        writer.add_expert_used_count(2)
    spec.keys(writer)
    rng = np.random.default_rng(1)
    values = dict(values or {})
    for name, shape in spec.shapes().items():
        if name not in values:
            values[name] = (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        kind = (
            "F32" if len(shape) == 1 else next((t for stem, t in spec.types.items() if stem in name), "F32")
        )
        if kind == "F32":
            writer.add_tensor(name, values[name])
            continue
        data = stored(name, values[name], kind)
        writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    if spec.rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", spec.rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def yarn_keys(writer) -> None:
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_yarn_beta_fast(16.0)
