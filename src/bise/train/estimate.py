"""What training on a data file will cost: the report of `bise tune check`. Knows nothing of torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bise.config import ModelConfig
from bise.train.data import DataFile, histogram

PASS_TOKENS = 4096
_RANK = 16
_EFFICIENCY = 0.25
"""Training's share of the speed of a large matrix product: a guess, not a measurement."""
_PROCESS_BYTES = 500 << 20
"""PyTorch itself."""


def data_report(file: DataFile, config: ModelConfig, max_tokens: int, epochs: float) -> Mapping[str, Any]:
    """Return the JSON of a checked file: faults, counts, lengths, estimates for a LoRA run."""
    texts = file.texts
    lengths = [len(text.ids) for text in texts]
    tokens = sum(min(length, max_tokens) for length in lengths)
    work = 4 * config.num_active_params * tokens * epochs
    return {
        "path": str(file.path),
        "sha256": file.sha256,
        "bad": [{"line": bad.line, "field": bad.field, "reason": bad.reason} for bad in file.bad],
        "kinds": file.kinds,
        "texts": len(texts),
        "tokens": sum(lengths),
        "learned_tokens": sum(sum(text.learned) for text in texts),
        "longest": max(lengths, default=0),
        "histogram": [{"up_to": bound, "texts": count} for bound, count in histogram(lengths)],
        "max_tokens": max_tokens,
        "too_long": sum(length > max_tokens for length in lengths),
        "duplicates": [{"line": line, "same_as": earlier} for line, earlier in file.duplicates],
        "epochs": epochs,
        "seconds": work / (_EFFICIENCY * _flops_per_second()),
        "memory_bytes": memory_bytes(config, min(PASS_TOKENS, max(tokens, 1))),
    }


def memory_bytes(config: ModelConfig, tokens: int) -> int:
    """Return about what a LoRA run in float32 needs: weights, adapter with its moments, activations."""
    adapter = (
        _RANK
        * config.num_layers
        * (5 * config.dim + 2 * config.q_dim + 2 * config.kv_dim + 3 * config.hidden_dim)
    )
    per_token = (
        config.num_layers * (12 * config.dim + 4 * config.q_dim + 6 * config.kv_dim + 6 * config.hidden_dim)
        + 3 * config.vocab_size
    )
    return _PROCESS_BYTES + 4 * (config.num_params + 5 * adapter + tokens * per_token)


def _flops_per_second() -> float:
    """Measure a float32 matrix product for about a tenth of a second."""
    a = np.random.default_rng(0).standard_normal((768, 768), dtype=np.float32)
    np.matmul(a, a)
    started = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - started < 0.1:
        np.matmul(a, a)
        count += 1
    return 2 * 768**3 * count / (time.perf_counter() - started)
