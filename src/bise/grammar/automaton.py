"""Finite automata: over characters while languages are combined, over bytes while an output is followed.

Every construction spends from a `Budget`, so that what a stranger's schema can cost is known before it is
paid, and is the same on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from bise.errors import RequestError
from bise.grammar.regex import (
    ANY,
    Alt,
    Chars,
    Edge,
    Ranges,
    Regex,
    Repeat,
    Seq,
    common,
    json_escaped,
    ranges,
    size,
    without,
)

MAX_STEPS = 250_000
"""What one grammar may spend: about a second and some ten MiB of this module's work."""

UNREACHABLE = 1 << 60
"""A distance that stands for no way at all."""

Visited: TypeAlias = "int | frozenset[int]"
"""A state of a `ByteMachine`."""


class Budget:
    """Counts the work and the memory that a grammar takes."""

    __slots__ = ("_left", "_place", "_steps")

    def __init__(self, place: str, steps: int = MAX_STEPS) -> None:
        self._left = self._steps = steps
        self._place = place

    @property
    def spent(self) -> int:
        """What was taken so far."""
        return self._steps - self._left

    def spend(self, count: int) -> None:
        """Take `count` units; RequestError when nothing is left."""
        self._left -= count
        if self._left < 0:
            raise RequestError(
                f"{self._place} is too large or too ambiguous to compile within its budget; use fewer or "
                "simpler alternatives, patterns and counts",
                field=self._place,
            )


