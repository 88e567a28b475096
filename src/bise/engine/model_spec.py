"""What a fleet is told about a model, what it plans for it from headers alone, and what it tells others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bise.config import default_threads
from bise.engine.device import choose_split
from bise.engine.load import DraftSource, LoadedModel, Progress, load_model, load_text
from bise.engine.memory import (
    PROCESS_BYTES,
    STEP_TOKENS,
    memory_need,
    planned_context,
    require_weights,
    weight_bytes,
)
from bise.engine.placement import NATIVE, Placement
from bise.engine.split import Split
from bise.errors import ConfigError
from bise.model.checkpoint import open_model
from bise.model.generation import PLAIN_TEMPERATURE, suggested_temperature
from bise.model.lora import open_adapter
from bise.model.source import ModelSource

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
    draft: Path | None = None
    """A model of the same vocabulary that guesses ahead; None: guesses come from the texts alone."""
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
        names = [adapter.name for adapter in self.adapters]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"{self.name} has two adapters called '{twice[0]}'; rename one", field="adapters"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What a model will take and offer once it is loaded."""

    size_bytes: int
    """Peak bytes beyond those of the process: weights, tokenizer, KV cache, swap and scratch, or loading; the
    draft model's included. Of a model on a device, its bytes there.
    """
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
    split: Split | None = None
    """What stays in RAM of a model on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """An adapter of a model of the fleet as others see it."""

    spec: AdapterSpec
    size_bytes: int
    """Memory that is set aside for it while its model is loaded; 0 when its files could not be read."""
    is_loaded: bool
    users: int = 0
    """Leases held now."""
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
    loaded: float | None = None
    """While it is being loaded: how much of it is there, 0 to 1."""


def plan_model(spec: ModelSpec, memory: int | None) -> ModelPlan:
    """Return the plan of a model that may take `memory` bytes (None: no bound), from its headers alone; where
    it has a draft model, from the headers of both and their vocabularies.

    Raises MemoryPlanError when weights or the context asked for do not fit, ModelFileError for bad files,
    ConfigError for a draft model of another vocabulary.
    """
    source = open_model(spec.path)
    kv_format = spec.placement.kv_format(spec.kv, spec.quant)
    draft = spec.draft
    guessing = None if draft is None else DraftSource.open(draft, load_text(source)[0], spec.placement)
    size = (_native_size if spec.placement.is_native else _device_size)(spec, source, guessing, memory)
    return ModelPlan(
        size_bytes=size.total,
        weight_bytes=size.weights,
        context=size.context,
        split=size.split,
        kv_format=kv_format,
        family=source.config.family,
        parameters=source.config.num_params,
        title=source.name,
        licence=source.licence,
        modified_s=spec.path.stat().st_mtime,
        notes=size.notes,
        temperature=suggested_temperature(source.path),
        window=max((window for window in source.config.windows if window is not None), default=None),
    )


class _Size(NamedTuple):
    """What a model takes, for which context."""

    total: int
    weights: int
    context: int
    notes: tuple[str, ...]
    split: Split | None = None


def _native_size(
    spec: ModelSpec, source: ModelSource, guessing: DraftSource | None, memory: int | None
) -> _Size:
    kv_format = spec.placement.kv_format(spec.kv, spec.quant)
    beside = 0 if guessing is None else guessing.weight_bytes
    weights = weight_bytes(source, spec.quant) + beside
    require_weights(source, spec.quant, None if memory is None else memory - beside)
    context, notes = planned_context(
        source,
        spec.quant,
        kv_format,
        context=spec.context,
        sequences=spec.sequences,
        available=None if memory is None else memory - weights,
        beside=None if guessing is None else partial(guessing.working_bytes, sequences=spec.sequences),
    )
    if guessing is not None:
        beside += guessing.working_bytes(context, spec.sequences)
    need = memory_need(source, spec.quant, context=context, kv_format=kv_format, sequences=spec.sequences)
    return _Size(need.total - PROCESS_BYTES + spec.swap_bytes + beside, weights, context, notes)


def _device_size(
    spec: ModelSpec, source: ModelSource, guessing: DraftSource | None, memory: int | None
) -> _Size:
    """Return what a model takes of its device; what stays in RAM is checked against what is free there."""

    def beside(context: int) -> int:
        assert guessing is not None
        return guessing.weight_bytes + guessing.working_bytes(context, spec.sequences)

    choice = choose_split(
        source, spec.quant, spec.placement,
        kv_format=spec.placement.kv_format(spec.kv, spec.quant),
        context=spec.context,
        sequences=spec.sequences,
        device_free=memory,
        threads=default_threads() if spec.threads is None else spec.threads,
        beside=None if guessing is None else beside,
    )  # fmt: skip
    need = choice.need
    return _Size(need.device, need.weights, choice.context, choice.notes, choice.split)


def adapter_bytes(spec: ModelSpec, path: Path) -> int:
    """Return the memory that an adapter of the model takes, from headers alone: its matrices, and what a step
    needs more where it adapts feed-forward layers.

    Raises ModelFileError for an adapter that is damaged or made for another architecture.
    """
    config = open_model(spec.path).config
    file = open_adapter(path, config)
    is_inner = any(name.endswith((".w1", ".w2", ".w3")) for name in file.parts)
    return file.size_bytes + (2 * 4 * STEP_TOKENS * config.hidden_dim if is_inner else 0)


def load_planned(spec: ModelSpec, plan: ModelPlan, progress: Progress | None = None) -> LoadedModel:
    """Load a model exactly as planned, whatever else is loaded; `progress` hears of what and how far."""
    return load_model(
        spec.path,
        quant=spec.quant,
        kv=spec.kv,
        threads=spec.threads,
        placement=spec.placement,
        context=plan.context,
        split=plan.split,
        max_sequences=spec.sequences,
        prefix_cache_dir=spec.prefix_cache_dir,
        swap_bytes=spec.swap_bytes,
        draft=spec.draft,
        progress=progress,
    )
