"""Word patterns of known models pass; patterns of exponential time do not."""

from __future__ import annotations

import pytest

from bise.text.regex_check import repeats_within_repetition

KNOWN = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|\p{N}",
    r"[\p{P}\$\+<=>\^~\|]+",
    r"[^(\s|[.,!?])]+",
    r"[]+]+",
    r"[^]a]*",
    r"(a{2}){3}",
    r"\(a+\)+",
    r"(?:ab)+",
    "",
]
ENDLESS = [
    "(a+)+",
    "(a*)*",
    "(?:a|aa)+",
    "((a+))*",
    "(a+){2,}",
    r"(\s+)+$",
    "(x(a|b)y)*",
    "(?=(a+)+)b",
    "([a-z]+ ?)*",
]


@pytest.mark.parametrize("pattern", KNOWN)
def test_known_word_patterns_pass(pattern):
    assert not repeats_within_repetition(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_of_exponential_time_are_found(pattern):
    assert repeats_within_repetition(pattern)
