"""What all pictures that bise draws begin with: an SVG is text, and needs no library."""

from __future__ import annotations

from html import escape

_STYLE = 'font-family="system-ui, sans-serif" font-size="12" fill="#343a40"'


def frame(width: float, height: float) -> list[str]:
    """Return the first lines of a picture on white; the caller adds what it shows, and `</svg>`."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {_STYLE}>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Return a line of text at a point; `anchor` is its start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
