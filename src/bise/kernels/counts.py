"""What became of the experts that a model wanted, where not all of them fit its device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self


@dataclass(slots=True)
class ExpertCounts:
    """One count per expert, layer and step."""

    wanted: int = 0
    found: int = 0
    """Of the wanted, those that were on the device."""
    copied: int = 0
    """Copies to the device, of wanted and of guessed ones."""
    guessed: int = 0
    """Of the copied, those that were guessed ahead."""
    guessed_right: int = 0
    """Of the guessed, those that were wanted before they gave way."""
    copied_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of the wanted that was found; 0 before the first step."""
        return self.found / self.wanted if self.wanted else 0.0

    @classmethod
    def total(cls, parts: Iterable[ExpertCounts]) -> Self:
        """Return the sum of the counts of several layers."""
        counts = list(parts)
        return cls(*(sum(getattr(each, field.name) for each in counts) for field in fields(cls)))
