"""Patterns as people write them (ECMAScript's and Python's common ground) to expressions.

Takes time linear in the pattern and evaluates nothing: what has no place in a regular language, or means
different things in the two dialects, is refused. Of classes such as \\W it keeps the characters on which both
agree, so that an output matches whoever reads the pattern.
"""

from __future__ import annotations

import re
from typing import NoReturn

from bise.errors import RequestError, quoted
from bise.grammar.regex import (
    DIGITS,
    ECMA_SPACE,
    EMPTY,
    WORD,
    Chars,
    Edge,
    Ranges,
    Regex,
    Repeat,
    Seq,
    alt,
    common,
    complement,
    ranges,
    size,
)

MAX_PATTERN = 4096
"""Characters of a pattern at most."""
MAX_SIZE = 20_000
"""Sets of characters in a pattern at most, repetitions written out."""
_MAX_DEPTH = 50
_MAX_COUNT = 1_000_000
_NO_DIGITS: Ranges = (
    (0, 0x2F), (0x3A, 0x65F), (0x2000, 0xA61F), (0xAC00, 0xD7FF), (0xE000, 0xFEFF), (0x1F300, 0x1F64F),
)  # fmt: skip
"""Characters that are a digit to nobody: rather too few than one that a later Unicode makes one."""
_NO_WORD: Ranges = (
    (0, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0x7F), (0xA1, 0xA9), (0xAB, 0xB1),
    (0xB4, 0xB4), (0xB6, 0xB8), (0xBB, 0xBB), (0xBF, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7), (0x2010, 0x2027),
    (0x2030, 0x205E), (0x20A0, 0x20BF), (0x2190, 0x23FF), (0x2500, 0x26FF), (0x3001, 0x3004),
    (0x3008, 0x3020), (0x1F300, 0x1F64F),
)  # fmt: skip
"""Likewise no letter, digit or underscore."""
_PYTHON_SPACE = ranges([(9, 13), (0x1C, 0x20), (0x85, 0x85), *ECMA_SPACE[2:-1]])
_CLASSES: dict[str, Ranges] = {
    "d": DIGITS, "D": _NO_DIGITS, "w": WORD, "W": _NO_WORD,
    "s": common(ECMA_SPACE, _PYTHON_SPACE), "S": complement(ranges([*ECMA_SPACE, *_PYTHON_SPACE])),
}  # fmt: skip
"""Per class what is in it by ECMAScript and by Python."""
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_NOT_NEWLINE = complement(ranges([(10, 10), (13, 13), (0x2028, 0x2029)]))
_COUNTS = re.compile(r"\{(\d{1,9})(?:(,)(\d{1,9})?)?\}")


