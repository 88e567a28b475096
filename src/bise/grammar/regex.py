"""Regular expressions as values: a tree over sets of characters, and its spelling for the grammar engine.

The tree is the one truth: the masks (by the engine, from `spelled`) and the shortest way to the end (by
`automaton`) both come from it, so that they cannot disagree about what a dialect's `\\d` means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points, inclusive, ascending, disjoint, not touching."""

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Return `pairs` (inclusive) in canonical form, without surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return _minus(tuple(merged), (_SURROGATES,))


def _minus(left: Ranges, right: Ranges) -> Ranges:
    parts = list(left)
    for low, high in right:
        cut: list[tuple[int, int]] = []
        for first, last in parts:
            if last < low or first > high:
                cut.append((first, last))
                continue
            if first < low:
                cut.append((first, low - 1))
            if last > high:
                cut.append((high + 1, last))
        parts = cut
    return tuple(parts)


def without(left: Ranges, right: Ranges) -> Ranges:
    """Return the characters of `left` that are not in `right`."""
    return _minus(left, right)


def common(left: Ranges, right: Ranges) -> Ranges:
    """Return the characters in both."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if low <= high:
            found.append((low, high))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def complement(chars: Ranges) -> Ranges:
    """Return all other characters."""
    return without(ANY, chars)


ANY: Ranges = ((0, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, _LAST))
DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
ECMA_SPACE: Ranges = ranges(
    [
        (9, 13),
        (32, 32),
        (0xA0, 0xA0),
        (0x1680, 0x1680),
        (0x2000, 0x200A),
        (0x2028, 0x2029),
        (0x202F, 0x202F),
        (0x205F, 0x205F),
        (0x3000, 0x3000),
        (0xFEFF, 0xFEFF),
    ]
)


STRING_CHARACTER = r'(?:[^"\\\x00-\x1F]|\\["\\bfnrt])'
"""One character inside a JSON string as plain strings spell it: raw, or one of the short escapes."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Seq:
    """One part after the other; () is the empty text."""

    parts: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of the options; () matches nothing."""

    options: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times; None: without end."""

    part: Regex
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """The start (`^`) or the end (`$`) of the text; gone once a pattern is anchored."""

    is_start: bool


Regex: TypeAlias = Chars | Seq | Alt | Repeat | Edge

EMPTY = Seq(())
ANYTHING = Repeat(Chars(ANY), 0, None)


def text(value: str) -> Regex:
    """Return the expression of one text."""
    return Seq(tuple(Chars(((ord(char), ord(char)),)) for char in value))


def seq(*parts: Regex) -> Regex:
    """Return the parts one after the other."""
    return parts[0] if len(parts) == 1 else Seq(parts)


def alt(*options: Regex) -> Regex:
    """Return the choice between the options."""
    return options[0] if len(options) == 1 else Alt(options)


def optional(part: Regex) -> Regex:
    """Return `part` or nothing."""
    return Repeat(part, 0, 1)


def char(first: str, last: str | None = None) -> Regex:
    """Return one character, or one of a range."""
    return Chars(((ord(first), ord(last or first)),))


def digits(low: int, high: int | None) -> Regex:
    """Return `low` to `high` decimal digits."""
    return Repeat(Chars(DIGITS), low, high)


def spelled(node: Regex) -> str:
    """Return the expression in the syntax of Rust's regex crate, without slashes in it."""
    match node:
        case Chars(ranges=members):
            return _spelled_set(members)
        case Seq(parts=parts):
            return "".join(map(spelled, parts)) if parts else "(?:)"
        case Alt(options=options):
            return "(?:" + "|".join(map(spelled, options)) + ")" if options else "[^\\x{0}-\\x{10FFFF}]"
        case Repeat(part=part, low=low, high=high):
            counts = f"{{{low},{'' if high is None else high}}}"
            counts = {"{0,}": "*", "{1,}": "+", "{0,1}": "?"}.get(counts, counts)
            return f"(?:{spelled(part)}){counts}"
        case Edge():
            raise AssertionError("anchor the pattern first")


def _spelled_set(members: Ranges) -> str:
    if len(members) == 1 and members[0][0] == members[0][1]:
        return _spelled_char(members[0][0])
    return (
        "["
        + "".join(
            _spelled_char(low) + (f"-{_spelled_char(high)}" if high > low else "") for low, high in members
        )
        + "]"
    )


def _spelled_char(point: int) -> str:
    letter = chr(point)
    return letter if letter.isascii() and letter.isalnum() else f"\\x{{{point:X}}}"


