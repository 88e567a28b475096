"""Side by side and fair: engines take turns within a round, the machine is probed before and after each turn,
and rounds that something else disturbed are marked.

It knows cases and seconds, but no engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MAX_FOREIGN_CORES = 0.05
"""A round counts only when other processes used at most this share of a core."""

MAX_PROBE_SPREAD = 0.15
"""A round counts only when the read rates before and after differ by at most this."""

TICKS = 100
"""Clock ticks per second in /proc (USER_HZ, the same on every Linux)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure."""

    op: str
    """`prefill` or `decode`."""
    prompt: int
    """Tokens of the prompt whose reading is timed; 0 for decode."""
    batch: int
    """Sequences that decode together; 1 for prefill."""
    context: int
    """Tokens each sequence holds when decoding starts; 0 for prefill."""
    steps: int
    """Decoding steps of one turn; 0 for prefill."""

    @property
    def tokens(self) -> int:
        """Tokens that one turn reads or produces."""
        return self.prompt if self.op == "prefill" else self.batch * self.steps


class Contestant(Protocol):
    """An engine under test."""

    name: str
    """`bise`, or the peer's name and format."""
    version: str

    def prepare(self, case: Case, rounds: int) -> None:
        """Get ready for `rounds` turns and a warm-up of a case. Raises PeerError when it cannot run it."""
        ...

    def run(self) -> float:
        """Take one turn and return its seconds."""
        ...

    def release(self) -> None:
        """Let go of what `prepare` took."""
        ...

    def cpu_seconds(self) -> float:
        """Return the processor time used so far, outside this process."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one engine did in one round."""

    seconds: float
    read_before: float
    """Bytes per second that the machine read right before."""
    read_after: float
    foreign_cores: float
    """Cores that other processes kept busy meanwhile."""
    joules: float | None
    arithmetic: tuple[float | None, float | None] = (None, None)
    """8-bit and float operations per second of the machine right before; None where unknown."""

    @property
    def read_bytes_s(self) -> float:
        """The machine's read rate during the turn."""
        return (self.read_before + self.read_after) / 2

    @property
    def is_clean(self) -> bool:
        """True when nothing disturbed the turn."""
        spread = abs(self.read_before - self.read_after) / max(self.read_before, self.read_after)
        return self.foreign_cores <= MAX_FOREIGN_CORES and spread <= MAX_PROBE_SPREAD


@dataclass(slots=True)
class Series:
    """All turns of one engine at one case."""

    contestant: str
    version: str
    case: Case
    turns: list[Turn] = field(default_factory=list[Turn])

    @property
    def kept(self) -> list[Turn]:
        """The clean turns, or all of them when none is clean."""
        return [turn for turn in self.turns if turn.is_clean] or self.turns

    @property
    def is_noisy(self) -> bool:
        """True when no turn was clean: the numbers are a lower bound at best."""
        return not any(turn.is_clean for turn in self.turns)

    @property
    def seconds(self) -> float:
        """Median of the kept turns."""
        return statistics.median(turn.seconds for turn in self.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meters:
    """Where rounds read the machine; tests put others in place."""

    read_rate: Callable[[], float]
    busy_seconds: Callable[[], float | None]
    """Processor seconds that all processes used since boot; None where unknown."""
    joules: Callable[[], float | None]
    arithmetic: Callable[[], tuple[float | None, float | None]] = lambda: (None, None)
    clock: Callable[[], float] = time.perf_counter
    own_seconds: Callable[[], float] = time.process_time


def run_rounds(
    case: Case,
    contestants: Sequence[Contestant],
    rounds: int,
    meters: Meters,
    *,
    warm_up: bool = True,
    budget_s: float = float("inf"),
) -> tuple[list[Series], list[str]]:
    """Let every contestant take one turn per round, in an order that shifts by one each round.

    With `warm_up` a first turn of each is not counted. No round but the first starts after `budget_s` seconds
    of turns. Returns the series, and a line for each contestant that cannot run.
    """
    ready: list[Contestant] = []
    skipped: list[str] = []
    series: dict[str, Series] = {}
    try:
        for contestant in contestants:
            try:
                contestant.prepare(case, rounds)
                ready.append(contestant)
                if warm_up:
                    contestant.run()
            except PeerError as error:
                skipped.append(f"{contestant.name} skipped for {describe(case)}: {error}")
                continue
            series[contestant.name] = Series(contestant.name, contestant.version, case)
        racing = [contestant for contestant in ready if contestant.name in series]
        for number in range(rounds):
            if sum(turn.seconds for entry in series.values() for turn in entry.turns) >= budget_s:
                break
            shift = number % max(len(racing), 1)
            for contestant in [*racing[shift:], *racing[:shift]]:
                series[contestant.name].turns.append(_turn(contestant, meters))
    finally:
        for contestant in ready:
            contestant.release()
    return list(series.values()), skipped


class PeerError(Exception):
    """A peer is absent or cannot run a case; the text says why."""


def _turn(contestant: Contestant, meters: Meters) -> Turn:
    arithmetic = meters.arithmetic()
    before = meters.read_rate()
    busy, own, joules = meters.busy_seconds(), _own(contestant, meters), meters.joules()
    started = meters.clock()
    seconds = contestant.run()
    wall = meters.clock() - started
    busy_after, own_after, joules_after = meters.busy_seconds(), _own(contestant, meters), meters.joules()
    foreign = 0.0
    if busy is not None and busy_after is not None and wall > 0:
        # The kernel counts in ticks: two of them are no evidence of anything.
        foreign = max(0.0, busy_after - busy - (own_after - own) - 2 / TICKS) / wall
    return Turn(
        seconds=seconds,
        read_before=before,
        read_after=meters.read_rate(),
        foreign_cores=foreign,
        joules=None if joules is None or joules_after is None else max(joules_after - joules, 0.0),
        arithmetic=arithmetic,
    )


def _own(contestant: Contestant, meters: Meters) -> float:
    return meters.own_seconds() + contestant.cpu_seconds()


def describe(case: Case) -> str:
    """Return a case for people."""
    if case.op == "prefill":
        return f"prefill of {case.prompt}"
    return f"decode of {case.batch} at {case.context}"


def busy_seconds() -> float | None:
    """Return the processor seconds that all processes of this machine used since boot; None where unknown."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    ticks = [int(text) for text in first]
    return sum(ticks[index] for index in (0, 1, 2, 5, 6)) / TICKS  # user nice system irq softirq


def process_cpu_seconds(pid: int) -> float:
    """Return the processor seconds of another process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def energy_joules() -> float | None:
    """Return the energy counter of all processor packages (RAPL); None where the machine does not tell."""
    total = 0
    counters = (
        sorted(Path("/sys/class/powercap").glob("intel-rapl:?"))
        if Path("/sys/class/powercap").is_dir()
        else []
    )
    for package in counters:
        try:
            total += int((package / "energy_uj").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
    return total / 1e6 if counters else None


def wait_until_idle(limit_s: float, busy: Callable[[], float | None] = busy_seconds) -> float | None:
    """Wait, at most `limit_s` seconds, until others use less than 8 % of a core; return their last share."""
    share = None
    stop = time.monotonic() + limit_s
    while True:
        before, own, started = busy(), time.process_time(), time.monotonic()
        if before is None:
            return None
        time.sleep(min(0.5, max(limit_s, 0.05)))
        after = busy()
        assert after is not None
        share = (after - before - (time.process_time() - own)) / (time.monotonic() - started)
        if share < 0.08 or time.monotonic() >= stop:
            return share
