"""What fits and how fast, from headers or from a known shape: nothing is loaded, nothing is downloaded.

Memory follows the arithmetic by which the engine admits work (engine/memory.py). Speeds are ceilings: bytes
over the machine's measured read rate, operations over its measured arithmetic rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig
from bise.engine.memory import (
    FLOAT_FORMATS,
    MemoryNeed,
    checked_kv_format,
    largest_context,
    memory_need,
    packed_formats,
)
from bise.errors import ConfigError, UserError
from bise.formats import FORMATS, KV_FORMATS
from bise.hub.registry import known_models
from bise.kernels.cpu import packed_size
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes

QUANT_CHOICES = ("bf16", "q8", "q4")
"""What the best quantisation is chosen from, widest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """What the machine can do at most, measured."""

    read_bytes_s: float
    """Bytes per second that all threads together read from memory."""
    int8_ops_s: float | None
    """8-bit operations per second, two per multiply-add; None where there is no measure."""
    float_ops_s: float | None
    """32-bit float operations per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step has to do, whatever engine does it."""

    tokens: int
    bytes_read: float
    """Weights and keys and values that must come from memory."""
    operations: float
    """Of the linear layers, two per multiply-add."""
    is_float: bool
    """True when the linear layers compute in float rather than in 8 bits."""

    def seconds(self, limits: MachineLimits) -> float:
        """Return the least time the machine needs."""
        peak = limits.float_ops_s if self.is_float else limits.int8_ops_s
        return max(self.bytes_read / limits.read_bytes_s, self.operations / peak if peak else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer of `bise plan`."""

    need: MemoryNeed
    context: int
    sequences: int
    quant: str
    kv_format: str
    memory: int
    """Bytes granted."""
    largest_context: int
    """Most tokens per sequence that fit the grant; 0 when none does."""
    best_quant: str | None
    """Widest quantisation that fits the grant at this context; None when none does."""
    decode_tokens_s: float | None
    """Ceiling at this context and as many sequences, all together; None without limits."""
    prefill_tokens_s: float | None
    """Ceiling of a prompt of 512 tokens, or of the context when that is shorter."""

    @property
    def fits(self) -> bool:
        """True when the peak stays within the grant."""
        return self.need.total <= self.memory


class ShapeTensor:
    """A weight that exists as a shape only; a `SourceTensor` without values."""

    def __init__(self, shape: tuple[int, ...], stored: str) -> None:
        self.shape = shape
        self.format = stored

    @property
    def size_bytes(self) -> int:
        """See `SourceTensor.size_bytes`."""
        return int(np.prod(self.shape)) * FORMATS[self.format].block_bytes

    def raw(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """There are no values: always raises."""
        raise ConfigError("a shape has no values to read")

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """There are no values: always raises."""
        raise ConfigError("a shape has no values to read")


def shapes() -> Mapping[str, ModelConfig]:
    """Return every known shape by name: the registry's aliases and the two of our benchmarks."""
    small = ModelConfig(
        family="mistral", dim=2048, num_layers=12, num_heads=16, num_kv_heads=4, head_dim=128,
        hidden_dim=5632, vocab_size=32000, max_context=65536, rope_theta=1e6,
    )  # fmt: skip
    mixture = ModelConfig(
        family="mixtral", dim=2048, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=128,
        hidden_dim=4096, vocab_size=32000, max_context=65536, rope_theta=1e6, num_experts=8,
        experts_per_token=2,
    )  # fmt: skip
    return {model.alias: model.config for model in known_models()} | {"s06": small, "moe": mixture}


def shape_source(name: str, config: ModelConfig) -> ModelSource:
    """Return a source without values: bf16 tensors of the right shape, for plans and random weights."""
    tensors = {key: ShapeTensor(shape, "BF16") for key, shape in weight_shapes(config).items()}
    return ModelSource(path=Path(name), kind="shape", config=config, tensors=tensors, name=name)


def known_shape(name: str) -> ModelSource:
    """Return the source of a known shape. Raises UserError that lists the names."""
    known = shapes()
    if name not in known:
        raise UserError(f"'{name}' is not a known shape; known: {', '.join(known)}", field="shape")
    return shape_source(name, known[name])


def make_plan(
    source: ModelSource,
    *,
    quant: str,
    kv: str,
    context: int,
    sequences: int,
    memory: int,
    adapters: int = 0,
    limits: MachineLimits | None = None,
) -> Plan:
    """Plan `sequences` sequences of `context` tokens, and `adapters` bytes of LoRA, within `memory` bytes.

    Raises ConfigError for a context beyond the model's own or a format that does not exist.
    """
    config = source.config
    config.check_context(context)
    kv_format = checked_kv_format(kv, quant)
    decode = prefill = None
    if limits is not None:
        formats = packed_formats(source, quant)
        step = decode_work(config, formats, kv_format, batch=sequences, context=context)
        decode = step.tokens / step.seconds(limits)
        step = prefill_work(config, formats, prompt=min(512, context))
        prefill = step.tokens / step.seconds(limits)
    return Plan(
        need=replace(
            memory_need(source, quant, context=context, kv_format=kv_format, sequences=sequences),
            adapters=adapters,
        ),
        context=context,
        sequences=sequences,
        quant=quant,
        kv_format=kv_format,
        memory=memory,
        largest_context=largest_context(
            source, quant, kv_format=kv_format, sequences=sequences, available=memory - adapters
        ),
        best_quant=_best_quant(source, kv, context, sequences, memory - adapters),
        decode_tokens_s=decode,
        prefill_tokens_s=prefill,
    )


def _best_quant(source: ModelSource, kv: str, context: int, sequences: int, memory: int) -> str | None:
    if source.kind == "packed":
        return None
    for quant in QUANT_CHOICES:
        kv_format = checked_kv_format(kv, quant)
        need = memory_need(source, quant, context=context, kv_format=kv_format, sequences=sequences)
        if need.total <= memory:
            return quant
    return None


def decode_work(
    config: ModelConfig, formats: Mapping[str, str], kv_format: str, *, batch: int, context: int
) -> Work:
    """Return the work of one step that gives each of `batch` sequences at depth `context` its next token.

    `formats` are packed formats by weight name. Of a mixture, the experts that `batch` independent choices
    touch on average are read.
    """
    kv = config.kv_bytes(context, KV_FORMATS[kv_format].bytes_per_value(config.head_dim))
    return Work(
        tokens=batch,
        bytes_read=_weights_read(config, formats, batch) + batch * kv,
        operations=batch * 2 * _active_values(config, head=True),
        is_float=_computes_in_float(formats),
    )


def prefill_work(config: ModelConfig, formats: Mapping[str, str], *, prompt: int) -> Work:
    """Return the work of reading a prompt into an empty context; the last row alone gets logits."""
    head = 2 * config.vocab_size * config.dim
    return Work(
        tokens=prompt,
        bytes_read=_weights_read(config, formats, prompt),
        operations=prompt * 2 * _active_values(config, head=False) + head,
        is_float=_computes_in_float(formats),
    )


def _matrices(config: ModelConfig, formats: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Yield (name, packed bytes) of every matrix that is multiplied; a tied model's table is its head."""
    for name, shape in weight_shapes(config).items():
        if len(shape) == 2 and (name != "tok_embeddings" or config.tied_embeddings):
            yield name, packed_size(formats[name], *shape)


def _weights_read(config: ModelConfig, formats: Mapping[str, str], rows: int) -> float:
    shared = experts = 0
    for name, size in _matrices(config, formats):
        if ".experts." in name:
            experts += size
        else:
            shared += size
    if not config.is_moe:
        return shared
    missed = (1 - config.experts_per_token / config.num_experts) ** rows
    return shared + experts * (1 - missed)


def _active_values(config: ModelConfig, *, head: bool) -> int:
    """Return the weights that one row is multiplied with, the head's included on request."""
    table = config.vocab_size * config.dim
    norms = (2 * config.num_layers + 1) * config.dim
    inner = config.num_active_params - norms - table * (1 if config.tied_embeddings else 2)
    return inner + (table if head else 0)


def _computes_in_float(formats: Mapping[str, str]) -> bool:
    return all(chosen in FLOAT_FORMATS for name, chosen in formats.items() if not name.endswith(".router"))
