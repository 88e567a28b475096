"""Rotary frequencies, plain and stretched (linear, yarn, llama3), in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig, RopeScaling

Frequencies = npt.NDArray[np.float64]


def rope_frequencies(config: ModelConfig) -> tuple[Frequencies, float]:
    """Return (inverse frequencies [D / 2], factor on cos and sin) of a model.

    Sources: RoPE arXiv 2104.09864; YaRN arXiv 2309.00071 section 3; llama3 as published with Llama 3.1.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    inv_freq = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "factors":
        return inv_freq / np.array(scaling.factors, np.float64), 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return _yarn(inv_freq, scaling, config), factor


def _llama3(inv_freq: Frequencies, scaling: RopeScaling) -> Frequencies:
    wavelength = 2 * math.pi / inv_freq
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    if span == 0:
        return np.where(wavelength > low, inv_freq / scaling.factor, inv_freq)
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / span
    blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    return np.where(
        wavelength < high, inv_freq, np.where(wavelength > low, inv_freq / scaling.factor, blended)
    )


def _yarn(inv_freq: Frequencies, scaling: RopeScaling, config: ModelConfig) -> Frequencies:
    def dimension_of(rotations: float) -> float:
        return (
            config.head_dim
            * math.log(scaling.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.head_dim - 1)
    steps = np.arange(config.head_dim // 2, dtype=np.float64)
    ramp = np.clip((steps - low) / max(high - low, 0.001), 0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)
