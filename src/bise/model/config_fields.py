"""Typed access to the fields of a model's configuration file: every error names the file and the field.

It knows JSON types and ranges, not architectures. Neither `true` nor `1.0` is an integer; null means absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, cast

from bise.errors import ModelFileError, quoted


class ConfigFields:
    """The members of one JSON object of a configuration file."""

    def __init__(self, values: Mapping[str, object], origin: str, prefix: str = "") -> None:
        """Wrap `values` of the file `origin`; `prefix` is the dotted path of a nested object."""
        self.values = values
        self.origin = origin
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        """Return True when the field is there and not null."""
        return self.values.get(name) is not None

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise `ModelFileError` about a field."""
        field = self._prefix + name
        raise ModelFileError(f"{self.origin}: {quoted(field)[1:-1]} {reason}", field=field)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer in [low, high]; an absent one is `default`, or refused without a default."""
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"must be an integer from {low} to {high}, got {quoted(value)}")
        return value

    def number(self, name: str, default: float | None = None, *, below: float = 1e15) -> float:
        """Return a number in (0, below) as a float; an absent one is `default`, or refused without."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"must be a number, got {quoted(value)}")
        if not 0 < value < below:
            self.refuse(name, f"must be above 0 and below {below:g}, got {quoted(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false; an absent one is `default`."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, got {quoted(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; an absent one is `default`, or refused without."""
        value = self._get(name, default)
        if not isinstance(value, str):
            self.refuse(name, f"must be a text, got {quoted(value)}")
        return value

    def items(self, name: str) -> list[object]:
        """Return an array; an absent one is refused."""
        value = self._get(name, None)
        if not isinstance(value, list):
            self.refuse(name, f"must be an array, got {quoted(value)}")
        return cast(list[object], value)

    def nested(self, name: str) -> ConfigFields:
        """Return the fields of a nested object; an absent one is refused."""
        value = self._get(name, None)
        if not isinstance(value, dict):
            self.refuse(name, f"must be an object, got {quoted(value)}")
        return ConfigFields(cast(dict[str, object], value), self.origin, f"{self._prefix}{name}.")

    def require_neutral(self, neutral: Mapping[str, tuple[object, ...]], reason: str) -> None:
        """Refuse each field of `neutral` whose value is neither null nor one of those given for it."""
        for name, accepted in neutral.items():
            value = self.values.get(name)
            if value is None:
                continue
            # `1 == True` in Python, never in a configuration.
            if not any(type(value) is type(item) and value == item for item in accepted):
                self.refuse(name, f"= {quoted(value)} {reason}")

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            self.refuse(name, "is missing")
        return default
