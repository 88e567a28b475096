"""Random models on a device, and steps to run them: what `gpu_sections.py` measures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bise.cache.pages import KVCache
from bise.config import ModelConfig
from bise.engine.graphs import GraphedModel
from bise.hub.registry import resolve
from bise.kernels import BLOCK_SIZE, AttentionMeta
from bise.kernels.grouped import Grouped
from bise.kernels.triton.ops import TritonOps
from bise.kernels.triton.tiles import Tiles, tile
from bise.model.batch import Batch
from bise.model.transformer import Transformer, weight_shapes


def shape_of(family: str, dim: int, heads: tuple[int, int, int], hidden: int, **others: Any) -> ModelConfig:
    """Return the configuration of a model; heads are queries, keys and their width."""
    return ModelConfig(
        family=family, dim=dim, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2],
        hidden_dim=hidden, **others,
    )  # fmt: skip


_LARGE = {"num_layers": 32, "max_context": 32768}
_SMALL = {"num_layers": 1, "vocab_size": 96, "max_context": 1024}
MISTRAL = shape_of("mistral", 4096, (32, 8, 128), 14336, vocab_size=32768, **_LARGE)
MIXTRAL = shape_of(
    "mixtral", 4096, (32, 8, 128), 14336, vocab_size=32000, num_experts=8, experts_per_token=2, **_LARGE
)
TOY = shape_of("mistral", 64, (4, 2, 16), 128, **_SMALL)
TOY_EXPERTS = shape_of("mixtral", 64, (4, 2, 16), 128, num_experts=4, experts_per_token=2, **_SMALL)


def with_window(config: ModelConfig, window: int | None) -> ModelConfig:
    """Return the model with one window on every layer."""
    from dataclasses import replace

    return replace(config, windows=(window,) * config.num_layers)


def random_matrix(num_rows: int, num_columns: int, bits: int, ops: TritonOps) -> Tiles:
    """Return random tiles: 4 bits as `--quant q4` makes them of floats (z4), 8 bits with a scale for 32
    columns (q8), or the compute type (0).
    """
    device = ops.device
    if not bits:
        values = torch.randn(num_rows, num_columns, device=device) / num_columns**0.5
        return tile(values.to(ops.dtype))
    codes = torch.randint(0, 256, (num_rows, num_columns * bits // 8), dtype=torch.uint8, device=device)
    if bits == 4:
        words = random_words(num_rows, -(-num_columns // 256), num_columns**-0.5 / 3, device)
        return tile(Grouped(codes, words, None, bits, 32, 0, False, num_columns, "u7"))
    scale = torch.full((num_rows, num_columns // 32), num_columns**-0.5 / 64, device=device)
    return tile(Grouped(codes, scale.half(), None, bits, 32, 128, False, num_columns))


def random_words(num_rows: int, supers: int, top: float, device: torch.device) -> torch.Tensor:
    """Return the words of z4's scales: fields of 7 bits at random below one half, `top`."""
    low = torch.randint(0, 1 << 28, (num_rows, supers, 4), dtype=torch.int32, device=device)
    half = int(np.float16(top).view(np.uint16))
    tops = torch.tensor([half >> 4 * i & 15 for i in range(4)], dtype=torch.int32, device=device)
    return (low | tops << 28).flatten(1)


def random_model(config: ModelConfig, bits: int, ops: TritonOps) -> tuple[Transformer, int]:
    """Return a model of random weights, and the bytes of a step at batch 1: all but the embedding table, and
    of experts those that a row wants.
    """
    weights: dict[str, Any] = {}
    read = 0
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = ops.vector(np.ones(shape, np.float32))
            read += 4 * shape[0]
            continue
        if name.endswith(".router"):
            weights[name] = ops.weight(np.zeros(shape, np.float32))
            continue
        matrix = random_matrix(shape[0], shape[1], bits, ops)
        weights[name] = matrix
        size = matrix.size_bytes
        if ".experts." in name:
            size = size * config.experts_per_token // config.num_experts
        read += 0 if name == "tok_embeddings" else size
    return Transformer(config, weights, ops), read


