"""What training on a data file will cost: the report of `bise tune check`. Knows nothing of torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bise.config import ModelConfig
from bise.train.data import DataFile, histogram

PASS_TOKENS = 4096
_RANK = 16
_EVALUATIONS = 11
"""Of a run, the one before the first step included."""
_HELD_BACK = 0.1
_FORWARD = 1 / 3
"""What a pass without the way back costs of one with it."""
_EFFICIENCY = 0.25
"""Training's share of the speed of a large matrix product: a guess, where nothing can be timed."""
_PROCESS_BYTES = 430 << 20
"""PyTorch itself, the tokenizer and the engine of the parity gate."""

StepTimer = Callable[[ModelConfig, Sequence[int], float, bool], float]
"""Returns the seconds of a step, for a model, lengths of texts, the share of learned tokens, and whether all
weights learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would be asked for."""

    method: str = "lora"
    epochs: float = 3.0
    batch: int = 8
    max_tokens: int


def data_report(
    file: DataFile, config: ModelConfig, plan: Plan, timer: StepTimer | None = None
) -> Mapping[str, Any]:
    """Return the JSON of a checked file: faults, counts, lengths, and what a run over it would take.

    `timer` measures a step on this machine; without one the time is a guess from a matrix product's.
    """
    texts = file.texts
    lengths = [len(text.ids) for text in texts]
    cut = [min(length, plan.max_tokens) for length in lengths]
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
        "max_tokens": plan.max_tokens,
        "too_long": sum(length > plan.max_tokens for length in lengths),
        "duplicates": [{"line": line, "same_as": earlier} for line, earlier in file.duplicates],
        "method": plan.method,
        "epochs": plan.epochs,
        "batch": plan.batch,
        "seconds": _seconds(file, config, plan, cut, timer) if cut else 0.0,
        "is_timed": timer is not None,
        "memory_bytes": memory_bytes(config, cut, plan),
    }


def _seconds(
    file: DataFile, config: ModelConfig, plan: Plan, lengths: Sequence[int], timer: StepTimer | None
) -> float:
    """Return about how long the steps and the evaluations of a run take, without start and publication."""
    is_full = plan.method == "full"
    if timer is None:
        work = (6 if is_full else 4) * config.num_active_params
        per_token = work / (_EFFICIENCY * _flops_per_second())
    else:
        learned = sum(sum(text.learned) for text in file.texts) / sum(len(text.ids) for text in file.texts)
        in_step = min(len(lengths), plan.batch * (2 if plan.method == "dpo" else 1))
        ordered = sorted(lengths)  # of a step's texts one from each part of the histogram
        sample = [ordered[int((n + 0.5) / in_step * len(ordered))] for n in range(in_step)]
        per_token = timer(config, sample, learned, is_full) / sum(sample)
    evaluated = _FORWARD * _EVALUATIONS * (_HELD_BACK if len(lengths) >= 10 else 0)
    before = _FORWARD if plan.method == "dpo" else 0  # what the base says of every pair
    return per_token * sum(lengths) * (plan.epochs + evaluated + before)


def memory_bytes(config: ModelConfig, lengths: Sequence[int], plan: Plan) -> int:
    """Return about what a run in float32 needs: weights, what is trained with its gradient and moments, and
    what the largest pass keeps for the way back.
    """
    in_step = plan.batch * (2 if plan.method == "dpo" else 1)
    tokens = min(PASS_TOKENS, sum(sorted(lengths)[-in_step:]))
    if plan.method == "full":
        trained = 5 * config.num_params
    else:
        inputs_and_outputs = 5 * config.dim + 2 * config.q_dim + 2 * config.kv_dim + 3 * config.hidden_dim
        trained = config.num_params + 5 * _RANK * config.num_layers * inputs_and_outputs
    per_token = (
        config.num_layers * (12 * config.dim + 4 * config.q_dim + 6 * config.kv_dim + 6 * config.hidden_dim)
        + 3 * config.vocab_size
    )
    return _PROCESS_BYTES + 4 * (trained + math.ceil(tokens * per_token))


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