@dataclass(slots=True)
class Machine:
    """A nondeterministic automaton over characters without empty moves; state 0 is the start."""

    edges: list[list[tuple[Ranges, int]]] = field(default_factory=lambda: [[]])
    final: set[int] = field(default_factory=set[int])

    def matches(self, value: str, budget: Budget) -> bool:
        """Say whether the whole text is in the language; linear in the text and in the states at a time."""
        states = {0}
        for char in value:
            point, looked = ord(char), 0
            following: set[int] = set()
            for state in states:
                for members, target in self.edges[state]:
                    looked += len(members)
                    if any(low <= point <= high for low, high in members):
                        following.add(target)
            budget.spend(1 + looked // 8)
            states = following
            if not states:
                return False
        return not states.isdisjoint(self.final)

    def is_empty(self) -> bool:
        """Say whether the language is empty."""
        seen, left = {0}, [0]
        while left:
            state = left.pop()
            if state in self.final:
                return False
            for members, target in self.edges[state]:
                if members and target not in seen:
                    seen.add(target)
                    left.append(target)
        return True


def machine(node: Regex, budget: Budget) -> Machine:
    """Return the automaton of an expression, by positions: one state per set of characters."""
    budget.spend(2 * size(node))
    built = Machine()
    entry = _attach(node, {0}, built, budget)
    built.final = entry
    return built


def _attach(node: Regex, sources: set[int], built: Machine, budget: Budget) -> set[int]:
    """Let `node` follow the states `sources`; return the states after it."""
    match node:
        case Chars(ranges=members):
            target = len(built.edges)
            built.edges.append([])
            budget.spend(len(sources))
            if members:
                for source in sources:
                    built.edges[source].append((members, target))
                return {target}
            return set()
        case Seq(parts=parts):
            for part in parts:
                sources = _attach(part, sources, built, budget)
            return sources
        case Alt(options=options):
            return {state for option in options for state in _attach(option, sources, built, budget)}
        case Repeat():
            return _attach_repeat(node, sources, built, budget)
        case Edge():
            raise AssertionError("anchor the pattern first")


def _attach_repeat(node: Repeat, sources: set[int], built: Machine, budget: Budget) -> set[int]:
    for _ in range(node.low):
        sources = _attach(node.part, sources, built, budget)
    if node.high is None:
        first = len(built.edges)
        after = _attach(node.part, sources, built, budget)
        # Go round: what leads into the copy from before it also leads into it from its end.
        entries = [
            (members, target)
            for source in sources
            for members, target in built.edges[source]
            if target >= first
        ]
        entries = list(dict.fromkeys(entries))
        budget.spend(len(entries) * len(after))
        for state in after:
            known = set(built.edges[state])
            built.edges[state] += [entry for entry in entries if entry not in known]
        return sources | after
    ends = set(sources)
    for _ in range(node.high - node.low):
        sources = _attach(node.part, sources, built, budget)
        ends |= sources
    return ends


def intersection(left: Machine, right: Machine, budget: Budget) -> Machine:
    """Return the automaton of the texts in both languages."""
    numbers = {(0, 0): 0}
    order = [(0, 0)]
    built = Machine()
    # Few sets stand on many edges: each pair of them is met once, and what they share is kept once. By
    # identity, because a tuple's hash is made anew each time.
    shared: dict[tuple[int, int], Ranges] = {}
    for pair in order:
        for first_members, first in left.edges[pair[0]]:
            for second_members, second in right.edges[pair[1]]:
                budget.spend(1)
                key = (id(first_members), id(second_members))
                members = shared.get(key)
                if members is None:
                    budget.spend(len(first_members) + len(second_members))
                    members = shared[key] = common(first_members, second_members)
                if not members:
                    continue
                target = numbers.get((first, second))
                if target is None:
                    budget.spend(1)
                    target = numbers[first, second] = len(order)
                    order.append((first, second))
                    built.edges.append([])
                built.edges[numbers[pair]].append((members, target))
    built.final = {numbers[pair] for pair in order if pair[0] in left.final and pair[1] in right.final}
    return built


def span(source: Machine, budget: Budget) -> tuple[int, int | None]:
    """Return how many characters the shortest and the longest text have; None: there is no longest."""
    budget.spend(sum(map(len, source.edges)))
    before: list[list[int]] = [[] for _ in source.edges]
    for state, edges in enumerate(source.edges):
        for members, target in edges:
            if members:
                before[target].append(state)
    left = dict.fromkeys(source.final, 0)  # fewest characters from a state to the end of a text
    queue = list(left)
    for state in queue:
        for earlier in before[state]:
            if earlier not in left:
                left[earlier] = left[state] + 1
                queue.append(earlier)
    if 0 not in left:
        return 0, None
    ahead = [sum(1 for members, to in edges if members and to in left) for edges in source.edges]
    most = [0] * len(source.edges)
    queue = [state for state in left if not ahead[state]]
    for state in queue:  # whoever is never reached leads round in a circle, or into one
        for earlier in before[state]:
            most[earlier] = max(most[earlier], most[state] + 1)
            ahead[earlier] -= 1
            if not ahead[earlier]:
                queue.append(earlier)
    return left[0], None if ahead[0] else most[0]


def other_than(texts: Iterable[str], budget: Budget) -> Machine:
    """Return the automaton of all texts but these."""
    built = Machine()
    nodes: dict[str, int] = {"": 0}
    excluded = set(texts)
    children: list[dict[str, int]] = [{}]
    for value in excluded:
        budget.spend(len(value) + 1)
        state = 0
        for char in value:
            target = children[state].get(char)
            if target is None:
                target = children[state][char] = len(children)
                children.append({})
                built.edges.append([])
            state = target
        nodes[value] = state
    anything = len(built.edges)
    built.edges.append([(ANY, anything)])
    for state, branches in enumerate(children):
        known = ranges((ord(char), ord(char)) for char in branches)
        built.edges[state] = [(((ord(char), ord(char)),), target) for char, target in branches.items()]
        built.edges[state].append((without(ANY, known), anything))
    built.final = set(range(len(built.edges))) - {nodes[value] for value in excluded}
    return built


def of_length(low: int, high: int | None, budget: Budget) -> Machine:
    """Return the automaton of the texts of `low` to `high` characters."""
    count = low if high is None else high
    budget.spend(count + 1)
    built = Machine([[(ANY, state + 1)] for state in range(count)] + [[]])
    if high is None:
        built.edges[count].append((ANY, count))
    built.final = set(range(low, count + 1))
    return built


class ByteMachine:
    """A deterministic automaton over bytes, made of a `Machine` as far as outputs visit it.

    States are numbers from 0, the start. What was visited stays, at most `MAX_VISITED` states; those beyond
    are sets of states of `source`, found anew each time.
    """

    MAX_VISITED = 20_000

    __slots__ = ("_edges", "_final", "_growing", "_moves", "_numbers", "_rests", "_sets")

    def __init__(self, source: Machine, budget: Budget, *, in_json: bool = False) -> None:
        """Spell the characters of `source` in UTF-8; with `in_json` as a JSON string, quotes included."""
        self._edges: list[list[tuple[int, int, int]]] = [[] for _ in source.edges]
        shared: dict[tuple[int, bytes], int] = {}
        for state, edges in enumerate(source.edges):
            for members, target in edges:
                raw, escapes = json_escaped(members) if in_json else (members, ())
                self._add_ranges(state, raw, target, shared, budget)
                for escape in escapes:
                    self._add_path(state, [(byte, byte) for byte in escape.encode()], target, shared, budget)
        start, self._final = 0, set(source.final)
        if in_json:
            start, end = len(self._edges), len(self._edges) + 1
            self._edges += [[(0x22, 0x22, 0)], []]
            for state in source.final:
                self._edges[state].append((0x22, 0x22, end))
            self._final = {end}
        self._rests = self._distances()
        first = frozenset([start])
        self._sets = [first]
        self._numbers = {first: 0}
        self._moves: list[dict[int, int]] = [{}]
        self._growing = threading.Lock()
        """Held while a state gets its number: requests of one grammar come from any thread."""

    def _add_ranges(
        self, state: int, members: Ranges, target: int, shared: dict[tuple[int, bytes], int], budget: Budget
    ) -> None:
        for low, high in members:
            for path in utf8_paths(low, high):
                self._add_path(state, path, target, shared, budget)

    def _add_path(
        self,
        state: int,
        path: Sequence[tuple[int, int]],
        target: int,
        shared: dict[tuple[int, bytes], int],
        budget: Budget,
    ) -> None:
        """Add the way from `state` through `path` (ranges of bytes) to `target`, its tail shared."""
        budget.spend(len(path))
        for index in range(len(path) - 1, 0, -1):
            key = (target, bytes(bound for pair in path[index:] for bound in pair))
            before = shared.get(key)
            if before is None:
                before = shared[key] = len(self._edges)
                follow = target if index == len(path) - 1 else shared[target, key[1][2:]]
                self._edges.append([(*path[index], follow)])
        first = shared[target, bytes(b for pair in path[1:] for b in pair)] if len(path) > 1 else target
        self._edges[state].append((*path[0], first))

    def _distances(self) -> list[int]:
        """Return, per state, the fewest bytes to a final one."""
        before: list[list[int]] = [[] for _ in self._edges]
        for state, edges in enumerate(self._edges):
            for _, _, target in edges:
                before[target].append(state)
        rests = [UNREACHABLE] * len(self._edges)
        layer = list(self._final)
        for state in layer:
            rests[state] = 0
        while layer:
            following: list[int] = []
            for state in layer:
                for source in before[state]:
                    if rests[source] == UNREACHABLE:
                        rests[source] = rests[state] + 1
                        following.append(source)
            layer = following
        return rests

    def step(self, state: Visited, byte: int) -> Visited | None:
        """Return the state after one more byte, None where the language has no such text."""
        if not isinstance(state, int):
            return self._known(self._after(state, byte))
        moves = self._moves[state]
        found = moves.get(byte)
        if found is None:
            known = self._known(self._after(self._sets[state], byte))
            if known is not None and not isinstance(known, int):
                return known
            found = moves[byte] = -1 if known is None else known
        return found if found >= 0 else None

    def _after(self, members: frozenset[int], byte: int) -> frozenset[int]:
        rests = self._rests
        return frozenset(
            target
            for source in members
            for low, high, target in self._edges[source]
            if low <= byte <= high and rests[target] < UNREACHABLE
        )

    def _known(self, members: frozenset[int]) -> Visited | None:
        """Return the number of a state, a new one while there are any left; None for no state."""
        if not members:
            return None
        number = self._numbers.get(members)
        if number is not None:
            return number
        with self._growing:
            number = self._numbers.get(members)
            if number is None:
                number = len(self._sets)
                if number >= self.MAX_VISITED:
                    return members
                self._sets.append(members)
                self._moves.append({})
                self._numbers[members] = number  # last: whoever finds it finds all of it
        return number

    def _members(self, state: Visited) -> frozenset[int]:
        return self._sets[state] if isinstance(state, int) else state

    def rest(self, state: Visited) -> int:
        """Return the fewest bytes from `state` to the end of a text of the language."""
        return min(self._rests[source] for source in self._members(state))

    def shortest(self, state: Visited) -> bytes:
        """Return the first in byte order of the shortest texts from `state` to an end."""
        written = bytearray()
        members = self._members(state)
        rest = self.rest(state)
        while rest:
            rest -= 1
            byte, members = self._nearer(members, rest)
            written.append(byte)
        return bytes(written)

    def _nearer(self, members: frozenset[int], rest: int) -> tuple[int, frozenset[int]]:
        """Return a byte that leads to a state `rest` bytes from the end, and the states after it."""
        rests = self._rests
        byte = min(
            _pleasant(low, high)
            for source in members
            for low, high, target in self._edges[source]
            if rests[target] == rest
        )[1]
        return byte, frozenset(
            target
            for source in members
            for low, high, target in self._edges[source]
            if low <= byte <= high and rests[target] == rest
        )


def _pleasant(low: int, high: int) -> tuple[int, int]:
    """Return (rank, byte) of the byte to write out of a range when any will do: a, else a digit, else any."""
    for rank, byte in enumerate((0x61, 0x30, 0x41, 0x5F, 0x2D)):
        if low <= byte <= high:
            return rank, byte
    return 9, low


def utf8_paths(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Return the UTF-8 spellings of the code points from `low` to `high` as products of byte ranges."""
    paths: list[list[tuple[int, int]]] = []
    for least, most in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
        first, last = max(low, least), min(high, most)
        if first <= last:
            _split(chr(first).encode(), chr(last).encode(), [], paths)
    return paths


def _split(
    first: bytes, last: bytes, prefix: list[tuple[int, int]], paths: list[list[tuple[int, int]]]
) -> None:
    """Add the paths of the texts from `first` to `last`, which have equal lengths."""
    if len(first) == 1:
        paths.append([*prefix, (first[0], last[0])])
        return
    if first[0] == last[0]:
        _split(first[1:], last[1:], [*prefix, (first[0], first[0])], paths)
        return
    tail = len(first) - 1
    low, high = first[0], last[0]
    if first[1:] != b"\x80" * tail:
        _split(first[1:], b"\xbf" * tail, [*prefix, (low, low)], paths)
        low += 1
    stops_short = last[1:] != b"\xbf" * tail
    if low <= high - stops_short:
        paths.append([*prefix, (low, high - stops_short), *[(0x80, 0xBF)] * tail])
    if stops_short:
        _split(b"\x80" * tail, last[1:], [*prefix, (high, high)], paths)
