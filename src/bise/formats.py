"""Storage formats of weights and of the KV cache as plain values: names, block sizes, bytes.

A weight row of K values is stored as K / block_length blocks of block_bytes bytes each; the block is the
smallest unit that can be moved or dequantised alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Format:
    """How the values of one weight row are stored."""

    name: str
    """`F32`, `F16`, `BF16`, or the name that GGUF gives the type."""
    ggml_id: int | None
    """Type number in GGUF files; None for a format that only bise uses."""
    block_length: int
    """Values in one block."""
    block_bytes: int
    """Bytes of one block."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales included."""
        return 8 * self.block_bytes / self.block_length

    @property
    def is_quantised(self) -> bool:
        """True when values are codes under a scale, False for plain floats."""
        return self.block_length > 1

    def row_bytes(self, length: int) -> int:
        """Return the bytes of a row of `length` values; `length` must be a multiple of block_length."""
        if length % self.block_length:
            raise ValueError(f"a {self.name} row of {length} values is not a whole number of blocks")
        return length // self.block_length * self.block_bytes


def _by_name(*formats: Format) -> Mapping[str, Format]:
    return MappingProxyType({entry.name: entry for entry in formats})


FORMATS = _by_name(
    Format("F32", 0, 1, 4),
    Format("F16", 1, 1, 2),
    Format("BF16", 30, 1, 2),
    Format("Q4_0", 2, 32, 18),
    Format("Q4_1", 3, 32, 20),
    Format("Q5_0", 6, 32, 22),
    Format("Q5_1", 7, 32, 24),
    Format("Q8_0", 8, 32, 34),
    Format("Q2_K", 10, 256, 84),
    Format("Q3_K", 11, 256, 110),
    Format("Q4_K", 12, 256, 144),
    Format("Q5_K", 13, 256, 176),
    Format("Q6_K", 14, 256, 210),
    Format("IQ4_NL", 20, 32, 18),
    Format("IQ4_XS", 23, 256, 136),
)
"""Every format that a model file may store a weight in, by name."""

FORMATS_BY_GGML_ID: Mapping[int, Format] = MappingProxyType(
    {entry.ggml_id: entry for entry in FORMATS.values() if entry.ggml_id is not None}
)
"""The same formats by GGUF type number."""


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How keys and values are held in the cache."""

    name: str
    value_bytes: int
    """Bytes of one stored value."""
    scale_bytes: int = 0
    """Bytes of the scale that one token and head adds beside its values; 0 for plain floats."""

    def bytes_per_value(self, head_dim: int) -> float:
        """Return the bytes that one value costs, its share of the scale included."""
        return self.value_bytes + self.scale_bytes / head_dim


KV_FORMATS: Mapping[str, KvFormat] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            KvFormat("f32", 4),
            KvFormat("f16", 2),
            KvFormat("bf16", 2),
            KvFormat("q16", 2, 4),
            KvFormat("q8", 1, 4),
        )
    }
)
"""KV cache formats by name."""
