"""JSON numbers within bounds, as expressions over decimal digits. All arithmetic is on exact integers."""

from __future__ import annotations

from decimal import Decimal

from bise.grammar.regex import EMPTY, Alt, Regex, alt, char, digits, optional, seq, text

INTEGER_DIGITS = 18
"""Digits of an integer that has no bounds."""
PRECISION = 15
"""Significant digits of a bounded number: doubles tell any two such decimals apart."""

Digits = str


def any_integer() -> Regex:
    """Return the integers of up to `INTEGER_DIGITS` digits; never -0."""
    positive = seq(char("1", "9"), digits(0, INTEGER_DIGITS - 1))
    return alt(char("0"), seq(optional(char("-")), positive))


def any_number() -> Regex:
    """Return the numbers that JSON spells with up to 16 digits on each side of the point and an exponent."""
    whole = alt(char("0"), seq(char("1", "9"), digits(0, 15)))
    exponent = seq(alt(char("e"), char("E")), optional(alt(char("+"), char("-"))), digits(1, 2))
    return seq(optional(char("-")), whole, optional(seq(char("."), digits(1, 16))), optional(exponent))


def integers_between(low: int | None, high: int | None) -> Regex:
    """Return the integers from `low` to `high` (None: no bound on that side, but `INTEGER_DIGITS`)."""
    limit = 10**INTEGER_DIGITS - 1
    low = min(-limit, high or 0) if low is None else low
    high = max(limit, low) if high is None else high
    options: list[Regex] = []
    if low < 0:
        options.append(seq(char("-"), _naturals(max(1, -high), -low)))
    if high >= 0:
        options.append(_naturals(max(0, low), high))
    return Alt(tuple(options))


def _naturals(low: int, high: int) -> Regex:
    """Return the natural numbers from `low` to `high`, without leading zeros."""
    options: list[Regex] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        if first <= last:
            options.append(_fixed(str(first), str(last)))
    return Alt(tuple(options))


def _digit(low: str, high: str) -> list[Regex]:
    return [char(low, high)] if low <= high else []


def _next(digit: str) -> str:
    return chr(ord(digit) + 1)


def _previous(digit: str) -> str:
    return chr(ord(digit) - 1)


def _fixed(first: Digits, last: Digits) -> Regex:
    """Return the digit strings from `first` to `last`, which have one length."""
    if not first:
        return EMPTY
    if first[0] == last[0]:
        return seq(char(first[0]), _fixed(first[1:], last[1:]))
    rest = len(first) - 1
    if first[1:] == "0" * rest and last[1:] == "9" * rest:
        return seq(char(first[0], last[0]), digits(rest, rest))
    options = [
        seq(char(first[0]), _fixed(first[1:], "9" * rest)),
        seq(char(last[0]), _fixed("0" * rest, last[1:])),
    ]
    options += [seq(middle, digits(rest, rest)) for middle in _digit(_next(first[0]), _previous(last[0]))]
    return Alt(tuple(options))


def numbers_between(
    low: Decimal | None, high: Decimal | None, *, above: bool = False, below: bool = False
) -> Regex:
    """Return decimals without exponent from `low` to `high`; `above` and `below` leave out the bounds
    themselves.

    Written with so few digits that reading them as doubles cannot move one across a bound.
    """
    limit = 10 ** (PRECISION - 3)
    low = Decimal(min(-limit, int(high or limit) - limit)) if low is None else low
    high = Decimal(max(limit, int(low) + limit)) if high is None else high
    size = max(1, len(str(int(max(abs(low), abs(high))))))
    places = max(0, min(PRECISION - size, 12))
    least = _scaled(low, places, up=True, strict=above)
    most = _scaled(high, places, up=False, strict=below)
    options: list[Regex] = []
    if least < 0:
        options.append(seq(char("-"), _decimals(max(1, -most), -least, places)))
    if most >= 0:
        options.append(_decimals(max(0, least), most, places))
    return Alt(tuple(options))


def _scaled(bound: Decimal, places: int, *, up: bool, strict: bool) -> int:
    """Return the nearest point of the grid of 10^-places inside of a bound."""
    numerator, denominator = bound.as_integer_ratio()
    whole, left = divmod(numerator * 10**places, denominator)
    if up:
        return whole + (1 if left or strict else 0)
    return whole - (1 if strict and not left else 0)


def _decimals(low: int, high: int, places: int) -> Regex:
    """Return the decimals of the grid from `low` to `high` (scaled, not negative)."""
    if low > high:
        return Alt(())
    unit = 10**places
    first, low_part = divmod(low, unit)
    last, high_part = divmod(high, unit)
    smallest, largest = _padded(low_part, places), _padded(high_part, places)
    if first == last:
        return seq(text(str(first)), _point(*_between(smallest, largest)))
    options = [
        seq(text(str(first)), _point(*_between(smallest, "9" * places))),
        seq(text(str(last)), _point(*_between("0" * places, largest))),
    ]
    if first + 1 < last:
        options.append(seq(_naturals(first + 1, last - 1), _point(*_between("0" * places, "9" * places))))
    return Alt(tuple(options))


def _padded(part: int, places: int) -> Digits:
    return str(part).zfill(places) if places else ""


def _point(written: Regex | None, may_stop: bool) -> Regex:
    """Return the fraction with its point: `written` digits, or none at all where `may_stop`."""
    if written is None:
        return EMPTY if may_stop else Alt(())
    fraction = seq(char("."), written)
    return optional(fraction) if may_stop else fraction


def _between(low: Digits, high: Digits) -> tuple[Regex | None, bool]:
    """Return the digit strings, one digit at least, that lie from `low` to `high` when filled up with zeros;
    and whether the empty one does.
    """
    if not low:
        return None, True
    if set(low) == {"0"} and set(high) == {"9"}:
        return digits(1, len(low)), True
    options: list[Regex] = []
    if low[0] == high[0]:
        options += _continued(char(low[0]), *_between(low[1:], high[1:]))
    else:
        rest = len(low) - 1
        options += _continued(char(low[0]), *_between(low[1:], "9" * rest))
        options += [seq(middle, digits(0, rest)) for middle in _digit(_next(low[0]), _previous(high[0]))]
        options += _continued(char(high[0]), *_between("0" * rest, high[1:]))
    return (Alt(tuple(options)) if options else None), set(low) == {"0"}


def _continued(digit: Regex, written: Regex | None, may_stop: bool) -> list[Regex]:
    if written is None:
        return [digit] if may_stop else []
    return [seq(digit, optional(written) if may_stop else written)]


def multiples(step: int, low: int | None, high: int | None) -> list[int] | None:
    """Return the multiples of `step` within bounds; None when they are too many to be listed."""
    if low is None or high is None or (high - low) // step > 4096:
        return None
    return list(range(-(-low // step) * step, high + 1, step))
