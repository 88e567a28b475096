"""Random packed weights of a shape, made in memory: speed does not depend on values, only on bytes."""

from __future__ import annotations

import numpy as np

from bise.kernels.cpu import Bytes, CpuOps, arena, packed_size
from bise.model.pack import PackedWeights, Slot, plan_packing
from bise.model.source import ModelSource

PANEL_ROWS = 16
DISTINCT_ROWS = 128
"""Rows that are drawn and packed once per format and width; a weight repeats them."""


def random_weights(source: ModelSource, quant: str, ops: CpuOps, seed: int = 0) -> PackedWeights:
    """Return random packed weights for every tensor of a source, scaled so that activations stay finite."""
    plan = plan_packing(source, quant)
    memory = arena(plan.size_bytes)
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[str, int], Bytes] = {}
    for slot in plan.slots:
        out = memory[slot.offset : slot.offset + slot.size_bytes]
        if len(slot.shape) == 1:
            out.view(np.float32)[:] = 1.0
            continue
        key = (slot.packed_format, slot.shape[1])
        if key not in drawn:
            drawn[key] = _panels(slot, ops, rng)
        _repeat(drawn[key], out)
    return PackedWeights(plan, memory)


def _panels(slot: Slot, ops: CpuOps, rng: np.random.Generator) -> Bytes:
    columns = slot.shape[1]
    rows = (rng.standard_normal((DISTINCT_ROWS, columns)) / columns**0.5).astype(np.float32)
    panels = np.zeros(packed_size(slot.packed_format, DISTINCT_ROWS, columns), np.uint8)
    fits = ops.pack_floats(slot.packed_format, rows, panels)
    assert fits, slot
    return panels


def _repeat(panels: Bytes, out: Bytes) -> None:
    whole = len(out) // len(panels) * len(panels)
    out[:whole].reshape(-1, len(panels))[:] = panels
    out[whole:] = panels[: len(out) - whole]
