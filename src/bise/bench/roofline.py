"""Where the time of a step goes, op by op, and how far each op is from the roof above it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bise.config import ModelConfig
from bise.formats import KV_FORMATS
from bise.kernels.cpu import packed_size
from bise.model.transformer import weight_shapes
from bise.plan import MachineLimits
from bise.svg import frame, label

_OP_OF_WEIGHT = {"wq": "linear", "wk": "linear", "wv": "linear", "wo": "linear", "w1": "mlp", "w2": "mlp",
                 "w3": "mlp", "router": "mlp"}  # fmt: skip
_NAMES = {"moe": "mlp", "add_norm": "norm"}


class TimedOps:
    """Ops that note how long each takes; everything else is the ops beneath."""

    def __init__(self, ops: object) -> None:
        self._ops = ops
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the op, timed."""
        inner: Callable[..., Any] = getattr(self._ops, name)
        key = _NAMES.get(name, name)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*args, **options)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started
            return result

        return timed if callable(inner) else inner


def op_work(
    config: ModelConfig, formats: Mapping[str, str], kv_format: str, *, rows: int, depth: int
) -> dict[str, tuple[float, float]]:
    """Return (bytes, operations) per op of a step of `rows` tokens of one sequence that follow `depth`."""
    work = {"linear": (0.0, 0.0), "mlp": (0.0, 0.0), "logits": (0.0, 0.0)}
    share = touched = 1.0
    if config.is_moe:
        share = config.experts_per_token / config.num_experts
        touched = 1 - (1 - share) ** rows
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1 or (name == "tok_embeddings" and not config.tied_embeddings):
            continue
        op = _OP_OF_WEIGHT.get(name.rpartition(".")[2], "logits")
        expert = ".experts." in name
        size = packed_size(formats[name], *shape) * (touched if expert else 1)
        count = 2 * shape[0] * shape[1] * (share if expert else 1) * (1 if op == "logits" else rows)
        work[op] = (work[op][0] + size, work[op][1] + count)
    per_value = KV_FORMATS[kv_format].bytes_per_value(config.head_dim)
    seen = sum(
        min(depth + row + 1, window or depth + rows) for window in config.windows for row in range(rows)
    )
    work["attend"] = (config.kv_bytes(depth + rows, per_value), 4.0 * config.q_dim * seen)
    return work


def op_rows(
    seconds: Mapping[str, float],
    work: Mapping[str, tuple[float, float]],
    limits: MachineLimits,
    phase: str,
    kv_format: str = "f16",
) -> list[dict[str, Any]]:
    """Return one entry per op, slowest first; `seconds` are those of one step.

    Integer keys and values multiply in 16 bits, at half the rate of 8.
    """
    attend_ops_s = limits.float_ops_s
    if KV_FORMATS[kv_format].scale_bytes and limits.int8_ops_s:
        attend_ops_s = limits.int8_ops_s / 2
    total = sum(seconds.values())
    found: list[dict[str, Any]] = []
    for op, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        size, count = work.get(op, (0.0, 0.0))
        peak = attend_ops_s if op == "attend" else limits.int8_ops_s
        least = max(size / limits.read_bytes_s, count / peak if peak else 0.0)
        found.append({
            "phase": phase,
            "op": op,
            "ms": 1e3 * taken,
            "share_of_step": taken / total,
            "gb_per_s": size / taken / 1e9 if size else None,
            "gops": count / taken / 1e9 if count else None,
            "ops_per_byte": count / size if size else None,
            "share_of_limit": least / taken if size else None,
        })  # fmt: skip
    return found


def op_table(ops: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return columns and cells of the per-op table."""

    def cell(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    rows = [
        [
            entry["phase"],
            entry["op"],
            cell(entry["ms"], ".3f"),
            cell(entry["share_of_step"], ".0%"),
            cell(entry["gb_per_s"], ".1f"),
            cell(entry["gops"], ".0f"),
            cell(entry["share_of_limit"], ".0%"),
        ]
        for entry in ops
    ]
    return ("PHASE", "OP", "MS", "OF STEP", "GB/S", "GOPS", "OF LIMIT"), rows


def draw_roofline(
    ops: Sequence[Mapping[str, Any]],
    limits: MachineLimits,
    title: str,
    *,
    decades: tuple[float, float] = (0.0, 3.5),
) -> str:
    """Return an SVG: operations per byte against operations per second, both logarithmic, roofs and ops;
    `decades` are the powers of ten of GOPS at its foot and its top.
    """
    width, height, edge = 720, 440, 60
    low_x, high_x = -1.0, 4.0
    low_y, high_y = decades

    def x(intensity: float) -> float:
        return edge + (width - 2 * edge) * (math.log10(intensity) - low_x) / (high_x - low_x)

    def y(gops: float) -> float:
        return height - edge - (height - 2 * edge) * (math.log10(gops) - low_y) / (high_y - low_y)

    parts = [
        *frame(width, height),
        label(edge, 24, title),
        label(width / 2, height - 16, "operations per byte (log)", "middle"),
        label(8, edge - 10, "GOPS (log)"),
    ]
    for name, peak in (("8-bit", limits.int8_ops_s), ("float", limits.float_ops_s)):
        if not peak:
            continue
        knee = peak / limits.read_bytes_s
        start = max(10**low_x, 10**low_y * 1e9 / limits.read_bytes_s)
        foot = start * limits.read_bytes_s / 1e9
        roof = y(peak / 1e9)
        points = f"{x(start):.1f},{y(foot):.1f} {x(knee):.1f},{roof:.1f} {width - edge},{roof:.1f}"
        parts.append(f'<polyline points="{points}" fill="none" stroke="#868e96" stroke-width="2"/>')
        parts.append(label(width - edge, roof - 6, f"{name} {peak / 1e9:,.0f} GOPS", "end"))
    for entry in ops:
        if not entry["gops"] or not entry["ops_per_byte"]:
            continue
        at_x = x(min(max(entry["ops_per_byte"], 10**low_x), 10**high_x))
        at_y = y(min(max(entry["gops"], 10**low_y), 10**high_y))
        colour = "#d9480f" if entry["phase"] == "prefill" else "#1971c2"
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="{colour}"/>')
        parts.append(label(at_x + 8, at_y + 4, f"{entry['op']} ({entry['phase']})"))
    return "\n".join([*parts, "</svg>"]) + "\n"
