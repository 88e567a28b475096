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

MAX_URI = 2_048
"""Characters of a URI at most, where any number is limited."""

STRING_FORMATS = frozenset(_PATTERNS)
INTEGER_FORMATS: dict[str, tuple[int, int] | None] = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "float": None,
    "double": None,
}
"""Formats of numbers with their bounds; None: no further bound."""


def format_expression(name: str, most: int | None = None) -> Regex:
    """Return the expression of a string format in `STRING_FORMATS`, for the whole text. Of URIs, which alone
    have no longest one, those whose parts have so few characters that all have `most`, if there are any.
    """
    pattern = _PATTERNS[name] if name != "uri" or most is None else _uri_within(most)
    whole = anchored(parse_pattern(f"^(?:{pattern})$", name))
    assert whole is not None
    return whole


def _uri_within(most: int) -> str:
    """Return the pattern of URIs of at most `most` characters; of any number where that leaves no path.

    Counting the characters of all URIs would take a copy of their automaton for each number.
    """
    scheme, host, longest = ("{1,20}", rf"{_LABEL}(\.{_LABEL}){{0,3}}", 276)
    if most < 2 * longest:
        scheme, host, longest = ("{1,8}", rf"{_SHORT_LABEL}(\.{_SHORT_LABEL}){{0,2}}", 112)
    units = (min(most, MAX_URI) - longest - len("/?#")) // len("%00")
    if units < len("/?#"):
        return _PATTERNS["uri"]
    path, query = units - 2 * (units // 3), units // 3
    return (
        rf"[a-zA-Z][a-zA-Z0-9+.-]{scheme}://{host}(:[0-9]{{1,4}})?"
        rf"(/{_URI_CHARACTER}{{0,{path}}})?(\?{_URI_CHARACTER}{{0,{query}}})?(#{_URI_CHARACTER}{{0,{query}}})?"
    )
