"""From a GGUF's key/value pairs to a `ModelConfig`: no key that changes the network is guessed or ignored.

Every key under the architecture's prefix is either used here, or known to change nothing at the value it has,
or a reason to refuse the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from bise.config import ARCHITECTURE_LIMITS, ModelConfig, RopeScaling
from bise.errors import ConfigError, ModelFileError, quoted

ARCHITECTURES = ("llama", "mistral3")
"""`llama` covers Llama 1 to 3, Mistral and Mixtral; `mistral3` is a later name for Mistral's dense models."""

_INERT: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (1.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rescale_every_n_layers": (0,),
    "residual_scale": (1.0,),
    "rope.scaling.finetuned": (False, True),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Keys that change nothing at these values, and mean something that bise does not compute at others."""

_SOURCES: Mapping[str, str] = {
    "dim": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
    "max_context": "context_length",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_scaling": "rope.scaling",
    "windows": "attention.sliding_window",
}
"""The key that a field of `ModelConfig` comes from, for messages."""

_MAX_EXPERTS_IN_ALL = 1 << 16
"""Layers times experts; more is a damaged file."""


class Keys:
    """The key/value pairs under one architecture's prefix: typed reads, and what was not read in the end."""

    def __init__(self, path: Path, metadata: Mapping[str, object], architecture: str) -> None:
        self._path = path
        self._prefix = architecture + "."
        self._metadata = metadata
        self._used: set[str] = set()

    def error(self, name: str, problem: str) -> ModelFileError:
        """Return the error to raise about the key `name`."""
        key = self._prefix + name
        return ModelFileError(f"{self._path}: {key} {problem}", field=key)

    def value(self, name: str) -> object | None:
        """Return the value of a key, None when it is absent; it counts as used."""
        self._used.add(name)
        return self._metadata.get(self._prefix + name)

    def integer(self, name: str, default: int | None = None, limit: int = 1 << 31) -> int:
        """Return an integer from 0 to `limit`; a per-layer array is accepted when its values are equal."""
        value = self.value(name)
        if isinstance(value, np.ndarray):
            array = cast(npt.NDArray[np.generic], value)
            if array.size == 0 or array.dtype.kind not in "iu" or (array != array.flat[0]).any():
                raise self.error(name, "varies from layer to layer, which is not supported")
            value = int(array.flat[0])
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {quoted(value)}")
        if not 0 <= value <= limit:
            raise self.error(name, f"must be between 0 and {limit}, got {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number; a float32 gives the shortest decimal for it (1e-05, not 9.99e-06)."""
        value = self.value(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, got {quoted(value)}")
        if not math.isfinite(value):
            raise self.error(name, f"must be finite, got {value}")
        with np.errstate(over="ignore"):
            narrow = np.float32(value)
        return float(str(narrow)) if float(narrow) == value else float(value)

    def text(self, name: str) -> str | None:
        """Return a string, None when the key is absent."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"must be a string, got {quoted(value)}")
        return value

    def refuse_unread(self) -> None:
        """Raise unless every key under the prefix was used or is inert."""
        for key, value in self._metadata.items():
            name = key.removeprefix(self._prefix)
            if name == key or name in self._used:
                continue
            allowed = _INERT.get(name)
            if allowed is None:
                raise self.error(name, "means nothing to bise in such a model and cannot be ignored")
            if not any(type(value) is type(option) and value == option for option in allowed):
                shown = " or ".join(repr(option) for option in allowed)
                raise self.error(name, f"is {quoted(value)}; bise computes only {shown}")


def read_config(
    path: Path,
    metadata: Mapping[str, object],
    vocab_size: int,
    *,
    tied: bool,
    rope_factors: tuple[float, ...],
) -> ModelConfig:
    """Return the architecture that the metadata describes.

    `vocab_size` is the number of embedding rows, `rope_factors` the rope_freqs tensor (`()` without one).
    Raises `ModelFileError` naming `path` and the key.
    """
    architecture = _architecture(path, metadata)
    keys = Keys(path, metadata, architecture)
    try:
        config = _build(keys, metadata, architecture, vocab_size, tied, rope_factors)
    except ConfigError as error:
        key = f"{architecture}.{_SOURCES.get(error.field or '', 'block_count')}"
        raise ModelFileError(f"{path}: {key}: {error}", field=key) from error
    if config.num_layers * config.num_experts > _MAX_EXPERTS_IN_ALL:
        raise keys.error(
            "expert_count", f"of {config.num_experts} in {config.num_layers} layers is not plausible"
        )
    keys.refuse_unread()
    return config


def _architecture(path: Path, metadata: Mapping[str, object]) -> str:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ModelFileError(
            f"{path}: general.type is {quoted(kind)}, not a model; open the model's own file",
            field="general.type",
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        shown = "is missing" if name is None else f"is {quoted(name)}, which is not supported"
        raise ModelFileError(
            f"{path}: general.architecture {shown}; known: {', '.join(ARCHITECTURES)}",
            field="general.architecture",
        )
    return cast(str, name)


def _build(
    keys: Keys,
    metadata: Mapping[str, object],
    architecture: str,
    vocab_size: int,
    tied: bool,
    rope_factors: tuple[float, ...],
) -> ModelConfig:
    dim = keys.integer("embedding_length")
    num_layers = keys.integer("block_count", limit=ARCHITECTURE_LIMITS["num_layers"])
    num_heads = keys.integer("attention.head_count")
    hidden_dim = keys.integer("feed_forward_length")
    num_experts = keys.integer("expert_count", 0)
    context = keys.integer("context_length")
    if num_experts and keys.integer("expert_feed_forward_length", hidden_dim) != hidden_dim:
        raise keys.error("expert_feed_forward_length", f"differs from feed_forward_length, {hidden_dim}")
    if (declared := keys.integer("vocab_size", vocab_size)) != vocab_size:
        raise keys.error("vocab_size", f"is {declared}, but token_embd.weight has {vocab_size} rows")
    head_dim = _head_dim(keys, dim, num_heads)
    return ModelConfig(
        family=_family(metadata, architecture, num_experts),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        max_context=context,
        rope_theta=_rope_theta(keys),
        rope_scaling=_rope_scaling(keys, context, rope_factors),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        windows=_windows(keys, num_layers),
        num_experts=num_experts,
        experts_per_token=keys.integer("expert_used_count", 0),
        tied_embeddings=tied,
    )


def _family(metadata: Mapping[str, object], architecture: str, num_experts: int) -> str:
    if num_experts:
        return "mixtral"
    parts = [str(metadata.get(key, "")) for key in ("general.name", "general.basename")]
    label = " ".join(parts).lower()
    if "ministral" in label:
        return "ministral"
    return "mistral" if architecture == "mistral3" or "mistral" in label else "llama"


def _head_dim(keys: Keys, dim: int, num_heads: int) -> int:
    """Return the width of a head: key_length when given, else dim / heads; all other widths must agree."""
    if num_heads < 1:
        raise keys.error("attention.head_count", "must be at least 1")
    if keys.value("attention.key_length") is not None:
        head_dim = keys.integer("attention.key_length")
    else:
        if dim % num_heads:
            raise keys.error("attention.head_count", f"{num_heads} does not divide embedding_length {dim}")
        head_dim = dim // num_heads
    for name in (
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.dimension_count",
        "rope.dimension_count_swa",
    ):
        if (width := keys.integer(name, head_dim)) != head_dim:
            raise keys.error(
                name, f"is {width}, but heads are {head_dim} wide; unequal widths are not supported"
            )
    scale, usual = keys.number("attention.scale", 0.0), head_dim**-0.5 if head_dim else 0.0
    if scale and abs(scale - usual) > 1e-6 * usual:
        raise keys.error("attention.scale", f"is {scale}; bise computes only 1 / sqrt({head_dim})")
    return head_dim


def _windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer; a pattern of n leaves every n-th layer with full attention.

    Example: sliding_window 512 and pattern 4 over 6 layers give 512, 512, 512, None, 512, 512. A pattern may
    also list one bool per layer, true for a windowed one. A window of 0 means none.
    """
    window = keys.integer("attention.sliding_window", 0) or None
    pattern = keys.value("attention.sliding_window_pattern")
    if pattern is None:
        return (window,) * num_layers
    name = "attention.sliding_window_pattern"
    if isinstance(pattern, np.ndarray):
        flags = cast(npt.NDArray[np.generic], pattern)
        if flags.dtype != np.bool_ or flags.size != num_layers:
            raise keys.error(name, f"must list {num_layers} bools, one per layer")
        windowed = [bool(flag) for flag in flags]
    else:
        every = keys.integer(name)
        windowed = [every == 0 or layer % every < every - 1 for layer in range(num_layers)]
    if window is None and any(windowed):
        raise keys.error(name, "is given without attention.sliding_window")
    return tuple(window if flag else None for flag in windowed)


def _rope_theta(keys: Keys) -> float:
    theta = keys.number("rope.freq_base", 10000.0)
    if (windowed := keys.number("rope.freq_base_swa", theta)) != theta:
        raise keys.error(
            "rope.freq_base_swa", f"is {windowed}; a base other than rope.freq_base is not supported"
        )
    return theta


def _rope_scaling(keys: Keys, context: int, factors: tuple[float, ...]) -> RopeScaling | None:
    kind = keys.text("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if kind is None:
        kind = "none" if factor == 1 else "linear"
    if kind not in ("none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", f"is {quoted(kind)}; known: none, linear, yarn")
    original = keys.integer("rope.scaling.original_context_length", context)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "none" and factor != 1:
        raise keys.error("rope.scaling.factor", f"is {factor}, but rope.scaling.type is none")
    if kind != "yarn" and attention != 1:
        raise keys.error("rope.scaling.attn_factor", f"is {attention}; it is supported with yarn only")
    if kind == "none" or (kind == "linear" and factor == 1):
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling(kind="linear", factor=factor)
    else:
        scaling = _yarn(keys, factor, original, attention)
    if not factors or all(value == 1 for value in factors):
        return scaling
    if scaling is not None:
        raise keys.error("rope.scaling.type", f"{kind} together with a rope_freqs tensor is not supported")
    return RopeScaling(kind="factors", factor=max(1.0, *factors), factors=factors)


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> RopeScaling:
    """Return YaRN scaling; cos and sin are multiplied by attention * m.

    m is yarn_attn_factor when given; else (0.1 ln f + 1) / (0.1 yarn_log_multiplier ln f + 1).
    """
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise keys.error(
            "rope.scaling.yarn_ext_factor", "must be 1 (or -1, not set); others are not supported"
        )
    stretch = math.log(factor) if factor > 1 else 0.0
    divisor = 0.1 * keys.number("rope.scaling.yarn_log_multiplier", 0.0) * stretch + 1.0
    magnitude = keys.number("rope.scaling.yarn_attn_factor", 0.0)
    if not magnitude and not divisor:
        raise keys.error("rope.scaling.yarn_log_multiplier", "makes the attention factor infinite")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention * (magnitude or (0.1 * stretch + 1.0) / divisor),
    )
