"""A tiny sound model directory, the tools to change it, and odd variants that must be accepted (`SOUND`)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DELETE = object()
Header = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One directory. `mentions` must appear in the error; `reads` says that only reading shows the fault."""

    name: str
    build: Callable[[Path], None]
    mentions: str = ""
    reads: bool = False


def base_config() -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def base_shapes(experts: int = 0) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (16,)
        shapes[prefix + "self_attn.q_proj.weight"] = (16, 16)
        shapes[prefix + "self_attn.k_proj.weight"] = (8, 16)
        shapes[prefix + "self_attn.v_proj.weight"] = (8, 16)
        shapes[prefix + "self_attn.o_proj.weight"] = (16, 16)
        shapes[prefix + "post_attention_layernorm.weight"] = (16,)
        if experts:
            shapes[prefix + "block_sparse_moe.gate.weight"] = (experts, 16)
        for expert in range(experts):
            for part, shape in (("w1", (24, 16)), ("w2", (16, 24)), ("w3", (24, 16))):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight"] = shape
        if not experts:
            shapes[prefix + "mlp.gate_proj.weight"] = (24, 16)
            shapes[prefix + "mlp.up_proj.weight"] = (24, 16)
            shapes[prefix + "mlp.down_proj.weight"] = (16, 24)
    shapes["model.norm.weight"] = (16,)
    shapes["lm_head.weight"] = (32, 16)
    return shapes


def base_params() -> dict[str, Any]:
    return {
        "dim": 16,
        "n_layers": 2,
        "head_dim": 4,
        "hidden_dim": 24,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 32,
        "rope_theta": 1e6,
    }


