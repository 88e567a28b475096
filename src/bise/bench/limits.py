"""What this machine can do at most, measured in this process: memory read rate and arithmetic rates."""

from __future__ import annotations

from dataclasses import dataclass

from bise.engine.memory import available_memory
from bise.errors import EngineError
from bise.kernels.cpu import arena, arithmetic_rate, read_rate
from bise.plan import MachineLimits

BUFFER_BYTES = 1 << 30
"""Read by one probe: many times any cache, 30 ms at 34 GB/s."""

ARITHMETIC_SECONDS = 0.25


class ReadProbe:
    """Memory that is read again and again to learn how fast the machine reads right now."""

    def __init__(self, threads: int, size_bytes: int = BUFFER_BYTES) -> None:
        """Take and fill the buffer: at most a quarter of what is free, so that no probe ends a program."""
        free = available_memory()
        size = size_bytes if free is None else min(size_bytes, free // 4)
        if size < 1 << 20:
            raise EngineError("less than 4 MiB of memory are free: there is nothing to measure with")
        self._threads = threads
        self._memory = arena(size)
        self._memory.fill(1)

    def __call__(self, reads: int = 3) -> float:
        """Return the best of `reads` readings in bytes per second."""
        return max(read_rate(self._memory, self._threads) for _ in range(reads))


@dataclass(frozen=True, slots=True)
class ArithmeticProbe:
    """Loops of nothing but dot products, and of multiply-adds."""

    threads: int

    def __call__(self, seconds: float = 0.04) -> tuple[float | None, float | None]:
        """Return 8-bit and float operations per second, each loop running for `seconds`."""
        return (
            arithmetic_rate(floats=False, threads=self.threads, seconds=seconds),
            arithmetic_rate(floats=True, threads=self.threads, seconds=seconds),
        )


def measure_limits(threads: int, probe: ReadProbe | None = None) -> MachineLimits:
    """Return the machine's limits with `threads` threads; takes about a second."""
    reader = ReadProbe(threads, BUFFER_BYTES // 4) if probe is None else probe
    whole, floats = ArithmeticProbe(threads)(ARITHMETIC_SECONDS)
    return MachineLimits(read_bytes_s=reader(), int8_ops_s=whole, float_ops_s=floats)
