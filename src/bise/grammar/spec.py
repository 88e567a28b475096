"""What a caller asks of the shape of an output: a plain, hashable value. Knows nothing of how it is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bise.errors import RequestError

MAX_SOURCE = 1 << 20
"""Characters of a schema, pattern or grammar at most."""


class GrammarKind(StrEnum):
    """In which language a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"
    TOOL_CALLS = "tool_calls"
    FREE = "free"
    """Any text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """The language that an output must belong to. Make one with the methods; equal specs are compiled once.

    The check of what is written in `source` comes with `Engine.prepare_grammar` or `submit`.
    """

    kind: GrammarKind
    source: str
    """JSON text of the schema, of the list of choices or of the tools; the pattern; the grammar."""
    strict: bool = False
    """JSON schema only: OpenAI's strict mode, in which every object lists all its properties as required and
    allows no others; a schema that does not is refused.
    """
    field: str = "grammar"
    """What errors call the source, such as `response_format.json_schema.schema`."""
    trigger: str | None = None
    """A control token such as `[TOOL_CALLS]`: the text before it is free, the grammar holds from it on."""

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE:
            raise RequestError(
                f"{self.field} has {len(self.source)} characters; at most {MAX_SOURCE} are taken",
                field=self.field,
            )

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, object] | bool, *, strict: bool = False, field: str = "json_schema"
    ) -> GrammarSpec:
        """Return the JSON texts that are valid under `schema` (docs/structured.md says for which keywords).

        Raises RequestError when the schema cannot be written as JSON.
        """
        return cls(kind=GrammarKind.JSON_SCHEMA, source=_json_text(schema, field), strict=strict, field=field)

    @classmethod
    def json_schema_text(
        cls, source: str, *, strict: bool = False, field: str = "json_schema"
    ) -> GrammarSpec:
        """Return the same as `json_schema`, of a schema that is JSON text; it is read when it is compiled."""
        return cls(kind=GrammarKind.JSON_SCHEMA, source=source, strict=strict, field=field)

    @classmethod
    def json_object(cls, *, field: str = "response_format") -> GrammarSpec:
        """Return the JSON texts that are objects."""
        return cls.json_schema({"type": "object"}, field=field)

    @classmethod
    def regex(cls, pattern: str, *, field: str = "regex") -> GrammarSpec:
        """Return the texts that match all of `pattern`."""
        return cls(kind=GrammarKind.REGEX, source=pattern, field=field)

    @classmethod
    def choice(cls, options: Sequence[str], *, field: str = "choice") -> GrammarSpec:
        """Return the texts that are one of `options`."""
        return cls(kind=GrammarKind.CHOICE, source=_json_text(list(options), field), field=field)

    @classmethod
    def lark(cls, text: str, *, field: str = "grammar") -> GrammarSpec:
        """Return the texts that the rule `start` of a Lark grammar derives (docs/structured.md: the
        subset).
        """
        return cls(kind=GrammarKind.LARK, source=text, field=field)

    @classmethod
    def without(cls, trigger: str, *, field: str = "grammar") -> GrammarSpec:
        """Return the texts in which the control token `trigger` does not stand."""
        return cls(kind=GrammarKind.FREE, source="", field=field, trigger=trigger)


def _json_text(value: object, field: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode("utf-8")
        return text
    except (RecursionError, TypeError, ValueError) as error:
        raise RequestError(
            f"{field} cannot be written as JSON ({' '.join(str(error).split())[:80]})", field=field
        ) from error
