"""A tiny model on disk with brise's tokenizer and chat format, and texts for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from bise.config import ModelConfig
from bise.hub.embedded import embedded_path
from bise.model.tensor_names import hf_location
from bise.model.transformer import weight_shapes

CONFIG = ModelConfig(
    family="mistral", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48,
    vocab_size=4096, max_context=128, windows=(24, 24), tied_embeddings=True,
)  # fmt: skip


def write_tiny_model(path: Path, *, num_layers: int = 2, **changes: int) -> Path:
    config = replace(CONFIG, num_layers=num_layers, windows=(24,) * num_layers, **changes)
    path.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        spread = 0.5 if name == "tok_embeddings" else 0.08  # so that tied outputs can be sure of a token
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * spread
        tensors[hf_location(name, shape, config, ()).stored_name] = values
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_path() / name, path / name)
    fields = json.loads((embedded_path() / "config.json").read_text())
    fields |= {
        "hidden_size": config.dim, "intermediate_size": config.hidden_dim, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24,
        "max_position_embeddings": CONFIG.max_context, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(fields))
    return path


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_data(path: Path, count: int = 12) -> Path:
    rows = [chat(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
