"""Tiny random models on every backend that is installed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bise.config import ModelConfig
from bise.engine.engine import Engine
from bise.kernels import Ops
from bise.model.transformer import Transformer, weight_shapes

VOCAB = 258

MODELS = {
    "dense full": {"windows": (None, None)},
    "dense window": {"windows": (48, 48)},
    "interleaved": {"windows": (None, 48, 48), "num_layers": 3},
    "8 experts": {"windows": (48, None), "num_experts": 8, "experts_per_token": 2},
}


def tiny_config(name: str) -> ModelConfig:
    """Return one of `MODELS`: heads as in Nemo (head_dim != dim / heads), bytes as tokens."""
    fields: dict[str, Any] = {
        "family": "mistral",
        "dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "hidden_dim": 96,
        "vocab_size": VOCAB,
        "max_context": 2048,
    }
    return ModelConfig(**{**fields, **MODELS[name]})


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights of a model whose logits differ enough that sampling is no coin toss."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in weight_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        weights[name] = 1 + 0.1 * values if len(shape) == 1 else values * (2.5 / shape[1] ** 0.5)
    return weights


@dataclass(frozen=True)
class Backend:
    """How a backend is made and how exactly it must keep the identities."""

    name: str
    make_ops: Callable[..., Ops]
    """Takes the number of threads."""
    pack: Callable[[Any, np.ndarray], Any]
    """(ops, matrix) to the weight form that is tested."""
    is_exact: bool
    kv_format: str

    def weights(self, config: ModelConfig, ops: Any) -> dict[str, Any]:
        return {
            name: ops.vector(array) if array.ndim == 1 else self.pack(ops, array)
            for name, array in random_weights(config).items()
        }

    def transformer(self, config: ModelConfig, ops: Any) -> Any:
        return Transformer(config, self.weights(config, ops), ops)


def _torch_backend() -> Backend:
    torch = pytest.importorskip("torch")
    from bise.kernels.torch import TorchOps

    torch.set_num_threads(1)  # tiny products: threads only get in the way of the tests beside this one
    # Rows of a batch share one matrix product there, so that only the last bits may differ.
    return Backend(
        "torch", lambda _: TorchOps(torch.float64), lambda ops, array: ops.weight(array), False, "f32"
    )


def _cpu_backend(packed_format: str, kv_format: str) -> Backend:
    """Return the processor with its decode steps recorded, as `bise serve` runs it."""
    cpu = pytest.importorskip("bise.kernels.cpu", exc_type=ImportError)
    from bise.engine.replay import ReplayedModel

    def pack(ops: Any, array: np.ndarray) -> Any:
        return ops.quantized(array, packed_format)

    class OnProcessor(Backend):
        def transformer(self, config: ModelConfig, ops: Any) -> Any:
            weights = self.weights(config, ops)
            plain = Transformer(config, weights, ops)
            return ReplayedModel(plain, weights, ops, max_context=config.max_context)

    return OnProcessor(f"cpu-{packed_format}-{kv_format}", cpu.CpuOps, pack, True, kv_format)


def _triton_backend(packed_format: str, kv_format: str) -> Backend:
    """Return a CUDA device whose decode steps are recorded, as `bise serve` runs it."""
    torch = pytest.importorskip("torch")
    cpu = pytest.importorskip("bise.kernels.cpu", exc_type=ImportError)
    from bise.engine.graphs import GraphedModel
    from bise.kernels.triton.ops import TritonOps

    def pack(ops: Any, array: np.ndarray) -> Any:
        memory = cpu.arena(cpu.packed_size(packed_format, *array.shape))
        assert cpu.CpuOps(1).pack_floats(packed_format, array, memory)
        return ops.packed(packed_format, *array.shape, memory)

    class OnDevice(Backend):
        def transformer(self, config: ModelConfig, ops: Any) -> Any:
            model = Backend.transformer(self, config, ops)
            return GraphedModel(model, ops.device, max_rows=8, max_context=config.max_context)

    name = f"triton-{packed_format}-{kv_format}"
    return OnDevice(name, lambda _: TritonOps(torch.bfloat16), pack, True, kv_format)


BACKENDS = {
    "torch-f64": _torch_backend,
    "cpu-f32": lambda: _cpu_backend("f32", "f32"),
    "cpu-bf16": lambda: _cpu_backend("bf16", "bf16"),
    "cpu-q8": lambda: _cpu_backend("q8", "q16"),
    "cpu-q4": lambda: _cpu_backend("q4", "q8"),
}
if os.environ.get("TRITON_INTERPRET") != "1":  # `make test-gpu`, on a GPU
    BACKENDS |= {
        "triton-bf16": lambda: _triton_backend("bf16", "bf16"),
        "triton-q8": lambda: _triton_backend("q8", "bf16"),
        "triton-z4": lambda: _triton_backend("z4", "q8"),
    }


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="session")
def ops(backend) -> Ops:
    return backend.make_ops(1)


@pytest.fixture(scope="session", params=MODELS)
def model(request, backend, ops) -> Transformer:
    return backend.transformer(tiny_config(request.param), ops)


@pytest.fixture(scope="session")
def make_engine(backend, ops, model, byte_tokenizer) -> Callable[..., Engine]:
    """Return a function that makes an engine without a thread over `model`: (**engine options)."""

    def make(**options: Any) -> Engine:
        settings: dict[str, Any] = {
            "num_blocks": 80,
            "threaded": False,
            "kv_format": backend.kv_format,
            **options,
        }
        return Engine(model, ops, config=model.config, tokenizer=byte_tokenizer, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], tuple[ModelConfig, dict[str, np.ndarray]]]:
    """Return a function that gives the configuration and float32 weights of one of `MODELS`."""
    return lambda name: (tiny_config(name), random_weights(tiny_config(name)))


@pytest.fixture(scope="session")
def cpu_model() -> Callable[[str, str, int], tuple[Transformer, Ops]]:
    """Return a function that gives one of `MODELS` on the cpu backend: (name, weight format, threads)."""
    backend = functools.cache(lambda packed_format: _cpu_backend(packed_format, "f16"))

    @functools.cache
    def make(name: str, packed_format: str, threads: int) -> tuple[Transformer, Ops]:
        ops = backend(packed_format).make_ops(threads)
        return backend(packed_format).transformer(tiny_config(name), ops), ops

    return make
