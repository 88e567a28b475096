"""Guardrails: regular expressions that a key's prompts and answers must not match.

Matching takes time linear in the text (RE2), whatever the expression. Text is searched, never kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from bise.errors import ConfigError

MAX_RULES = 64
MAX_PATTERN = 1000
"""Characters of one expression."""
MAX_PROGRAM_BYTES = 4 << 20
"""Memory that one compiled expression may take; larger ones are refused."""
STAGES = ("input", "output", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One expression that must not occur. Raises ConfigError for a field that makes no sense."""

    name: str
    """What the ledger and the answer call it."""
    pattern: str
    """In RE2's syntax: no look-around, no back references."""
    stage: str = "both"
    """Where it counts: `input` (before generation), `output` (after it) or `both`."""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 100 or not self.name.isprintable():
            raise ConfigError("a rule's name must have 1 to 100 printable characters", field="rules")
        if self.stage not in STAGES:
            raise ConfigError(
                f"rule {self.name}: stage must be one of {', '.join(STAGES)}, got {self.stage!r}",
                field="rules",
            )
        if not self.pattern or len(self.pattern) > MAX_PATTERN:
            raise ConfigError(
                f"rule {self.name}: pattern must have 1 to {MAX_PATTERN} characters", field="rules"
            )
        compile_pattern(self.name, self.pattern)

    def as_json(self) -> dict[str, str]:
        """Return the rule as stored and shown."""
        return {"name": self.name, "pattern": self.pattern, "stage": self.stage}


def rules_from_json(value: object, where: str = "rules") -> tuple[Rule, ...]:
    """Return the rules that a list of `{name, pattern, stage}` describes; ConfigError names what is wrong."""
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of rules", field="rules")
    entries = cast(list[object], value)
    if len(entries) > MAX_RULES:
        raise ConfigError(f"{where}: at most {MAX_RULES} rules, got {len(entries)}", field="rules")
    found: list[Rule] = []
    for index, entry in enumerate(entries):
        fields = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        strings = all(isinstance(part, str) for part in fields.values())
        if not strings or not {"name", "pattern"} <= fields.keys() <= {"name", "pattern", "stage"}:
            raise ConfigError(
                f"{where}[{index}] must have the strings name, pattern and, if wanted, stage", field="rules"
            )
        found.append(Rule(**fields))
    return tuple(found)


class Span(Protocol):
    """One occurrence."""

    def start(self) -> int:
        """Return where it begins."""
        ...

    def end(self) -> int:
        """Return where it ends."""
        ...


class Pattern(Protocol):
    """A compiled expression."""

    def search(self, text: str) -> object | None:
        """Return something when the expression occurs in the text."""
        ...

    def finditer(self, text: str) -> Iterator[Span]:
        """Return its occurrences, none of which overlap."""
        ...


def compile_pattern(name: str, pattern: str) -> Pattern:
    """Return the compiled expression; ConfigError when RE2 does not take it."""
    re2 = cast(Any, import_module("re2"))  # the package has no types
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_PROGRAM_BYTES
    try:
        return cast(Pattern, re2.compile(pattern, options))
    except re2.error as error:
        raise ConfigError(
            f"rule {name}: the expression is not valid or too big ({_reason(error)}); "
            "RE2 has no look-around and no back references",
            field="rules",
        ) from error


def _reason(error: Exception) -> str:
    reason: object = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)


class Guard:
    """A key's rules, compiled; says which rule a text breaks."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        """Compile the rules."""
        self._rules = [(rule, compile_pattern(rule.name, rule.pattern)) for rule in rules]

    @property
    def watches_output(self) -> bool:
        """True when answers must be checked before anyone sees them."""
        return any(rule.stage != "input" for rule, _ in self._rules)

    def broken_rule(self, texts: Sequence[str], stage: str) -> str | None:
        """Return the name of the first rule that one of the texts breaks; None when all is well."""
        for rule, pattern in self._rules:
            if rule.stage in (stage, "both") and any(pattern.search(text) for text in texts):
                return rule.name
        return None

    def broken_between(self, before: str, text: str, after: str) -> str | None:
        """Return the name of the first rule for answers that `text` breaks, alone or together with what is
        around it; what lies in `before` or `after` alone is not the answer's doing.
        """
        whole = f"{before}{text}{after}"
        first, last = len(before), len(before) + len(text)
        for rule, pattern in self._rules:
            if rule.stage == "input":
                continue
            if not pattern.search(whole):
                continue
            spans = pattern.finditer(whole)
            if any(span.end() > first and span.start() < last for span in spans) or pattern.search(text):
                return rule.name
        return None
