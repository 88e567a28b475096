"""The rotary part of config.json: rope_theta, and rope_scaling or (since transformers 5) rope_parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bise.config import ARCHITECTURE_LIMITS, RopeScaling
from bise.errors import ConfigError, ModelFileError, quoted
from bise.model.config_fields import ConfigFields

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    # The trained context does not enter linear scaling; some files state it all the same.
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    }),
    "yarn": frozenset({
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    }),
}  # fmt: skip
"""Fields of each kind of scaling; any other field is refused."""
_SHARED_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def rope_of(fields: ConfigFields, default_theta: float, max_context: int) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling or None); what the files say twice must agree."""
    rope = _rope_object(fields)
    theta = fields.number("rope_theta", default_theta)
    if rope is None:
        return _checked_theta(fields, theta), None
    if "rope_theta" in rope:
        own = rope.number("rope_theta")
        if "rope_theta" in fields and own != theta:
            rope.refuse("rope_theta", f"= {own:g} contradicts rope_theta = {theta:g}")
        theta = own
    theta = _checked_theta(fields, theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if "type" in rope and rope.text("type") != kind:
        rope.refuse("type", f"= {quoted(rope.text('type'))} contradicts rope_type = {quoted(kind)}")
    if kind not in _KEYS:
        known = ", ".join(_KEYS)
        rope.refuse(
            "rope_type" if "rope_type" in rope else "type",
            f"= {quoted(kind)} is not supported; known: {known}",
        )
    for name, value in rope.values.items():
        if value is not None and name not in _KEYS[kind] | _SHARED_KEYS:
            rope.refuse(name, f"= {quoted(value)} is not known for rope_type {kind}")
    rope.require_neutral({"partial_rotary_factor": (1, 1.0), "truncate": (True,)}, "is not supported")
    if kind == "default":
        return theta, None
    try:
        return theta, _scaling(fields, rope, kind, max_context)
    except ConfigError as error:
        raise ModelFileError(f"{fields.origin}: {error}", field=error.field) from error


def _rope_object(fields: ConfigFields) -> ConfigFields | None:
    found = [fields.nested(name) for name in ("rope_parameters", "rope_scaling") if name in fields]
    if len(found) == 2 and found[0].values != found[1].values:
        fields.refuse("rope_scaling", "contradicts rope_parameters; keep one of them")
    return found[0] if found and found[0].values else None


def _checked_theta(fields: ConfigFields, theta: float) -> float:
    if theta <= 1:
        fields.refuse("rope_theta", f"must be above 1, got {theta:g}")
    return theta


def _scaling(fields: ConfigFields, rope: ConfigFields, kind: str, max_context: int) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind=kind, factor=rope.number("factor"))
    limit = ARCHITECTURE_LIMITS["max_context"]
    original = fields.integer(
        "original_max_position_embeddings",
        1,
        limit,
        rope.integer("original_max_position_embeddings", 1, limit, max_context),
    )
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.refuse("high_freq_factor", f"= {high:g} must be above low_freq_factor = {low:g}")
        return RopeScaling(
            kind=kind,
            factor=rope.number("factor"),
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = rope.number("factor", max_context / original)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if fast <= slow:
        rope.refuse("beta_fast", f"= {fast:g} must be above beta_slow = {slow:g}")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: ConfigFields, factor: float) -> float | None:
    """Return the factor on cos and sin, None for yarn's own formula; the two mscales make a ratio."""
    if "attention_factor" in rope:
        return rope.number("attention_factor")
    if "mscale" not in rope or "mscale_all_dim" not in rope:
        return None
    mscale, all_dim = _scale(rope, "mscale"), _scale(rope, "mscale_all_dim")
    if not mscale or not all_dim or factor <= 1:
        return None
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def _scale(rope: ConfigFields, name: str) -> float:
    """Return a field that may be 0, which means unset."""
    value = rope.values[name]
    return 0.0 if type(value) in (int, float) and value == 0 else rope.number(name)
