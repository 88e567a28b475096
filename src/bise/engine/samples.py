"""Figures measured again and again on a machine that others use, too."""

from __future__ import annotations

from collections import deque


class Samples:
    """The last figures of one kind. Noise only adds time, so their lower third stands for all of them."""

    __slots__ = ("_last", "count", "mean", "value")

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=16)
        self.count = 0
        """Figures that are remembered."""
        self.value = self.mean = 0.0
        """The lower third, and the mean."""

    def add(self, figure: float) -> None:
        """Remember a figure, and forget the oldest of many."""
        self._last.append(figure)
        self._sum_up()

    def forget_one(self) -> None:
        """Forget the oldest figure."""
        self._last.popleft()
        self._sum_up()

    def _sum_up(self) -> None:
        self.count = len(self._last)
        if self.count:
            self.value = sorted(self._last)[self.count // 3]
            self.mean = sum(self._last) / self.count
