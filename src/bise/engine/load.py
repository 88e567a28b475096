"""From a path to a running engine: open, pack or read the weights, plan the KV cache, start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bise.cache.pages import sequence_kv_bytes
from bise.config import default_threads
from bise.engine.engine import Engine
from bise.errors import ConfigError, MemoryPlanError, ModelFileError
from bise.formats import KV_FORMATS
from bise.kernels.cpu import CpuOps
from bise.model.checkpoint import open_model
from bise.model.pack import plan_packing
from bise.model.packed import load_packed
from bise.model.source import ModelSource
from bise.model.transformer import Transformer
from bise.text.template import ChatTemplate, load_template, template_from_gguf
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

Progress = Callable[[str, float], None]

DEFAULT_CONTEXT = 32768
"""Tokens of KV cache that are planned when no context is asked for."""

STEP_TOKENS = 512


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
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model at `path` and start its engine.

    `kv` is f32, f16, bf16, q8 or auto (f32 with quant none, else f16). `context` bounds prompt and output
    together; without it the model's own context counts, up to 32,768 tokens and what half of the free memory
    holds. `max_sequences` full contexts can run at once. Raises UserError for everything the caller can mend.
    """
    source = open_model(path)
    kv_format = _kv_format(kv, quant)
    ops = CpuOps(default_threads() if threads is None else _checked_threads(threads))
    _require_memory(source, quant)
    tokenizer, template = _text(source)
    packed, notes = load_packed(source, quant, ops, progress)
    transformer = Transformer(source.config, packed.weights(ops), ops)
    tokens, shortened = _planned_context(source, kv_format, context, max_sequences)
    engine = Engine(
        transformer,
        ops,
        config=source.config,
        tokenizer=tokenizer,
        kv_format=kv_format,
        kv_memory_bytes=max_sequences * sequence_kv_bytes(source.config, tokens, kv_format, STEP_TOKENS),
        max_context=tokens,
        max_step_tokens=STEP_TOKENS,
        max_sequences=max(max_sequences, 8),
        threaded=threaded,
    )
    return LoadedModel(source, tokenizer, template, engine, notes + shortened, quant, kv_format)


def _checked_threads(threads: int) -> int:
    if not 1 <= threads <= 1024:
        raise ConfigError(f"threads must be from 1 to 1024, got {threads}", field="threads")
    return threads


def _kv_format(kv: str, quant: str) -> str:
    if kv == "auto":
        return "f32" if quant == "none" else "f16"
    if kv not in KV_FORMATS:
        raise ConfigError(f"kv must be auto, {', '.join(KV_FORMATS)}, got '{kv}'", field="kv")
    return kv


def _text(source: ModelSource) -> tuple[Tokenizer, ChatTemplate | None]:
    vocab_size = source.config.vocab_size
    from_gguf = any(key.startswith("tokenizer.ggml.") for key in source.metadata)
    tokenizer = (
        tokenizer_from_gguf(source.metadata, vocab_size)
        if from_gguf
        else load_tokenizer(source.path, vocab_size)
    )
    try:
        template = (
            template_from_gguf(source.metadata, tokenizer)
            if from_gguf
            else load_template(source.path, tokenizer)
        )
    except ModelFileError as error:
        if error.field not in ("chat_template", "tokenizer.chat_template"):
            raise
        template = None
    return tokenizer, template


def _require_memory(source: ModelSource, quant: str) -> None:
    available = available_memory()
    if source.kind == "packed":
        needed = sum(tensor.size_bytes for tensor in source.tensors.values())
    else:
        needed = plan_packing(source, quant).size_bytes
    if available is not None and needed > available:
        raise MemoryPlanError(
            f"{source.path} needs {needed / 2**30:.1f} GiB for its weights, {available / 2**30:.1f} GiB "
            "of memory are free; try --quant q4, close other programs, or take a smaller model",
            field="model",
        )


def _planned_context(
    source: ModelSource, kv_format: str, context: int | None, max_sequences: int
) -> tuple[int, tuple[str, ...]]:
    config = source.config
    available = available_memory()
    budget = None if available is None else available // 2

    def cost(tokens: int) -> int:
        return max_sequences * sequence_kv_bytes(config, tokens, kv_format, STEP_TOKENS)

    if context is not None:
        if not 1 <= context <= config.max_context:
            raise ConfigError(
                f"context must be from 1 to {config.max_context} tokens (this model's), got {context}",
                field="context",
            )
        if available is not None and cost(context) > available:
            raise MemoryPlanError(
                f"a context of {context} tokens needs {cost(context) / 2**30:.1f} GiB of KV cache, "
                f"{available / 2**30:.1f} GiB are free; ask for a smaller --context or --kv q8",
                field="context",
            )
        return context, ()
    tokens = min(config.max_context, DEFAULT_CONTEXT)
    while budget is not None and cost(tokens) > budget and tokens > 512:
        tokens //= 2
    if tokens == config.max_context:
        return tokens, ()
    return tokens, (
        f"context {tokens} of the model's {config.max_context} tokens; --context N asks for another",
    )


def available_memory() -> int | None:
    """Return the bytes of memory that can be taken without swapping, None when the system does not tell."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
