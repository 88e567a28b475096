"""What bise does with every keyword of JSON Schema. docs/structured.md shows this table; a test compares."""

from __future__ import annotations

from enum import StrEnum


class Treatment(StrEnum):
    """What becomes of a keyword."""

    ENFORCED = "enforced"
    ANNOTATION = "annotation"
    """Says nothing about what is valid; read over."""
    REFUSED = "refused"


KEYWORDS: dict[str, tuple[Treatment, str]] = {
    # Structure
    "$ref": (
        Treatment.ENFORCED,
        "within the document: `#`, `#/a/b`, `#anchor`; other keywords beside it count, and are refused where "
        "`$schema` names draft 4, 6 or 7, in which they do not",
    ),
    "$defs": (Treatment.ENFORCED, "holds what `$ref` names"),
    "definitions": (Treatment.ENFORCED, "as `$defs`"),
    "$anchor": (Treatment.ENFORCED, "a name for `$ref`; none where `$schema` names draft 4, 6 or 7"),
    "$schema": (Treatment.ENFORCED, "draft 4, 6, 7, 2019-09 and 2020-12; others are refused"),
    "$id": (Treatment.ANNOTATION, "at the root; refused below it, where it would move `$ref`"),
    "id": (Treatment.ANNOTATION, "as `$id` (draft 4)"),
    "$dynamicRef": (Treatment.REFUSED, "use `$ref`"),
    "$recursiveRef": (Treatment.REFUSED, "use `$ref`"),
    "$dynamicAnchor": (Treatment.ANNOTATION, "without `$dynamicRef` it does nothing"),
    "$recursiveAnchor": (Treatment.ANNOTATION, "without `$recursiveRef` it does nothing"),
    "$vocabulary": (Treatment.REFUSED, "changes what keywords mean"),
    # Any type
    "type": (Treatment.ENFORCED, "a name or a list of names"),
    "enum": (Treatment.ENFORCED, "together with all keywords beside it"),
    "const": (
        Treatment.ENFORCED,
        "together with all keywords beside it; refused where `$schema` names draft 4, which has it not",
    ),
    "allOf": (Treatment.ENFORCED, ""),
    "anyOf": (Treatment.ENFORCED, ""),
    "oneOf": (Treatment.ENFORCED, "where the options provably exclude one another; else refused"),
    "not": (Treatment.REFUSED, "say what is allowed instead"),
    "if": (Treatment.REFUSED, "use `anyOf`"),
    "then": (Treatment.REFUSED, "use `anyOf`"),
    "else": (Treatment.REFUSED, "use `anyOf`"),
    # Numbers
    "minimum": (Treatment.ENFORCED, ""),
    "maximum": (Treatment.ENFORCED, ""),
    "exclusiveMinimum": (Treatment.ENFORCED, "also draft 4's boolean"),
    "exclusiveMaximum": (Treatment.ENFORCED, "also draft 4's boolean"),
    "multipleOf": (
        Treatment.ENFORCED,
        "whole numbers from 1; fractions are refused: floating point cannot tell their multiples. Small and "
        "round ones without bounds (up to 15 digits), others where bounds leave at most 4,096 multiples",
    ),
    # Strings
    "minLength": (Treatment.ENFORCED, ""),
    "maxLength": (Treatment.ENFORCED, ""),
    "pattern": (Treatment.ENFORCED, "ECMAScript, without look-around, back-references and word boundaries"),
    "format": (
        Treatment.ENFORCED,
        "date-time, date, time, duration, email, hostname, ipv4, ipv6, uuid, uri; int32, int64, float and "
        "double on numbers; others are refused",
    ),
    "contentEncoding": (Treatment.ANNOTATION, ""),
    "contentMediaType": (Treatment.ANNOTATION, ""),
    "contentSchema": (Treatment.ANNOTATION, ""),
    # Arrays
    "items": (Treatment.ENFORCED, "also draft 4's list"),
    "prefixItems": (
        Treatment.ENFORCED,
        "refused where `$schema` names an older draft, in which it says nothing and `items` says something "
        "else",
    ),
    "additionalItems": (Treatment.ENFORCED, "after a list of `items`"),
    "minItems": (Treatment.ENFORCED, ""),
    "maxItems": (Treatment.ENFORCED, ""),
    "uniqueItems": (
        Treatment.ENFORCED,
        "where items come from an `enum` or there is at most one; else refused",
    ),
    "contains": (Treatment.REFUSED, ""),
    "minContains": (Treatment.REFUSED, ""),
    "maxContains": (Treatment.REFUSED, ""),
    "unevaluatedItems": (Treatment.REFUSED, "use `items`"),
    # Objects
    "properties": (Treatment.ENFORCED, "written in this order; without `additionalProperties` no others"),
    "required": (Treatment.ENFORCED, ""),
    "additionalProperties": (
        Treatment.ENFORCED,
        "after the named ones; beside `patternProperties` only those",
    ),
    "patternProperties": (
        Treatment.ENFORCED,
        "where no name matches two of the patterns, and every reader of a pattern agrees which of "
        "`properties` it matches; else refused",
    ),
    "propertyNames": (Treatment.ENFORCED, "string keywords and lists of names; refused as `const` is"),
    "minProperties": (Treatment.ENFORCED, "as far as named properties reach, and one more; else refused"),
    "maxProperties": (Treatment.ENFORCED, ""),
    "unevaluatedProperties": (Treatment.REFUSED, "use `additionalProperties`"),
    "dependentRequired": (Treatment.REFUSED, "use `anyOf`"),
    "dependentSchemas": (Treatment.REFUSED, "use `anyOf`"),
    "dependencies": (Treatment.REFUSED, "use `anyOf`"),
    # For people
    "title": (Treatment.ANNOTATION, ""),
    "description": (Treatment.ANNOTATION, ""),
    "default": (Treatment.ANNOTATION, ""),
    "examples": (Treatment.ANNOTATION, ""),
    "example": (Treatment.ANNOTATION, "OpenAPI"),
    "deprecated": (Treatment.ANNOTATION, ""),
    "readOnly": (Treatment.ANNOTATION, ""),
    "writeOnly": (Treatment.ANNOTATION, ""),
    "$comment": (Treatment.ANNOTATION, ""),
    "discriminator": (Treatment.ANNOTATION, "OpenAPI: a hint for readers of `oneOf`"),
    "externalDocs": (Treatment.ANNOTATION, "OpenAPI"),
    "xml": (Treatment.ANNOTATION, "OpenAPI"),
    "enumNames": (Treatment.ANNOTATION, "forms"),
    "nullable": (Treatment.REFUSED, 'OpenAPI 3.0; write `"type": ["string", "null"]`'),
}
"""Keyword -> what becomes of it, and a remark. Names that begin with `x-` are annotations; all others that
are not here are refused, because a misspelt keyword would enforce nothing.
"""
