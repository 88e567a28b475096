"""Whole models as GGUF files that llama.cpp runs: F16, Q8_0 or Q4_K matrices, float32 vectors.

Owns the file's layout, names and keys. One tensor at a time is in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from bise.config import ModelConfig
from bise.formats import FORMATS
from bise.model.gguf import paired_rows
from bise.model.rope import rope_frequencies
from bise.model.source import ModelSource
from bise.train.gguf_codes import encode
from bise.train.gguf_vocabulary import vocabulary_pairs
from bise.train.whole import Floats, WholeModel

FORMS = {"f16": "F16", "q8_0": "Q8_0", "q4_k": "Q4_K"}
"""What matrices can be stored as."""
_FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_K": 15}
_ALIGNMENT = 32
_TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER = {
    "attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "ffn_norm": "ffn_norm", "router": "ffn_gate_inp", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
}  # fmt: skip
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAY_TYPES = {
    "u1": 0,
    "i1": 1,
    "u2": 2,
    "i2": 3,
    "u4": 4,
    "i4": 5,
    "f4": 6,
    "b1": 7,
    "u8": 10,
    "i8": 11,
    "f8": 12,
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file and the weights of bise that it is made of."""

    name: str
    parts: tuple[str, ...]
    """One weight; the experts of a layer, stacked."""
    shape: tuple[int, ...]
    form: str

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return int(np.prod(self.shape[:-1])) * FORMATS[self.form].row_bytes(self.shape[-1])


def write_gguf(path: Path, model: WholeModel, form: str) -> list[str]:
    """Write a model as a GGUF file with matrices of `form` (F16, Q8_0, Q4_K); return remarks, a line each.

    Raises ModelFileError when the vocabulary cannot be said in GGUF, or a value does not fit.
    """
    source, config = model.source, model.source.config
    tensors = list(_tensors(model.shapes, config, form))
    factors = _rope_factors(config)
    if factors is not None:
        tensors.append(_Tensor("rope_freqs.weight", (), (len(factors),), "F32"))
    pairs = _pairs(source, form) | vocabulary_pairs(source)
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
        for key, value in pairs.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            dims = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            kind = cast(int, FORMATS[tensor.form].ggml_id)
            file.write(_text(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims)
            file.write(struct.pack("<IQ", kind, offset))
            offset += tensor.size_bytes + -tensor.size_bytes % _ALIGNMENT
        _pad(file)
        for tensor in tensors:
            if not tensor.parts and factors is not None:
                file.write(factors.tobytes())
            for part in tensor.parts:
                file.write(encode(_rows(model, part), tensor.form, part).tobytes())
            _pad(file)
    return list(_remarks(config, tensors, form))


def _tensors(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, form: str) -> Iterator[_Tensor]:
    stacked: set[str] = set()
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(parts) == 1:
            yield _Tensor(f"{_TOP[name]}.weight", (name,), shape, _form(name, shape, form))
            continue
        block, kind = f"blk.{parts[1]}.", parts[-1]
        if len(parts) == 3:
            yield _Tensor(f"{block}{_LAYER[kind]}.weight", (name,), shape, _form(name, shape, form))
            continue
        whole = f"{block}{_LAYER[kind]}_exps.weight"
        if whole not in stacked:
            stacked.add(whole)
            experts = tuple(f"layers.{parts[1]}.experts.{n}.{kind}" for n in range(config.num_experts))
            yield _Tensor(whole, experts, (len(experts), *shape), _form(name, shape, form))


def _form(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return how a weight is stored: vectors and routers as float32; of Q4_K files the embeddings and the
    output as Q8_0, and so every row that is no whole number of 256; F16 where 32 does not divide it either.
    """
    if len(shape) == 1 or name.endswith("router"):
        return "F32"
    if wanted == "Q4_K" and (shape[-1] % 256 or "." not in name):
        wanted = "Q8_0"
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def _rows(model: WholeModel, name: str) -> Floats:
    values = model.values(name)
    if name.endswith((".wq", ".wk")):
        paired = np.empty_like(values)
        paired[paired_rows(0, len(values), model.source.config.head_dim)] = values
        return paired
    return values.reshape(-1, values.shape[-1])


def _pairs(source: ModelSource, form: str) -> dict[str, object]:
    config = source.config
    own = {
        "block_count": config.num_layers, "context_length": config.max_context,
        "embedding_length": config.dim, "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if config.is_moe:
        own |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
    own |= _window_pairs(config) | _scaling_pairs(config)
    # The family shows in the name, from which readers tell Mistral's models from Llama's.
    name = source.name if config.family in source.name.lower() else f"{source.name} ({config.family})"
    general: dict[str, object] = {
        "general.architecture": "llama", "general.type": "model", "general.name": name,
        "general.quantization_version": 2, "general.file_type": _FILE_TYPES[form],
    }  # fmt: skip
    if source.licence is not None:
        general["general.license"] = source.licence
    return general | {f"llama.{key}": value for key, value in own.items()}


def _window_pairs(config: ModelConfig) -> dict[str, object]:
    windows = {window for window in config.windows if window is not None}
    if not windows:
        return {}
    pairs: dict[str, object] = {"attention.sliding_window": max(windows)}
    if None in config.windows:
        pairs["attention.sliding_window_pattern"] = np.array(
            [window is not None for window in config.windows]
        )
    return pairs


def _scaling_pairs(config: ModelConfig) -> dict[str, object]:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("llama3", "factors"):
        return {}
    pairs: dict[str, object] = {
        "rope.scaling.type": scaling.kind,
        "rope.scaling.factor": float(scaling.factor),
    }
    if scaling.kind == "yarn":
        pairs["rope.scaling.original_context_length"] = scaling.original_context
        pairs["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        pairs["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
        if scaling.attention_factor is not None:
            usual = 0.1 * float(np.log(scaling.factor)) + 1 if scaling.factor > 1 else 1.0
            pairs["rope.scaling.attn_factor"] = scaling.attention_factor / usual
    return pairs


def _rope_factors(config: ModelConfig) -> Floats | None:
    """Return what each frequency is divided by, for the scalings that GGUF writes as a tensor."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "factors"):
        return None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return (config.rope_theta**-exponents / rope_frequencies(config)[0]).astype("<f4")


def _remarks(config: ModelConfig, tensors: list[_Tensor], form: str) -> Iterator[str]:
    wider = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.form not in (form, "F32")]
    odd = [tensor for tensor in wider if form != "Q4_K" or tensor.shape[-1] % 256]
    if odd:
        kept = f"{odd[0].name} and {len(odd) - 1} more" if len(odd) > 1 else odd[0].name
        width = odd[0].shape[-1]
        yield f"stored as {odd[0].form}: {kept}; their rows of {width} are no multiple of a {form} block"
    if any(window is not None and window < config.max_context for window in config.windows):
        window = min(window for window in config.windows if window is not None)
        yield (
            f"llama.cpp computes this architecture without its window of {window} tokens: longer texts come "
            "out otherwise there (bise reads the window from the file)"
        )


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    """Return a value of the metadata with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in cast(list[object], value)):
        items = cast(list[str], value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + b"".join(map(_text, items))
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = array.astype("<f4")
    elif isinstance(value, list):
        array = array.astype("<i4")
    kind = _ARRAY_TYPES[f"{array.dtype.kind}{array.dtype.itemsize}"]
    return struct.pack("<IIQ", _ARRAY, kind, array.size) + array.tobytes()


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
