"""A model as it is to be written: the stored weights, with an adapter's products added; one at a time.

Knows nothing of torch: what was trained can be merged and exported wherever bise runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bise.errors import ModelFileError
from bise.model.lora import LowRank, check_base, open_adapter
from bise.model.packed import content_hash
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes

Floats = npt.NDArray[np.float32]


class WholeModel:
    """A model's weights in float32, read when they are asked for."""

    def __init__(self, source: ModelSource, adapter: Path | None = None) -> None:
        """Take a model and an adapter of it. ModelFileError when the two do not belong together."""
        self.source = source
        self.shapes = weight_shapes(source.config)
        self._parts: Mapping[str, LowRank] = {}
        if adapter is not None:
            file = open_adapter(adapter, source.config)
            check_base(file, lambda: content_hash(source))
            self._parts = file.parts

    def values(self, name: str) -> Floats:
        """Return a weight [N, K] or [K]. ModelFileError when a value is NaN or infinite."""
        rows = self.shapes[name][0]
        values = self.source.tensors[name].floats(0, rows)
        part = self._parts.get(name)
        if part is not None:
            a, b = (half.floats(0, half.shape[0]) for half in (part.a, part.b))
            values = values + np.float32(part.scale) * (b @ a).astype(np.float32, copy=False)
            values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ModelFileError(
                f"{self.source.path}: {name} holds a value that is NaN or infinite", field=name
            )
        return values
