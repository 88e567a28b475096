"""The report on ablations: differences with their errors, a table, two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

QUESTIONS = {
    "Grouped queries (Mistral 7B: quality of many heads at the cost of few)": ("gqa", ("mha", "mqa")),
    "Window (Mistral 7B: attention over 64 tokens a layer instead of all)": ("gqa", ("window",)),
    "Experts (Mixtral: 8 experts of which 2 answer)": ("gqa", ("moe", "dense-total")),
}
"""Each question's base and what is compared with it."""
COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#862e9c", "#868e96", "#e8590c")
Result = Mapping[str, Any]


def write_report(out: Path) -> None:
    """Write report.json, report.md, loss.svg and kv.svg from the results in a folder."""
    results: dict[str, list[Result]] = {}
    for path in sorted(out.glob("*.*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["variant"], []).append(result)
    if "gqa" not in results:
        return
    rows = {name: _mean(found) for name, found in results.items()}
    differences = {
        name: _difference(results["gqa"], found) for name, found in results.items() if name != "gqa"
    }
    report = {"variants": rows, "against_gqa": differences}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_text(rows, differences, results), encoding="utf-8")
    curves = {name: [(flops, loss) for flops, loss in _curve(found[0])] for name, found in results.items()}
    (out / "loss.svg").write_text(
        _lines(curves, "share of the training compute", "loss on held-back text (nats a token)"), "utf-8"
    )
    points = {name: [(row["kv_bytes_at_4096"] / 1024, row["loss"])] for name, row in rows.items()}
    (out / "kv.svg").write_text(
        _lines(points, "KiB of keys and values for 4,096 tokens (float16)", "loss (nats a token)"), "utf-8"
    )


def _mean(found: Sequence[Result]) -> dict[str, Any]:
    keep = (
        "steps",
        "tokens",
        "flops",
        "parameters",
        "active_parameters",
        "kv_bytes_per_token",
        "kv_bytes_at_4096",
    )
    means = {
        name: sum(result[name] for result in found) / len(found)
        for name in ("loss", "loss_second_half", "seconds")
    }
    return {name: found[0][name] for name in keep} | means | {"seeds": len(found), "size": found[0]["size"]}


def _difference(base: Sequence[Result], other: Sequence[Result]) -> dict[str, float]:
    """Return the mean difference of losses row by row, and its standard error over the held-back rows."""
    pairs = [
        [b - a for a, b in zip(first["row_losses"], second["row_losses"], strict=True)]
        for first, second in zip(base, other, strict=False)
    ]
    rows = [sum(column) / len(column) for column in zip(*pairs, strict=True)]
    mean = sum(rows) / len(rows)
    spread = math.sqrt(sum((row - mean) ** 2 for row in rows) / (len(rows) - 1) / len(rows))
    return {"difference": mean, "standard_error_over_rows": spread, "seeds": len(pairs)}


def _curve(result: Result) -> list[tuple[float, float]]:
    return [(step / result["steps"], loss) for step, loss in result["curve"]]


def _text(
    rows: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, float]],
    results: Mapping[str, Sequence[Result]],
) -> str:
    size = next(iter(rows.values()))["size"]
    lines = [
        f"# Ablations, size `{size}`",
        "",
        "Every variant was trained with the same compute (6 per active weight and token, attention counted),",
        "on the same rows as far as they go. A difference is against `gqa`, row by row over held-back rows;",
        "its error says nothing of other seeds: those vary by more, and one seed shows none of it.",
        "",
        "| model | seeds | weights, active | steps | loss | second half | against gqa | KV bytes | at 4k |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        found = differences.get(name)
        against = ""
        if found is not None:
            against = f"{found['difference']:+.4f} ± {found['standard_error_over_rows']:.4f}"
        cells = (
            name, len(results[name]),
            f"{row['parameters'] / 1e6:.2f} M, {row['active_parameters'] / 1e6:.2f} M", row["steps"],
            f"{row['loss']:.4f}", f"{row['loss_second_half']:.4f}", against,
            f"{row['kv_bytes_per_token']:,}", f"{row['kv_bytes_at_4096']:,}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for question, (base, others) in QUESTIONS.items():
        there = [name for name in others if name in differences]
        if there:
            found = ", ".join(f"{name} {differences[name]['difference']:+.4f}" for name in there)
            lines += ["", f"**{question}.** Against {base}: {found} nats a token."]
    lines += ["", "![loss](loss.svg)", "", "![loss and cache](kv.svg)", ""]
    return "\n".join(lines)


def _lines(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Return an SVG of named curves; a curve of one point is a dot."""
    width, height, edge = 720, 420, 60
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = 0.0, max(x for x, _ in points) * 1.05
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    low_y, high_y = low_y - 0.05 * (high_y - low_y), high_y + 0.05 * (high_y - low_y) + 1e-9

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            edge + (width - 2 * edge) * (x - low_x) / (high_x - low_x),
            height - edge - (height - 2 * edge) * (y - low_y) / (high_y - low_y),
        )

    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#343a40"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{width / 2}" y="{height - 16}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="8" y="24">{escape(y_label)}</text>',
    ]
    for part in range(5):
        y = low_y + (high_y - low_y) * part / 4
        at = place(0, y)[1]
        parts.append(f'<line x1="{edge}" x2="{width - edge}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{edge - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.3f}</text>')
        x = low_x + (high_x - low_x) * part / 4
        parts.append(
            f'<text x="{place(x, low_y)[0]:.1f}" y="{height - 40}" text-anchor="middle">{x:.4g}</text>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = [place(x, y) for x, y in curve]
        if len(drawn) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = drawn[-1]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        at = f'x="{width - edge}" y="{edge + 16 * number}"'
        parts.append(f'<text {at} text-anchor="end" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
