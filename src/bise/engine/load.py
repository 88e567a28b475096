"""From a path to a running engine: open, pack or read the weights, plan the KV cache, start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bise import __version__
from bise.cache.pages import plan_num_blocks
from bise.cache.prefix_file import PrefixFile
from bise.config import default_threads
from bise.diskfile import require_inside
from bise.engine.device import NATIVE, Placement, device_excess, free_bytes, make_ops, place_weights
from bise.engine.draft_model import STEP_TOKENS as DRAFT_STEP_TOKENS
from bise.engine.draft_model import DraftModel, check_same_vocabulary
from bise.engine.engine import Engine
from bise.engine.memory import (
    STEP_TOKENS,
    available_memory,
    checked_kv_format,
    kv_bytes,
    packed_formats,
    planned_context,
    require_weights,
    scratch_bytes,
    weight_bytes,
)
from bise.engine.pace import Pace
from bise.engine.receipt import NUMERICS_VERSION
from bise.engine.speculation import Speculation
from bise.errors import ConfigError, MemoryPlanError, ModelFileError
from bise.kernels import Array, Ops, Weight
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
    from bise.kernels.torch import TorchOps

Progress = Callable[[str, float], None]

STEP_SECONDS = 0.25
"""What a step should last at most while others wait for it: a gap between two words that nobody minds."""

SEATS = 2
"""Sequences that may run for each one that the KV memory is planned for: few reach the full context."""

PREFIX_FILE_BYTES = 1 << 30
"""Largest file of cached prefixes."""


@dataclass(slots=True)
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

    def load_adapter(self, name: str, path: Path) -> Adapter:
        """Let requests name the LoRA adapter in directory `path` as `name`, while others run.

        Raises ModelFileError when it is damaged or made for another model, MemoryPlanError when it does not
        fit the free memory, ConfigError when the name belongs to another adapter.
        """
        if self.ops is None:
            raise ConfigError("this model was not loaded in a way that lets it take adapters")
        file = open_adapter(path, self.source.config)
        check_base(file, lambda: content_hash(self.source))
        free = available_memory()
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
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model at `path` and start its engine on the device of `placement`.

    `kv` is f32, f16, bf16, q8 or auto (f32 with quant none, else f16). `context` bounds prompt and output
    together; without it the model's own context counts, up to 32,768 tokens and what half of the free memory
    holds. `max_sequences` full contexts can run at once, and twice as many shorter ones. With
    `prefix_cache_dir` cached prefixes are written there when the engine closes, up to 1 GiB, and found again
    by the next one. Preempted requests may leave `swap_bytes` outside of the KV memory. The model at `draft`,
    of the same vocabulary, guesses ahead; the output is the same. Raises UserError for everything the caller
    can mend.
    """
    source = open_model(path)
    kv_format = placement.kv_format(kv, quant)
    threads = default_threads() if threads is None else _checked_threads(threads)
    ops: CpuOps | TorchOps = CpuOps(threads) if placement.is_native else make_ops(placement)
    if not placement.is_native:
        _require_native(placement, prefix_cache_dir=prefix_cache_dir, swap_bytes=swap_bytes, draft=draft)
    guessing = None if draft is None else DraftSource.open(draft)
    free = free_bytes(placement)
    if free is not None:
        free -= device_excess(source, quant, placement) + (0 if guessing is None else guessing.weight_bytes)
    require_weights(source, quant, free)
    tokens, shortened = planned_context(
        source, quant, kv_format,
        context=context,
        sequences=max_sequences,
        available=None if free is None else free - weight_bytes(source, quant),
        beside=None if guessing is None else partial(guessing.working_bytes, sequences=max_sequences),
    )  # fmt: skip
    tokenizer, template = load_text(source)
    if guessing is not None:
        check_same_vocabulary(load_text(guessing.source)[0], tokenizer, str(draft))
    weights, notes = _load_weights(source, quant, ops, threads, progress)
    transformer = Transformer(source.config, weights, ops)
    prefix_file = _prefix_file(prefix_cache_dir, source, quant, kv_format)
    guesser = None if guessing is None else guessing.load(ops, tokens, max_sequences, progress)
    engine = Engine(
        transformer,
        ops,
        config=source.config,
        tokenizer=tokenizer,
        kv_format=kv_format,
        kv_memory_bytes=kv_bytes(source.config, tokens, kv_format, max_sequences),
        max_context=tokens,
        max_step_tokens=STEP_TOKENS,
        max_sequences=max(SEATS * max_sequences, 8),
        prefix_file=prefix_file,
        swap_bytes=swap_bytes,
        model_id=str(path) if prefix_file is None else prefix_file.model_id,
        speculation=Speculation(draft_model=guesser),
        pace=Pace(STEP_SECONDS),
        threaded=threaded,
    )
    notes, temperature = notes + shortened, suggested_temperature(source.path)
    return LoadedModel(source, tokenizer, template, engine, notes, quant, kv_format, temperature, ops)


def _load_weights(
    source: ModelSource, quant: str, ops: CpuOps | TorchOps, threads: int, progress: Progress | None
) -> tuple[dict[str, Weight | Array], tuple[str, ...]]:
    """Return the weights in the form of `ops`, and a line for each conversion that changes values."""
    if isinstance(ops, CpuOps):
        packed, notes = load_packed(source, quant, ops, progress)
        return packed.weights(ops), notes
    weights = place_weights(source, quant, ops, threads, progress)
    return weights, () if source.kind == "packed" else plan_packing(source, quant).notes


def _require_native(placement: Placement, **wanted: object) -> None:
    """Raise ConfigError for what only the native extension can do so far."""
    for name, value in wanted.items():
        if value:
            raise ConfigError(
                f"{name} is not there yet on {placement.device} with PyTorch; leave it away", field=name
            )


@dataclass(frozen=True, slots=True)
class DraftSource:
    """A model on disk that is going to guess for another one."""

    source: ModelSource

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a model as it lies; its weights keep their width."""
        return cls(open_model(path))

    @property
    def weight_bytes(self) -> int:
        """Memory of its weights."""
        return weight_bytes(self.source, "auto")

    def working_bytes(self, context: int, sequences: int) -> int:
        """Return the memory for KV pages and steps beside `sequences` texts of `context` tokens."""
        config = self.source.config
        kv_format, context = checked_kv_format("auto", "auto"), min(context, config.max_context)
        formats = packed_formats(self.source, "auto")
        rows = min(DRAFT_STEP_TOKENS, sequences * context)
        pages = kv_bytes(config, context, kv_format, sequences)
        return pages + scratch_bytes(config, formats, rows, max(sequences, 8))

    def load(
        self, ops: CpuOps | TorchOps, context: int, sequences: int, progress: Progress | None
    ) -> DraftModel:
        """Load the weights, and take KV memory for `sequences` texts of `context` tokens, or as many as the
        model can take.
        """
        assert isinstance(ops, CpuOps)  # refused before, elsewhere
        config = self.source.config
        kv_format, context = checked_kv_format("auto", "auto"), min(context, config.max_context)
        blocks = plan_num_blocks(
            config,
            kv_bytes(config, context, kv_format, sequences),
            kv_format,
            max_context=context,
            max_step_tokens=STEP_TOKENS,
            max_sequences=max(sequences, 8),
        )
        packed, _ = load_packed(self.source, "auto", ops, progress)
        model = Transformer(config, packed.weights(ops), ops)
        return DraftModel(model, ops, num_blocks=blocks, kv_format=kv_format)


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
