"""SVG pictures of the reports: lines, intervals, and a grid of shares. No library, no style but this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bise.svg import frame, label

WIDTH, HEIGHT, EDGE = 720, 420, 60
COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#862e9c", "#343a40", "#e8590c")
Points = Sequence[tuple[float, float]]


def lines(curves: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Return named curves; a curve of one point is a dot."""
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = 0.0, max(x for x, _ in points) * 1.05
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    low_y, high_y = low_y - 0.05 * (high_y - low_y), high_y + 0.05 * (high_y - low_y) + 1e-9

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            EDGE + (WIDTH - 2 * EDGE) * (x - low_x) / (high_x - low_x),
            HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (y - low_y) / (high_y - low_y),
        )

    parts = frame(WIDTH, HEIGHT)
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="8" y="24">{escape(y_label)}</text>')
    for part in range(5):
        y = low_y + (high_y - low_y) * part / 4
        at = place(0, y)[1]
        parts.append(f'<line x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{EDGE - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.3f}</text>')
        x = low_x + (high_x - low_x) * part / 4
        at = place(x, low_y)[0]
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 40}" text-anchor="middle">{x:.4g}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = [place(x, y) for x, y in curve]
        if len(drawn) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = drawn[-1]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        at = f'x="{WIDTH - EDGE}" y="{EDGE + 16 * number}"'
        parts.append(f'<text {at} text-anchor="end" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def intervals(rows: Mapping[str, tuple[Sequence[float], float | None]], x_label: str) -> str:
    """Return named values as dots around zero, a row a name, with the mean and its interval (half of its
    width; None draws none) as a bar.
    """
    line, left, top = 26, 150, 16
    height = top + line * len(rows) + 48
    ends: list[float] = [0.0]
    for values, half in rows.values():
        mean = sum(values) / len(values)
        ends += [*values, mean - (half or 0.0), mean + (half or 0.0)]
    edge = 0.05 * (max(ends) - min(ends)) + 1e-9
    low, high = min(ends) - edge, max(ends) + edge

    def at(value: float) -> float:
        return left + (WIDTH - left - EDGE) * (value - low) / (high - low)

    parts = frame(WIDTH, height)
    foot = top + line * len(rows)
    for number in range(5):
        value = low + (high - low) * number / 4
        parts.append(label(at(value), foot + 18, f"{value:+.3f}", "middle"))
    parts.append(f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{top}" y2="{foot}" stroke="#868e96"/>')
    parts.append(label(WIDTH / 2, height - 8, x_label, "middle"))
    for number, (name, (values, half)) in enumerate(rows.items()):
        y, colour = top + line * (number + 0.5), COLOURS[number // 2 % len(COLOURS)]
        mean = sum(values) / len(values)
        parts.append(label(left - 10, y + 4, name, "end"))
        if half is not None:
            ends_x = f'x1="{at(mean - half):.1f}" x2="{at(mean + half):.1f}"'
            parts.append(f'<line {ends_x} y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>')
            bar = f'x="{at(mean) - 1.5:.1f}" y="{y - 7:.1f}" width="3" height="14"'
            parts.append(f'<rect {bar} fill="{colour}"/>')
        for value in values:
            dot = f'cx="{at(value):.1f}" cy="{y:.1f}" r="3.5"'
            parts.append(f'<circle {dot} fill="{colour}" fill-opacity="0.6"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def shares(grids: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return named grids of shares side by side, a row a layer, a column an expert; the darker the more."""
    cell, gap, top = 34, 40, 48
    experts, layers = len(next(iter(grids.values()))[0]), max(map(len, grids.values()))
    height = top + cell * layers + 40
    parts = frame(gap + len(grids) * (experts * cell + gap), height)
    peak = max(share for grid in grids.values() for row in grid for share in row)
    for number, (name, grid) in enumerate(grids.items()):
        left = gap + number * (experts * cell + gap)
        parts.append(f'<text x="{left}" y="{top - 12}">{escape(name)}</text>')
        for layer, row in enumerate(grid):
            y = top + layer * cell
            parts.append(f'<text x="{left - 6}" y="{y + 21}" text-anchor="end">{layer}</text>')
            for expert, share in enumerate(row):
                x = left + expert * cell
                ink = "#ffffff" if share > 0.6 * peak else "#343a40"
                box = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
                parts.append(
                    f'<rect {box} fill="#1864ab" fill-opacity="{share / peak:.3f}" stroke="#dee2e6"/>'
                    f'<text x="{x + cell / 2}" y="{y + 21}" text-anchor="middle" font-size="10" '
                    f'style="fill:{ink}">{100 * share:.0f}</text>'
                )
    foot = f"per cent of all choices; rows are layers, columns experts; {100 / experts:.1f} is even use"
    parts.append(f'<text x="{gap}" y="{height - 12}">{foot}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