def parse_pattern(pattern: str, place: str, *, is_wide: bool = False) -> Regex:
    """Return the expression of a pattern, edges still in it; RequestError names `place`.

    It matches what every reader's pattern does, with `is_wide` what any reader's does.
    """
    if len(pattern) > MAX_PATTERN:
        raise RequestError(
            f"{place} has {len(pattern)} characters; a pattern may have {MAX_PATTERN}", field=place
        )
    node = _Parser(pattern, place, is_wide=is_wide).parse()
    if (total := size(node)) > MAX_SIZE:
        raise RequestError(
            f"{place} {quoted(pattern)} grows to {total} characters with its repetitions written out; at "
            f"most {MAX_SIZE} are taken: lower the counts, or use minLength and maxLength",
            field=place,
        )
    return node


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str, place: str, *, is_wide: bool) -> None:
        self._text = pattern
        self._is_wide = is_wide
        self._place = place
        self._at = 0

    def parse(self) -> Regex:
        node = self._alternatives(0)
        if self._at < len(self._text):
            self._refuse("has a ) without a (")
        return node

    def _refuse(self, reason: str) -> NoReturn:
        raise RequestError(
            f"{self._place} {quoted(self._text)} {reason} (character {self._at})", field=self._place
        )

    def _next(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _take(self, what: str) -> bool:
        if self._text.startswith(what, self._at):
            self._at += len(what)
            return True
        return False

    def _alternatives(self, depth: int) -> Regex:
        if depth > _MAX_DEPTH:
            self._refuse(f"nests more than {_MAX_DEPTH} groups")
        options = [self._sequence(depth)]
        while self._take("|"):
            options.append(self._sequence(depth))
        return alt(*options)

    def _sequence(self, depth: int) -> Regex:
        parts: list[Regex] = []
        while self._at < len(self._text) and self._next() not in "|)":
            parts.append(self._quantified(self._atom(depth)))
        return parts[0] if len(parts) == 1 else Seq(tuple(parts)) if parts else EMPTY

    def _quantified(self, atom: Regex) -> Regex:
        low: int
        high: int | None
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif match := _COUNTS.match(self._text, self._at):
            low = int(match[1])
            high = int(match[3]) if match[3] else None if match[2] else low
            if high is not None and high < low:
                self._refuse("has a repetition whose upper count is below the lower one")
            if max(low, high or 0) > _MAX_COUNT:
                self._refuse(f"repeats more than {_MAX_COUNT} times")
            self._at = match.end()
        elif self._next() == "{":
            self._refuse("has a { that is no count; write \\{")
        else:
            return atom
        if isinstance(atom, Edge):
            self._refuse("repeats ^ or $")
        if self._next() == "+" or self._next() == "*" or _COUNTS.match(self._text, self._at):
            self._refuse("repeats a repetition (possessive quantifiers are no regular language)")
        self._take("?")  # lazy or not, the language is the same
        return Repeat(atom, low, high)

    def _atom(self, depth: int) -> Regex:
        letter = self._next()
        if letter in "*+?{":
            self._refuse(f"has a {letter} that repeats nothing")
        self._at += 1
        match letter:
            case ".":
                return Chars(complement(_one(10)) if self._is_wide else _NOT_NEWLINE)
            case "^" | "$":
                return Edge(letter == "^")
            case "[":
                return Chars(self._class())
            case "(":
                return self._group(depth)
            case "\\":
                members = self._escape(in_class=False)
                return Chars(members)
            case _:
                return Chars(((ord(letter), ord(letter)),))

    def _group(self, depth: int) -> Regex:
        if self._take("?") and not self._take(":") and not self._named_group():
            self._refuse("has a look-around or a flag, which no regular language has")
        node = self._alternatives(depth + 1)
        if not self._take(")"):
            self._refuse("has a ( without a )")
        return node

    def _named_group(self) -> bool:
        match = re.compile(r"P?<[A-Za-z_]\w{0,63}>").match(self._text, self._at)
        if match:
            self._at = match.end()
        return match is not None

    def _escape(self, *, in_class: bool, is_negated: bool = False) -> Ranges:
        letter = self._next()
        self._at += 1
        if letter in _CLASSES:
            # What is in a class by one of them alone must go as well where the rest is what counts.
            is_rest = is_negated != self._is_wide
            return complement(_CLASSES[letter.swapcase()]) if is_rest else _CLASSES[letter]
        if letter == "b" and in_class:
            return ((8, 8),)
        if letter == "0" and self._next().isdigit():
            self._refuse("has an octal escape; write \\x00")
        if letter in _CONTROLS:
            return _one(ord(_CONTROLS[letter]))
        if letter in ("x", "u"):
            return _one(self._code_point(2 if letter == "x" else 4))
        if not letter or letter.isalnum():
            self._refuse(f"has the escape \\{letter}, which is not supported")
        return ((ord(letter), ord(letter)),)

    def _code_point(self, count: int) -> int:
        match = re.compile(rf"[0-9A-Fa-f]{{{count}}}").match(self._text, self._at)
        if match is None and count == 4:
            match = re.compile(r"\{([0-9A-Fa-f]{1,6})\}").match(self._text, self._at)
        if match is None:
            self._refuse(f"needs {count} hexadecimal digits after the escape")
        self._at = match.end()
        point = int(match[0].strip("{}"), 16)
        if 0xD800 <= point <= 0xDBFF:
            low = re.compile(r"\\u([dD][C-Fc-f][0-9A-Fa-f]{2})").match(self._text, self._at)
            if low:
                self._at = low.end()
                return 0x10000 + ((point - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
            self._refuse("names half of a surrogate pair or no character")
        return point

    def _class(self) -> Ranges:
        negated = self._take("^")
        pairs: list[tuple[int, int]] = []
        if self._next() == "]":
            self._refuse("has an empty class")
        while not self._take("]"):
            if self._at >= len(self._text):
                self._refuse("has a [ without a ]")
            members = self._class_member(is_negated=negated)
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._class_member(is_negated=negated)
                if not (_is_single(members) and _is_single(last)) or last[0][0] < members[0][0]:
                    self._refuse("has a range in a class that is no range")
                members = ((members[0][0], last[0][0]),)
            pairs += members
        chars = ranges(pairs)
        return complement(chars) if negated else chars

    def _class_member(self, *, is_negated: bool) -> Ranges:
        letter = self._next()
        self._at += 1
        if letter == "\\":
            return self._escape(in_class=True, is_negated=is_negated)
        if letter == "[" and self._next() in (":", "."):
            self._refuse("has a POSIX class; write the characters")
        return ((ord(letter), ord(letter)),)


def _one(point: int) -> Ranges:
    return ((point, point),)


def _is_single(members: Ranges) -> bool:
    return len(members) == 1 and members[0][0] == members[0][1]