def native_shapes() -> dict[str, tuple[int, ...]]:
    words = {
        "model.embed_tokens": "tok_embeddings", "model.": "", "lm_head": "output",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.": "attention.",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in base_shapes().items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        shapes[name] = shape
    return shapes


def header_of(
    shapes: dict[str, tuple[int, ...]], dtype: str = "F32", size: int = 4
) -> tuple[Header, bytearray]:
    """Return (header, data of ones) for tensors laid end to end."""
    header: Header = {}
    position = 0
    for name, shape in shapes.items():
        count = int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + count]}
        position += count
    data = np.full(position // size, 0.5, "<f4").tobytes() if size == 4 else bytes(position)
    return header, bytearray(data)


def write_file(
    path: Path, header: Header | bytes, data: bytes | bytearray, length: int | None = None
) -> None:
    """Write a safetensors file; `length` overrides the header length field."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def write_config(directory: Path, changes: dict[str, Any] | None = None, text: bytes | None = None) -> None:
    config = base_config() | (changes or {})
    config = {key: value for key, value in config.items() if value is not DELETE}
    (directory / "config.json").write_bytes(json.dumps(config).encode() if text is None else text)


def write_model(directory: Path, changes: dict[str, Any] | None = None) -> None:
    """Write the base model with `changes` to its config.json."""
    write_config(directory, changes)
    write_file(directory / "model.safetensors", *header_of(base_shapes()))


def write_native(directory: Path, changes: dict[str, Any] | None = None) -> None:
    params = {key: value for key, value in (base_params() | (changes or {})).items() if value is not DELETE}
    (directory / "params.json").write_text(json.dumps(params))
    write_file(directory / "consolidated.safetensors", *header_of(native_shapes()))


def write_sharded(directory: Path) -> dict[str, str]:
    """Write the base model in two shards with an index; return its weight_map."""
    write_config(directory)
    names = list(base_shapes())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        write_file(directory / shard, *header_of({name: base_shapes()[name] for name in part}))
        weight_map |= dict.fromkeys(part, shard)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _padded_header(directory: Path) -> None:
    write_config(directory)
    header, data = header_of(base_shapes())
    raw = json.dumps(header).encode()
    write_file(directory / "model.safetensors", raw + b" " * (100_000_000 - len(raw)), data)


def _shuffled(directory: Path) -> None:
    """Header in another order than the data, with white space, escapes and metadata."""
    write_config(directory)
    header, data = header_of(base_shapes())
    turned = {"__metadata__": {"format": "pt", "note": "\u00e9 \U0001f600"}, **dict(reversed(header.items()))}
    raw = json.dumps(turned, indent=1).replace("lm_head", "lm\\u005fhead").encode() + b"   "
    write_file(directory / "model.safetensors", raw, data)


def _with_inv_freq(directory: Path) -> None:
    write_config(directory)
    shapes = base_shapes() | {"model.layers.1.self_attn.rotary_emb.inv_freq": (2,)}
    write_file(directory / "model.safetensors", *header_of(shapes))


def _hub_cache(directory: Path) -> None:
    """Lay the model out as a hub cache does and leave `directory` as a link to the snapshot."""
    root = directory.parent / "models--owner--tiny"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_sharded(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(f"../../blobs/{number:064x}")
    directory.rmdir()
    directory.symlink_to(snapshot)


def _terabyte(directory: Path) -> None:
    """One embedding matrix of a terabyte that takes no room on disk."""
    vocabulary = (1 << 38) // (1 << 17)
    write_config(directory, {"hidden_size": 1 << 17, "vocab_size": vocabulary, "tie_word_embeddings": True})
    shapes = {
        name: _wide(name, shape, vocabulary)
        for name, shape in base_shapes().items()
        if name != "lm_head.weight"
    }
    header: Header = {}
    position = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    path = directory / "model.safetensors"
    write_file(path, header, b"")
    os.truncate(path, path.stat().st_size + position)


def _wide(name: str, shape: tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    """Return the shape of a base tensor when the model is 2^17 wide (heads and hidden layer stay small)."""
    width = 1 << 17
    if "embed" in name:
        return vocabulary, width
    if "norm" in name:
        return (width,)
    return (width, shape[1]) if "o_proj" in name or "down_proj" in name else (shape[0], width)


def _stored_as(dtype: str, size: int) -> Case:
    def build(directory: Path) -> None:
        write_config(directory)
        write_file(directory / "model.safetensors", *header_of(base_shapes(), dtype, size))

    return Case("stored_as_" + dtype, build)


def _mixture(directory: Path) -> None:
    write_config(
        directory,
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    )
    write_file(directory / "model.safetensors", *header_of(base_shapes(experts=3)))


def _both_layouts(directory: Path) -> None:
    write_native(directory)
    write_model(directory)


def _beside_pickle(directory: Path) -> None:
    write_model(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (directory / "modeling_mine.py").write_text("raise SystemExit('this code must never run')")


def _sound(name: str, **changes: Any) -> Case:
    return Case(name, lambda directory: write_model(directory, changes))


SOUND: list[Case] = [
    _sound("base"),
    _sound("head_dim_derived", head_dim=DELETE),
    _sound("head_dim_null", head_dim=None),
    _sound("window", sliding_window=8),
    _sound("window_absent", sliding_window=DELETE),
    _sound(
        "ministral",
        model_type="ministral",
        architectures=["MinistralForCausalLM"],
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _sound(
        "llama",
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        pretraining_tp=2,
        attention_bias=False,
    ),
    _sound("theta_absent", rope_theta=DELETE),
    _sound("auto_map", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
    _sound("unknown_but_harmless", unsloth_version="2024.9", license="mit", my_notes={"a": [1, 2]}),
    _sound("unknown_and_inactive", logit_softcap=None, use_qk_norm=False),
    _sound("tied_with_stored_head", tie_word_embeddings=True),
    _sound("rope_default", rope_scaling={"rope_type": "default"}),
    _sound("rope_empty", rope_parameters={}),
    _sound("rope_parameters", rope_theta=DELETE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    _sound("rope_linear", rope_scaling={"type": "linear", "factor": 2}),
    _sound("several_ends", eos_token_id=[2, 3, 4]),
    _sound("integral_theta", rope_theta=1000000),
    Case("shuffled_header", _shuffled),
    Case("header_of_exactly_the_limit", _padded_header),
    Case("rotary_tables", _with_inv_freq),
    Case("hub_cache", _hub_cache),
    Case("sharded", lambda directory: write_sharded(directory) and None),
    Case("terabyte", _terabyte),
    Case("mixture", _mixture),
    _stored_as("BF16", 2),
    _stored_as("F16", 2),
    Case("native", lambda directory: write_native(directory)),
    Case("native_pattern", lambda directory: write_native(directory, {"_sliding_window": [None, 4]})),
    Case(
        "native_yarn",
        lambda directory: write_native(
            directory, {"yarn": {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1}}
        ),
    ),
    Case("both_layouts", _both_layouts),
    Case("beside_pickle_and_code", _beside_pickle),
]
