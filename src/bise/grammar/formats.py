"""The string formats that are enforced, as expressions. Each is at least as narrow as its RFC."""

from __future__ import annotations

from bise.grammar.pattern import parse_pattern
from bise.grammar.regex import Regex, anchored

_DATE = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
_ZONE = r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LABEL = r"[a-zA-Z0-9](-?[a-zA-Z0-9]){0,30}"  # `--` at its third place is an IDN's, with rules of its own
_SHORT_LABEL = _LABEL.replace("30", "15")
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = r"[0-9a-fA-F]{1,4}"
_SPECIAL = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,15}"
_URI_CHARACTER = r"([a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})"
_UNIT = r"[0-9]{1,9}"
_TIME_PART = rf"T({_UNIT}H({_UNIT}M({_UNIT}S)?)?|{_UNIT}M({_UNIT}S)?|{_UNIT}S)"
_DAY_PART = rf"({_UNIT}Y({_UNIT}M({_UNIT}D)?)?|{_UNIT}M({_UNIT}D)?|{_UNIT}D)"

_PATTERNS = {
    "date": _DATE.replace("[0-9]{4}", _YEAR, 1),
    "time": _CLOCK + _ZONE,
    "date-time": _DATE.replace("[0-9]{4}", _YEAR, 1) + "[Tt]" + _CLOCK + _ZONE,
    "duration": rf"P({_DAY_PART}({_TIME_PART})?|{_TIME_PART}|{_UNIT}W)",
    "email": rf"{_SPECIAL}(\.{_SPECIAL}){{0,3}}@{_SHORT_LABEL}(\.{_SHORT_LABEL}){{1,3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": rf"({_GROUP}:){{7}}{_GROUP}|::|::{_GROUP}(:{_GROUP}){{0,5}}|{_GROUP}(:{_GROUP}){{0,5}}::"
    rf"|{_GROUP}::{_GROUP}(:{_GROUP}){{0,4}}",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]{{1,20}}://{_LABEL}(\.{_LABEL}){{0,3}}(:[0-9]{{1,4}})?"
    rf"(/{_URI_CHARACTER}*)?(\?{_URI_CHARACTER}*)?(#{_URI_CHARACTER}*)?",
}

STRING_FORMATS = frozenset(_PATTERNS)
INTEGER_FORMATS: dict[str, tuple[int, int] | None] = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "float": None,
    "double": None,
}
"""Formats of numbers with their bounds; None: no further bound."""


def format_expression(name: str) -> Regex:
    """Return the expression of a string format in `STRING_FORMATS`, for the whole text."""
    whole = anchored(parse_pattern(f"^(?:{_PATTERNS[name]})$", name))
    assert whole is not None
    return whole
