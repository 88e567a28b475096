"""The memory that a model needs, from its headers alone, and what is free: the arithmetic behind admission
and behind `bise plan`.

Sizes are exact where we allocate (weights, KV pages, step buffers) and measured where others do (interpreter,
libraries, tokenizer): see docs/bench.md for how far prediction and peak lie apart. It loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bise.cache.pages import sequence_kv_bytes
from bise.config import ModelConfig
from bise.errors import ConfigError, MemoryPlanError
from bise.formats import FORMATS, KV_FORMATS
from bise.kernels.cpu import packed_format_of
from bise.model.pack import ALIGNMENT, SLICE_BYTES, Slot, plan_packing
from bise.model.source import ModelSource, SourceTensor

DEFAULT_CONTEXT = 32768
"""Tokens of KV cache that are planned when no context is asked for."""

STEP_TOKENS = 512
"""Rows that one step computes at most."""

PROCESS_BYTES = 50 << 20
"""Interpreter, numpy, the extension and bise, before any model (Python 3.11, Linux, 2026-11-21)."""

TOKENIZER_FACTOR = 16
"""Bytes in memory per byte of tokenizer file: the text, its parsed form and the library's tables."""

HUGE_PAGE = 2 << 20
FLOAT_FORMATS = ("f32", "f16", "bf16")
TILE_ROW_BYTES = 52
"""Bytes of one quantised activation row per 32 columns (native/formats.h)."""
FEW_ROW_BYTES = 384 * 1024
"""Quantised rows up to this size keep gate and up of the feed-forward part as floats (native/context.cpp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes that a running model takes at its peak."""

    weights: int
    """Packed weights, padding and alignment included."""
    kv: int
    """KV pages of every sequence at its longest."""
    scratch: int
    """Activations of the largest step, quantised tiles, logits."""
    loading: int
    """What converting weights takes beyond them; gone before KV and scratch appear."""
    process: int
    """Interpreter, libraries and tokenizer."""
    adapters: int = 0
    """LoRA adapters that are loaded beside the model."""

    @property
    def own(self) -> int:
        """Bytes at the peak beyond those of the process itself."""
        return self.weights + max(self.kv + self.scratch + self.adapters, self.loading)

    @property
    def total(self) -> int:
        """Peak resident bytes."""
        return self.process + self.own


