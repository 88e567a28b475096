"""GGUF files of random weights in a shape, for peers that read nothing else; made once, under BISE_HOME."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig, state_directory
from bise.model.source import ModelSource

Bytes = npt.NDArray[np.uint8]

GGUF_KINDS = ("Q4_0", "Q4_K_M", "Q8_0", "BF16")
"""Mixtures of formats as llama-quantize makes them."""

_OURS = {"Q4_0": "q4", "Q4_K": "q4k", "Q6_K": "q6k", "Q8_0": "q8", "BF16": "bf16", "F32": "f32"}
_POOL_VALUES = 1 << 22
"""Random values drawn per format; tensors repeat them from different offsets."""


def gguf_path(source: ModelSource, kind: str) -> Path:
    """Return the GGUF file of a shape, writing it (gigabytes for a 7B) when it is not there yet."""
    digest = zlib.crc32(repr(source.config).encode())
    path = state_directory("cache", "bench") / f"{source.name}-{digest:08x}-{kind}.gguf"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        try:
            _write(temporary, source.config, kind)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def gguf_formats(config: ModelConfig, kind: str) -> Mapping[str, str]:
    """Return the packed format that corresponds to each weight's GGUF type, by bise's weight names."""
    stored = {name: _OURS[form] for name, _, form in _tensors(config, kind)}
    formats: dict[str, str] = {}
    experts = range(config.num_experts)
    for name, form in stored.items():
        parts = name.rsplit(".", 1)
        if parts[-1] in ("gate_exps", "up_exps", "down_exps"):
            ours = {"gate_exps": "w1", "up_exps": "w3", "down_exps": "w2"}[parts[-1]]
            formats |= {f"{parts[0]}.experts.{expert}.{ours}": form for expert in experts}
        else:
            formats[name] = form
    return formats


def _tensors(config: ModelConfig, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield (bise's name, shape, type) in file order; the experts of a layer are one tensor."""
    dim, hidden, vocab, layers = config.dim, config.hidden_dim, config.vocab_size, config.num_layers
    plain = {"Q4_0": "Q4_0", "Q4_K_M": "Q4_K", "Q8_0": "Q8_0", "BF16": "BF16"}[kind]
    head = "Q6_K" if kind.startswith("Q4") else plain
    yield "tok_embeddings", (vocab, dim), plain
    for index in range(layers):
        layer = f"layers.{index}."
        better = index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2
        careful = "Q6_K" if kind == "Q4_K_M" and better else plain
        yield layer + "attn_norm", (dim,), "F32"
        yield layer + "wq", (config.q_dim, dim), plain
        yield layer + "wk", (config.kv_dim, dim), plain
        yield layer + "wv", (config.kv_dim, dim), careful
        yield layer + "wo", (dim, config.q_dim), plain
        yield layer + "ffn_norm", (dim,), "F32"
        if config.is_moe:
            yield layer + "router", (config.num_experts, dim), "F32"
            yield layer + "gate_exps", (config.num_experts, hidden, dim), plain
            yield layer + "up_exps", (config.num_experts, hidden, dim), plain
            yield layer + "down_exps", (config.num_experts, dim, hidden), careful
        else:
            yield layer + "w1", (hidden, dim), plain
            yield layer + "w3", (hidden, dim), plain
            yield layer + "w2", (dim, hidden), careful
    yield "norm", (dim,), "F32"
    if not config.tied_embeddings:
        yield "output", (vocab, dim), head


_GGUF_NAMES = {
    "attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "ffn_norm": "ffn_norm", "router": "ffn_gate_inp", "w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down",
    "gate_exps": "ffn_gate_exps", "up_exps": "ffn_up_exps", "down_exps": "ffn_down_exps",
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    parts = name.split(".")
    own = _GGUF_NAMES[parts[-1]]
    return f"blk.{parts[1]}.{own}.weight" if parts[0] == "layers" else f"{own}.weight"


def _write(path: Path, config: ModelConfig, kind: str) -> None:
    import gguf

    writer: Any = gguf.GGUFWriter(str(path), "llama")
    _write_keys(writer, config)
    rng = np.random.default_rng(1)
    pools: dict[str, Bytes] = {}
    tensors = list(_tensors(config, kind))
    for name, shape, form in tensors:
        stored = gguf.GGMLQuantizationType[form]
        length, size = gguf.GGML_QUANT_SIZES[stored]
        columns = shape[-1] // length * size
        if form == "F32":
            writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            rows = (*shape[:-1], columns)
            writer.add_tensor_info(_gguf_name(name), rows, np.dtype(np.uint8), int(np.prod(rows)), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, form in tensors:
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
        if form not in pools:
            pools[form] = _pool(form, rng, _POOL_VALUES // length, size)
        data = np.resize(pools[form], int(np.prod(shape)) // length * size)
        writer.write_tensor_data(data.view(np.float32) if form == "F32" else data)
        assert name
    writer.close()


def _write_keys(writer: Any, config: ModelConfig) -> None:
    writer.add_name("synthetic")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁t{number:x}" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _pool(form: str, rng: np.random.Generator, blocks: int, size: int) -> Bytes:
    """Return `blocks` random blocks of a format, with scales that keep activations finite."""
    if form == "F32":
        return (rng.standard_normal(blocks) * 0.02).astype(np.float32).view(np.uint8)
    if form == "BF16":
        values = (rng.standard_normal(blocks) * 0.02).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)

    def scale(start: int, low: float, high: float) -> None:
        values = rng.uniform(low, high, blocks).astype(np.float16)
        data[:, start : start + 2] = values.view(np.uint8).reshape(blocks, 2)

    if form == "Q4_0":
        scale(0, 0.002, 0.006)
    elif form == "Q8_0":
        scale(0, 0.0002, 0.0004)
    elif form == "Q4_K":
        scale(0, 0.00008, 0.00016)
        scale(2, 0.0006, 0.0012)
    else:
        data[:, 192:208] = rng.integers(-20, 21, (blocks, 16)).astype(np.int8).view(np.uint8)
        scale(208, 0.00008, 0.00012)
    return data.reshape(-1)
