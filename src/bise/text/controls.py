"""Control strings inside a text that a trusted template wrote: where they are, leftmost longest.

Knows nothing of vocabularies; takes near linear time whatever the text and however many strings there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlString:
    """One control token as templates spell it."""

    text: str
    token_id: int
    eats_left: bool = False
    """White space before it belongs to it (Hugging Face's lstrip)."""
    eats_right: bool = False
    """White space after it belongs to it (rstrip)."""


class ControlSplitter:
    """Cuts texts at control strings."""

    def __init__(self, strings: Sequence[ControlString]) -> None:
        self._strings = {item.text: item for item in strings if item.text}
        # Openings of two characters are few; behind each, the lengths that exist are tried, longest first.
        self._lengths: dict[str, list[int]] = {}
        for text in self._strings:
            lengths = self._lengths.setdefault(text[:2], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)
        openings = sorted(self._lengths, key=len, reverse=True)
        self._opening = re.compile("|".join(map(re.escape, openings)) if openings else r"(?!)")

    def split(self, text: str) -> list[str | int]:
        """Return `text` cut at its control strings, each replaced by its id: `"<s> a"` gives `[1, " a"]`."""
        parts: list[str | int] = []
        end = place = 0
        while match := self._opening.search(text, place):
            place = match.start()
            found = self._longest_at(text, place)
            if found is None:
                place += 1
                continue
            before = text[end:place].rstrip() if found.eats_left else text[end:place]
            if before:
                parts.append(before)
            parts.append(found.token_id)
            end = place = place + len(found.text)
            if found.eats_right:
                while end < len(text) and text[end].isspace():
                    end += 1
                place = end
        if end < len(text):
            parts.append(text[end:])
        return parts

    def _longest_at(self, text: str, place: int) -> ControlString | None:
        # An opening of one character is a control string of its own; longer ones come first.
        for opening in (text[place : place + 2], text[place : place + 1]):
            for length in self._lengths.get(opening, ()):
                if found := self._strings.get(text[place : place + length]):
                    return found
        return None
