"""Whose turn it is: the queue, in the order of (level, hunger, service of the tenant, what it runs, arrival).

The level is the request's priority, lowered by one for every `AGING_TOKENS` that the engine has computed
since the request came, so that nobody waits for ever behind better priorities. Age makes it as good as the
best priority there is and no better: a backlog that is old must not go ahead of who comes. The service of a
tenant is the number of tokens computed for it (the virtual token counter of Sheng et al. 2024, arXiv
2401.00588, with prompt and output tokens alike): within a level the least served tenant is first. A tenant
that comes back after a pause starts `CREDIT_TOKENS` before the least served of those present: enough for its
first prompt to go ahead of a backlog, and all that a pause can earn. Hunger keeps newcomers without end from
holding up another tenant for ever: one for which nothing was computed while the engine computed
`AGING_TOKENS` goes first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from bise.engine.sequence import Sequence

AGING_TOKENS = 1 << 14
"""Tokens computed by the engine that make up for one level of priority, or make hungry: 6 minutes of prefill
of a 7B model on two cores, at most a minute on a larger machine."""

CREDIT_TOKENS = 2048
"""Head start of a tenant that comes. At least the tokens of a step: then its time to first token is at most
twice what it would be alone, where it gets all of a step at first and half of each later on."""

MAX_ABSENT = 4096
"""Tenants that are remembered while they have no request: those with the most service of all."""

Turn = tuple[int, int, int, int, int]


class FairQueue:
    """Sequences that wait, and what each tenant has been given."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], list[Sequence]] = {}
        """Waiting sequences per priority and tenant, by arrival."""
        self._served: dict[str, int] = {}
        self._floor = 0
        """What the least served tenant present had at the last arrival of one, or an earlier one."""
        self._present: Counter[str] = Counter()
        """Sequences per tenant that wait or run."""
        self._waiting: Counter[str] = Counter()
        self._priorities: Counter[int] = Counter()
        """Sequences per priority that wait or run."""
        self._best = 0
        """The best of these priorities."""
        self._fed: dict[str, int] = {}
        """What the engine had computed when a tenant present was last served, or came."""
        self._num_computed = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Sequences that wait, in the order of service as it is now."""
        return iter(sorted(self.everyone(), key=self.turn))

    def everyone(self) -> list[Sequence]:
        """Return the sequences that wait, in no order: nothing that could fail is asked of them."""
        return [sequence for line in self._lines.values() for sequence in line]

    def enter(self, sequence: Sequence) -> None:
        """Count a new sequence of a tenant; it does not wait yet."""
        tenant = sequence.request.tenant
        if tenant not in self._present:
            least = min((self._served[name] for name in self._present), default=0)
            # It never falls: the head start of one newcomer is not the next one's starting line.
            self._floor = max(self._floor, least)
            start = self._floor - CREDIT_TOKENS
            self._served[tenant] = max(self._served.get(tenant, start), start)
            self._fed[tenant] = self._num_computed
        self._present[tenant] += 1
        self._priorities[sequence.request.priority] += 1
        self._best = min(self._priorities)
        sequence.clock = self._num_computed

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that is over."""
        tenant, priority = sequence.request.tenant, sequence.request.priority
        self._priorities[priority] -= 1
        if not self._priorities[priority]:
            del self._priorities[priority]
            self._best = min(self._priorities, default=0)
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant], self._waiting[tenant], self._fed[tenant]
        if not self._present:
            self._served.clear()
            self._floor = 0
        elif len(self._served) > len(self._present) + MAX_ABSENT:
            absent = [name for name in self._served if name not in self._present]
            del self._served[min(absent, key=self._served.__getitem__)]

    def push(self, sequence: Sequence) -> None:
        """Let a sequence that entered wait for its turn."""
        line = self._lines.setdefault(_line_of(sequence), [])
        insort(line, sequence, key=_arrival)
        self._waiting[sequence.request.tenant] += 1
        self._num_waiting += 1

    def pop(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        key = _line_of(sequence)
        line = self._lines[key]
        index = bisect_left(line, sequence.arrival, key=_arrival)
        assert line[index] is sequence
        del line[index]
        if not line:
            del self._lines[key]
        self._waiting[sequence.request.tenant] -= 1
        self._num_waiting -= 1

    def head(self) -> Sequence | None:
        """Return the waiting sequence whose turn comes first."""
        return min((line[0] for line in self._lines.values()), key=self.turn, default=None)

    def turn(self, sequence: Sequence) -> Turn:
        """Return the place of a sequence in the order of service; lower is earlier."""
        tenant = sequence.request.tenant
        hunger = (self._num_computed - self._fed[tenant]) // AGING_TOKENS
        return (
            self.level(sequence),
            -hunger,
            self._served[tenant],
            self.num_running(tenant),
            sequence.arrival,
        )

    def num_running(self, tenant: str) -> int:
        """Return how many sequences of a tenant run."""
        return self._present[tenant] - self._waiting[tenant]

    def num_present(self, tenant: str) -> int:
        """Return how many sequences of a tenant wait or run."""
        return self._present[tenant]

    def level(self, sequence: Sequence) -> int:
        """Return the priority of a sequence, age taken into account; lower is better."""
        age = (self._num_computed - sequence.clock) // AGING_TOKENS
        return max(self._best, sequence.request.priority - age)

    def charge(self, sequence: Sequence) -> None:
        """Count what was computed for a sequence; what a preemption makes necessary again is not charged
        twice.
        """
        tokens = sequence.num_computed - sequence.num_charged
        if tokens > 0:
            self._served[sequence.request.tenant] += tokens
            self._num_computed += tokens
            self._fed[sequence.request.tenant] = self._num_computed
            sequence.num_charged = sequence.num_computed


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _line_of(sequence: Sequence) -> tuple[int, str]:
    return (sequence.request.priority, sequence.request.tenant)