def matches_empty(node: Regex) -> bool:
    """Say whether the empty text matches."""
    match node:
        case Chars():
            return False
        case Seq(parts=parts):
            return all(map(matches_empty, parts))
        case Alt(options=options):
            return any(map(matches_empty, options))
        case Repeat(part=part, low=low):
            return low == 0 or matches_empty(part)
        case Edge():
            return True


_NAMED_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED: Ranges = ranges([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
"""Characters that a JSON string cannot hold as they are."""


_WIDE = 100
"""Characters from which a set leaves out control characters without a short escape."""


def json_escaped(members: Ranges) -> tuple[Ranges, tuple[str, ...]]:
    """Return how one character of a set is written inside a JSON string: the raw ones, and escapes.

    Each character has one spelling: as it is, a short escape, or four lower-case hexadecimal digits. Sets of
    many characters leave out those of the last kind, which nobody misses there.
    """
    escapes: list[str] = []
    is_wide = sum(high - low + 1 for low, high in members) > _WIDE
    for low, high in common(members, _ESCAPED):
        for point in range(low, high + 1):
            named = _NAMED_ESCAPES.get(chr(point))
            if named or not is_wide:
                escapes.append(f"\\{named}" if named else f"\\u{point:04x}")
    return without(members, _ESCAPED), tuple(escapes)


def in_json(node: Regex) -> Regex:
    """Return the expression of the JSON spelling of the texts that `node` matches, without the quotes."""
    match node:
        case Chars(ranges=members):
            raw, escapes = json_escaped(members)
            options = [Chars(raw)] if raw else []
            return alt(*options, *map(text, escapes))
        case Seq(parts=parts):
            return Seq(tuple(map(in_json, parts)))
        case Alt(options=options):
            return Alt(tuple(map(in_json, options)))
        case Repeat(part=part, low=low, high=high):
            return Repeat(in_json(part), low, high)
        case Edge():
            raise AssertionError("anchor the pattern first")


def size(node: Regex) -> int:
    """Return how many sets of characters the expression holds with its repetitions written out.

    The figure is what an automaton of it takes, and is known without building one.
    """
    match node:
        case Chars(ranges=members):
            return 1 + len(members) // 8
        case Seq(parts=parts):
            return 1 + sum(map(size, parts))
        case Alt(options=options):
            return 1 + sum(map(size, options))
        case Repeat(part=part, low=low, high=high):
            return 1 + size(part) * max(1, low + 1 if high is None else high)
        case Edge():
            return 1


def anchored(node: Regex, *, is_wide: bool = False) -> Regex | None:
    """Return what must match the whole text so that `node` is found somewhere in it; None when that cannot
    be told: `^` and `$` count only at the edges of the pattern and of its outermost alternatives.

    With `is_wide`, `$` stands before a last line end as well, as Python has it.
    """
    end = (optional(char("\n")),) if is_wide else ()
    options: Sequence[Regex] = node.options if isinstance(node, Alt) else (node,)
    whole: list[Regex] = []
    for option in options:
        parts = list(option.parts) if isinstance(option, Seq) else [option]
        if len(parts) == 1 and isinstance(parts[0], Alt):
            inner = anchored(parts[0], is_wide=is_wide)
            if inner is None:
                return None
            whole.append(inner)
            continue
        starts = bool(parts) and isinstance(parts[0], Edge) and parts[0].is_start
        ends = bool(parts) and isinstance(parts[-1], Edge) and not parts[-1].is_start
        parts = parts[1 if starts else 0 : -1 if ends else None]
        if any(map(_has_edge, parts)):
            return None
        whole.append(Seq((*(() if starts else (ANYTHING,)), *parts, *(end if ends else (ANYTHING,)))))
    return alt(*whole)


def unedged(node: Regex) -> Regex | None:
    """Return what `node` means where it must match the whole text anyway; None as in `anchored`."""
    options: Sequence[Regex] = node.options if isinstance(node, Alt) else (node,)
    whole: list[Regex] = []
    for option in options:
        parts = list(option.parts) if isinstance(option, Seq) else [option]
        if len(parts) == 1 and isinstance(parts[0], Alt):
            inner = unedged(parts[0])
            if inner is None:
                return None
            whole.append(inner)
            continue
        if parts and isinstance(parts[0], Edge) and parts[0].is_start:
            parts = parts[1:]
        if parts and isinstance(parts[-1], Edge) and not parts[-1].is_start:
            parts = parts[:-1]
        if any(map(_has_edge, parts)):
            return None
        whole.append(Seq(tuple(parts)))
    return alt(*whole)


def _has_edge(node: Regex) -> bool:
    match node:
        case Edge():
            return True
        case Chars():
            return False
        case Seq(parts=parts):
            return any(map(_has_edge, parts))
        case Alt(options=options):
            return any(map(_has_edge, options))
        case Repeat(part=part):
            return _has_edge(part)
