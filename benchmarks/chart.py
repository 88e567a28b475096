"""Draw benchmarks/results/*.json as one SVG: bise beside its peers, bars of tokens per second per case.

python benchmarks/chart.py RESULTS.json OUT.svg
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LABEL, BAR, GAP, HEAD = 860, 250, 18, 5, 30
OWN, PEER, INK = "#d9480f", "#adb5bd", "#343a40"


def main() -> int:
    """Read, draw, write."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(document), encoding="utf-8")
    return 0


def groups(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, results) of every case that has a peer to stand beside."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for name, run in document["runs"].items():
        where = ", both for AVX2 alone" if name.startswith("avx2") else ""
        cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for entry in run["results"]:
            cases.setdefault(tuple(entry[k] for k in ("op", "prompt", "batch", "context")), []).append(entry)
        for (op, prompt, batch, context), entries in cases.items():
            if len(entries) > 1:
                what = f"prefill of {prompt}" if op == "prefill" else f"decode x{batch} at {context}"
                found.append((f"{run['model']} {run['quant']}, {what} tokens{where}", entries))
    return found


def draw(document: dict[str, Any]) -> str:
    """Return the SVG; bars are scaled within each case, as cases differ by orders of magnitude."""
    parts: list[str] = []
    y = 24
    for title, entries in groups(document):
        parts.append(text(8, y + 14, title, weight="bold"))
        y += HEAD - 6
        most = max(entry["tokens_per_s"] for entry in entries)
        for entry in sorted(entries, key=lambda entry: -entry["tokens_per_s"]):
            length = (WIDTH - LABEL - 170) * entry["tokens_per_s"] / most
            colour = OWN if entry["peer"] == "bise" else PEER
            parts.append(text(LABEL - 8, y + 13, entry["peer"], anchor="end"))
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
            told = f"{entry['tokens_per_s']:,.1f} tok/s"
            if entry.get("bise_ratio"):
                told += f"  (bise {entry['bise_ratio']:.2f}x)"
            parts.append(text(LABEL + length + 6, y + 13, told))
            y += BAR + GAP
        y += 12
    any_run = next(iter(document["runs"].values()), None)
    if any_run is not None:
        told = f"{any_run['cpu']}, {any_run['threads']} threads, {any_run['isa']}, {any_run['date'][:10]}"
        parts.append(text(8, y + 12, f"{told}, commit {any_run['commit']}"))
        y += 24
    style = 'font-family="system-ui, sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" {style}>'
    back = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, back, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal") -> str:
    """Return one line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"'
    return f"<text {place}>{escape(content)}</text>"


if __name__ == "__main__":
    sys.exit(main())
