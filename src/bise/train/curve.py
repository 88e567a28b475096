"""The picture of a run: loss over steps as an SVG."""

from __future__ import annotations

from collections.abc import Sequence

from bise.svg import frame, label

_WIDTH, _HEIGHT, _EDGE = 720, 400, 56


def draw_losses(
    trained: Sequence[tuple[int, float]], evaluated: Sequence[tuple[int, float]], title: str
) -> str:
    """Return an SVG of (step, loss in nats a token) while training and on the held-back texts."""
    points = [*trained, *evaluated]
    last = max((step for step, _ in points), default=0)
    low, high = 0.0, max((loss for _, loss in points), default=0.0) * 1.05 or 1.0

    def x(step: float) -> float:
        return _EDGE + (_WIDTH - 2 * _EDGE) * step / max(last, 1)

    def y(loss: float) -> float:
        return _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * (loss - low) / (high - low)

    parts = [
        *frame(_WIDTH, _HEIGHT),
        label(_EDGE, 24, title),
        label(_WIDTH / 2, _HEIGHT - 14, "step", "middle"),
        label(8, _EDGE - 12, "loss (nats per learned token)"),
        label(_WIDTH - _EDGE, _HEIGHT - 36, str(last), "end"),
        label(_EDGE, _HEIGHT - 36, "0", "middle"),
    ]
    right = _WIDTH - _EDGE
    for part in range(5):
        loss = low + (high - low) * part / 4
        height = f"{y(loss):.1f}"
        parts.append(f'<line x1="{_EDGE}" x2="{right}" y1="{height}" y2="{height}" stroke="#dee2e6"/>')
        parts.append(label(_EDGE - 6, y(loss) + 4, f"{loss:.2f}", "end"))
    for name, colour, row, values in (
        ("training", "#868e96", 0, trained), ("evaluation", "#d9480f", 1, evaluated),
    ):  # fmt: skip
        if not values:
            continue
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in values)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{right}" y="{_EDGE + 16 * row}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
