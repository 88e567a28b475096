"""Regular expressions that a model file brings: refused when they could take exponential time."""

from __future__ import annotations

import re

_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
_BOUNDED = re.compile(r"\?|\{\d+(?:,\d+)?\}")


def repeats_within_repetition(pattern: str) -> bool:
    """Say whether a group that repeats without bound holds a repetition or alternatives, as in `(a+)+` or
    `(a|aa)*`.

    The word patterns of known models have none; backtracking engines take exponential time on such ones
    (and the libraries then panic aloud). Character classes and escapes are skipped; anything else is left
    to the engines.
    """
    groups: list[bool] = []
    closed = False
    in_class = place = 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "\\":
            place, closed = place + 1, False
        elif in_class:
            in_class += (char == "[") - (char == "]")
        elif char == "[":
            # A bracket that comes first stands for itself.
            in_class, closed = 1, False
            place += pattern.startswith("^", place)
            place += pattern.startswith("]", place)
        elif char == "(":
            groups.append(False)
            # (?: (?= (?i: and the like: their question mark is no repetition
            place += pattern.startswith("?", place)
            closed = False
        elif char == ")":
            closed = groups.pop() if groups else False
            if closed and groups:
                groups[-1] = True
        else:
            unbounded = _UNBOUNDED.match(pattern, place - 1)
            if unbounded and closed:
                return True
            if groups and (unbounded or char == "|"):
                groups[-1] = True
            step = unbounded or _BOUNDED.match(pattern, place - 1)
            place = step.end() if step else place
            closed = False
    return False
