"""Where each weight lies in a checkpoint: names, stacked experts, rotary row order.

Pure names and shapes; no file is touched here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from bise.config import ModelConfig

_HF_LAYER = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
    "router": "block_sparse_moe.gate",
}
_HF_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_MISTRAL_LAYER = {
    "attn_norm": "attention_norm",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "ffn_norm": "ffn_norm",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
    "router": "feed_forward.gate",
}

# Tables of rotary frequencies that old exporters stored; they follow from the configuration.
_HF_IGNORED = re.compile(r"model\.(layers\.(?P<layer>0|[1-9][0-9]{0,5})\.self_attn\.)?rotary_emb\.inv_freq")
_MISTRAL_IGNORED = re.compile(r"rope\.freqs")


@dataclass(frozen=True, slots=True)
class Location:
    """Where one weight lies: in a stored tensor, from row `first_row` of its flattened rows on."""

    stored_name: str
    stored_shape: tuple[int, ...]
    first_row: int = 0
    pair_width: int = 0
    """Head width when the rows are stored as rotary pairs, else 0."""


def hf_location(name: str, shape: tuple[int, ...], config: ModelConfig, stored: Collection[str]) -> Location:
    """Return where a weight lies under Hugging Face names; `stored` tells which layout of experts is used."""
    if name in _HF_TOP:
        return Location(_HF_TOP[name] + ".weight", shape)
    _, layer, *rest = name.split(".")
    prefix = f"model.layers.{layer}."
    fused = f"{prefix}mlp.experts."
    is_fused = config.is_moe and fused + "gate_up_proj" in stored
    if rest[0] == "router" and is_fused:
        return Location(f"{prefix}mlp.gate.weight", shape)
    if rest[0] != "experts":
        return Location(f"{prefix}{_HF_LAYER[rest[0]]}.weight", shape)
    expert, part = int(rest[1]), rest[2]
    if not is_fused:
        return Location(f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight", shape)
    # transformers 5 keeps [X, 2F, E] gate over up, and [X, E, F] down; on disk it is rare but legal.
    rows, width = shape
    if part == "w2":
        return Location(fused + "down_proj", (config.num_experts, rows, width), first_row=expert * rows)
    offset = rows if part == "w3" else 0
    return Location(
        fused + "gate_up_proj", (config.num_experts, 2 * rows, width), first_row=2 * expert * rows + offset
    )


def mistral_location(
    name: str, shape: tuple[int, ...], config: ModelConfig, stored: Collection[str]
) -> Location:
    """Return where a weight lies under Mistral's own names; wq and wk are stored as rotary pairs."""
    del stored
    if "." not in name:
        return Location(name + ".weight", shape)
    _, layer, *rest = name.split(".")
    if rest[0] == "experts":
        return Location(f"layers.{layer}.feed_forward.experts.{rest[1]}.{rest[2]}.weight", shape)
    pair_width = config.head_dim if rest[0] in ("wq", "wk") else 0
    return Location(f"layers.{layer}.{_MISTRAL_LAYER[rest[0]]}.weight", shape, pair_width=pair_width)


def is_ignored(stored_name: str, config: ModelConfig) -> bool:
    """Return True for a stored tensor that is known to carry nothing beyond the configuration."""
    if _MISTRAL_IGNORED.fullmatch(stored_name):
        return True
    match = _HF_IGNORED.fullmatch(stored_name)
    return match is not None and (match["layer"] is None or int(match["layer"]) < config.num_layers)
