"""From a path to a running engine: open, pack or read the weights, plan the KV cache, start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from bise import __version__
from bise.cache.pages import plan_num_blocks
from bise.cache.prefix_file import PrefixFile
from bise.config import default_threads
from bise.diskfile import require_inside
from bise.engine.device import choose_split, device_name, device_ops, free_bytes, make_ops, place_weights
from bise.engine.draft_model import STEP_TOKENS as DRAFT_STEP_TOKENS
from bise.engine.draft_model import DraftModel, check_same_vocabulary
from bise.engine.engine import Engine
from bise.engine.memory import (
    STEP_TOKENS,
    available_memory,
    kv_bytes,
    packed_formats,
    planned_context,
    require_weights,
    scratch_bytes,
    weight_bytes,
)
from bise.engine.pace import Pace
from bise.engine.placement import NATIVE, Placement
from bise.engine.receipt import NUMERICS_VERSION, ModelIdentity, identify
from bise.engine.replay import ReplayedModel
from bise.engine.runner import Model
from bise.engine.speculation import Speculation
from bise.engine.split import Choice, Sizes, Split
from bise.errors import ConfigError, MemoryPlanError, ModelFileError
from bise.kernels import Array, Ops, Weight
from bise.kernels.counts import ExpertCounts
from bise.kernels.cpu import CpuOps
from bise.model.checkpoint import open_model
from bise.model.generation import PLAIN_TEMPERATURE, suggested_temperature
from bise.model.lora import Adapter, check_base, load_adapter, open_adapter
from bise.model.pack import plan_packing
from bise.model.packed import TOKENIZER_FILES, content_hash, load_packed
from bise.model.source import ModelSource
from bise.model.transformer import Transformer
from bise.text.template import ChatTemplate, load_template, template_from_gguf
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

if TYPE_CHECKING:
    from bise.kernels.split import SplitOps
    from bise.kernels.torch import TorchOps

Progress = Callable[[str, float], None]

STEP_SECONDS = 0.12
"""What a step should last at most while others wait for it: a gap between two words that nobody minds."""

SEATS = 2
"""Sequences that may run for each one that the KV memory is planned for: few reach the full context."""

PREFIX_FILE_BYTES = 1 << 30
"""Largest file of cached prefixes."""


@dataclass(slots=True, weakref_slot=True)
class LoadedModel:
    """A model that runs."""

    source: ModelSource
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None when the model brings no chat format."""
    engine: Engine
    notes: tuple[str, ...]
    """One line for each conversion that changes values."""
    quant: str
    kv: str
    temperature: float = PLAIN_TEMPERATURE
    """For callers that name none: what the model's author suggests."""

    ops: Ops | None = None
    """The backend that the model lies on; None: it cannot take adapters."""
    placement: Placement = NATIVE
    """The device that it runs on."""
    split: Split | None = None
    """What of it lies there; None on the processor."""

    _identity: ModelIdentity | None = field(default=None, init=False, repr=False)

    def identity(self) -> ModelIdentity:
        """Return which model this is, by content. The first call reads its files."""
        if self._identity is None:
            self._identity = identify(self.source, self.tokenizer)
        return self._identity

    def load_adapter(self, name: str, path: Path) -> Adapter:
        """Let requests name the LoRA adapter in directory `path` as `name`, while others run.

        Raises ModelFileError when it is damaged or made for another model, MemoryPlanError when it does not
        fit the free memory, ConfigError when the name belongs to another adapter.
        """
        if self.ops is None:
            raise ConfigError(
                "this model was put together without its backend, so it takes no adapters; load it with "
                "`load_model`",
                field="adapter",
            )
        file = open_adapter(path, self.source.config)
        check_base(file, lambda: content_hash(self.source))
        free = available_memory() if self.placement.is_native else free_bytes(self.placement)
        if free is not None and file.size_bytes > free:
            raise MemoryPlanError(
                f"{path} needs {file.size_bytes >> 20} MiB, {free >> 20} MiB of memory are free; unload "
                "another model or close other programs",
                field="adapter",
            )
        adapter = load_adapter(file, self.ops)
        self.engine.adapters.add(name, adapter)
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Refuse the adapter from now on; requests that use it go on. Raises ModelNotFoundError."""
        self.engine.adapters.remove(name)

    def expert_counts(self) -> ExpertCounts | None:
        """Return how often wanted experts were on the device; None where all lie in one place."""
        return getattr(self.ops, "expert_counts", None)

    def close(self) -> None:
        """Stop the engine and let the memory go."""
        self.engine.close()


def load_model(
    path: Path,
    *,
    quant: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    max_sequences: int = 1,
    threaded: bool = True,
    prefix_cache_dir: Path | None = None,
    swap_bytes: int = 0,
    draft: Path | None = None,
    placement: Placement = NATIVE,
    split: Split | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model at `path` and start its engine on the device of `placement`.

    `kv` is f32, f16, bf16, q16, q8 or auto (f32 with quant none, else q16; on a device what it computes in).
    `context` bounds prompt and output together; without it the model's own context counts, up to 32,768
    tokens and what half of the free memory holds. `max_sequences` full contexts can run at once, and twice as
    many shorter ones (8 at least). With `prefix_cache_dir` cached prefixes are written there when the engine
    closes, up to 1 GiB, and found again by the next one. Preempted requests may leave `swap_bytes` outside of
    the KV memory. The model at `draft`, of the same vocabulary, guesses ahead; the output is the same. On a
    device `split` says what stays in RAM; None: as `placement` allows and the memory asks for. Raises
    UserError for everything the caller can mend.
    """
    source = open_model(path)
    kv_format, temperature = placement.kv_format(kv, quant), suggested_temperature(source.path)
    threads = default_threads() if threads is None else _checked_threads(threads)
    tokenizer, template = load_text(source)
    guessing = None if draft is None else DraftSource.open(draft, tokenizer, placement)
    wanted = Wanted(source, quant, kv_format, context, max_sequences, threads)
    if placement.is_native:
        tokens, choice_notes = _native_context(wanted, guessing)
        split, ops = None, CpuOps(threads)
    else:
        choice = _device_choice(wanted, placement, split, guessing)
        tokens, choice_notes, split = choice.context, choice.notes, choice.split
        ops = make_ops(placement, split, threads)
    weights, notes = _load_weights(source, quant, ops, split, threads, progress)
    transformer = Transformer(source.config, weights, ops)
    prefix_file = _prefix_file(prefix_cache_dir, source, f"{quant}{device_name(placement, split)}", kv_format)
    guesser = None if guessing is None else guessing.load(ops, tokens, max_sequences, threads, progress)
    seats = max(SEATS * max_sequences, 8)
    engine = Engine(
        _recorded(transformer, weights, ops, seats, tokens),
        ops,
        config=source.config,
        tokenizer=tokenizer,
        kv_format=kv_format,
        kv_memory_bytes=kv_bytes(source.config, tokens, kv_format, max_sequences),
        max_context=tokens,
        max_step_tokens=STEP_TOKENS,
        max_sequences=seats,
        prefix_file=prefix_file,
        swap_bytes=swap_bytes,
        model_id=str(path) if prefix_file is None else prefix_file.model_id,
        speculation=Speculation(draft_model=guesser),
        pace=Pace(STEP_SECONDS),
        threaded=threaded,
    )
    notes += choice_notes
    return LoadedModel(
        source, tokenizer, template, engine, notes, quant, kv_format, temperature, ops, placement, split
    )


