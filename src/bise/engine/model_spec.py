"""What a fleet is told about a model, what it plans for it from headers alone, and what it tells others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bise.engine.device import NATIVE, Placement, device_excess
from bise.engine.load import LoadedModel, load_model
from bise.engine.memory import (
    PROCESS_BYTES,
    STEP_TOKENS,
    memory_need,
    planned_context,
    require_weights,
    weight_bytes,
)
from bise.errors import ConfigError
from bise.model.checkpoint import open_model
from bise.model.generation import PLAIN_TEMPERATURE, suggested_temperature
from bise.model.lora import open_adapter

ADAPTER_SEPARATOR = ":"
"""Between a model's name and its adapter's in what a request asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A LoRA adapter that requests ask for as MODEL:NAME."""

    name: str
    path: Path

    def __post_init__(self) -> None:
        if not self.name or ADAPTER_SEPARATOR in self.name:
            raise ConfigError(
                f"an adapter's name must have a character and no '{ADAPTER_SEPARATOR}', got '{self.name}'",
                field="name",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that a fleet may load, and how. Raises ConfigError for a name that nobody could ask for."""

    name: str
    path: Path
    quant: str = "auto"
    kv: str = "auto"
    context: int | None = None
    """Most tokens of one request; None: the model's own context, or less where memory is short."""
    sequences: int = 1
    """Requests that can reach the full context at once."""
    threads: int | None = None
    placement: Placement = NATIVE
    """The device that it runs on."""
    prefix_cache_dir: Path | None = None
    """Where cached prefixes outlast the engine; None: they do not."""
    swap_bytes: int = 0
    """Memory, beside the KV cache's, for what preempted requests leave; 0: it is computed again."""
    aliases: tuple[str, ...] = ()
    """Further names that mean this model."""
    adapters: tuple[AdapterSpec, ...] = ()
    """LoRA adapters to serve beside it; more can come and go later (`Fleet.add_adapter`)."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not name or ADAPTER_SEPARATOR in name:
                raise ConfigError(
                    f"a model's name must have a character and no '{ADAPTER_SEPARATOR}' (it separates an "
                    f"adapter's name), got '{name}'",
                    field="name",
                )
        if self.sequences < 1:
            raise ConfigError(f"sequences must be at least 1, got {self.sequences}", field="sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What a model will take and offer once it is loaded."""

    size_bytes: int
    """Peak bytes beyond those of the process: weights, tokenizer, KV cache, swap and scratch, or loading."""
    weight_bytes: int
    context: int
    kv_format: str
    family: str
    parameters: int
    title: str
    """The model's own name; empty when its files state none."""
    licence: str | None
    modified_s: float
    """When its file or directory changed last, in seconds since 1970."""
    notes: tuple[str, ...] = ()
    temperature: float = PLAIN_TEMPERATURE
    """For callers that name none: what the model's author suggests."""
    window: int | None = None
    """Keys that a token sees in the layers with a sliding window; None where every layer sees all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """An adapter of a model of the fleet as others see it."""

    spec: AdapterSpec
    size_bytes: int
    """Memory that is set aside for it while its model is loaded; 0 when its files could not be read."""
    is_loaded: bool
    fault: str | None = None
    """Why it cannot be used, in one line; None when it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model of the fleet as others see it; known without loading it."""

    spec: ModelSpec
    plan: ModelPlan | None
    """None when its files could not be read; see `fault`."""
    state: str
    """`cold`, `loading`, `ready` or `closing`."""
    users: int
    """Leases held now."""
    fault: str | None = None
    """Why it cannot be loaded, in one line; None when it can."""
    adapters: tuple[AdapterCard, ...] = ()


def plan_model(spec: ModelSpec, memory: int | None) -> ModelPlan:
    """Return the plan of a model that may take `memory` bytes (None: no bound), from its headers alone.

    Raises MemoryPlanError when weights or the context asked for do not fit, ModelFileError for bad files.
    """
    source = open_model(spec.path)
    kv_format = spec.placement.kv_format(spec.kv, spec.quant)
    excess = device_excess(source, spec.quant, spec.placement)
    weights = weight_bytes(source, spec.quant) + excess
    require_weights(source, spec.quant, None if memory is None else memory - excess)
    context, notes = planned_context(
        source,
        spec.quant,
        kv_format,
        context=spec.context,
        sequences=spec.sequences,
        available=None if memory is None else memory - weights,
    )
    need = memory_need(source, spec.quant, context=context, kv_format=kv_format, sequences=spec.sequences)
    return ModelPlan(
        size_bytes=need.total - PROCESS_BYTES + spec.swap_bytes + excess,
        weight_bytes=weights,
        context=context,
        kv_format=kv_format,
        family=source.config.family,
        parameters=source.config.num_params,
        title=source.name,
        licence=source.licence,
        modified_s=spec.path.stat().st_mtime,
        notes=notes,
        temperature=suggested_temperature(source.path),
        window=max((window for window in source.config.windows if window is not None), default=None),
    )


def adapter_bytes(spec: ModelSpec, path: Path) -> int:
    """Return the memory that an adapter of the model takes, from headers alone: its matrices, and what a step
    needs more where it adapts feed-forward layers.

    Raises ModelFileError for an adapter that is damaged or made for another architecture.
    """
    config = open_model(spec.path).config
    file = open_adapter(path, config)
    is_inner = any(name.endswith((".w1", ".w2", ".w3")) for name in file.parts)
    return file.size_bytes + (2 * 4 * STEP_TOKENS * config.hidden_dim if is_inner else 0)


def load_planned(spec: ModelSpec, plan: ModelPlan) -> LoadedModel:
    """Load a model exactly as planned, whatever else is loaded."""
    return load_model(
        spec.path,
        quant=spec.quant,
        kv=spec.kv,
        threads=spec.threads,
        placement=spec.placement,
        context=plan.context,
        max_sequences=spec.sequences,
        prefix_cache_dir=spec.prefix_cache_dir,
        swap_bytes=spec.swap_bytes,
    )
