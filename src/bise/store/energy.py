"""Energy (RAPL, NVML) and machine time, shared out among the requests that run at once: shares add up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6
MILLI = 1e-3


class RaplMeter:
    """The processors' own energy counters (Linux, RAPL). Reading them usually takes root."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        """Find the packages whose counters can be read."""
        self._zones: list[tuple[Path, int]] = []
        self._last: list[int] = []
        self._total = 0
        for zone in sorted(folder.glob("intel-rapl:[0-9]*")):
            # intel-rapl:0 is a processor, intel-rapl:0:0 a part of it that is counted in it already.
            if zone.name.count(":") != 1:
                continue
            try:
                limit = int((zone / "max_energy_range_uj").read_text())
                self._last.append(_read(zone))
            except (OSError, ValueError):
                continue
            self._zones.append((zone, limit))

    def joules(self) -> float | None:
        """Return the energy used since this meter was made; None where it cannot be read."""
        if not self._zones:
            return None
        for index, (zone, limit) in enumerate(self._zones):
            try:
                now = _read(zone)
            except (OSError, ValueError):
                return None
            self._total += (now - self._last[index]) % (limit + 1)
            self._last[index] = now
        return self._total * MICRO


class NvmlMeter:
    """The energy counters of NVIDIA's graphics cards, through its own library (nvidia-ml-py)."""

    def __init__(self, module: str = "pynvml") -> None:
        """Find the cards that count their energy; where the library or a driver is missing there are none."""
        self._nvml: Any = None
        self._cards: list[Any] = []
        self._first = 0
        try:
            nvml: Any = import_module(module)
            nvml.nvmlInit()
        except Exception:  # the library's own errors exist only where it does
            return
        self._nvml = nvml
        for index in range(int(nvml.nvmlDeviceGetCount())):
            try:
                card = nvml.nvmlDeviceGetHandleByIndex(index)
                self._first += int(nvml.nvmlDeviceGetTotalEnergyConsumption(card))
            except nvml.NVMLError:  # older than Volta, or not ours to read
                continue
            self._cards.append(card)

    def joules(self) -> float | None:
        """Return the energy used since this meter was made; None where it cannot be read."""
        if not self._cards:
            return None
        try:
            read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
            return (sum(int(read(card)) for card in self._cards) - self._first) * MILLI
        except self._nvml.NVMLError:
            return None


class Meter(Protocol):
    """Counts energy."""

    def joules(self) -> float | None:
        """Return the energy used since the meter was made; None where it cannot be read."""
        ...


class MachineMeter:
    """All of this machine's energy that can be read."""

    def __init__(self, meters: Mapping[str, Meter] | None = None) -> None:
        """Take meters by name; by default the processors' and the graphics cards'."""
        found = {"rapl": RaplMeter(), "nvml": NvmlMeter()} if meters is None else meters
        self._meters = {name: meter for name, meter in found.items() if meter.joules() is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """What can be read: rapl, nvml, both or nothing."""
        return tuple(self._meters)

    def joules(self) -> float | None:
        """Return the energy used since this meter was made; None where nothing can be read, or not now."""
        total = 0.0
        for meter in self._meters.values():
            value = meter.joules()
            if value is None:
                return None
            total += value
        return total if self._meters else None


def _read(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


class _Mark(NamedTuple):
    """What one who runs all the time has had so far; the difference of two is a share."""

    seconds: float = 0.0
    joules: float = 0.0
    num_unknown: int = 0
    """Times between two looks whose energy could not be measured."""


class Shares:
    """Divides time and energy equally among those who run. Any thread."""

    def __init__(
        self,
        joules: Callable[[], float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`joules` is a counter that only grows, or None where there is none."""
        self._joules = joules or (lambda: None)
        self._clock = clock
        self._running: dict[str, _Mark] = {}
        self._so_far = _Mark()
        self._lock = threading.Lock()
        self._at = clock()
        self._energy = self._joules()

    def enter(self, name: str) -> None:
        """Begin a share."""
        with self._lock:
            self._divide()
            self._running[name] = self._so_far

    def leave(self, name: str) -> tuple[float, float | None]:
        """End a share; return its machine seconds and its joules (None where they cannot be measured)."""
        with self._lock:
            self._divide()
            began, now = self._running.pop(name), self._so_far
        is_known = now.num_unknown == began.num_unknown
        return now.seconds - began.seconds, now.joules - began.joules if is_known else None

    def _divide(self) -> None:
        """Give everyone who runs an equal part of what was used since the last look."""
        now, energy = self._clock(), self._joules()
        seconds = now - self._at
        joules = energy - self._energy if energy is not None and self._energy is not None else None
        self._at, self._energy = now, energy
        if num := len(self._running):
            before = self._so_far
            self._so_far = _Mark(
                before.seconds + seconds / num,
                before.joules + (joules or 0.0) / num,
                before.num_unknown + (joules is None),
            )