def write_model(config: ModelConfig, folder: Path, device: torch.device) -> None:
    """Write a dense model of random bf16 weights as a folder of Hugging Face's form, one file a layer, with
    bise's own tokenizer: what starting is timed with where no model is at hand.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    own = resolve("brise")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / name, folder / name)
    fields = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "hidden_act": "silu", "sliding_window": None, "rope_theta": 1e6,
        "max_position_embeddings": config.max_context, "rms_norm_eps": 1e-5, "vocab_size": config.vocab_size,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    e, q, kv, f = config.dim, config.q_dim, config.kv_dim, config.hidden_dim
    layer = {
        "input_layernorm": (e,), "post_attention_layernorm": (e,), "self_attn.q_proj": (q, e),
        "self_attn.k_proj": (kv, e), "self_attn.v_proj": (kv, e), "self_attn.o_proj": (e, q),
        "mlp.gate_proj": (f, e), "mlp.up_proj": (f, e), "mlp.down_proj": (e, f),
    }  # fmt: skip
    files = {
        f"layer-{index}.safetensors": {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        for index in range(config.num_layers)
    }
    ends = {
        "model.embed_tokens": (config.vocab_size, e),
        "model.norm": (e,),
        "lm_head": (config.vocab_size, e),
    }
    files["ends.safetensors"] = ends
    for file, tensors in files.items():
        made = {
            f"{name}.weight": (
                torch.ones(shape, device=device)
                if len(shape) == 1
                else torch.randn(shape, device=device) / shape[1] ** 0.5
            )
            for name, shape in tensors.items()
        }
        save_file({name: tensor.bfloat16().cpu() for name, tensor in made.items()}, folder / file)
    index = {f"{name}.weight": file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


class Runs:
    """A model with pages, and steps of it."""

    def __init__(
        self,
        config: ModelConfig,
        bits: int,
        ops: TritonOps,
        *,
        rows: int,
        context: int,
        kv: str,
        recorder: Any = None,
    ) -> None:
        self.config = config
        self.ops = ops
        self.model, self.weight_bytes = random_model(config, bits, ops)
        self.blocks = -(-context // BLOCK_SIZE)
        self.cache = KVCache(config, ops, [self.blocks * rows] * len(config.window_groups), kv)
        self.context = context
        self.rows = rows
        self.graphed: GraphedModel | None = None
        if ops.device.type == "cuda" or recorder is not None:
            self.graphed = GraphedModel(
                self.model, ops.device, max_rows=rows, max_context=context, recorder=recorder
            )
            self.graphed.prepare(self.cache)

    def kv_bytes(self, positions: int) -> int:
        """Return the bytes of keys and values that a row at this position reads over all layers."""
        page = self.cache.layer(0)
        per_token = 2 * page.k[0].numel() * page.k.element_size()
        return sum(per_token * min(positions, window or positions) for window in self.config.windows)

    def batch(self, positions: int, count: int, rows: int) -> Batch:
        """Return a step: `rows` sequences, `count` tokens each, the last at position `positions` - 1."""
        first = positions - count
        at = np.arange(first, positions, dtype=np.int32)
        tables = np.arange(rows * self.blocks, dtype=np.int32).reshape(rows, self.blocks)
        meta = AttentionMeta(
            q_start=np.arange(0, rows * count + 1, count, dtype=np.int32),
            q_pos=np.full(rows, first, np.int32),
            block_table=tables,
            slots=(tables[:, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE).reshape(-1).astype(np.int32),
        )
        return Batch(
            token_ids=np.arange(rows * count, dtype=np.int32) % self.config.vocab_size,
            positions=np.tile(at, rows),
            attention=(meta,) * len(self.config.window_groups),
            logit_rows=np.arange(count - 1, rows * count, count, dtype=np.int32),
        )

    def decode(self, positions: int, rows: int) -> Any:
        """Compute one decode step and its logits; replayed where steps are recorded."""
        return self.step(self.batch(positions, 1, rows))

    def step(self, batch: Batch) -> Any:
        """Compute a step and its logits; replayed where it is recorded."""
        model = self.graphed or self.model
        return model.logits(model.forward(batch, self.cache))

    def prefill(self, count: int, chunk: int) -> None:
        """Compute a prompt of `count` tokens in chunks, and the logits of its last row."""
        hidden = None
        for low in range(0, count, chunk):
            size = min(chunk, count - low)
            hidden = self.model.forward(self.batch(low + size, size, 1), self.cache)
        assert hidden is not None
        self.model.logits(hidden[-1:])