def _recorded(
    model: Transformer, weights: Mapping[str, Weight | Array], ops: Ops, max_rows: int, context: int
) -> Model:
    """Return the model with its decode steps recorded where the backend can do that, else as it is."""
    if isinstance(ops, CpuOps):
        return ReplayedModel(model, weights, ops, max_context=context)
    if ops.name != "triton":
        return model
    from bise.engine.graphs import GraphedModel
    from bise.kernels.triton.ops import TritonOps

    assert isinstance(ops, TritonOps)
    if ops.device.type != "cuda":
        return model
    return GraphedModel(model, ops.device, max_rows=max_rows, max_context=context)


class Wanted(NamedTuple):
    """A model and what is asked of it."""

    source: ModelSource
    quant: str
    kv_format: str
    context: int | None
    sequences: int
    threads: int


def _native_context(wanted: Wanted, guessing: DraftSource | None) -> tuple[int, tuple[str, ...]]:
    """Return the context to plan for on the processor, with a note when it is short; MemoryPlanError when
    weights or context do not fit.
    """
    free = available_memory()
    if free is not None and guessing is not None:
        free -= guessing.weight_bytes
    require_weights(wanted.source, wanted.quant, free)
    return planned_context(
        wanted.source, wanted.quant, wanted.kv_format,
        context=wanted.context,
        sequences=wanted.sequences,
        available=None if free is None else free - weight_bytes(wanted.source, wanted.quant),
        beside=None if guessing is None else partial(guessing.working_bytes, sequences=wanted.sequences),
    )  # fmt: skip


def _device_choice(
    wanted: Wanted, placement: Placement, split: Split | None, guessing: DraftSource | None
) -> Choice:
    """Return what is to lie on the device; MemoryPlanError when it does not fit."""

    def beside(context: int) -> int:
        assert guessing is not None
        return guessing.weight_bytes + guessing.working_bytes(context, wanted.sequences)

    return choose_split(
        wanted.source, wanted.quant, placement,
        kv_format=wanted.kv_format,
        context=wanted.context,
        sequences=wanted.sequences,
        device_free=free_bytes(placement),
        threads=wanted.threads,
        beside=None if guessing is None else beside,
        split=split,
    )  # fmt: skip


