"""Small ablations of what Mistral's papers claim: attention heads, window, experts; each at equal compute.

    python recipes/ablations/ablate.py --run RUN --out recipes/ablations/results/small

RUN is a folder of the brise recipe with `pretrain.ids.npy` and `valid_text.ids.npy` (recipes/brise/data.py).
Every variant is trained once per seed and written to OUT/<variant>.<seed>.json; what is there is not trained
again, so a stopped run goes on. The report (report.json, report.md, two pictures) is made of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from report import write_report
from torch import Tensor

from bise.config import ModelConfig
from bise.model.transformer import weight_shapes
from bise.text.turns import LearnedText
from bise.train.loop import Schedule, Training
from bise.train.network import Network, torch_ops
from bise.train.objective import NextToken, Sample

BATCH = 8
VALID_ROWS = 64


@dataclass(frozen=True, slots=True)
class Size:
    """How large and how long."""

    dim: int
    layers: int
    hidden: int
    steps: int
    """Of the base variant; the others get as much compute."""


SIZES = {
    "smallest": Size(96, 3, 256, 150),
    "small": Size(192, 4, 512, 600),
    "medium": Size(256, 6, 704, 3000),
}
HEAD_DIM = 24
"""Width of a head at `smallest`; twice that above."""


def variants(size: Size) -> dict[str, ModelConfig]:
    """Return the models that are compared: `gqa` is the base of all three questions."""
    heads = size.dim // (HEAD_DIM if size.dim < 192 else 2 * HEAD_DIM)
    if size.dim == 256:
        heads = 4
    base = ModelConfig(
        family="mistral", dim=size.dim, num_layers=size.layers, num_heads=heads, num_kv_heads=heads // 2,
        head_dim=size.dim // heads, hidden_dim=size.hidden, vocab_size=4096, max_context=1024,
        tied_embeddings=True,
    )  # fmt: skip
    experts = {"family": "mixtral", "num_experts": 8, "experts_per_token": 2}
    return {
        "gqa": base,
        "mha": replace(base, num_kv_heads=heads),
        "mqa": replace(base, num_kv_heads=1),
        "window": replace(base, windows=(64,) * size.layers),
        "moe": replace(base, hidden_dim=size.hidden // 2, **experts),
        "dense-total": replace(base, hidden_dim=4 * size.hidden),
    }


def flops_per_token(config: ModelConfig, row_tokens: int) -> float:
    """Return what a token costs to train on: 6 per active weight (the embedding is looked up, but it is the
    output as well), and attention over the keys that it sees on average.
    """
    window = config.windows[0] or row_tokens
    seen = sum(min(position + 1, window) for position in range(row_tokens)) / row_tokens
    return 6 * config.num_active_params + 12 * config.num_layers * config.q_dim * seen


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return normal values of 1 / sqrt(width); what is added to the residual is smaller in deeper models."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        spread = 0.02 if name == "tok_embeddings" else shape[1] ** -0.5
        if name.endswith(("wo", "w2")):
            spread /= math.sqrt(2 * config.num_layers)
        weights[name] = torch.randn(shape, generator=generator) * spread
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def rows(path: Path, count: int, seed: int) -> list[Sample]:
    """Return `count` rows of a file of token ids, drawn by the seed, every token learned."""
    ids = np.load(path, mmap_mode="r")
    chosen = np.random.default_rng(seed).choice(len(ids), min(count, len(ids)), replace=False)
    learned = (False, *(True,) * (ids.shape[1] - 1))
    return [(LearnedText(tuple(ids[index].tolist()), learned),) for index in sorted(chosen)]


def train(name: str, config: ModelConfig, size: Size, run: Path, seed: int) -> Mapping[str, object]:
    """Train one variant and return what is reported of it."""
    base = variants(size)["gqa"]
    row_tokens = int(np.load(run / "pretrain.ids.npy", mmap_mode="r").shape[1]) - 1
    budget = flops_per_token(base, row_tokens) * size.steps
    steps = round(budget / flops_per_token(config, row_tokens))
    weights = initial_weights(config, seed)
    network = Network(config, weights, torch_ops("f32", "cpu"))
    schedule = Schedule(
        max_steps=steps, batch=BATCH, pass_tokens=BATCH * row_tokens // 2, lr=4e-3, warmup=0.1,
        weight_decay=0.1, evaluations=6, patience=0, seed=seed,
    )  # fmt: skip
    events: list[Mapping[str, object]] = []
    valid = rows(run / "valid_text.ids.npy", VALID_ROWS, 0)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            weights, NextToken(network, dict), schedule,
            rows(run / "pretrain.ids.npy", steps * BATCH, seed), valid[:16],
            run=Path(folder), fingerprint=name, report=events.append,
        )  # fmt: skip
        started = time.monotonic()
        training.run(lambda: False)
        seconds = time.monotonic() - started
        losses = training.losses_of(valid).view(len(valid), row_tokens).numpy()
    per_row = losses.mean(1)
    late = losses[:, row_tokens // 2 :].mean()
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    kept = min(config.windows[0] or 4096, 4096)
    return {
        "variant": name, "seed": seed, "steps": steps, "tokens": steps * BATCH * row_tokens,
        "flops": flops_per_token(config, row_tokens) * steps * BATCH * row_tokens,
        "parameters": config.num_params, "active_parameters": config.num_active_params,
        "loss": float(per_row.mean()), "standard_error": float(per_row.std(ddof=1) / math.sqrt(len(per_row))),
        "loss_second_half": float(late), "row_losses": [round(float(loss), 5) for loss in per_row],
        "kv_bytes_per_token": cache, "kv_bytes_at_4096": cache * kept, "seconds": seconds,
        "curve": [[event["step"], event["loss"]] for event in events if event["event"] == "evaluation"],
    }  # fmt: skip


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="smallest")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="one variant")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    size = SIZES[options.size]
    for seed in range(options.seeds):
        for name, config in variants(size).items():
            path = options.out / f"{name}.{seed}.json"
            if path.exists() or options.only not in (None, name):
                continue
            result = train(name, config, size, options.run, seed)
            path.write_text(json.dumps({"size": options.size, **result}, indent=1) + "\n", encoding="utf-8")
            print(f"{name} seed {seed}: loss {result['loss']:.4f} in {result['seconds']:.0f} s", flush=True)
    write_report(options.out)


if __name__ == "__main__":
    main()
