"""The rows of the speed table: what is measured, its floor and target, and what a run of run_all.py says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

Document = dict[str, Any]

IK_MOE_PREFILL = 422.0
"""Tokens per second of ik_llama.cpp at `moe` in Q4_0, 512 tokens: another day on the same kind of machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    value: Callable[[Document], float]
    """Raises KeyError, IndexError or ValueError while its run is missing."""
    floor: float
    target: float
    unit: str = "x"
    """`x`, `%` (of one), `tok/s` or `s`."""
    less_is_better: bool = False


def _entry(document: Document, run: str, peer: str = "bise", **wanted: Any) -> dict[str, Any]:
    """Return the only result of a run with these fields."""
    found = [
        entry
        for entry in document["runs"][run]["results"]
        if entry["peer"].startswith(peer) and all(entry[key] == value for key, value in wanted.items())
    ]
    return found[0]


def _ratio(run: str, peer: str, **wanted: Any) -> Callable[[Document], float]:
    """Return the ratio to the best of the peers whose name starts with `peer`."""

    def value(document: Document) -> float:
        ratios = [
            entry["bise_ratio"]
            for entry in document["runs"][run]["results"]
            if entry["peer"].startswith(peer) and all(entry[key] == value for key, value in wanted.items())
        ]
        return min(ratios)

    return value


def _speed(document: Document, run: str, **wanted: Any) -> float:
    return _entry(document, run, **wanted)["tokens_per_s"]


def _four_rows(document: Document) -> float:
    return 4 * _speed(document, "7b-q4", batch=1, op="decode") / _speed(document, "7b-q4", batch=4)


def _window_decode(document: Document) -> float:
    run = "window-decode"
    return _speed(document, run, context=4096) / _speed(document, run, context=32768)


def _window_prefill(document: Document) -> float:
    run = "window-prefill"
    return _speed(document, run, prompt=32768) / _speed(document, run, prompt=2048)


def _overhead(document: Document) -> float:
    step = document["runs"]["7b-q4"]["engine_step_us"] / 1e6
    return step * _speed(document, "7b-q4", batch=1, op="decode")


ROWS = (
    Row("7B 4-bit prefill 512 vs llama.cpp Q4_0", _ratio("7b-q4", "llama", prompt=512), 1.8, 2.3),
    Row("same, 4 layers, vs the better of Q4_0, Q4_K_M", _ratio("7b-q4-2k", "llama", prompt=512), 1.8, 2.3),
    Row("prefill 2048, 4 layers, vs the better of both", _ratio("7b-q4-2k", "llama", prompt=2048), 1.8, 2.3),
    Row(
        "7B 4-bit decode, share of the probe",
        lambda d: _entry(d, "7b-q4", op="decode", batch=1)["share_of_limit"], 0.88, 0.95, "%",
    ),
    Row("batch 4 vs llama.cpp", _ratio("7b-q4", "llama", batch=4), 1.8, 2.4),
    Row("batch 8 vs llama.cpp", _ratio("7b-q4", "llama", batch=8), 2.0, 3.0),
    Row("batch 16 vs llama.cpp", _ratio("7b-q4", "llama", batch=16), 2.0, 2.5),
    Row("4 rows against 1 row", _four_rows, 1.3, 1.1, less_is_better=True),
    Row("0.6B decode at depth 4,096 vs llama.cpp", _ratio("s06-q4-deep", "llama", context=4096), 1.2, 1.6),
    Row("decode at 32k, window 4,096, against 4,096", _window_decode, 1.2, 1.1, less_is_better=True),
    Row("prefill of 32k, window 4,096, against 2k (7B layer)", _window_prefill, 0.75, 0.85, "%"),
    Row("MoE prefill 512 vs llama.cpp", _ratio("moe-q4", "llama", prompt=512), 1.8, 2.5),
    Row(
        "MoE prefill 512 vs ik_llama.cpp (PEERS.md)",
        lambda d: _speed(d, "moe-q4", prompt=512) / IK_MOE_PREFILL, 0.9, 1.1,
    ),
    Row("0.6B 8-bit prefill 512 vs CTranslate2", _ratio("s06-q8", "ctranslate2", prompt=512), 0.95, 1.1),
    Row(
        "8-bit decode, share of the probe (7B, 16 layers)",
        lambda d: _entry(d, "7b-q8", op="decode")["share_of_limit"], 0.88, 0.95, "%",
    ),
    Row("embedded model, decode", lambda d: _speed(d, "brise", op="decode"), 1000, 2000, "tok/s"),
    Row(
        "embedded model, start to first token",
        lambda d: median(d["startup_s"]), 0.8, 0.5, "s", less_is_better=True,
    ),
    Row("engine's share of a 7B step", _overhead, 0.03, 0.01, "%", less_is_better=True),
    Row("AVX2: prefill vs llama.cpp for AVX2 (4 layers)", _ratio("avx2", "llama", prompt=512), 1.0, 1.0),
    Row("AVX2: decode vs llama.cpp for AVX2 (4 layers)", _ratio("avx2", "llama", op="decode"), 1.0, 1.0),
    Row("AVX2, same Q4_0 file: prefill", _ratio("avx2-same-file", "llama", prompt=512), 1.0, 1.0),
    Row("AVX2, same Q4_0 file: decode", _ratio("avx2-same-file", "llama", op="decode"), 1.0, 1.0),
)  # fmt: skip


def verdicts(document: Document) -> list[dict[str, Any]]:
    """Return every row with its value (None while its run is missing), floor, target and verdict."""
    found: list[dict[str, Any]] = []
    for row in ROWS:
        try:
            value = row.value(document)
        except (KeyError, IndexError, ValueError):
            value = None
        sign = -1 if row.less_is_better else 1
        verdict = "missing"
        if value is not None:
            verdict = "target" if sign * value >= sign * row.target else "floor"
            verdict = verdict if sign * value >= sign * row.floor else "below the floor"
        found.append({"row": row.name, "value": value, "floor": row.floor, "target": row.target,
                      "unit": row.unit, "verdict": verdict})  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the verdicts as lines of text."""
    cells = [("ROW", "VALUE", "FLOOR", "TARGET", "VERDICT")]
    for entry in found:
        numbers = [_told(entry[key], entry["unit"]) for key in ("value", "floor", "target")]
        cells.append((entry["row"], numbers[0], numbers[1], numbers[2], entry["verdict"]))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _told(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.0f} tok/s" if unit == "tok/s" else f"{value:.2f}{'x' if unit == 'x' else ' s'}"
