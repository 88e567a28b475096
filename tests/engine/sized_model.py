"""Writes models of a chosen size, loads one in a process of its own, fills its contexts, and tells the peak.

python sized_model.py DIRECTORY QUANT KV CONTEXT SEQUENCES     prints the peak resident bytes
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Size:
    """A Mistral-family shape, small enough for a test."""

    dim: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 1536
    vocab: int = 4096
    window: int | None = None
    experts: int = 0
    max_context: int = 8192

    @property
    def name(self) -> str:
        kind = f"x{self.experts}" if self.experts else ""
        return f"d{self.dim}-l{self.layers}-f{self.hidden}{kind}-v{self.vocab}-w{self.window}"


def write(directory: Path, size: Size) -> Path:
    """Write random bfloat16 weights, a tokenizer of `vocab` entries and a configuration; returns the path."""
    path = directory / size.name
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(_config(size)))
    (path / "tokenizer.json").write_text(json.dumps(_tokenizer(size.vocab)))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    _write_weights(path / "model.safetensors", size)
    return path


def _config(size: Size) -> dict:
    moe = {"num_local_experts": size.experts, "num_experts_per_tok": 2} if size.experts else {}
    return moe | {
        "architectures": ["MixtralForCausalLM" if size.experts else "MistralForCausalLM"],
        "model_type": "mixtral" if size.experts else "mistral",
        "hidden_size": size.dim,
        "intermediate_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.dim // size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": size.max_context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": size.window,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer(vocab: int) -> dict:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"▁t{number:x}" for number in range(vocab - len(pieces))]
    special = [
        {"id": number, "content": piece, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for number, piece in enumerate(pieces[:3])
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": []},
    }  # fmt: skip


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    head = size.dim // size.heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab, size.dim)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", size.dim), ("k", size.kv_heads * head), ("v", size.kv_heads * head)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, size.dim)
        shapes[prefix + "self_attn.o_proj.weight"] = (size.dim, size.dim)
        shapes[prefix + "input_layernorm.weight"] = (size.dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (size.dim,)
        if not size.experts:
            for name in ("gate", "up"):
                shapes[f"{prefix}mlp.{name}_proj.weight"] = (size.hidden, size.dim)
            shapes[prefix + "mlp.down_proj.weight"] = (size.dim, size.hidden)
            continue
        shapes[prefix + "block_sparse_moe.gate.weight"] = (size.experts, size.dim)
        for expert in range(size.experts):
            inner = f"{prefix}block_sparse_moe.experts.{expert}."
            shapes |= {inner + "w1.weight": (size.hidden, size.dim),
                       inner + "w3.weight": (size.hidden, size.dim),
                       inner + "w2.weight": (size.dim, size.hidden)}  # fmt: skip
    return shapes | {"model.norm.weight": (size.dim,), "lm_head.weight": (size.vocab, size.dim)}


def _write_weights(path: Path, size: Size) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, shape in _shapes(size).items():
        length = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    pool = (np.random.default_rng(0).standard_normal(1 << 20) * 0.03).astype(np.float32)
    codes = (pool.view(np.uint32) >> 16).astype(np.uint16)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in _shapes(size).values():
            file.write(np.resize(codes, int(np.prod(shape))).tobytes())


def main() -> None:
    from bise.engine import load
    from bise.engine.load import load_model
    from bise.engine.request import Request, SamplingParams

    # Steps shrink on a slow or busy machine while others wait; the plan is for the largest one.
    load.STEP_SECONDS = 3600.0

    path, quant, kv, context, sequences = sys.argv[1:6]
    loaded = load_model(
        Path(path), quant=quant, kv=kv, threads=2, context=int(context), max_sequences=int(sequences),
        threaded=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    ids = tuple(np.random.default_rng(1).integers(300, 4000, int(context) - 2).tolist())
    handles = [loaded.engine.submit(Request(token_ids=ids, params=params)) for _ in range(int(sequences))]
    for handle in handles:
        handle.result()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    sys.stdout.write(f"{int(peak.split()[1]) * 1024}\n")


if __name__ == "__main__":
    main()