def _load_weights(
    source: ModelSource,
    quant: str,
    ops: CpuOps | TorchOps | SplitOps,
    split: Split | None,
    threads: int,
    progress: Progress | None,
) -> tuple[dict[str, Weight | Array], tuple[str, ...]]:
    """Return the weights in the form of `ops`, and a line for each conversion that changes values."""
    if isinstance(ops, CpuOps):
        packed, notes = load_packed(source, quant, ops, progress)
        return packed.weights(ops), notes
    weights = place_weights(source, quant, ops, split or Split(), threads, progress)
    return weights, () if source.kind == "packed" else plan_packing(source, quant).notes


@dataclass(frozen=True, slots=True)
class DraftSource:
    """A model on disk that is going to guess for another one, on the same device."""

    source: ModelSource
    placement: Placement = NATIVE

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, placement: Placement = NATIVE) -> Self:
        """Open a model as it lies; its weights keep their width. Raises ConfigError unless its vocabulary is
        that of `tokenizer`.
        """
        source = open_model(path)
        check_same_vocabulary(load_text(source)[0], tokenizer, str(path))
        return cls(source, placement)

    @property
    def _kv_format(self) -> str:
        return self.placement.kv_format("auto", "auto")

    @property
    def weight_bytes(self) -> int:
        """Memory of its weights."""
        if self.placement.is_native:
            return weight_bytes(self.source, "auto")
        return self._sizes.need(Split(), 1, 1).weights

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.source, "auto", self.placement, self._kv_format)

    def working_bytes(self, context: int, sequences: int) -> int:
        """Return the memory for KV pages and steps beside `sequences` texts of `context` tokens."""
        config = self.source.config
        context = min(context, config.max_context)
        if not self.placement.is_native:
            need = self._sizes.need(Split(), context, sequences)
            return max(need.kv + need.scratch, need.loading)
        formats = packed_formats(self.source, "auto")
        rows = min(DRAFT_STEP_TOKENS, sequences * context)
        pages = kv_bytes(config, context, self._kv_format, sequences)
        return pages + scratch_bytes(config, formats, rows, max(sequences, 8))

    def load(
        self,
        ops: CpuOps | TorchOps | SplitOps,
        context: int,
        sequences: int,
        threads: int,
        progress: Progress | None,
    ) -> DraftModel:
        """Load the weights, and take KV memory for `sequences` texts of `context` tokens, or as many as the
        model can take. On a device all of it lies there.
        """
        config = self.source.config
        own = ops if isinstance(ops, CpuOps) else device_ops(ops)
        kv_format, context = self._kv_format, min(context, config.max_context)
        blocks = plan_num_blocks(
            config,
            kv_bytes(config, context, kv_format, sequences),
            kv_format,
            max_context=context,
            max_step_tokens=STEP_TOKENS,
            max_sequences=max(sequences, 8),
        )
        weights, _ = _load_weights(self.source, "auto", own, None, threads, progress)
        return DraftModel(Transformer(config, weights, own), own, num_blocks=blocks, kv_format=kv_format)


def _prefix_file(
    directory: Path | None, source: ModelSource, quant: str, kv_format: str
) -> PrefixFile | None:
    """Return where this model's cached prefixes are kept over restarts."""
    if directory is None:
        return None
    return PrefixFile(
        directory,
        model_id=f"{content_hash(source)} {quant}",
        kv_format=kv_format,
        version=f"{__version__} {NUMERICS_VERSION}",
        max_bytes=PREFIX_FILE_BYTES,
    )


def _checked_threads(threads: int) -> int:
    if not 1 <= threads <= 1024:
        raise ConfigError(f"threads must be from 1 to 1024, got {threads}", field="threads")
    return threads


def load_text(source: ModelSource) -> tuple[Tokenizer, ChatTemplate | None]:
    """Read a model's tokenizer and chat format; None where it has no format. Raises ModelFileError."""
    vocab_size = source.config.vocab_size
    if not any(key.startswith("tokenizer.ggml.") for key in source.metadata):
        require_inside(source.path, TOKENIZER_FILES)
        tokenizer = load_tokenizer(source.path, vocab_size)
        return tokenizer, _template(lambda: load_template(source.path, tokenizer))
    try:
        tokenizer = tokenizer_from_gguf(source.metadata, vocab_size)
        return tokenizer, _template(lambda: template_from_gguf(source.metadata, tokenizer))
    except ModelFileError as error:
        # Metadata has no path of its own: only here is it known which file it came from.
        raise ModelFileError(f"{source.path}: {error}", field=error.field) from error


def _template(load: Callable[[], ChatTemplate]) -> ChatTemplate | None:
    """Return the chat template; None for a model that has none."""
    try:
        return load()
    except ModelFileError as error:
        if error.field not in ("chat_template", "tokenizer.chat_template"):
            raise
        return None
