"""bise itself as a contestant: the whole engine (scheduler, kernels, sampling), stepped by hand and timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from bise import __version__
from bise.bench.roofline import TimedOps
from bise.bench.rounds import Case, PeerError
from bise.bench.synthetic import random_weights
from bise.config import ModelConfig
from bise.engine.engine import Engine
from bise.engine.handle import RequestHandle
from bise.engine.memory import (
    STEP_TOKENS,
    available_memory,
    checked_kv_format,
    kv_bytes,
    packed_formats,
    require_weights,
)
from bise.engine.replay import ReplayedModel
from bise.engine.request import Delta, Request, SamplingParams
from bise.engine.runner import Model
from bise.errors import EngineError
from bise.kernels import Array, Ops
from bise.kernels.cpu import CpuOps
from bise.model.packed import load_packed
from bise.model.source import ModelSource
from bise.model.transformer import Transformer

SHAPE_CONTEXT = 1 << 20
"""A shape has no trained context: whatever fits may be measured."""


class BiseContestant:
    """The engine over one model, without a thread of its own."""

    name = "bise"

    def __init__(self, source: ModelSource, *, quant: str, kv: str, threads: int) -> None:
        """Load the weights of a model, or make random ones for a shape.

        Raises MemoryPlanError when they do not fit what is free.
        """
        require_weights(source, quant, available_memory())
        self.version = __version__
        self.kv_format = checked_kv_format(kv, quant)
        self.formats: Mapping[str, str] = packed_formats(source, quant)
        self.config: ModelConfig = source.config
        self._ops = CpuOps(threads)
        if source.kind == "shape":
            self.config = dataclasses.replace(source.config, max_context=SHAPE_CONTEXT)
            packed = random_weights(source, quant, self._ops)
        else:
            packed, _ = load_packed(source, quant, self._ops)
        weights = packed.weights(self._ops)
        self._transformer = Transformer(self.config, weights, self._ops)
        self._weights = weights
        self._timed = TimedOps(self._ops)
        self._timed_transformer = Transformer(self.config, weights, cast(Ops, self._timed))
        self._engine: Engine | None = None
        self._case: Case | None = None
        self._running: list[Iterator[Delta]] = []
        self._seed = 0

    def prepare(self, case: Case, rounds: int) -> None:
        """Take KV memory for the case; for decoding, read the prompts of all sequences."""
        context = case.prompt + 1 if case.op == "prefill" else case.context + case.steps * (rounds + 2) + 64
        if context > self.config.max_context:
            raise PeerError(f"{context} tokens exceed the model's context of {self.config.max_context}")
        free, needed = available_memory(), kv_bytes(self.config, context, self.kv_format, case.batch)
        if free is not None and needed > free:
            raise PeerError(f"its KV cache needs {needed >> 20:,} MiB, {free >> 20:,} MiB of memory are free")
        self._case = case
        model = ReplayedModel(self._transformer, self._weights, self._ops, max_context=context)
        self._engine = _engine(model, self._ops, self.config, self.kv_format, context, case.batch)
        if case.op == "decode":
            handles = [self._submit(case.context, None) for _ in range(case.batch)]
            self._running = [iter(handle) for handle in handles]
            for deltas in self._running:
                _check(next(deltas))

    def run(self) -> float:
        """Read one prompt up to its first token, or take the case's decoding steps with every sequence."""
        assert self._case is not None
        assert self._engine is not None
        if self._case.op == "prefill":
            handle = self._submit(self._case.prompt, 1)
            started = time.perf_counter()
            handle.result()
            return time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(self._case.steps):
            self._engine.step()
        seconds = time.perf_counter() - started
        if self._engine.stats().num_running != self._case.batch:
            raise EngineError("a sequence ended while it was measured")
        return seconds

    def release(self) -> None:
        """Close the engine; the weights stay."""
        self._running = []
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def cpu_seconds(self) -> float:
        """Return 0: everything runs in this process."""
        return 0.0

    def step_seconds(self, *, prompt: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds per op of reading a prompt (one step at most), and of one decoding step."""
        prompt = min(prompt, STEP_TOKENS)
        self._engine = _engine(
            self._timed_transformer, self._ops, self.config, self.kv_format, prompt + steps + 64, 1
        )
        try:
            self._submit(prompt, 1).result()  # warm-up
            self._timed.seconds.clear()
            deltas = iter(self._submit(prompt, None))
            _check(next(deltas))
            prefill = dict(self._timed.seconds)
            self._timed.seconds.clear()
            for _ in range(steps):
                self._engine.step()
            return prefill, {op: seconds / steps for op, seconds in self._timed.seconds.items()}
        finally:
            self.release()

    def _submit(self, num_tokens: int, max_tokens: int | None) -> RequestHandle:
        assert self._engine is not None
        self._seed += 1
        ids = np.random.default_rng(self._seed).integers(0, self.config.vocab_size, num_tokens)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return self._engine.submit(Request(token_ids=tuple(ids.tolist()), params=params))


def _engine(
    transformer: Model, ops: Ops, config: ModelConfig, kv_format: str, context: int, batch: int
) -> Engine:
    return Engine(
        transformer,
        ops,
        config=config,
        tokenizer=None,
        kv_format=kv_format,
        kv_memory_bytes=kv_bytes(config, context, kv_format, batch),
        max_context=context,
        max_step_tokens=max(STEP_TOKENS, batch),
        max_sequences=max(batch, 8),
        threaded=False,
    )


def _check(delta: Delta) -> None:
    if delta.error is not None:
        raise delta.error


class _NoModel:
    """A model that costs nothing: what remains of a step is the engine's own work."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def forward(self, batch: object, cache: object = None) -> Array:
        """Return hidden states nobody computed."""
        return np.zeros((1, 1), np.float32)

    def logits(self, hidden: Array) -> Array:
        """Return equal scores."""
        return np.zeros((1, self.config.vocab_size), np.float32)


def engine_step_seconds(config: ModelConfig, steps: int = 200) -> float:
    """Return the seconds per token that scheduler, batch building and sampling take beside the model."""
    tiny = dataclasses.replace(
        config, num_layers=1, windows=(None,), num_heads=1, num_kv_heads=1, head_dim=2, dim=2,
        max_context=steps + 64,
    )  # fmt: skip
    engine = Engine(
        _NoModel(tiny), CpuOps(1), config=tiny, tokenizer=None, num_blocks=steps // 32 + 3, threaded=False
    )
    params = SamplingParams(temperature=0.7, top_p=0.95, seed=1, max_tokens=steps + 32, ignore_eos=True)
    try:
        deltas = iter(engine.submit(Request(token_ids=(1,), params=params)))
        _check(next(deltas))
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        return (time.perf_counter() - started) / steps
    finally:
        engine.close()
