"""A model as it lies on disk, before any weight is loaded: architecture, tensors by bise's names, metadata.

Every source (HF safetensors, Mistral's own files, GGUF, packed cache) is turned into one `ModelSource`;
names, RoPE row order and stacked experts are normalised there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig


class SourceTensor(Protocol):
    """One weight on disk. Rows are read on demand, so that a 7B never lies in memory twice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in bise's layout: [N, K] or [K]."""
        ...

    @property
    def format(self) -> str:
        """Storage format: F32, F16, BF16 or a GGUF type name such as Q4_0, Q4_K, Q6_K."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        ...

    def raw(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return rows [start, stop) as stored, [stop - start, bytes per row], in bise's row order."""
        ...

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows [start, stop) dequantised, [stop - start, K] ([stop - start] for a vector)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Everything known about a model from its headers."""

    path: Path
    """The directory or .gguf file the model was opened from."""
    kind: str
    """`safetensors` (HF names), `mistral` (params.json + consolidated) or `gguf`."""
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    """By the names of `transformer.weight_shapes`; shapes already checked against the configuration."""
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])
    """GGUF key/value pairs (tokenizer, chat template); the raw config.json / params.json otherwise."""
    name: str = ""
    licence: str | None = None
    default_quant: str = "q8"
    """What `--quant auto` makes of this source's floats, and of blocks that no packed format keeps."""