def packed_formats(source: ModelSource, quant: str) -> Mapping[str, str]:
    """Return the packed format of every matrix by name, as `quant` would choose it."""
    if source.kind == "packed":
        return {name: tensor.format for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    return {
        slot.name: slot.packed_format for slot in plan_packing(source, quant).slots if len(slot.shape) == 2
    }


def weight_bytes(source: ModelSource, quant: str) -> int:
    """Return the bytes of the packed weights in memory, the last huge page rounded up."""
    if source.kind == "packed":
        size = sum(-(-tensor.size_bytes // 64) * 64 for tensor in source.tensors.values())
    else:
        size = plan_packing(source, quant).size_bytes
    return _rounded(size, HUGE_PAGE)


def kv_bytes(config: ModelConfig, context: int, kv_format: str, sequences: int = 1) -> int:
    """Return the bytes of the KV pages of `sequences` sequences of `context` tokens, windows respected."""
    return sequences * sequence_kv_bytes(config, context, kv_format, STEP_TOKENS)


def scratch_bytes(config: ModelConfig, formats: Mapping[str, str], rows: int, sequences: int = 1) -> int:
    """Return the bytes of a step of `rows` tokens: the arrays alive at its widest point, and the buffers that
    the native context keeps (native/context.cpp).
    """
    width, hidden = config.dim, config.hidden_dim
    rope = rows * config.head_dim * 4
    attention = rows * (2 * config.q_dim + 2 * config.kv_dim + 3 * width)
    feed_forward = rows * 4 * width
    floats = 4 * max(attention, feed_forward)
    padded = -(-rows // 16) * 16 if rows > 4 else rows
    wide = max(width, config.q_dim)
    native = 0
    if any(chosen not in FLOAT_FORMATS for chosen in formats.values()):
        native += padded * -(-wide // 32) * TILE_ROW_BYTES
    if _is_fused(formats):
        native += padded * -(-hidden // 32) * TILE_ROW_BYTES
        few = FEW_ROW_BYTES // (-(-width // 32) * TILE_ROW_BYTES)
        native += 2 * min(rows, few) * hidden * 4
    else:
        native += 2 * rows * hidden * 4
    if config.is_moe:
        busiest = min(rows, -(-2 * rows * config.experts_per_token // config.num_experts))
        native += 4 * width * (2 * busiest + rows * config.experts_per_token)
    logits = sequences * config.vocab_size * 4 + config.vocab_size * 8
    return rope + floats + native + logits


def _is_fused(formats: Mapping[str, str]) -> bool:
    """Return True when the feed-forward layers keep their hidden rows as quantised tiles."""
    inner = [chosen for name, chosen in formats.items() if name.endswith((".w1", ".w2", ".w3"))]
    return bool(inner) and all(chosen not in FLOAT_FORMATS for chosen in inner)


def loading_bytes(source: ModelSource, quant: str) -> int:
    """Return the bytes by which converting the weights, one after the other, exceeds the packed weights.

    A slice of rows is alive as stored and as float32 beside the slice before it; the memory of weights that
    come later is not touched yet.
    """
    if source.kind == "packed":
        return 0
    done = most = 0
    for slot in plan_packing(source, quant).slots:
        if len(slot.shape) == 2:
            most = max(most, done + _converting_bytes(source.tensors[slot.name], slot))
        done += _rounded(slot.size_bytes, ALIGNMENT)
    return max(0, most - done)


def _converting_bytes(tensor: SourceTensor, slot: Slot) -> int:
    """Return the most bytes that one weight takes while it is converted, its packed rows included."""
    num_rows, num_columns = slot.shape
    step = min(num_rows, max(16, SLICE_BYTES // (4 * num_columns) // 16 * 16))
    stored = FORMATS[tensor.format].bits_per_weight / 8 * num_columns
    ggml_id = FORMATS[tensor.format].ggml_id
    repacks = FORMATS[tensor.format].is_quantised and packed_format_of(ggml_id or 0) == slot.packed_format
    kept = stored if repacks else 4.0 * num_columns
    # Stored slices are small enough for the allocator to keep their memory when they are freed.
    slack = 0.0 if repacks else stored * step
    packed = slot.size_bytes / num_rows
    most = 0.0
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        before = kept * step if start else 0.0
        most = max(most, start * packed + before + kept * count, (start + count) * packed + kept * count)
    return int(most + slack)


def process_bytes(source: ModelSource) -> int:
    """Return the bytes of a process that has read the source's tokenizer and nothing else."""
    return PROCESS_BYTES + TOKENIZER_FACTOR * _tokenizer_file_bytes(source)


def _tokenizer_file_bytes(source: ModelSource) -> int:
    for name in ("tekken.json", "tokenizer.json", "tokenizer.model"):
        path = source.path / name
        try:
            return path.stat().st_size
        except OSError:  # not there, or the source is a file
            continue
    return 40 * source.config.vocab_size  # a token list with scores inside a GGUF, or a shape without files


def memory_need(
    source: ModelSource, quant: str, *, context: int, kv_format: str, sequences: int = 1
) -> MemoryNeed:
    """Return what the model takes when `sequences` sequences reach `context` tokens each."""
    formats = packed_formats(source, quant)
    rows = min(STEP_TOKENS, sequences * context)
    return MemoryNeed(
        weights=weight_bytes(source, quant),
        kv=kv_bytes(source.config, context, kv_format, sequences),
        scratch=scratch_bytes(source.config, formats, rows, sequences),
        loading=loading_bytes(source, quant),
        process=process_bytes(source),
    )


def require_weights(source: ModelSource, quant: str, available: int | None) -> None:
    """Raise MemoryPlanError unless the weights, and the slices they are made of, fit `available` bytes."""
    needed = weight_bytes(source, quant) + loading_bytes(source, quant)
    if available is not None and needed > available:
        raise MemoryPlanError(
            f"{source.path} needs {amount(needed)} for its weights, {amount(available)} "
            "of memory are free; try --quant q4, close other programs, or take a smaller model",
            field="model",
        )


def planned_context(
    source: ModelSource,
    quant: str,
    kv_format: str,
    *,
    context: int | None,
    sequences: int,
    available: int | None,
    beside: Callable[[int], int] | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Return the context to plan for, with a note when it is shorter than the model's own.

    `available` is what is free beside the weights, `beside` the bytes that another model takes for a context
    of so many tokens. An asked-for context that does not fit raises
    MemoryPlanError; without one the longest of the model's own and 32,768, halved until it takes half of what
    is free.
    """
    config = source.config
    formats = packed_formats(source, quant)

    def cost(tokens: int) -> int:
        rows = min(STEP_TOKENS, sequences * tokens)
        other = 0 if beside is None else beside(tokens)
        own = kv_bytes(config, tokens, kv_format, sequences)
        return other + own + scratch_bytes(config, formats, rows, sequences)

    if context is not None:
        config.check_context(context)
        if available is not None and cost(context) > available:
            raise MemoryPlanError(
                f"a context of {context} tokens needs {amount(cost(context))} of KV cache and "
                f"scratch memory, {amount(max(available, 0))} are free beside the weights; "
                "ask for a smaller --context or --kv q8",
                field="context",
            )
        return context, ()
    tokens = min(config.max_context, DEFAULT_CONTEXT)
    while available is not None and cost(tokens) > available // 2 and tokens > STEP_TOKENS:
        tokens //= 2
    if tokens == config.max_context:
        return tokens, ()
    return tokens, (
        f"context {tokens} of the model's {config.max_context} tokens; --context N asks for another",
    )


def largest_context(
    source: ModelSource, quant: str, *, kv_format: str, sequences: int, available: int
) -> int:
    """Return the most tokens per sequence, up to the model's own context, whose peak fits `available` bytes;
    0 when not even one token fits.
    """

    def fits(tokens: int) -> bool:
        need = memory_need(source, quant, context=tokens, kv_format=kv_format, sequences=sequences)
        return need.total <= available

    low, high = 0, source.config.max_context
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def checked_kv_format(kv: str, quant: str) -> str:
    """Return the KV format that `kv` means: itself, or for auto f32 beside float32 weights and q16 else."""
    if kv == "auto":
        return "f32" if quant == "none" else "q16"
    if kv not in KV_FORMATS:
        raise ConfigError(f"kv must be auto, {', '.join(KV_FORMATS)}, got '{kv}'", field="kv")
    return kv


def available_memory() -> int | None:
    """Return the bytes of memory that can be taken without swapping, within the container's limit; None when
    the system does not tell.
    """
    free = _free_memory()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None:
        return free
    left = max(limit - (used or 0), 0)
    return left if free is None else min(free, left)


def _free_memory() -> int | None:
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


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def amount(size: int) -> str:
    """Return bytes for people: `4.1 GiB`, `96.0 MiB`."""
    return gibibytes(size) if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def gibibytes(size: int) -> str:
    """Return bytes for people, in one unit whatever they are: `0.1 GiB`."""
    return f"{size / 2**30:.1f} GiB"
